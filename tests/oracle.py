"""Independent dense simulations of every layer, in float64 / complex128 numpy, from the definitions only.

Each layer is the discretization of x' = A x + B u, y = C x + D u with step size dt (times `rate`):

    zero-order hold    A_bar = exp(dt A)                          B_bar = int_0^dt exp(s A) ds B
    bilinear           A_bar = (I - dt/2 A)^-1 (I + dt/2 A)       B_bar = (I - dt/2 A)^-1 dt B
    simulation         x_k = A_bar x_{k-1} + B_bar u_k            y_k = C x_k + D u_k

The (n, n) matrices are written out, the conjugate half of a conjugate-pair system included; discretization is
dense linear algebra; time is a loop. There is no kernel, convolution, scan or low-rank formula here, so that
nothing is shared with the code under test. Slow on purpose: for a few features, states and hundreds of steps.

Sizes: b batch, h features, n state, l length, m channels. u (b, h, l). A state is the x_{-1} of the
recurrence; None means zeros. `p` is a dict of float64 arrays under the layers' parameter names; complex ones
have a last dimension of 2.
"""

import math

import numpy as np

# ------------------------------------------------------------------------------------------------------------
# Discretization and simulation
# ------------------------------------------------------------------------------------------------------------


def expm(A):
    """Matrix exponential, A (n, n): exp(A) = exp(A / 2^s)^(2^s), with |A / 2^s| <= 1/2, 20 Taylor terms."""
    norm = np.abs(A).sum(axis=0).max()
    s = max(0, math.ceil(math.log2(norm)) + 1) if norm > 0 else 0
    A = A / 2.0**s
    term = result = np.eye(len(A), dtype=A.dtype)
    for k in range(1, 21):
        term = term @ A / k
        result = result + term
    for _ in range(s):
        result = result @ result
    return result


def zoh(A, B, dt):
    """Zero-order hold, for any A, singular too: A (n, n), B (n) or (n, m) -> A_bar, B_bar of the same shapes.

    exp(dt [[A, B], [0, 0]]) = [[A_bar, B_bar], [0, I]], because with u held constant the pair (x, u) obeys
    x' = A x + B u, u' = 0.
    """
    n = len(A)
    columns = B.reshape(n, -1)
    m = columns.shape[1]
    augmented = np.block([[A, columns], [np.zeros((m, n)), np.zeros((m, m))]])
    E = expm(dt * augmented)
    return E[:n, :n], E[:n, n:].reshape(B.shape)


def gbt(A, B, dt, alpha):
    """Generalized bilinear transform: A (n, n), B (n) or (n, m) -> A_bar, B_bar of the same shapes.

    A_bar = (I - alpha dt A)^-1 (I + (1 - alpha) dt A),  B_bar = (I - alpha dt A)^-1 dt B.
    alpha = 0 is forward Euler, 1/2 bilinear, 1 backward Euler.
    """
    I = np.eye(len(A))
    left = I - alpha * dt * A
    return np.linalg.solve(left, I + (1 - alpha) * dt * A), np.linalg.solve(left, dt * B)


def bilinear(A, B, dt):
    """Bilinear (trapezoidal, Tustin) discretization: `gbt` with alpha = 1/2."""
    return gbt(A, B, dt, 0.5)


DISCRETIZATIONS = {"zoh": zoh, "bilinear": bilinear}


def simulate(A_bar, B_bar, C, D, u, x0):
    """One linear system: x_k = A_bar x_{k-1} + B_bar u_k,  y_k = C x_k + D u_k,  x_{-1} = x0.

    A_bar (n, n), B_bar (n, m), C (q, n), D (q, m), u (m, l), x0 (n) -> y (q, l), x_last (n).
    """
    x, y = x0, []
    for k in range(u.shape[1]):
        x = A_bar @ x + B_bar @ u[:, k]
        y.append(C @ x + D @ u[:, k])
    return np.stack(y, axis=1), x


def simulate_features(systems, u, x0):
    """One single-input system per feature, and the real part of its output.

    systems: h tuples (A_bar (n, n), B_bar (n), C (m, n), D (m)); u (b, h, l); x0 (b, h, n)
    -> y (b, m h, l) with channel c of feature i at row c h + i, x_last (b, h, n).
    """
    b, h, l = u.shape
    m = len(systems[0][2])
    y = np.zeros((b, m, h, l))
    x_last = np.zeros_like(x0)
    for i, (A_bar, B_bar, C, D) in enumerate(systems):
        for j in range(b):
            out, x_last[j, i] = simulate(A_bar, B_bar[:, None], C, D[:, None], u[j, i][None], x0[j, i])
            y[j, :, i] = out.real
    return y.reshape(b, m * h, l), x_last


