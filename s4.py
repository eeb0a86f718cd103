"""S4: a state space layer with the HiPPO matrix, and its relatives as options.

    Gu, Goel, Re: Efficiently Modeling Long Sequences with Structured State Spaces (2021),
    arXiv 2111.00396.                                 Try it: python s4.py

Each of the h features u(t) drives a linear system of its own, with n states:

    x'(t) = A x(t) + B u(t),    y(t) = C x(t) + D u(t).                            (1)

Sampled every dt, this is a recurrence, and unrolled, from x_{-1} = 0, a convolution:

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = C x_k + D u_k,                       (2)
    y = K * u + D u,    K_k = C A_bar^k B_bar.                                     (3)

What was wrong before. HiPPO-LegS, which makes long memory work, is dense, and cannot be
diagonalized in floating point: the condition of its eigenvectors is exponential in n. So
lssl.py takes n^2 operations for a step and, by powers of A_bar, n^3 log l for a kernel.

The idea. HiPPO is normal plus low rank, and a normal matrix has unitary eigenvectors V:

    V* A V = Lambda - P P*,    P with r = 1 or 2 columns.                          (4)

From here on A, B, C and x are in that basis. The bilinear transform,

    A_bar = (1 - dt/2 A)^{-1} (1 + dt/2 A),    B_bar = (1 - dt/2 A)^{-1} dt B,     (5)

inverts diagonal plus low rank, so by the Woodbury identity A_bar is diagonal minus low
rank: a step takes O(n r) operations, see discretize(). And the generating function of K, at
a complex z with |z| < 1 and with s = 2 (1 - z) / (1 + z), needs A only in a resolvent:

    sum_k K_k z^k = C (1 - z A_bar)^{-1} B_bar = 2/(1+z) C (s - dt A)^{-1} dt B.   (6)

G = dt (s - dt Lambda)^{-1} is diagonal, which makes CB = C G B, CP = C G P, PB = P* G B and
PP = P* G P Cauchy sums, sum_n v_n / (s - w_n) with w = dt Lambda. Woodbury combines them:

    C (s - dt A)^{-1} dt B = CB - CP (1 + PP)^{-1} PB.                             (7)

An inverse FFT takes (6), for l numbers z on a circle, back to K. Differs from the paper:
the circle has a radius q < 1, q^l = 1e-8. So the FFT gives q^k (K_k + q^l K_{k+l} + ..),
with 1e-8 of a later K, and division by q^k turns rounding, 1e-16 in float64, into 1e-8:
half of the digits stay, as many as float32 has. With q = 1, as there, the parameter has to
be C (1 - A_bar^l), for one length and rate. P P* for P Q* keeps A stable (2202.09729).

When do the sums pay? They take n l operations and no n^3: at n = 128 and l = 256 a tenth of
the time of dense powers. At n = 64 both are equal at l = 1024, and at 4096 the powers take
a quarter. So kernel() takes the sums for l < 16 n alone, and powers, as in lssl.py, for
longer kernels, in float64, and for a state in a convolution.

Why bilinear? Zero-order hold needs the exponential of a dense matrix, and has no (6).
Why n/2? Eigenvalues come in conjugate pairs (0 in fout twice), as do B, C, P and x. The
second of a pair adds the conjugate of the first, so C x over all n is 2 Re(C x) over n/2.

Symbols: b batch, h features of the SSM, n states (d_state), l length, m channels, r rank.
u (b, h, l), y (b, m h, l); x (b, h, n/2), Lambda, B, B_bar (h, n/2), P (r, h, n/2) and
C (m, h, n/2) complex; K (m h, l); dt (h), D (m, h).
"""

