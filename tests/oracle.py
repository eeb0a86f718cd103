"""Independent dense simulations of every layer, in float64 / complex128 numpy, from the
definitions only.

Each layer is the discretization of x' = A x + B u, y = C x + D u with step size dt:

    zero-order hold    A_bar = exp(dt A)        B_bar = int_0^dt exp(s A) ds B
    bilinear           A_bar = (I - dt/2 A)^-1 (I + dt/2 A)    B_bar = (I - dt/2 A)^-1 dt B
    simulation         x_k = A_bar x_{k-1} + B_bar u_k         y_k = C x_k + D u_k

The (n, n) matrices are written out, the conjugate half of a conjugate-pair system included;
discretization is dense linear algebra; time is a loop. There is no kernel, convolution,
scan or low-rank formula here, so that nothing is shared with the code under test. Slow on
purpose: for a few features, states and hundreds of steps.

Sizes: b batch, h features, n state, l length, m channels. Every layer is a function of
p, a dict of float64 arrays under the layer's parameter names (complex ones have a last
dimension of 2), u (b, h, l), state, the x_{-1} of the recurrence (None: zeros), and rate,
which multiplies dt. It returns y (b, m h, l) and the last state.
"""

import math

import numpy as np

# ---- discretization and simulation ----


def expm(A):
    """Matrix exponential, A (n, n): exp(A / 2^s)^(2^s), where |A / 2^s| <= 1/2."""
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
    """Zero-order hold, for any A, singular too: A (n, n), B (n) or (n, m) -> A_bar, B_bar.

    exp(dt [[A, B], [0, 0]]) = [[A_bar, B_bar], [0, I]], because with u held constant the
    pair (x, u) obeys x' = A x + B u, u' = 0.
    """
    n = len(A)
    columns = B.reshape(n, -1)
    m = columns.shape[1]
    E = expm(dt * np.block([[A, columns], [np.zeros((m, n)), np.zeros((m, m))]]))
    return E[:n, :n], E[:n, n:].reshape(B.shape)


def gbt(A, B, dt, alpha):
    """Generalized bilinear transform: A (n, n), B (n) or (n, m) -> A_bar, B_bar.

    A_bar = (I - alpha dt A)^-1 (I + (1 - alpha) dt A),  B_bar = (I - alpha dt A)^-1 dt B.
    alpha = 0 is forward Euler, 1/2 bilinear, 1 backward Euler.
    """
    I = np.eye(len(A))
    left = I - alpha * dt * A
    return np.linalg.solve(left, I + (1 - alpha) * dt * A), np.linalg.solve(left, dt * B)


def bilinear(A, B, dt):
    """Bilinear (trapezoidal, Tustin) discretization."""
    return gbt(A, B, dt, 0.5)


DISCRETIZATIONS = {"zoh": zoh, "bilinear": bilinear}