# ------------------------------------------------------------------------------------------------------------
# Small helpers: parameters to complex matrices
# ------------------------------------------------------------------------------------------------------------


def to_complex(a):
    """(..., 2) real -> (...) complex."""
    return a[..., 0] + 1j * a[..., 1]


def conjugate_pairs(a, axis=-1):
    """Half of a conjugate-pair vector -> all of it: (..., n/2) -> (..., n) = [a, conj a]."""
    return np.concatenate([a, a.conj()], axis=axis)


def eigenvalues(p, real_type="exp"):
    """A = -f(log_A_real) + i A_imag with f named by real_type; any shape."""
    transform = {
        "exp": np.exp,
        "relu": lambda x: np.maximum(x, 0) + 1e-4,
        "softplus": softplus,
        "none": lambda x: x,
    }[real_type]
    return -transform(p["log_A_real"]) + 1j * p["A_imag"]


def with_channels(p):
    """C (h, n/2, 2) or (m, h, n/2, 2) and D (h) or (m, h) -> complex C (m, h, n/2), D (m, h)."""
    C = to_complex(p["C"])
    return C.reshape(-1, *C.shape[-2:]), np.atleast_2d(p["D"])


def copies(a, h):
    """s independent copies (s, ...) -> one for each feature (h, ...): feature i uses copy i % s."""
    return np.tile(a, (h // len(a),) + (1,) * (a.ndim - 1))


def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(0, x)


def silu(x):
    """x / (1 + exp(-x))."""
    return x * np.exp(-softplus(-x))


def gelu(x):
    """x Phi(x) with Phi the normal distribution function (the exact form, not the tanh approximation)."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


# ------------------------------------------------------------------------------------------------------------
# HiPPO matrices, in the conventions of the official S4 code
# ------------------------------------------------------------------------------------------------------------


def hippo_legs(n):
    """HiPPO-LegS: A_ij = -sqrt((2i+1)(2j+1)) below the diagonal, -(i+1) on it, 0 above; B_i = sqrt(2i+1).

    Shapes (n, n), (n).
    """
    A, B = np.zeros((n, n)), np.zeros(n)
    for i in range(n):
        B[i] = math.sqrt(2 * i + 1)
        A[i, i] = -(i + 1)
        for j in range(i):
            A[i, j] = -math.sqrt((2 * i + 1) * (2 * j + 1))
    return A, B


def hippo_legt(n):
    """HiPPO-LegT, halved as in the official S4: A_ij = -sqrt((2i+1)(2j+1))/2, B_i = sqrt(2i+1)/2.

    Above the diagonal A_ij is multiplied by (-1)^(i-j). Shapes (n, n), (n). The papers of HiPPO and LSSL have
    twice these.
    """
    A, B = np.zeros((n, n)), np.zeros(n)
    for i in range(n):
        B[i] = math.sqrt(2 * i + 1) / 2
        for j in range(n):
            sign = 1 if i >= j else (-1) ** (j - i)
            A[i, j] = -sign * math.sqrt((2 * i + 1) * (2 * j + 1)) / 2
    return A, B


def hippo_fout(n):
    """Truncated Fourier: states 2j and 2j+1 rotate at pi j, then B B^T is subtracted. Shapes (n, n), (n).

    A = S - B B^T with S[2j+1, 2j] = -S[2j, 2j+1] = pi j; B = (1, 0, sqrt 2, 0, sqrt 2, 0, ...).
    """
    A, B = np.zeros((n, n)), np.zeros(n)
    for j in range(n // 2):
        A[2 * j, 2 * j + 1], A[2 * j + 1, 2 * j] = -math.pi * j, math.pi * j
        B[2 * j] = math.sqrt(2) if j > 0 else 1.0
    return A - np.outer(B, B), B


# ------------------------------------------------------------------------------------------------------------
# Single-input layers: S4D, S4, LSSL, DSS, GSS
# ------------------------------------------------------------------------------------------------------------


def paired_systems(A, B, C, D, dt, disc):
    """Diagonal systems in conjugate pairs, as `simulate_features` takes them.

    A, B (h, n/2), C (m, h, n/2), D (m, h), dt (h). A_dense = diag(A, conj A), B_dense = [B; conj B],
    C_dense = [C, conj C]; a number plus its conjugate is 2 Re, so C_dense x_dense = 2 Re(C x).
    """
    systems = []
    for i in range(len(dt)):
        A_bar, B_bar = DISCRETIZATIONS[disc](np.diag(conjugate_pairs(A[i])), conjugate_pairs(B[i]), dt[i])
        systems.append((A_bar, B_bar, conjugate_pairs(C[:, i]), D[:, i]))
    return systems


def simulate_pairs(systems, u, state):
    """`simulate_features` on the kept half of the state: (b, h, n/2) complex or None -> y, state."""
    half = len(systems[0][0]) // 2
    if state is None:
        state = np.zeros((*u.shape[:2], half), dtype=complex)
    y, x = simulate_features(systems, u, conjugate_pairs(state.astype(complex)))
    return y, x[..., :half]


def s4d(p, u, state=None, rate=1.0, disc="zoh", real_type="exp"):
    """S4D: u (b, h, l), state (b, h, n/2) complex -> y (b, h, l), state. y = 2 Re(C x) + D u.

    p: log_dt (h), log_A_real, A_imag (h, n/2), C (h, n/2, 2), D (h); B (h, n/2, 2) if there, else 1.
    """
    A = eigenvalues(p, real_type)
    B = to_complex(p["B"]) if "B" in p else np.ones_like(A)
    C, D = with_channels(p)
    return simulate_pairs(paired_systems(A, B, C, D, rate * np.exp(p["log_dt"]), disc), u, state)


def s4_diag(p, u, state=None, rate=1.0, disc="zoh", real_type="exp", l_max=None, eps=1e-7):
    """S4 in diagonal mode: u (b, h, l), state (b, h, n/2) complex -> y (b, m h, l), state.

    p: log_dt (h); for s copies log_A_real, A_imag (s, n/2), B (s, n/2, 2); C (m, h, n/2, 2) or (h, n/2, 2),
    D (m, h) or (h).
    disc "zoh" or "bilinear": conjugate pairs, 2 Re(C x), as S4D. disc "dss": the softmax kernel of `dss` with
    Lambda = A, W = B C and, as in the official code, Re without the factor 2.
    """
    h = u.shape[1]
    A, B = copies(eigenvalues(p, real_type), h), copies(to_complex(p["B"]), h)
    C, D = with_channels(p)
    if disc != "dss":
        return simulate_pairs(paired_systems(A, B, C, D, rate * np.exp(p["log_dt"]), disc), u, state)
    systems = []
    for i, dt in enumerate(np.exp(p["log_dt"])):
        systems.append((*softmax_system(A[i], dt * A[i], B[i] * C[:, i], rate, l_max, eps), D[:, i]))
    return simulate_features(systems, u, zeros_or(state, (*u.shape[:2], A.shape[1])))


def zeros_or(state, shape):
    """The state as a complex array; zeros of that shape for None."""
    return np.zeros(shape, dtype=complex) if state is None else state.astype(complex)


def nplr_matrix(Lambda, P):
    """Normal plus low rank: A = diag(Lambda, conj Lambda) - sum_r [P_r; conj P_r][P_r; conj P_r]^H.

    Lambda (n/2), P (r, n/2) -> A (n, n).
    """
    A = np.diag(conjugate_pairs(Lambda))
    for column in P:
        q = conjugate_pairs(column)
        A = A - np.outer(q, q.conj())
    return A


def s4_nplr(p, u, state=None, rate=1.0, real_type="exp"):
    """S4, bilinear: u (b, h, l), state (b, h, n) REAL = [Re x; Im x] -> y (b, m h, l), state.

    y = 2 Re(C x) + D u, x being the kept half of the conjugate-pair state.
    p: log_dt (h); for s copies log_A_real, A_imag (s, n/2), B (s, n/2, 2), P (r, s, n/2, 2);
    C (m, h, n/2, 2) or (h, n/2, 2), D (m, h) or (h).
    """
    h, half = u.shape[1], p["A_imag"].shape[-1]
    Lambda, B = copies(eigenvalues(p, real_type), h), copies(to_complex(p["B"]), h)
    P = np.stack([copies(column, h) for column in to_complex(p["P"])])
    C, D = with_channels(p)
    dt = rate * np.exp(p["log_dt"])
    systems = []
    for i in range(h):
        A_bar, B_bar = bilinear(nplr_matrix(Lambda[i], P[:, i]), conjugate_pairs(B[i]), dt[i])
        systems.append((A_bar, B_bar, conjugate_pairs(C[:, i]), D[:, i]))
    x = None if state is None else state[..., :half] + 1j * state[..., half:]
    y, x = simulate_pairs(systems, u, x)
    return y, np.concatenate([x.real, x.imag], axis=-1)


def lssl(p, u, state=None, rate=1.0, alpha=0.5):
    """LSSL, dense and real: u (b, h, l), state (b, h, n) -> y (b, m h, l), state.

    p: A (n, n) or (h, n, n), B (n) or (h, n), C (m, h, n), D (m, h), log_dt (h). Discretized by `gbt`.
    """
    h, n = u.shape[1], p["B"].shape[-1]
    A = np.broadcast_to(p["A"], (h, n, n))
    B = np.broadcast_to(p["B"], (h, n))
    dt = rate * np.exp(p["log_dt"])
    systems = [(*gbt(A[i], B[i], dt[i], alpha), p["C"][:, i], p["D"][:, i]) for i in range(h)]
    x0 = np.zeros((*u.shape[:2], n)) if state is None else state
    return simulate_features(systems, u, x0)


def reciprocal(x, eps):
    """conj(x) / (|x|^2 + eps): DSS's 1 / x that stays finite at 0; exactly 1 / x for eps = 0."""
    return x.conj() / (np.abs(x) ** 2 + eps)


def softmax_weight(Lambda, z, W, rate, l_max, eps):
    """Output weights of DSS-softmax for the state x_k = exp(rate z) x_{k-1} + u_k.

    Lambda, z = dt Lambda (n), W (..., n) -> (..., n).
    At rate 1:      W / (Lambda sum_{r < l_max} exp(r z)) = W (exp(z) - 1) / (Lambda (exp(l_max z) - 1)).
    At other rates: W / (exp(l_max z) - 1) is the C of a continuous system with B = 1, and
    (exp(rate z) - 1) / Lambda its zero-order hold B_bar. Where Re Lambda > 0 the quotient is multiplied by
    exp(-l_max z) above and below, as the official code does; that only changes what eps is added to.
    """
    growing = Lambda.real > 0
    numerator = (np.exp(rate * z) - 1) * np.where(growing, -np.exp(-l_max * z), 1)
    denominator = (np.exp(np.where(growing, -1, 1) * l_max * z) - 1) * Lambda
    return W * numerator * reciprocal(denominator, eps)


def softmax_system(Lambda, z, W, rate, l_max, eps):
    """A_bar (n, n), B_bar (n), weight (..., n) of DSS-softmax, with a state that does not depend on the rate.

    B_bar is the zero-order hold (exp(rate z) - 1) / Lambda of B = 1, times exp(-l_max z / 2) where Re Lambda > 0;
    the weight is that of `softmax_weight` divided by it.
    """
    B_bar = (np.exp(rate * z) - 1) / Lambda * np.where(Lambda.real > 0, np.exp(-l_max * z / 2), 1)
    return expm(np.diag(rate * z)), B_bar, softmax_weight(Lambda, z, W, rate, l_max, eps) / B_bar


def dss(p, u, state=None, rate=1.0, version="softmax", l_max=None, eps=1e-7):
    """DSS: u (b, h, l), state (b, h, n) complex -> y (b, h, l), state. n complex modes without conjugates.

    p: Lambda_re, Lambda_im (n), W (h, n, 2), D (h), log_dt (h), or (h, 2) as in the official code, with one
    column for Re Lambda and one for Im Lambda: z = dt Lambda.
    version "exp":      Lambda = -exp(Lambda_re) + i Lambda_im; zero-order hold with B = 1, C = W:
                        x_k = exp(z) x_{k-1} + (exp(z) - 1) / Lambda u_k, y = Re(W x) + D u.
    version "softmax":  Lambda = Lambda_re + i Lambda_im; the system of `softmax_system`.
    """
    real = -np.exp(p["Lambda_re"]) if version == "exp" else p["Lambda_re"]
    Lambda = real + 1j * p["Lambda_im"]
    W = to_complex(p["W"])
    dt = np.exp(p["log_dt"]).reshape(len(W), -1)
    systems = []
    for i in range(len(W)):
        z = dt[i, 0] * Lambda.real + 1j * dt[i, -1] * Lambda.imag
        if version == "exp":
            A_bar, B_bar = zoh(np.diag(z), z / Lambda, rate)  # z / Lambda = dt, unless log_dt has two columns
            weight = W[i]
        else:
            A_bar, B_bar, weight = softmax_system(Lambda, z, W[i], rate, l_max, eps)
        systems.append((A_bar, B_bar, weight[None], p["D"][i : i + 1]))
    return simulate_features(systems, u, zeros_or(state, (*u.shape[:2], len(Lambda))))


def linear(x, weight, bias=None):
    """A position-wise linear map: x (b, h, l), weight (q, h), bias (q) -> (b, q, l)."""
    y = np.einsum("qh,bhl->bql", weight, x)
    return y if bias is None else y + bias[:, None]


def gss(u, ssm, to_gate, to_ssm, from_ssm, out):
    """Gated state space block (Mehta et al., 2022) around an inner SSM, without norm and residual.

    v = gelu(to_gate u), w = gelu(to_ssm u), (y, state) = ssm(w), result = out(v * from_ssm(y)).
    to_gate None: no gate, result = out(y). to_ssm None: no bottleneck, w = u.
    ssm: function (b, h', l) -> (y (b, h', l), state), such as `lambda w: s4d(p, w, state)`; the others are
    pairs (weight (q, h), bias (q) or None). Returns (b, h, l), state.
    """
    y, state = ssm(u if to_ssm is None else gelu(linear(u, *to_ssm)))
    if to_gate is not None:
        y = gelu(linear(u, *to_gate)) * linear(y, *from_ssm)
    return linear(y, *out), state


# ------------------------------------------------------------------------------------------------------------
# Multi-input layers: S5, LRU
# ------------------------------------------------------------------------------------------------------------


def s5(p, u, state=None, rate=1.0, disc="zoh", conj_sym=True, clip_eigs=False, bidirectional=False):
    """S5: u (b, h, l), state (b, p) complex -> y (b, h, l), state. One system from h inputs to h outputs.

    p: Lambda_re, Lambda_im, log_step (p), B (p, h, 2), D (h), C (h, p, 2) or, bidirectional, (h, 2p, 2) with
    forward before reverse.
    Each mode has its own step, which multiplies its row of A and B.
    conj_sym: y = 2 Re(C x) + D u, the p modes being half of 2p in conjugate pairs; else y = Re(C x) + D u.
    clip_eigs: Re Lambda <- min(Re Lambda, -1e-4).
    bidirectional: adds C_reverse x^rev with x^rev_k = A_bar x^rev_{k+1} + B_bar u_k, from zero; the state
    stays the forward one.
    """
    real = np.minimum(p["Lambda_re"], -1e-4) if clip_eigs else p["Lambda_re"]
    Lambda, B, C = real + 1j * p["Lambda_im"], to_complex(p["B"]), to_complex(p["C"])
    modes = len(Lambda)
    step = rate * np.exp(p["log_step"])
    C_forward, C_reverse = C[:, :modes], C[:, modes:]
    A_dense, B_dense = step * Lambda, step[:, None] * B
    x0 = zeros_or(state, (len(u), modes))
    if conj_sym:
        A_dense, B_dense = conjugate_pairs(A_dense), conjugate_pairs(B_dense, axis=0)
        C_forward, C_reverse, x0 = conjugate_pairs(C_forward), conjugate_pairs(C_reverse), conjugate_pairs(x0)
    A_bar, B_bar = DISCRETIZATIONS[disc](np.diag(A_dense), B_dense, 1.0)
    D = np.diag(p["D"])
    y, x_last = np.zeros_like(u), np.zeros_like(x0)
    for j in range(len(u)):
        out, x_last[j] = simulate(A_bar, B_bar, C_forward, D, u[j], x0[j])
        y[j] = out.real
        if bidirectional:
            out, _ = simulate(A_bar, B_bar, C_reverse, 0 * D, u[j][:, ::-1], 0 * x0[j])
            y[j] += out[:, ::-1].real
    return y, x_last[:, :modes]


def lru(p, u, state=None, rate=1.0):
    """LRU: u (b, h, l), state (b, n) complex -> y (b, h, l), state. y = Re(C x) + D u.

    p: nu_log, theta_log, gamma_log (n), B (n, h, 2), C (h, n, 2), D (h).
    lambda = exp(-exp(nu_log) + i exp(theta_log));  x_k = lambda x_{k-1} + exp(gamma_log) B u_k.
    Rate: lambda^rate = exp(rate log lambda), -pi < Im log lambda <= pi, and the input gain times (lambda^rate - 1) / (lambda - 1).
    """
    log_lambda = np.log(np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"])))    # principal branch
    gain = np.exp(p["gamma_log"]) * (np.exp(rate * log_lambda) - 1) / (np.exp(log_lambda) - 1)
    A_bar = expm(np.diag(rate * log_lambda))
    B_bar = gain[:, None] * to_complex(p["B"])
    x0 = zeros_or(state, (len(u), len(log_lambda)))
    y, x_last = np.zeros_like(u), np.zeros_like(x0)
    for j in range(len(u)):
        out, x_last[j] = simulate(A_bar, B_bar, to_complex(p["C"]), np.diag(p["D"]), u[j], x0[j])
        y[j] = out.real
    return y, x_last


# ------------------------------------------------------------------------------------------------------------
# Selective layers: selective scan, Mamba
# ------------------------------------------------------------------------------------------------------------


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, state=None):
    """Time-varying diagonal systems, one for each of d features: -> y (b, d, l), x_last (b, d, n).

    u, delta, z (b, d, l), A (d, n), B, C (b, n, l), D, delta_bias (d), state (b, d, n).
    x_k = exp(dt_k A) x_{k-1} + dt_k B_k u_k,  y_k = C_k x_k + D u_k, times silu(z_k) if given;
    dt = delta + delta_bias, then softplus if delta_softplus.
    """
    b, d, l = u.shape
    y, x_last = np.zeros((b, d, l)), np.zeros((b, d, A.shape[1]))
    for j in range(b):
        for i in range(d):
            x = np.zeros(A.shape[1]) if state is None else state[j, i]
            for k in range(l):
                dt = delta[j, i, k] + (0 if delta_bias is None else delta_bias[i])
                dt = softplus(dt) if delta_softplus else dt
                x = np.exp(dt * A[i]) * x + dt * B[j, :, k] * u[j, i, k]
                y[j, i, k] = C[j, :, k] @ x + (0 if D is None else D[i] * u[j, i, k])
            x_last[j, i] = x
    return (y if z is None else y * silu(z)), x_last


def selective_ssm(p, u, state=None, rate=1.0):
    """S6: u (b, d, l), state (b, d, n) -> y (b, d, l), state. dt, B, C are functions of u; A is not.

    p: x_proj.weight (dt_rank + 2n, d) with rows [dt, B, C], dt_proj.weight (d, dt_rank), dt_proj.bias (d),
    A_log (d, n), D (d).
    A = -exp(A_log), dt = rate softplus(dt_proj(dt_low)).
    """
    n = p["A_log"].shape[1]
    rank = p["dt_proj.weight"].shape[1]
    projected = linear(u, p["x_proj.weight"])
    low, B, C = projected[:, :rank], projected[:, rank : rank + n], projected[:, rank + n :]
    dt = rate * softplus(linear(low, p["dt_proj.weight"], p["dt_proj.bias"]))
    return selective_scan(u, dt, -np.exp(p["A_log"]), B, C, p["D"], state=state)


def mamba(p, x, state=None, rate=1.0):
    """Mamba block, without norm and residual: x (b, h, l) -> (b, h, l), state.

    p: in_proj.weight (2d, h) with rows [u, z], conv1d.weight (d, 1, k), conv1d.bias (d),
    out_proj.weight (h, d), and those of `selective_ssm`. state: the last k - 1 inputs u of the convolution
    (b, d, k - 1) and the state of the SSM (b, d, n), or None.
    Result: out_proj(selective_ssm(silu(conv1d(u))) * silu(z)). conv1d is causal, one filter for each feature:
    v_t = bias + sum_j weight_j u_{t-k+1+j}. rate multiplies dt only.
    """
    d, _, k = p["conv1d.weight"].shape
    projected = linear(x, p["in_proj.weight"])
    u, z = projected[:, :d], projected[:, d:]
    before, ssm = (np.zeros((len(x), d, k - 1)), None) if state is None else state
    u = np.concatenate([before, u], axis=2)
    v = np.zeros_like(z) + p["conv1d.bias"][:, None]
    for t in range(x.shape[2]):
        for j in range(k):
            v[:, :, t] += p["conv1d.weight"][:, 0, j] * u[:, :, t + j]
    y, ssm = selective_ssm(p, silu(v), ssm, rate)
    return linear(y * silu(z), p["out_proj.weight"]), (u[:, :, x.shape[2]:], ssm)