import math
import numbers

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class S4(nn.Module):
    """(b, d_model, l) -> (b, m d_model, l), with D, without activation and without mixing
    of features, except in the Block around it if gate or bottleneck is given.

    d_model, d_state: h (times bottleneck, if given), and n (even), as n/2 complex numbers
    mode: nplr, as above, or diag: A = Lambda, as in s4d.py
    measure: where A starts. nplr: legs, legt, fout, or hippo (legs and fout in turn);
        diag: see initial_eigenvalues
    disc: nplr: bilinear. diag: zoh (default), bilinear, or dss (the kernel of dss.py)
    real_type: -Re Lambda is exp or relu (+ 1e-4) of its parameter, or none: itself, and
        then nothing keeps the system stable
    rank: rank of P, at least that of the measure; more columns start as small noise
    n_ssm: number of different (A, B); feature i uses number i mod n_ssm. Default: h
    channels: m outputs for each feature: channel c of feature i is output c h + i
    bidirectional: add sum_{j >= 1} K'_{j-1} u_{k+j}, K' that of a second C; no state then
    gate, bottleneck: put the SSM in the Block of gss.py
    l_max: of disc dss, see dss.py
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of A
    lr: learning rate of dt, A and B, or a dict of the three (1e-3 if left out), for you to
        pass to the optimizer: see ssm_lr, and param_groups in example.py. 0.0 freezes
    """

    def __init__(self, d_model, d_state=64, *, mode="nplr", measure="legs", disc=None,
                 real_type="exp", rank=None, n_ssm=None, channels=1, bidirectional=False,
                 gate=None, bottleneck=None, l_max=None, dt_min=1e-3, dt_max=1e-1, lr=1e-3):
        super().__init__()
        disc = disc or ("bilinear" if mode == "nplr" else "zoh")
        check_options(d_model, d_state, mode, disc, real_type, l_max, dt_min, dt_max)
        self.block = Block(d_model, channels, gate, bottleneck)
        self.d_model, self.h, self.n = d_model, self.block.h, d_state
        self.mode, self.disc, self.real_type, self.l_max = mode, disc, real_type, l_max
        self.channels, self.bidirectional = channels, bidirectional
        copies = self.h if n_ssm is None else n_ssm
        check(copies > 0 and self.h % copies == 0, f"{n_ssm=}: pass a divisor of {self.h}")
        start = initial_nplr if mode == "nplr" else initial_diagonal
        Lambda, P, B = start(measure, copies, d_state, rank)
        log_dt = math.log(dt_min) + torch.rand(self.h) * math.log(dt_max / dt_min)
        self.log_dt = nn.Parameter(log_dt)
        real = (-Lambda.real).clamp(min=1e-4)               # is 0 in legt and fout
        real = real.log() if real_type == "exp" else real
        self.log_A_real = nn.Parameter(real.to(log_dt))     # a logarithm in exp alone
        self.A_imag = nn.Parameter(Lambda.imag.to(log_dt))
        self.P = nn.Parameter(torch.view_as_real(P).to(log_dt)) if mode == "nplr" else None
        self.B = nn.Parameter(torch.view_as_real(B).to(log_dt))
        outputs = 2 * channels if bidirectional else channels
        self.C = nn.Parameter(torch.randn(outputs, self.h, d_state // 2, 2) * 0.5 ** 0.5)
        self.D = nn.Parameter(torch.randn(channels, self.h))
        self.ssm_lr = learning_rates(self, lr)

    def continuous(self, rate):
        """Lambda, P, B, C complex128 and dt (h, 1) of each of the h features."""
        check_rate(rate, self)
        real = decay(self.log_A_real.double(), self.real_type)  # -Re Lambda
        repeats = self.h // real.shape[0]                       # of each of the copies
        Lambda = torch.complex(-real, self.A_imag.double()).tile(repeats, 1)      # (h, n/2)
        B = torch.complex(*self.B.double().unbind(-1)).tile(repeats, 1)
        C = torch.complex(*self.C.double().unbind(-1))          # (m, h, n/2)
        P = B[None][:0]                                         # r = 0 in mode diag
        if self.P is not None:
            P = torch.complex(*self.P.double().unbind(-1)).tile(repeats, 1)  # (r, h, n/2)
        return Lambda, P, B, C, rate * self.log_dt.double().exp()[:, None]

    def discretize(self, rate=1.0):
        """(5) at step size rate * dt: a, B_bar (h, n/2), Q, S (r, h, n/2), C (m, h, n/2),
        with A_bar x = a x - Q S x; complex128, because an error of A_bar grows k-fold in
        A_bar^k. By Woodbury (1 - dt/2 A)^{-1} is R - Q S / 2, R = (1 - dt/2 Lambda)^{-1},
        S = P* R, Q = dt R P (1 + dt/2 P* R P)^{-1}, and (5) is 2 (1 - dt/2 A)^{-1} - 1."""
        Lambda, P, B, C, dt = self.continuous(rate)
        if self.mode == "diag":
            return discretize_diagonal(self, Lambda, P, B, C, dt, rate)
        R = 1 / (1 - dt / 2 * Lambda)
        S = P.conj() * R
        PRP = over_pairs(S[:, None], P).permute(2, 0, 1)        # (h, r, r)
        eye = torch.eye(P.shape[0], dtype=dt.dtype, device=dt.device)
        inverse = torch.linalg.inv(eye + dt[..., None] / 2 * PRP)
        Q = torch.einsum("qhn,hqr->rhn", dt * R * P, inverse.to(P.dtype))
        B_bar = dt * (R * B - low_rank(Q, S, B) / 2)
        return 2 * R - 1, B_bar, Q, S, C

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, h, n/2) complex128, so that rounding stays small."""
        return self.D.new_zeros(batch_size, self.h, self.n // 2, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once, in O(n r): u (b, d_model), state (b, h, n/2) -> y (b, m d_model), next
        state. discrete: what discretize(rate) returned, to use it for many steps."""
        check(not self.bidirectional, "bidirectional=True: it has no state and no step")
        check_input(u, 2, self.d_model, state, (self.h, self.n // 2))
        check(discrete is None or rate == 1.0, "rate is in discrete: pass it to discretize")
        a, B_bar, Q, S, C = discrete or self.discretize(rate)
        check(a.shape == state.shape[1:], "discrete: it was made by another layer")
        dtype = u.dtype
        outer = u.to(self.D.dtype)
        u = self.block.enter(outer)                                     # (b, h)
        x = a * state - low_rank(Q, S, state) + B_bar * u[..., None]    # (b, h, n/2)
        y = over_pairs(C, x[:, None]) + self.D * u[:, None]             # (b, m, h)
        return self.block.leave(y.flatten(1).to(outer.dtype), outer).to(dtype), x

    def kernel(self, l, rate=1.0):
        """(3), of the SSM alone: K_0 ... K_{l-1}, (m h, l). Bidirectional: (2 m h, l), the
        kernels for the past before those for the future."""
        if l < 1:
            raise ValueError(f"{l=}: pass a positive length")
        # Cauchy sums where they are faster, measured on a CPU, but not in float64 (with l
        # numbers z they have 8 digits), nor where A may be unstable (q^l K_{k+l} is large)
        short = self.mode == "nplr" and l < 16 * self.n and self.real_type != "none"
        if short and self.D.dtype == torch.float32:
            K = cauchy_kernel(*self.continuous(rate), l)                # (m, h, l)
        else:
            K = power_kernel(self.discretize(rate), l, self.D.dtype)
        return K.to(self.D.dtype).flatten(0, 1)

    def forward(self, u, state=None, *, rate=1.0, method="conv"):
        """u (b, d_model, l), state or None -> y (b, m d_model, l), last state or None.

        rate: factor on dt: 2.0 for the same signal sampled half as often
        method: conv, (3), whose rounding errors are in proportion to max |u|, or step, (2)
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        one_way = state is None or not self.bidirectional
        check(one_way, "bidirectional=True: it has no state and no step")
        check_input(u, 3, self.d_model, state, (self.h, self.n // 2))
        check(method in ("conv", "step"), f"{method=}: choose conv or step")
        if method == "step":
            return self.recurrence(u, state, rate)
        K = self.kernel(u.shape[-1], rate).unflatten(0, (-1, self.h))   # (m, h, l)
        dtype = u.dtype
        outer = u.to(self.D.dtype).mT                                   # (b, l, d_model)
        u = self.block.enter(outer).mT.to(outer.dtype).contiguous()     # (b, h, l)
        y = fft_conv(u[:, None], K[:self.channels]) + self.D[..., None] * u[:, None]   # (3)
        if self.bidirectional:
            future = fft_conv(u[:, None].flip(-1), K[self.channels:]).flip(-1)
            y = y + F.pad(future[..., 1:], (0, 1))              # one step later
        last = None
        if state is not None:
            response, last = power_response(self.discretize(rate), u, state)
            y = y + response
        return self.block.leave(y.flatten(1, 2).mT, outer).mT.to(dtype), last

    def recurrence(self, u, state, rate):
        """(2), one step after the other: equal to the parallel form up to rounding."""
        x = self.initial_state(u.shape[0]) if state is None else state
        discrete = self.discretize(rate)
        outputs = []
        for u_k in u.unbind(-1):
            y_k, x = self.step(u_k, x, discrete=discrete)
            outputs.append(y_k)
        return torch.stack(outputs, -1), None if state is None else x


def over_pairs(C, x):
    """C x over all n, from halves of conjugate pairs: (.., h, n/2) -> (.., h) real."""
    return 2 * (C * x).sum(-1).real


def low_rank(Q, S, x):
    """Q S x: Q, S (r, h, n/2), x (.., h, n/2) -> (.., h, n/2)."""
    return sum(q * over_pairs(s, x)[..., None] for q, s in zip(Q, S))


def cauchy_kernel(Lambda, P, B, C, dt, l):
    """(6) and (7): K (m, h, l) float64, to 1e-7 of its maximum, from halves of pairs."""
    log_q = math.log(1e-8) / l
    k = torch.arange(l, dtype=torch.float64, device=dt.device)
    j = k[:l // 2 + 1]                                      # K is real: half of the circle
    log_z = torch.complex(torch.full_like(j, log_q), -2 * math.pi * j / l)
    z = torch.exp(log_z)
    s = -2 * torch.expm1(log_z) / (1 + z)                   # 1 - z is -expm1(log z)
    left = torch.cat([C, P.conj()])[:, None]                # (m + r, 1, h, n/2)
    right = torch.cat([B[None], P])                         # (1 + r, h, n/2)
    sums = cauchy(dt * left * right, s, dt * Lambda)        # [[CB, CP], [PB, PP]]
    for _ in range(P.shape[0]):     # (7), Schur complement: one column of P at a time
        CB, CP = sums[:-1, :-1], sums[:-1, -1:]
        PB, PP = sums[-1:, :-1], sums[-1:, -1:]
        sums = CB - CP * (PB / (1 + PP))
    K = torch.fft.irfft(2 / (1 + z) * sums[:, 0], l)
    return K * torch.exp(-log_q * k)


def cauchy(v, s, w):
    """sum_n v_n / (s - w_n) + v_n* / (s - w_n*): v (.., h, n/2), w (h, n/2), s (nodes) ->
    (.., h, nodes). One denominator for both halves of a pair, and real factors above it:
    2 (s Re v_n - Re(v_n w_n*)) / (s^2 - 2 s Re w_n + |w_n|^2)."""
    above = 2 * torch.stack([v.real, -(v * w.conj()).real])     # (2, .., h, n/2)
    w = w[..., None]
    below = s ** 2 - 2 * s * w.real + (w * w.conj()).real       # (h, n/2, nodes)
    sums = torch.einsum("...hn,hnjc->...hjc", above, torch.view_as_real(1 / below))
    sums = torch.view_as_complex(sums.contiguous())             # (2, .., h, nodes)
    return s * sums[0] + sums[1]


def fft_conv(u, K):
    """y_k = sum_{i <= k} K_i u_{k-i}: u (.., l), K (.., l). l zeros keep the FFT, which
    convolves on a circle, from wrapping the end around to the beginning."""
    l = u.shape[-1]
    product = torch.fft.rfft(u, 2 * l) * torch.fft.rfft(K, 2 * l)
    return torch.fft.irfft(product, 2 * l)[..., :l]


def nplr(measure, n):
    """(4), the half with Im Lambda >= 0: Lambda (n/2), P (r, n/2), B (n/2) complex128.

    legs, all of the past, fading: with B_i = sqrt(2i+1), A_ij is -B_i B_j for i > j,
        -(i+1) for i = j, else 0
    legt, a window of length 2: A_ij = -sqrt((2i+1)(2j+1)) / 2, times (-1)^(i-j) for i < j
        (as the official S4; in lssl.py A and B are twice that, and the window has length 1)
    fout, that window in a Fourier basis: rotations by 0, pi, 2 pi, ..., minus B B^T
    (arXiv 2111.00396, eq. 2; 2206.12037. lssl.py explains what the states mean.)
    """
    if measure == "fout":                               # V pairs each cosine with its sine
        Lambda = 1j * math.pi * torch.arange(n // 2, dtype=torch.float64)
        B = torch.ones_like(Lambda)
        B[0] = 0.5 ** 0.5
        return Lambda, B[None], B
    check(measure in ("legs", "legt"), f"{measure=}: choose legs, legt, fout or hippo")
    i = torch.arange(n, dtype=torch.float64)
    B = torch.sqrt(2 * i + 1)
    P = B[None] / 2 ** 0.5
    lower = -torch.outer(B, B).tril(-1) / 2
    c = -0.5
    if measure == "legt":
        P = P * torch.stack([1 - i % 2, i % 2])         # even i, odd i
        lower = lower * ((i[:, None] - i) % 2)          # odd i - j: the rest is in P^T P
        c = 0.0
        B = B / 2
    # A + P^T P is normal, c + lower - lower^T: -i times the difference is Hermitian
    imag, V = torch.linalg.eigh(-1j * (lower - lower.mT))       # ascending
    V = V[:, n // 2:]
    return c + 1j * imag[n // 2:], P.to(V.dtype) @ V.conj(), V.mH @ B.to(V.dtype)


# ---- S4 ends here. Powers of A_bar, as in lssl.py, for states and for long kernels; in
# real numbers, Re x and Im x in turn, because P P* mixes x with its conjugate ----

def power_kernel(discrete, l, dtype):
    """(3): K (m, h, l) in dtype."""
    A_bar, B_bar, C = dense(discrete)
    with full_precision(B_bar):
        A_k = squares(A_bar, l, dtype)
        return free_response(C.to(dtype), A_k, B_bar[None].to(dtype), l)[0]


def power_response(discrete, u, x):
    """What a state x adds to y, C A_bar^{k+1} x (b, m, h, l), and the last state."""
    A_bar, B_bar, C = dense(discrete)
    l = u.shape[-1]
    x = matvec(A_bar, as_real(x).to(B_bar)).to(u)           # (b, h, n)
    with full_precision(u):
        A_k = squares(A_bar, l, u.dtype)
        last = advance(x, A_k, l - 1) + last_state(u, B_bar.to(u), A_k)
        return free_response(C.to(u), A_k, x, l), as_complex(last.double())


def dense(discrete):
    """A_bar (h, n, n), in mode diag (h, n/2) complex, B_bar (h, n), C (m, h, n), real."""
    a, B_bar, Q, S, C = discrete
    A_bar = a
    if Q.shape[0] > 0:
        eye = torch.eye(2 * a.shape[-1], dtype=a.real.dtype, device=a.device)
        A_bar = matvec(a, eye[:, None]).permute(1, 2, 0)        # column j: a e_j
        A_bar = A_bar - 2 * torch.einsum("rhi,rhj->hij", as_real(Q), as_real(S.conj()))
    return A_bar, as_real(B_bar), 2 * as_real(C.conj())         # 2 for the pairs


def as_real(z):
    """(.., n/2) complex as (.., n) real: Re(v w) is as_real(v) times as_real(w conj)."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def as_complex(x):
    """(.., n) real as (.., n/2) complex."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def squares(A_bar, l, dtype):
    """A_bar, A_bar^2, A_bar^4, ... in two lists: from A_bar^T on, and below it.

    Time is k = jT + i, like the high and the low digit of a number. T, about 2 sqrt(l),
    and J are powers of 2: each A_bar^{jT} and A_bar^i is a product of squares. So J + T
    vectors and one matrix product give all l numbers C A_bar^k x.
    """
    powers = [A_bar]
    while 2 ** len(powers) < l:
        A = powers[-1]
        powers.append(A * A if A.is_complex() else A @ A)
    half = len(powers) // 2 + 1                         # T = 2^half
    dtype = torch.promote_types(dtype, torch.complex64) if A_bar.is_complex() else dtype
    powers = [A.to(dtype) for A in powers]
    return powers[half:], powers[:half]


def matvec(A, x):
    """A x: A (h, n, n), or (h, n/2) complex in mode diag; x (.., h, n) -> (.., h, n)."""
    if A.is_complex():
        return as_real(A * as_complex(x))
    return torch.einsum("hij,...hj->...hi", A, x)


def krylov(powers, x):
    """x, A x, A^2 x, ... by doubling: A, A^2, A^4, ..; x (.., h, n) -> (T, .., h, n)."""
    x = x[None]
    for A in powers:
        x = torch.cat([x, matvec(A, x)])
    return x


def free_response(C, A_k, x, l):
    """C A_bar^k x for k < l: C (m, h, n), states x (b, h, n) -> (b, m, h, l)."""
    high, low = A_k
    rows = [A.conj() if A.is_complex() else A.mT for A in low]
    C = krylov(rows, C)                                     # C A_bar^i, (T, m, h, n)
    x = krylov(high, x)                                     # A_bar^{jT} x, (J, b, h, n)
    return torch.einsum("jbhn,imhn->bmhji", x, C).flatten(-2)[..., :l]


def advance(x, A_k, k):
    """A_bar^k x for a k below l, from its binary digits: x (.., h, n)."""
    high, low = A_k
    for digit, A in enumerate(low + high):
        # not "if (k >> digit) & 1", for which torch.compile makes a graph for each k
        x = torch.stack([x, matvec(A, x)])[(k >> digit) & 1]
    return x


def last_state(u, B_bar, A_k):
    """sum_k A_bar^k B_bar u_{l-1-k}, the state that u (b, h, l) leaves: (b, h, n)."""
    high, low = A_k
    J = 2 ** len(high)
    T = 2 ** len(low)
    u = F.pad(u.flip(-1), (0, J * T - u.shape[-1])).unflatten(-1, (J, T))
    B_bar = krylov(low, B_bar)                          # A_bar^i B_bar, (T, h, n)
    blocks = torch.einsum("bhji,ihn->jbhn", u, B_bar)   # what each block of T steps leaves
    for A in high:                                      # two blocks in a row are one
        blocks = blocks[::2] + matvec(A, blocks[1::2])
    return blocks[0]


def full_precision(u):
    """Switch autocast off: half precision is too coarse for a long recurrence."""
    return torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False)


# ---- what the options add ----

def initial_nplr(measure, copies, n, rank):
    """Where Lambda, B (copies, n/2) and P (r, copies, n/2) start: complex128."""
    names = ["legs", "fout"] if measure == "hippo" else [measure]
    starts = [nplr(name, n) for name in names]
    turns = [starts[i % len(starts)] for i in range(copies)]
    Lambda, P, B = [torch.stack(parts, -2) for parts in zip(*turns)]
    rank = len(P) if rank is None else rank
    check(rank >= len(P), f"{rank=}: {measure} has rank {len(P)}, pass at least that")
    noise = 1e-2 * torch.randn(rank - len(P), copies, n // 2, dtype=P.dtype)
    return Lambda, torch.cat([P, noise]), B


def initial_diagonal(measure, copies, n, rank):
    """Lambda, an empty P, and B = 1 of mode diag: (copies, n/2) complex128."""
    check(rank is None, f"{rank=}: mode diag has no low-rank part, pass None")
    Lambda = initial_eigenvalues(measure, copies, n)
    return Lambda, Lambda[None][:0], torch.ones_like(Lambda)


def initial_eigenvalues(measure, copies, n):
    """Lambda (copies, n/2) complex128 of mode diag (arXiv 2206.11893, section 4).

    diag: diag-inv and diag-lin in turn. diag-rand, for dt_min = dt_max = 1: as in gss.py
    """
    real = torch.full((copies, n // 2), -0.5, dtype=torch.float64)
    i = torch.arange(n // 2, dtype=torch.float64).repeat(copies, 1)
    if measure == "diag-lin":
        return torch.complex(real, math.pi * i)
    if measure == "diag-inv":
        return torch.complex(real, n / math.pi * (n / (2 * i + 1) - 1))
    if measure == "diag-quad":
        return torch.complex(real, (2 * i + 1) ** 2 / math.pi)
    if measure == "diag-real":
        return torch.complex(-(i + 1), 0 * i)
    if measure in ("legs", "diag-legs"):
        Lambda, _, _ = nplr("legs", n)                  # flip: the order of diag-inv
        return Lambda.flip(0).repeat(copies, 1)
    if measure == "diag-rand":
        return torch.complex(-(1e-3 ** torch.rand_like(i)), math.pi * torch.rand_like(i))
    if measure == "diag":
        Lambda = initial_eigenvalues("diag-inv", copies, n)
        Lambda[1::2] = initial_eigenvalues("diag-lin", copies, n)[1::2]
        return Lambda
    raise ValueError(f"{measure=}: choose legs, diag, diag-lin, -inv, -quad, -real, -rand")


def decay(parameter, real_type):
    """-Re Lambda from log_A_real, which is a logarithm in real_type exp alone."""
    if real_type == "exp":
        return parameter.exp()
    if real_type == "relu":
        return parameter.relu() + 1e-4
    return parameter


def discretize_diagonal(layer, A, P, B, C, dt, rate):
    """What discretize() returns in mode diag; P is empty, and so are Q and S.

    disc dss is zero-order hold with B = 1 and, z being dt A at rate 1,
    C = B C / (e^{l_max z} - 1) / 2: dss.py, where numbers do not come in pairs.
    """
    if layer.disc == "bilinear":
        return (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2), P, P, C
    if layer.disc == "dss":
        x = A * torch.expm1(layer.l_max * dt / rate * A)    # A: 1e-7 is that of dss.py
        C = B * C * A * x.conj() / (x.abs() ** 2 + 1e-7) / 2
        B = 1
    hold = torch.expm1(dt * A) / torch.where(A == 0, 1, A)
    limit = dt * (1 + dt * A / 2)               # at A = 0; dt A / 2 is for its gradient
    return torch.exp(dt * A), torch.where(A == 0, limit, hold) * B, P, P, C


def learning_rates(layer, lr):
    """{parameter: learning rate} from one, or a dict for dt, A and B; 0.0 freezes."""
    given = lr if isinstance(lr, dict) else {"dt": lr, "A": lr, "B": lr}
    check(set(given) <= {"dt", "A", "B"} and min(given.values(), default=0) >= 0,
          f"{lr=}: pass a number from 0, or a dict for dt, A and B")
    groups = {"log_dt": "dt", "log_A_real": "A", "A_imag": "A", "P": "A", "B": "B"}
    rates = {}
    for name, parameter in layer.named_parameters():
        if name in groups:
            rates[name] = given.get(groups[name], 1e-3)
            parameter.requires_grad_(rates[name] > 0)
    return rates


class Block(nn.Module):
    """The block of gss.py around the SSM: W_out((W_up SSM(GELU(W_in u))) * GELU(W_gate u)),
    with d gate features in the gate. No gate: W_out SSM(..). No bottleneck: no W_in, no
    GELU of it. Neither: the SSM alone. Features come last: (b, l, d), or (b, d)."""

    def __init__(self, d, channels, gate, bottleneck):
        super().__init__()
        check(channels > 0, f"{channels=}: pass a positive number")
        check(gate is None or gate > 0, f"{gate=}: pass None or a positive number")
        check(bottleneck is None or bottleneck > 0 and d % bottleneck == 0,
              f"{bottleneck=}: pass None or a divisor of d_model = {d}")
        self.h = d // (bottleneck or 1)
        outputs = channels * self.h
        width = d * gate if gate else outputs
        last = gate or bottleneck
        self.input_linear = nn.Linear(d, self.h) if bottleneck else None            # W_in
        self.input_gate = nn.Linear(d, width) if gate else None                     # W_gate
        self.output_gate = nn.Linear(outputs, width) if gate else None              # W_up
        self.output_linear = nn.Linear(width, channels * d) if last else None       # W_out

    def enter(self, u):
        """Before the SSM: u (.., d) -> (.., h)."""
        return u if self.input_linear is None else F.gelu(self.input_linear(u.contiguous()))

    def leave(self, y, u):
        """After the SSM: y (.., m h), u (.., d) -> (.., m d)."""
        if self.input_gate is not None:
            gate = F.gelu(self.input_gate(u.contiguous()))
            y = self.output_gate(y.contiguous()) * gate
        if self.output_linear is not None:
            y = self.output_linear(y.contiguous())
        return y


def check_options(d_model, d_state, mode, disc, real_type, l_max, dt_min, dt_max):
    """Those that do not depend on others, and those that exclude each other."""
    check(d_model > 0, f"{d_model=}: pass a positive number")
    check(d_state > 0 and d_state % 2 == 0, f"{d_state=}: pass an even number from 2")
    check(mode in ("nplr", "diag"), f"{mode=}: choose nplr or diag")
    discs = ("bilinear",) if mode == "nplr" else ("zoh", "bilinear", "dss")
    check(disc in discs, f"{disc=}: in mode {mode} choose from {discs}")
    check(real_type in ("exp", "relu", "none"), f"{real_type=}: choose exp, relu, none")
    check(disc != "dss" or l_max is not None and l_max > 0 and real_type != "none",
          f"{l_max=}, {real_type=}: disc dss needs a length, and Re Lambda < 0")
    check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")


def check_input(u, dims, h, state, shape):
    """dims 2: u (b, h), a state (b, *shape); dims 3: u (b, h, l), a state or None."""
    wanted = f"(b, {h})" if dims == 2 else f"(b, {h}, l)"
    check(isinstance(u, torch.Tensor), f"u is a {type(u).__name__}: pass a tensor {wanted}")
    fits = u.dim() == dims and u.shape[1] == h and u.is_floating_point()
    check(fits, f"u is {u.dtype} {tuple(u.shape)}: pass floats {wanted}")
    check(u.numel() > 0, f"u is empty, {tuple(u.shape)}: pass {wanted} with b, l > 0")
    if dims == 2 or state is not None:
        wanted = (u.shape[0], *shape)
        is_tensor = isinstance(state, torch.Tensor)
        found = (state.dtype, *state.shape) if is_tensor else type(state).__name__
        check(is_tensor and state.shape == wanted and state.is_complex(),
              f"state: {found}, pass complex {wanted} like initial_state()")


def check_rate(rate, layer):
    """A rate for all steps, and parameters precise enough to be discretized."""
    if not isinstance(rate, numbers.Real) or not 0 < rate < math.inf:
        raise ValueError(f"{rate=}: pass one positive number; for irregular sampling take "
                         "s5.py or lru.py, or a rate of its own for each call of step")
    for p in layer.parameters():
        check(p.dtype not in (torch.float16, torch.bfloat16),
              f"parameters are {p.dtype}: use autocast")


def check(ok, message):
    """Raise a ValueError unless ok."""
    if not ok:
        raise ValueError(message)


# ---- one signal in every mode ----

if __name__ == "__main__":
    torch.manual_seed(0)
    l, layer = 1000, S4(d_model=4)
    u = torch.randn(2, 4, l)
    impulse = F.one_hot(torch.zeros(4, dtype=torch.long), l).float()[None]      # (1, 4, l)
    K, _ = layer(impulse, method="step")
    K = K[0] - layer.D.T * impulse[0]
    y, _ = layer(u)
    first, state = layer(u[..., :300], layer.initial_state(2))
    second, state = layer(u[..., 300:], state)
    smooth = torch.linspace(0, 6, l).sin().expand(2, 4, l)
    full, _ = layer(smooth)
    half, _ = layer(smooth[..., 1::2], rate=2.0)
    for what, a, b in (("kernel, response to an impulse", layer.kernel(l), K),
                       ("convolution, recurrence", y, layer(u, method="step")[0]),
                       ("whole, two pieces", y, torch.cat([first, second], -1)),
                       ("rate 1, rate 2 (about equal)", full[..., 1::2], half)):
        print(f"{what:<36} differ by {(a - b).abs().max() / b.abs().max():.1e}")