def simulate(A_bar, B_bar, C, D, u, x0):
    """One linear system from x_{-1} = x0: -> y (q, l), x_last (n).

    A_bar (n, n), B_bar (n, m), C (q, n), D (q, m), u (m, l), x0 (n).
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
        B_bar, D = B_bar[:, None], D[:, None]
        for j in range(b):
            out, x_last[j, i] = simulate(A_bar, B_bar, C, D, u[j, i][None], x0[j, i])
            y[j, :, i] = out.real
    return y.reshape(b, m * h, l), x_last


# ---- parameters ----


def to_complex(a):
    """(..., 2) real -> (...) complex."""
    return a[..., 0] + 1j * a[..., 1]


def conjugate_pairs(a, axis=-1):
    """Half of a vector of pairs -> all of it: (..., n/2) -> (..., n) = [a, conj a]."""
    return np.concatenate([a, a.conj()], axis=axis)


def eigenvalues(p, real_type):
    """-f(log_A_real) + i A_imag with f named by real_type."""
    real = p["log_A_real"]
    if real_type == "exp":
        real = np.exp(real)
    elif real_type == "relu":
        real = np.maximum(real, 0) + 1e-4
    return -real + 1j * p["A_imag"]


def with_channels(p):
    """C (m, h, n/2) complex and D (m, h), from ones with or without m."""
    C = to_complex(p["C"])
    return C.reshape(-1, *C.shape[-2:]), np.atleast_2d(p["D"])


def copies(a, h):
    """s copies (s, ...) -> one for each feature (h, ...): feature i uses copy i % s."""
    return np.tile(a, (h // len(a),) + (1,) * (a.ndim - 1))


def zeros_or(state, shape):
    """The state as a complex array; zeros of that shape for None."""
    return np.zeros(shape, dtype=complex) if state is None else state.astype(complex)


def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(0, x)


def silu(x):
    """x / (1 + exp(-x))."""
    return x * np.exp(-softplus(-x))


def gelu(x):
    """x Phi(x) with Phi the normal distribution function."""
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def linear(x, p, name):
    """The linear map p[name] of every step: (b, h, l) -> (b, q, l)."""
    y = np.einsum("qh,bhl->bql", p[f"{name}.weight"], x)
    return y + p[f"{name}.bias"][:, None] if f"{name}.bias" in p else y


# ---- single-input layers: S4D, S4, GSS, LSSL, DSS ----


def simulate_pairs(systems, u, state):
    """`simulate_features`, C of the kept half and state (b, h, n/2) complex or None.

    A number plus its conjugate is 2 Re, so [C, conj C] [x; conj x] = 2 Re(C x).
    """
    systems = [(A_bar, B_bar, conjugate_pairs(C), D) for A_bar, B_bar, C, D in systems]
    half = len(systems[0][0]) // 2
    x0 = conjugate_pairs(zeros_or(state, (*u.shape[:2], half)))
    y, x = simulate_features(systems, u, x0)
    return y, x[..., :half]


def s4d(p, u, state=None, rate=1.0, disc="zoh", real_type="exp", l_max=None):
    """S4D, and S4 in mode diag: state (b, h, n/2) complex. y = 2 Re(C x) + D u.

    p: log_dt (h); for s copies (S4D: s = h) log_A_real, A_imag (s, n/2) and, else 1,
    B (s, n/2, 2); C (m, h, n/2, 2) or (h, n/2, 2), D (m, h) or (h).
    disc "dss": the softmax kernel of `dss` with Lambda = A, W = B C and, as in the official
    code, Re without the factor 2.
    """
    A = eigenvalues(p, real_type)
    B = to_complex(p["B"]) if "B" in p else np.ones_like(A)
    h = u.shape[1]
    A, B = copies(A, h), copies(B, h)
    C, D = with_channels(p)
    systems = []
    for i, dt in enumerate(np.exp(p["log_dt"])):
        if disc == "dss":
            system = softmax_system(A[i], dt, B[i] * C[:, i], rate, l_max)
        else:
            matrix = np.diag(conjugate_pairs(A[i]))
            discretized = DISCRETIZATIONS[disc](matrix, conjugate_pairs(B[i]), rate * dt)
            system = (*discretized, C[:, i])
        systems.append((*system, D[:, i]))
    if disc == "dss":
        return simulate_features(systems, u, zeros_or(state, (*u.shape[:2], A.shape[1])))
    return simulate_pairs(systems, u, state)


def hippo(measure, n):
    """A (n, n), B (n) and P (r, n), with A + P^T P normal, of legs, legt and fout."""
    i = np.arange(n)
    root = np.sqrt(2 * i + 1)
    A = -np.outer(root, root)
    P = root / 2 ** 0.5
    if measure == "legs":
        return np.tril(A, -1) - np.diag(i + 1), root, P[None]
    if measure == "legt":
        above = np.triu(A, 1) * (-1.0) ** (i[:, None] - i)
        return (np.tril(A) + above) / 2, root / 2, np.stack([P * (i % 2 == 0), P * (i % 2)])
    B = 2 ** 0.5 * (i % 2 == 0)
    B[0] = 1
    A = -np.outer(B, B)
    for k in range(n // 2):
        A[2 * k + 1, 2 * k] += np.pi * k
        A[2 * k, 2 * k + 1] -= np.pi * k
    return A, B, B[None]


def nplr_matrix(Lambda, P):
    """A (n, n) = diag(Lambda, conj Lambda) - sum_r [P_r; conj P_r][P_r; conj P_r]^H.

    Lambda (n/2), P (r, n/2).
    """
    q = conjugate_pairs(P).T
    return np.diag(conjugate_pairs(Lambda)) - q @ q.conj().T


def s4_nplr(p, u, state=None, rate=1.0, real_type="exp"):
    """S4, bilinear: state (b, h, n/2), half of conjugate pairs. y = 2 Re(C x) + D u.

    p: as `s4d`, and P (r, s, n/2, 2).
    """
    h = u.shape[1]
    Lambda, B = copies(eigenvalues(p, real_type), h), copies(to_complex(p["B"]), h)
    P = np.stack([copies(column, h) for column in to_complex(p["P"])])
    C, D = with_channels(p)
    systems = []
    for i, dt in enumerate(np.exp(p["log_dt"])):
        A = nplr_matrix(Lambda[i], P[:, i])
        systems.append((*bilinear(A, conjugate_pairs(B[i]), rate * dt), C[:, i], D[:, i]))
    return simulate_pairs(systems, u, state)


def s4(p, u, state=None, rate=1.0, mode="nplr", **options):
    """S4 in either mode, with the block around it: state (b, h, n/2) complex."""
    ssm = s4d if mode == "diag" else s4_nplr
    p = {name.removeprefix("block."): value for name, value in p.items()}
    return block(p, u, lambda v: ssm(p, v, state, rate, **options))


def gss(p, u, state=None, rate=1.0):
    """GSS: state (b, c, n) complex, all independent: as pairs whose C counts half."""
    return block(p, u, lambda v: s4d(p | {"C": p["C"] / 2}, v, state, rate))


def block(p, u, ssm):
    """v = gelu(input_linear u), (y, state) = ssm(v), o = output_linear(output_gate(y) *
    gelu(input_gate u)); maps that p does not have are left out. -> o, state."""
    v = gelu(linear(u, p, "input_linear")) if "input_linear.weight" in p else u
    y, state = ssm(v)
    if "input_gate.weight" in p:
        y = linear(y, p, "output_gate") * gelu(linear(u, p, "input_gate"))
    if "output_linear.weight" in p:
        y = linear(y, p, "output_linear")
    return y, state


def lssl(p, u, state=None, rate=1.0, alpha=0.5):
    """LSSL, dense and real: state (b, h, n). Discretized by `gbt`.

    p: A (n, n) or (h, n, n), B (n) or (h, n), C (m, h, n), D (m, h), log_dt (h).
    """
    h, n = u.shape[1], p["B"].shape[-1]
    A = np.broadcast_to(p["A"], (h, n, n))
    B = np.broadcast_to(p["B"], (h, n))
    systems = []
    for i, dt in enumerate(np.exp(p["log_dt"])):
        systems.append((*gbt(A[i], B[i], rate * dt, alpha), p["C"][:, i], p["D"][:, i]))
    x0 = np.zeros((*u.shape[:2], n)) if state is None else state
    return simulate_features(systems, u, x0)


def softmax_system(Lambda, dt, W, rate, l_max):
    """A_bar (n, n), B_bar (n), C (..., n) of DSS-softmax: Lambda (n), W (..., n).

    C = W / (exp(l_max dt Lambda) - 1), B = 1 and zero-order hold. 1 / x is
    conj(x) / (|x|^2 + 1e-7), with x = Lambda (exp(l_max dt Lambda) - 1). Where
    Re Lambda > 0, x and what is above it are multiplied by exp(-l_max dt Lambda).
    """
    z = dt * Lambda
    growing = Lambda.real > 0
    x = Lambda * (np.exp(np.where(growing, -l_max, l_max) * z) - 1)
    factor = np.where(growing, -np.exp(-l_max * np.where(growing, z, 0)), 1)
    B_bar = (np.exp(rate * z) - 1) / Lambda
    C = factor * W * Lambda * x.conj() / (np.abs(x) ** 2 + 1e-7)
    return expm(np.diag(rate * z)), B_bar, C


def dss(p, u, state=None, rate=1.0, version="softmax", l_max=None):
    """DSS: state (b, h, n) complex, independent modes. y = Re(C x) + D u.

    p: Lambda_re, Lambda_im (n), W (h, n, 2), D, log_dt (h).
    version "exp":      Lambda = -exp(Lambda_re) + i Lambda_im; zoh of B = 1, C = W
    version "softmax":  Lambda = Lambda_re + i Lambda_im; `softmax_system`
    """
    real = -np.exp(p["Lambda_re"]) if version == "exp" else p["Lambda_re"]
    Lambda = real + 1j * p["Lambda_im"]
    systems = []
    for W, D, dt in zip(to_complex(p["W"])[:, None], p["D"][:, None], np.exp(p["log_dt"])):
        if version == "exp":
            system = (*zoh(np.diag(Lambda), np.ones_like(Lambda), rate * dt), W)
        else:
            system = softmax_system(Lambda, dt, W, rate, l_max)
        systems.append((*system, D))
    return simulate_features(systems, u, zeros_or(state, (*u.shape[:2], len(Lambda))))


# ---- multi-input layers: S5, LRU ----


def s5(p, u, state=None, rate=1.0, disc="zoh", conj_sym=True, clip_eigs=False,
       bidirectional=False, step_rescale=1.0):
    """S5: state (b, p) complex. One system from h inputs to h outputs.

    p: Lambda_re, Lambda_im, log_step (p), B (p, h, 2), D (h), C (h, p, 2) or,
    bidirectional, (h, 2p, 2) with forward before reverse.
    Each mode has its own step, which multiplies its row of A and B.
    conj_sym: y = 2 Re(C x) + D u, the p modes being half of 2p in conjugate pairs; else
    y = Re(C x) + D u. clip_eigs: Re Lambda <- min(Re Lambda, -1e-4).
    bidirectional: adds C_reverse x^rev with x^rev_k = A_bar x^rev_{k+1} + B_bar u_k, from
    zero; the state stays the forward one.
    """
    real = np.minimum(p["Lambda_re"], -1e-4) if clip_eigs else p["Lambda_re"]
    Lambda, B, C = real + 1j * p["Lambda_im"], to_complex(p["B"]), to_complex(p["C"])
    modes = len(Lambda)
    step = rate * step_rescale * np.exp(p["log_step"])
    C, C_reverse = C[:, :modes], C[:, modes:]
    A, B = step * Lambda, step[:, None] * B
    x0 = zeros_or(state, (len(u), modes))
    if conj_sym:
        A, B = conjugate_pairs(A), conjugate_pairs(B, axis=0)
        C, C_reverse, x0 = map(conjugate_pairs, (C, C_reverse, x0))
    A_bar, B_bar = DISCRETIZATIONS[disc](np.diag(A), B, 1.0)
    y, x = simulate_inputs(A_bar, B_bar, C, p["D"], u, x0)
    if bidirectional:
        back, _ = simulate_inputs(A_bar, B_bar, C_reverse, 0 * p["D"], u[..., ::-1], 0 * x0)
        y = y + back[..., ::-1]
    return y, x[:, :modes]


def simulate_inputs(A_bar, B_bar, C, D, u, x0):
    """One system of all features: D (h), u (b, h, l), x0 (b, n) -> Re y, x_last (b, n)."""
    runs = [simulate(A_bar, B_bar, C, np.diag(D), v, x) for v, x in zip(u, x0)]
    return np.stack([y.real for y, _ in runs]), np.stack([x for _, x in runs])


def lru(p, u, state=None, rate=1.0):
    """LRU: state (b, n) complex. y = Re(C x) + D u.

    p: nu_log, theta_log, gamma_log (n), B (n, h, 2), C (h, n, 2), D (h).
    lambda = exp(-exp(nu_log) + i exp(theta_log));
    x_k = lambda x_{k-1} + exp(gamma_log) B u_k.
    Rate: lambda^rate = exp(rate log lambda), -pi < Im log lambda <= pi, and the input gain
    times (lambda^rate - 1) / (lambda - 1).
    """
    log_lambda = np.log(np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"])))
    gain = np.exp(p["gamma_log"])
    gain = gain * (np.exp(rate * log_lambda) - 1) / (np.exp(log_lambda) - 1)
    A_bar = expm(np.diag(rate * log_lambda))
    B_bar = gain[:, None] * to_complex(p["B"])
    x0 = zeros_or(state, (len(u), len(log_lambda)))
    return simulate_inputs(A_bar, B_bar, to_complex(p["C"]), p["D"], u, x0)


# ---- selective layers: selective scan, Mamba ----


def selective_scan(u, dt, A, B, C, D, state=None):
    """Time-varying diagonal systems, one for each of d features: -> y, x_last (b, d, n).

    u, dt (b, d, l), A (d, n), B, C (b, n, l), D (d), state (b, d, n).
    x_k = exp(dt_k A) x_{k-1} + dt_k B_k u_k,  y_k = C_k x_k + D u_k.
    """
    b, d, l = u.shape
    x, y = np.zeros((b, d, A.shape[1])) if state is None else state, []
    for k in range(l):
        u_k, dt_k = u[:, :, k, None], dt[:, :, k, None]                     # (b, d, 1)
        x = np.exp(dt_k * A) * x + dt_k * B[:, None, :, k] * u_k
        y.append((C[:, None, :, k] * x).sum(-1) + D * u[:, :, k])
    return np.stack(y, axis=2), x


def selective_ssm(p, u, state=None, rate=1.0):
    """S6: state (b, d, n). dt, B, C are functions of u; A is not.

    p: x_proj.weight (dt_rank + 2n, d) with rows [dt, B, C], dt_proj.weight (d, dt_rank),
    dt_proj.bias (d), A_log (d, n), D (d).
    A = -exp(A_log), dt = rate softplus(dt_proj(dt_low)).
    """
    n = p["A_log"].shape[1]
    rank = p["dt_proj.weight"].shape[1]
    projected = linear(u, p, "x_proj")
    B, C = projected[:, rank:rank + n], projected[:, rank + n:]
    dt = rate * softplus(linear(projected[:, :rank], p, "dt_proj"))
    return selective_scan(u, dt, -np.exp(p["A_log"]), B, C, p["D"], state)


def mamba(p, x, state=None, rate=1.0):
    """Mamba block, without norm and residual.

    p: in_proj.weight (2d, h) with rows [u, z], conv1d.weight (d, 1, k), conv1d.bias (d),
    out_proj.weight (h, d), and those of `selective_ssm`. state: the last k - 1 inputs u of
    the convolution (b, d, k - 1) and the state of the SSM (b, d, n), or None.
    Result: out_proj(selective_ssm(silu(conv1d(u))) * silu(z)). conv1d is causal, one filter
    for each feature: v_t = bias + sum_j weight_j u_{t-k+1+j}. rate multiplies dt only.
    """
    d, _, k = p["conv1d.weight"].shape
    projected = linear(x, p, "in_proj")
    u, z = projected[:, :d], projected[:, d:]
    before, ssm = (np.zeros((len(x), d, k - 1)), None) if state is None else state
    u = np.concatenate([before, u], axis=2)
    v = np.zeros_like(z) + p.get("conv1d.bias", np.zeros(d))[:, None]
    for t in range(x.shape[2]):
        for j in range(k):
            v[:, :, t] += p["conv1d.weight"][:, 0, j] * u[:, :, t + j]
    y, ssm = selective_ssm(p, silu(v), ssm, rate)
    return linear(y * silu(z), p, "out_proj"), (u[:, :, x.shape[2]:], ssm)
