"""S4: a state space layer with the HiPPO matrix, and its relatives as options.

    Gu, Goel, Re: Efficiently Modeling Long Sequences with Structured State Spaces (2021),
    arXiv 2111.00396.                                 Try it: python s4.py

Each of the h features u(t) drives n states, x' = A x + B u, y = C x + D u. Sampled:

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = C x_k + D u_k,                       (1)
    y = K * u + D u,    K_k = C A_bar^k B_bar.                                     (2)

What was wrong before. HiPPO-LegS, which makes long memory work, is dense, and cannot be
diagonalized in floating point: its eigenvectors grow exponentially with n. So LSSL takes
n^2 operations a step, n^3 log l a kernel.

The idea. HiPPO is normal plus low rank, and a normal matrix has orthogonal eigenvectors V:

    V* A V = Lambda - P P*,    P with r = 1 or 2 columns.                          (3)

From here on A, B, C and x are in that basis. With the bilinear transform, A_bar = (1 - dt/2
A)^{-1} (1 + dt/2 A), B_bar = (1 - dt/2 A)^{-1} dt B, and s = 2 (1 - z) / (1 + z), the
geometric series of (2) needs A only in a resolvent:

    sum_k K_k z^k = C (1 - z A_bar)^{-1} B_bar = 2/(1+z) C (s - dt A)^{-1} dt B.   (4)

R = dt (s - dt Lambda)^{-1} is diagonal, which makes CB = C R B, CP = C R P, PB = P* R B and
PP = P* R P Cauchy sums. The Woodbury identity puts them together:

    C (s - dt A)^{-1} dt B = CB - CP (1 + PP)^{-1} PB.                             (5)

An inverse FFT takes (4) on a circle back to K. A state needs powers of the dense A_bar, for
x adds C A_bar^{k+1} x to y_k. They are also the faster way to K for l > 32 n.

Differs from the paper: the circle has a radius q < 1, with q^l = 1e-8. What the FFT adds to
K_k is then q^l K_{k+l} + ..., nothing in a stable system. On the unit circle the parameter
must be C (1 - A_bar^l), for one length and one rate. And P P* for P Q* keeps a trained A
stable (arXiv 2202.09729).

Why bilinear? Zero-order hold needs the exponential of a dense matrix, and has no (4).

Why n/2? Eigenvalues come in conjugate pairs, and the second of a pair adds the conjugate of
what the first adds: C x over all n is 2 Re(C x) over n/2. P P* mixes x with its conjugate,
so state, step and discretize() use real numbers, Re x and Im x in turn.

Symbols: b batch, h features of the SSM, n states (d_state), l length, m channels, r rank.
u (b, h, l), y (b, m h, l); x (b, h, n); Lambda, B (h, n/2), P (r, h, n/2), C (m, h, n/2)
complex; A_bar (h, n, n), B_bar (h, n), K (m h, l); dt (h), D (m, h).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


# ---- HiPPO, normal plus low rank ----

def nplr(measure, n):
    """(3), the half with Im Lambda >= 0: Lambda (n/2), P (r, n/2), B (n/2) complex128.

    legs, all of the past, fading: A_ij = -sqrt((2i+1)(2j+1)) for i > j, -(i+1) for i = j
    legt, a window of length 2: A_ij = -sqrt((2i+1)(2j+1)) / 2, times (-1)^(i-j) for i < j
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
    S = -torch.outer(B, B).tril(-1) / 2
    c = -0.5
    if measure == "legt":
        P = P * torch.stack([1 - i % 2, i % 2])         # even i, odd i
        S = S * ((i[:, None] - i) % 2)                  # odd i - j: the rest is in P^T P
        c = 0.0
        B = B / 2
    # A + P^T P = c + S - S^T is normal: V diagonalizes -i (S - S^T), which is Hermitian
    imag, V = torch.linalg.eigh(-1j * (S - S.mT))       # ascending
    V = V[:, n // 2:]
    return c + 1j * imag[n // 2:], P.to(V.dtype) @ V.conj(), V.mH @ B.to(V.dtype)


def initial_nplr(measure, copies, n, rank):
    """Where Lambda, B (copies, n/2) and P (r, copies, n/2) start: complex128."""
    even = nplr("legs" if measure == "hippo" else measure, n)
    odd = nplr("fout", n) if measure == "hippo" else even
    pairs = [torch.stack(pair, -2) for pair in zip(even, odd)]          # (.., 2, n/2)
    Lambda, P, B = [pair.tile(copies, 1)[..., :copies, :] for pair in pairs]
    rank = len(P) if rank is None else rank
    check(rank >= len(P), f"{rank=}: {measure} has rank {len(P)}, pass at least that")
    noise = 1e-2 * torch.randn(rank - len(P), copies, n // 2, dtype=P.dtype)
    return Lambda, torch.cat([P, noise]), B


# ---- the kernel ----

def cauchy_kernel(Lambda, P, B, C, dt, l):
    """(4) and (5): K_0 ... K_{l-1}, (m, h, l) float64, from halves of conjugate pairs.

    Good to 1e-7: rounding, 1e-16, is amplified by q^{-k}, at most 1e8. For fout, which has
    an eigenvalue near 0, (5) cancels at dt > 20: digits are lost, of gradients first.
    """
    log_q = math.log(1e-8) / l
    k = torch.arange(l, dtype=torch.float64, device=dt.device)
    j = k[:l // 2 + 1]
    # (4) at z = q exp(-2 pi i j / l): s = 2 tanh((2 pi i j / l - log q) / 2)
    s = 2 * torch.tanh(torch.complex(torch.full_like(j, -log_q), 2 * math.pi / l * j) / 2)
    w = dt * Lambda                                                     # (h, n/2)
    # Cauchy sums over pairs, of v = dt C B, dt C P, dt P* B and dt P* P:
    # v / (s - w) + v* / (s - w*) = 2 (s Re v - Re(v w*)) / (s^2 - 2 s Re w + |w|^2)
    square = w.real ** 2 + w.imag ** 2
    twice = -2 * w.real[..., None].to(s.dtype)
    pair = 1 / torch.addcmul(s ** 2 + square[..., None], s, twice)      # (h, n/2, nodes)
    v = torch.einsum("ihn,phn->iphn", torch.cat([C, P.conj()]), torch.cat([B[None], P]))
    v = 2 * dt * torch.stack([v.real, -(v * w.conj()).real])            # (2, .., h, n/2)
    v = torch.einsum("viphn,hnjc->viphjc", v, torch.view_as_real(pair))
    v = torch.view_as_complex(v)                            # (2, m + r, 1 + r, h, nodes)
    sums = s * v[0] + v[1]                                  # [[CB, CP], [PB, PP]]
    for _ in P:             # (5) for the last column of P; the others stay rows and columns
        CB, CP = sums[:-1, :-1], sums[:-1, -1:]
        PB, PP = sums[-1:, :-1], sums[-1:, -1:]
        sums = CB - CP * (PB / (1 + PP))
    K = torch.fft.irfft((1 + s / 2) * sums[:, 0], l)        # 2/(1+z) = 1 + s/2
    return K * torch.exp(-log_q * k)


# ---- the layer ----

class S4(nn.Module):
    """(b, d_model, l) -> (b, m d_model, l), with D, without activation and without mixing
    of features, except in the block around it that gate and bottleneck make.

    d_model, d_state: h (times bottleneck), and n (even)
    mode: nplr, as above, or diag: A = Lambda, as in s4d.py
    measure: where A starts. nplr: legs, legt, fout, or hippo (legs and fout in turn);
        diag: see initial_diagonal
    disc: nplr: bilinear. diag: zoh (default), bilinear, or dss (the kernel of dss.py)
    real_type: -Re Lambda is exp or relu (+ 1e-4) of its parameter, or none: itself, and
        then nothing keeps the system stable
    rank: rank of P, at least that of the measure; more columns start as small noise
    n_ssm: number of different (A, B); feature i uses number i mod n_ssm. Default: h
    channels: m outputs for each feature: channel c of feature i is output c h + i
    bidirectional: add sum_{j >= 1} K'_{j-1} u_{k+j} with a second C; without a state
    gate, bottleneck: the block of gss.py: W_o((W_y SSM(GELU(W_u u))) * GELU(W_v u)), with
        d_model * gate features in the gate; W_u and its GELU only with bottleneck
    l_max: the length, in steps at rate 1, over which disc dss normalizes; l may be longer
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of A
    lr: learning rate of dt, A and B, stored in ssm_lr for the optimizer; or a dict of
        these three (1e-3 if left out). 0.0 freezes
    """

    def __init__(self, d_model, d_state=64, *, mode="nplr", measure="legs", disc=None,
                 real_type="exp", rank=None, n_ssm=None, channels=1, bidirectional=False,
                 gate=None, bottleneck=None, l_max=None, dt_min=1e-3, dt_max=1e-1, lr=1e-3):
        super().__init__()
        check(d_state > 0 and d_state % 2 == 0, f"{d_state=}: pass an even number from 2")
        check(mode in ("nplr", "diag"), f"{mode=}: choose nplr or diag")
        discs = ["bilinear"] if mode == "nplr" else ["zoh", "bilinear", "dss"]
        disc = disc or discs[0]
        check(disc in discs, f"{disc=}: in mode {mode} choose from {discs}")
        check(real_type in ("exp", "relu", "none"), f"{real_type=}: choose exp, relu, none")
        check(disc != "dss" or l_max is not None and l_max > 0 and real_type != "none",
              f"{l_max=}, {real_type=}: disc dss needs a length, and Re Lambda < 0")
        check(channels > 0, f"{channels=}: pass a positive number")
        check(gate is None or gate > 0, f"{gate=}: pass None or a positive number")
        check(bottleneck is None or bottleneck > 0 and d_model % bottleneck == 0,
              f"{bottleneck=}: pass None or a divisor of d_model = {d_model}")
        check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")
        h = d_model // (bottleneck or 1)
        copies = h if n_ssm is None else n_ssm
        check(copies > 0 and h % copies == 0, f"{n_ssm=}: pass a divisor of {h}")
        self.d_model, self.h, self.n, self.channels = d_model, h, d_state, channels
        self.mode, self.disc, self.real_type, self.l_max = mode, disc, real_type, l_max
        self.bidirectional = bidirectional
        if mode == "nplr":
            Lambda, P, B = initial_nplr(measure, copies, d_state, rank)
        else:
            check(rank is None, f"{rank=}: mode diag has no low-rank part, pass None")
            Lambda = initial_diagonal(measure, copies, d_state)
            P = None
            B = torch.ones_like(Lambda)
        log_dt = math.log(dt_min) + torch.rand(h) * math.log(dt_max / dt_min)
        self.log_dt = nn.Parameter(log_dt)
        real = (-Lambda.real).clamp(min=1e-4)               # is 0 in legt and fout
        real = real.log() if real_type == "exp" else real
        self.log_A_real = nn.Parameter(real.to(log_dt))
        self.A_imag = nn.Parameter(Lambda.imag.to(log_dt))
        self.P = None if P is None else nn.Parameter(torch.view_as_real(P).to(log_dt))
        self.B = nn.Parameter(torch.view_as_real(B).to(log_dt))
        outputs = 2 * channels if bidirectional else channels
        self.C = nn.Parameter(torch.randn(outputs, h, d_state // 2, 2) * 0.5 ** 0.5)
        self.D = nn.Parameter(torch.randn(channels, h))
        self.ssm_lr = learning_rates(self, lr)
        add_block(self, gate, bottleneck)

    def continuous(self, rate):
        """Lambda, P (None in mode diag), B, C complex128 and dt (h, 1) of each feature."""
        if not 0 < rate < math.inf:
            raise ValueError(f"{rate=}: pass a positive number")
        check(self.D.dtype.itemsize > 2, f"parameters are {self.D.dtype}: use autocast")
        real = self.log_A_real.double()
        if self.real_type == "exp":
            real = real.exp()
        elif self.real_type == "relu":
            real = real.relu() + 1e-4
        repeats = self.h // len(real)                           # of each of the copies
        Lambda = torch.complex(-real, self.A_imag.double()).tile(repeats, 1)      # (h, n/2)
        B = torch.view_as_complex(self.B.double()).tile(repeats, 1)
        C = torch.view_as_complex(self.C.double())              # (m, h, n/2)
        P = self.P
        if P is not None:
            P = torch.view_as_complex(P.double()).tile(repeats, 1)      # (r, h, n/2)
        return Lambda, P, B, C, rate * self.log_dt.double().exp()[:, None]

    def discretize(self, rate=1.0):
        """(1) at step size rate * dt: A_bar (h, n, n), in mode diag (h, n/2) complex, B_bar
        (h, n), C (m, h, n): double, because an error of A_bar grows k-fold in A_bar^k."""
        if self.mode == "diag":
            return discretize_diagonal(self, rate)
        Lambda, P, B, C, dt = self.continuous(rate)
        one = torch.eye(self.n, dtype=dt.dtype, device=dt.device)
        P = as_real(P)
        A = times(Lambda, one[:, None]).permute(1, 2, 0)        # column j: Lambda times e_j
        A = A - 2 * torch.einsum("rhi,rhj->hij", P, P)          # (3) for Re x, Im x in turn
        half = dt[..., None] / 2 * A                            # (h, n, n)
        inverse = torch.linalg.inv(one - half)
        A_bar = 2 * inverse - one                               # 1 + half is 2 - (1 - half)
        C = 2 * as_real(C.conj())                               # 2 for the pairs
        return A_bar, times(inverse, dt * as_real(B)), C

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, h, n) float64, for rounding adds up over the steps."""
        return self.D.new_zeros(batch_size, self.h, self.n, dtype=torch.float64)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(1) once: u (b, d_model), state -> y (b, m d_model), next state.
        discrete: what discretize() returned, to use it for many steps."""
        self.check_input(u, 2, state)
        A_bar, B_bar, C = discrete or self.discretize(rate)
        v = enter_block(self, u)
        x = times(A_bar, state.double()) + B_bar * v[..., None]         # (b, h, n)
        y = (C * x[:, None]).sum(-1) + self.D * v[:, None]              # (b, m, h)
        return leave_block(self, y.flatten(1), u), x

    def kernel(self, l, rate=1.0):
        """(2), of the SSM alone: K_0 ... K_{l-1}, (m h, l). Bidirectional: (2 m h, l), the
        kernels for the past before those for the future."""
        if l < 1:
            raise ValueError(f"{l=}: pass a positive length")
        short = self.mode == "nplr" and l <= 32 * self.n
        # dense powers for a longer l: matrix products, n^3 log l operations, cost less than
        # n l / 2 Cauchy terms, and less memory; for float64, whose digits only they have;
        # and for real_type none, where states may grow
        if short and self.D.dtype == torch.float32 and self.real_type != "none":
            K = cauchy_kernel(*self.continuous(rate), l)                # (m, h, l)
        else:
            dtype = torch.float64 if self.mode == "nplr" else self.D.dtype
            A_bar, B_bar, C = self.discretize(rate)
            with full_precision(self.D):
                low, high = squares(A_bar, l, dtype)
                K = response(C.to(dtype), low, high, B_bar[None].to(dtype))[0, ..., :l]
        return K.to(self.D.dtype).flatten(0, 1)

    def forward(self, u, state=None, *, rate=1.0, method="conv"):
        """u (b, d_model, l), state or None -> y (b, m d_model, l), last state or None.

        rate: factor on dt: 2.0 for the same signal sampled half as often
        method: conv is (2), step is (1): the same numbers
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        self.check_input(u, 3, state)
        check(method in ("conv", "step"), f"{method=}: choose conv or step")
        if method == "step":
            x = self.initial_state(len(u)) if state is None else state
            discrete = self.discretize(rate)
            outputs = []
            for u_k in u.unbind(-1):
                y_k, x = self.step(u_k, x, discrete=discrete)
                outputs.append(y_k)
            return torch.stack(outputs, -1), None if state is None else x
        v = enter_block(self, u).to(self.D.dtype)       # (b, h, l)
        l = v.shape[-1]
        m = self.channels
        last = None
        with full_precision(u):
            if state is None:
                K = self.kernel(l, rate).unflatten(0, (-1, self.h))     # (m, h, l)
            else:
                A_bar, B_bar, C = self.discretize(rate)
                low, high = squares(A_bar, l, v.dtype)
                x = torch.cat([B_bar[None], times(A_bar, state.double())]).to(v)
                answers = response(C.to(v), low, high, x)[..., :l]      # (1 + b, m, h, l)
                K = answers[0]                          # K is the answer to the state B_bar
            D = F.pad(self.D[..., None], (0, l - 1))    # D v: an impulse at k = 0
            y = fft_conv(v[:, None], K[:m] + D)         # (b, m, h, l)
            if self.bidirectional:
                future = fft_conv(v.flip(-1)[:, None], K[m:]).flip(-1)
                y = y + F.pad(future[..., 1:], (0, 1))  # one step later
            if state is not None:
                y = y + answers[1:]
                last = final_state(x[1:], v, x[0], low, high).double()
        return leave_block(self, y.flatten(1, 2), u), last

    def check_input(self, u, dims, state):
        """dims 2: u (b, d_model); dims 3: u (b, d_model, l); state as initial_state()."""
        fits = u.dim() == dims and u.shape[1] == self.d_model and u.numel() > 0
        check(fits and u.is_floating_point(), f"u is {u.dtype} {tuple(u.shape)}: "
              f"pass floats, {self.d_model} features, {dims}-d")
        if state is not None:
            check(not self.bidirectional, "bidirectional=True: it has no state, pass False")
            check(state.shape == (len(u), self.h, self.n) and state.is_floating_point(),
                  "state: pass one of the shape and type of initial_state()")


# ---- powers of A_bar, as in lssl.py ----

def as_real(z):
    """(.., n) complex as (.., 2n) real: Re(v w) is as_real(v) times as_real(w conj)."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def squares(A_bar, l, dtype):
    """A_bar, A_bar^2, A_bar^4, ... in two lists: below A_bar^T, and from it on.

    Time has two digits, k = jT + i, as with T = 10 the tens and the ones. T, about
    2 sqrt(l), and J are powers of 2: each A_bar^i and A_bar^{jT} is a product of squares.
    So T + J vectors and one matrix product give all l numbers C A_bar^k x.
    """
    powers = [A_bar]
    while 2 ** len(powers) < l:
        A = powers[-1]
        powers.append(A * A if A.is_complex() else A @ A)
    half = len(powers) // 2 + 1                         # T = 2^half
    dtype = dtype.to_complex() if A_bar.is_complex() else dtype
    powers = [A.to(dtype) for A in powers]
    return powers[:half], powers[half:]


def times(A, x):
    """A x: A (h, n, n), or (h, n/2) complex in mode diag; x (.., h, n) -> (.., h, n)."""
    if A.is_complex():
        return as_real(A * torch.view_as_complex(x.unflatten(-1, (-1, 2))))
    return torch.einsum("hij,...hj->...hi", A, x)


def krylov(powers, x):
    """x, A x, A^2 x, ... by doubling: A, A^2, A^4, ..; x (.., h, n) -> (T, .., h, n)."""
    x = x[None]
    for A in powers:
        x = torch.cat([x, times(A, x)])
    return x


def response(C, low, high, x):
    """C A_bar^k x: C (m, h, n), states x (b, h, n) -> (b, m, h, JT)."""
    rows = [A.conj() if A.is_complex() else A.mT for A in low]
    C = krylov(rows, C)                                     # C A_bar^i, (T, m, h, n)
    x = krylov(high, x)                                     # A_bar^{jT} x, (J, b, h, n)
    return torch.einsum("jbhn,imhn->bmhji", x, C).flatten(-2)


def final_state(x, u, B_bar, low, high):
    """A_bar^{l-1} x + sum_k A_bar^{l-1-k} B_bar u_k: x (b, h, n), u (b, h, l)."""
    l = u.shape[-1]
    T = 2 ** len(low)
    J = 2 ** len(high)
    for digit, A in enumerate(low + high):              # the binary digits of l - 1
        x = torch.stack([x, times(A, x)])[((l - 1) >> digit) & 1]   # compiles with any l
    B_bar = krylov(low, B_bar).flip(0)                  # (T, h, n), the last i: power 0
    u = F.pad(u, (J * T - l, 0)).unflatten(-1, (J, T))  # zeros in front
    blocks = torch.einsum("bhji,ihn->jbhn", u, B_bar)   # each block of T steps
    for A in high:                                      # two blocks in a row are one
        blocks = times(A, blocks[::2]) + blocks[1::2]
    return x + blocks[0]


def fft_conv(u, K):
    """y_k = sum_{i <= k} K_i u_{k-i}: u (.., l), K (.., l). l zeros keep the FFT, which
    convolves on a circle, from wrapping the end around to the beginning."""
    l = u.shape[-1]
    product = torch.fft.rfft(u, 2 * l) * torch.fft.rfft(K, 2 * l)
    return torch.fft.irfft(product, 2 * l)[..., :l]


def full_precision(u):
    """Switch autocast off: half precision is too coarse for a long recurrence."""
    return torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False)


# ---- what the options add: mode diag, as in s4d.py ----

def initial_diagonal(measure, copies, n):
    """Lambda (copies, n/2) complex128 of mode diag (arXiv 2206.11893, section 4).

    diag: diag-inv and diag-lin in turn. diag-rand, for dt_min = dt_max = 1: as in gss.py
    """
    i = torch.arange(n // 2, dtype=torch.float64).repeat(copies, 1)
    real = torch.full_like(i, -0.5)
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
        Lambda = initial_diagonal("diag-inv", copies, n)
        Lambda[1::2] = initial_diagonal("diag-lin", copies, n)[1::2]
        return Lambda
    raise ValueError(f"{measure=}: choose legs, diag, diag-lin, -inv, -quad, -real, -rand")


def discretize_diagonal(layer, rate):
    """discretize() of mode diag, where A_bar is a vector (h, n/2) complex128.

    disc dss is zero-order hold with B = 1 and, z being dt A at rate 1,
    C = B C / (e^{l_max z} - 1) / 2: dss.py, where modes do not come in pairs.
    """
    A, _, B, C, dt = layer.continuous(rate)
    A = torch.where(A == 0, 1e-12, A)                   # there B_bar is its limit
    if layer.disc == "dss":
        x = A * torch.expm1(layer.l_max * dt / rate * A)    # A: 1e-7 is that of dss.py
        C = B * C * A * x.conj() / (x.abs() ** 2 + 1e-7) / 2
        B = torch.ones_like(B)
    if layer.disc == "bilinear":
        A_bar = (1 + dt * A / 2) / (1 - dt * A / 2)
        B_bar = dt * B / (1 - dt * A / 2)
    else:
        A_bar = torch.exp(dt * A)
        B_bar = torch.expm1(dt * A) / A * B
    return A_bar, as_real(B_bar), 2 * as_real(C.conj())


# ---- what the options add: learning rates, and the block of gss.py ----

def learning_rates(layer, lr):
    """{parameter: learning rate} from one, or a dict for dt, A and B; 0.0 freezes."""
    lr = lr if isinstance(lr, dict) else {"dt": lr, "A": lr, "B": lr}
    check(set(lr) <= {"dt", "A", "B"}, f"{lr=}: pass a number, or a dict for dt, A and B")
    groups = {"log_dt": "dt", "log_A_real": "A", "A_imag": "A", "P": "A", "B": "B"}
    rates = {}
    for name, parameter in layer.named_parameters():
        if name in groups:
            rates[name] = lr.get(groups[name], 1e-3)
            parameter.requires_grad_(rates[name] > 0)
    return rates


def add_block(layer, gate, bottleneck):
    """The linear maps around the SSM that gate and bottleneck ask for."""
    d, outputs = layer.d_model, layer.channels * layer.h
    width = d * gate if gate else outputs
    layer.input_linear = nn.Linear(d, layer.h) if bottleneck else None              # W_u
    layer.input_gate = nn.Linear(d, width) if gate else None                        # W_v
    layer.output_gate = nn.Linear(outputs, width) if gate else None                 # W_y
    last = gate or bottleneck
    layer.output_linear = nn.Linear(width, layer.channels * d) if last else None    # W_o


def enter_block(layer, u):
    """Before the SSM: u (b, d_model, l) -> (b, h, l), or without l."""
    if layer.input_linear is None:
        return u
    return F.gelu(channel_map(layer.input_linear, u))


def leave_block(layer, y, u):
    """After the SSM: y (b, m h, l) -> (b, m d_model, l), or without l."""
    if layer.input_gate is not None:
        y = channel_map(layer.output_gate, y) * F.gelu(channel_map(layer.input_gate, u))
    if layer.output_linear is not None:
        y = channel_map(layer.output_linear, y)
    return y.to(u.dtype)


def channel_map(linear, u):
    """A linear layer over the features of u (b, h), or of u (b, h, l) as a convolution of
    length 1: twice as fast as a matrix product, for which torch copies u."""
    u = u.to(linear.weight.dtype)
    if u.dim() == 2:
        return linear(u)
    return F.conv1d(u, linear.weight[..., None], linear.bias)


def check(ok, message):
    """Raise a ValueError unless ok. Not for rate or l: torch.compile can't print them."""
    if not ok:
        raise ValueError(message)


# ---- one signal in every mode ----

if __name__ == "__main__":
    torch.manual_seed(0)
    l, layer = 1000, S4(d_model=4)
    u = torch.randn(2, 4, l)
    A_bar, B_bar, C = layer.discretize()
    K = [C[0] * times(torch.linalg.matrix_power(A_bar, k), B_bar) for k in range(l)]
    y, _ = layer(u)
    stepped, _ = layer(u, method="step")
    first, state = layer(u[..., :300], layer.initial_state(2))
    second, state = layer(u[..., 300:], state)
    smooth = torch.linspace(0, 6, l).sin().expand(2, 4, l)
    full, _ = layer(smooth)
    half, _ = layer(smooth[..., 1::2], rate=2.0)
    for what, a, b in (("kernel, definition", layer.kernel(l), torch.stack(K, -1).sum(1)),
                       ("convolution, recurrence", y, stepped),
                       ("whole, two pieces", y, torch.cat([first, second], -1)),
                       ("rate 1, every second at rate 2: about", full[..., 1::2], half)):
        print(f"{what:<36} differ by {(a - b).abs().max() / b.abs().max():.1e}")
