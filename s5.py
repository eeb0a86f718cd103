"""S5: one state space system for all features, and a scan.

    Smith, Warrington, Linderman: Simplified State Space Layers for Sequence Modeling
    (2022), arXiv 2208.04933.                         Try it: python s5.py

All h features u(t) together drive one linear system with n states, Lambda diagonal:

    x'(t) = Lambda x(t) + B u(t),    y(t) = C x(t) + D u(t).                       (1)

With a step size dt for each state, and zero-order hold as in s4d.py, it is a recurrence:

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = 2 Re(C x_k) + D u_k,                 (2)
    A_bar = exp(dt Lambda),    B_bar = Lambda^{-1} (A_bar - 1) B.

With disc="bilinear" A_bar = (1 + dt/2 Lambda) / (1 - dt/2 Lambda), and
B_bar = dt / (1 - dt/2 Lambda) B.

What was wrong before. S4 and its relatives are h systems side by side, each with a single
input and a single output, and need another layer to mix the features. S5 is one system with
many inputs and many outputs: B and C mix, and the state has n numbers instead of h n.

Why a scan? With many inputs K_k = C A_bar^k B_bar is an (h, h) matrix for each k, which is
too large. But with v = B_bar u_k two steps, x -> a x + v and x -> a' x + v', are one:

    x -> a'a x + (a'v + v').                                                       (3)

This is associative: steps may be grouped in any way, so also in parallel: linear_scan.

Why complex, and why 2 Re? Eigenvalues of a real system come in conjugate pairs, as do B
and C, and the second of a pair adds the conjugate of what the first adds. So p = n/2 are
stored. With conj_sym=False, p = n independent ones, and y_k = Re(C x_k) + D u_k.

Where it starts. Lambda are the eigenvalues of the normal part of HiPPO-LegS, of size
n / blocks, once for each block. B and C are random, in the basis of its eigenvectors V:
V^{-1} B = V* B and C V. Differs from the official code: B has variance 1/h (there 1/n) and
C 1/n (there 1/(h n)), so that h and n hardly change the size of y.

Free-running dynamics from a state: layer(torch.zeros(b, h, n_steps), state).

Symbols: b batch, h features (d_model), n states (d_state), p stored states, l length.
u, y (b, h, l); x (b, p), Lambda, A_bar (p), B, B_bar (p, h), C (h, p) complex; dt (p);
D (h). If bidirectional, C is (h, 2p).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class S5(nn.Module):
    """(b, h, l) -> (b, h, l), with D, without activation.

    d_model, d_state: h, and n, stored as p = n/2 complex numbers for all features together
    blocks: number of HiPPO blocks that Lambda starts from, a divisor of n
    C_init: lecun_normal, trunc_standard_normal or complex_normal, see initial_C
    disc: zoh (zero-order hold, as above) or bilinear
    conj_sym: store one of each conjugate pair (n / blocks even)
    clip_eigs: use min(Re Lambda, -1e-4), so that training cannot make the system unstable
    bidirectional: add 2 Re(C_2 z_k), z_k = A_bar z_{k+1} + B_bar u_k, with the second half
        C_2 of C; no state then
    step_rescale: a constant factor on dt
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of Lambda
    lr: learning rate of dt, Lambda and B, stored in ssm_lr for the optimizer
    """

    def __init__(self, d_model, d_state=64, *, blocks=1, C_init="lecun_normal", disc="zoh",
                 conj_sym=True, clip_eigs=False, bidirectional=False, step_rescale=1.0,
                 dt_min=1e-3, dt_max=1e-1, lr=1e-3):
        super().__init__()
        check(d_model > 0 and lr >= 0, f"{d_model=}, {lr=}: pass d_model > 0 and lr >= 0")
        check(d_state > 0 and blocks > 0 and d_state % blocks == 0,
              f"{d_state=}, {blocks=}: pass positive numbers, blocks a divisor of d_state")
        check(not conj_sym or d_state // blocks % 2 == 0,
              f"{d_state=}, {blocks=}: with conj_sym, d_state / blocks must be even")
        check(disc in ("zoh", "bilinear"), f"{disc=}: choose zoh or bilinear")
        check(0 < step_rescale < math.inf, f"{step_rescale=}: pass a positive number")
        check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")
        self.h, self.disc, self.step_rescale = d_model, disc, step_rescale
        self.conj_sym, self.clip_eigs = conj_sym, clip_eigs
        self.bidirectional = bidirectional
        Lambda, V = make_DPLR_HiPPO(d_state // blocks)
        stored = len(Lambda) // 2 if conj_sym else len(Lambda)  # those with Im Lambda < 0
        Lambda = Lambda[:stored].repeat(blocks)                 # (p)
        V = torch.block_diag(*[V[:, :stored]] * blocks)         # (n, p)
        self.p = len(Lambda)
        B = torch.randn(d_state, d_model, dtype=torch.float64) / d_model ** 0.5
        C = initial_C(C_init, d_model, V)
        if bidirectional:
            C = torch.cat([C, initial_C(C_init, d_model, V)], 1)
        log_step = math.log(dt_min) + torch.rand(self.p) * math.log(dt_max / dt_min)
        self.log_step = nn.Parameter(log_step)
        self.Lambda_re = nn.Parameter(Lambda.real.to(log_step))
        self.Lambda_im = nn.Parameter(Lambda.imag.to(log_step))
        self.B = nn.Parameter(torch.view_as_real(V.mH @ B.to(V.dtype)).to(log_step))
        self.C = nn.Parameter(torch.view_as_real(C).to(log_step))
        self.D = nn.Parameter(torch.randn(d_model))
        self.ssm_lr = {"log_step": lr, "Lambda_re": lr, "Lambda_im": lr, "B": lr}

    def discretize(self, rate=1.0):
        """(2) at rate * dt: A_bar (p), B_bar (p, h), C (h, p), 2 C in pairs, complex128,
        because an error of A_bar grows k-fold in A_bar^k."""
        if isinstance(rate, (torch.Tensor, list)) or not 0 < rate < math.inf:
            raise ValueError(f"{rate=}: pass one positive number; for irregular sampling, "
                             "call step with a rate of its own for each sample")
        check(self.D.dtype.itemsize > 2, f"parameters are {self.D.dtype}: use autocast")
        dt = rate * self.step_rescale * self.log_step.double().exp()
        real = self.Lambda_re.double()
        if self.clip_eigs:
            real = real.clamp(max=-1e-4)
        Lambda = torch.complex(real, self.Lambda_im.double())
        B = torch.view_as_complex(self.B.double())
        C = torch.view_as_complex(self.C.double())
        if self.conj_sym:
            C = 2 * C                                           # 2 Re for the pairs
        if self.disc == "bilinear":
            half = dt * Lambda / 2
            return (1 + half) / (1 - half), (dt / (1 - half))[:, None] * B, C
        limit = dt * (1 + dt * Lambda / 2)                      # hold near Lambda = 0
        hold = torch.expm1(dt * Lambda) / torch.where(Lambda == 0, 1, Lambda)
        hold = torch.where(Lambda == 0, limit, hold)            # expm1(z) is exp(z) - 1
        return torch.exp(dt * Lambda), hold[:, None] * B, C

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, p) complex128, so that rounding stays small."""
        return self.D.new_zeros(batch_size, self.p, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, p) -> y (b, h), next state.
        discrete: what discretize(rate) returned, to use it for many steps."""
        self.check_input(u, 2, state)
        check(discrete is None or rate == 1.0, "rate is in discrete: pass it to discretize")
        A_bar, B_bar, C = discrete or self.discretize(rate)
        x = A_bar * state + u.to(B_bar.dtype) @ B_bar.mT        # (b, p)
        y = (x @ C.mT).real + self.D * u                        # (b, h)
        return y.to(u.dtype), x

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, h, l), state (b, p) or None -> y (b, h, l), last state or None.

        rate: factor on dt: 2.0 for the same signal sampled half as often
        method: scan, conv (FFT, whose rounding is relative to the largest u), or step, (2)
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        self.check_input(u, 3, state)
        check(method in ("scan", "conv", "step"), f"{method=}: choose scan, conv or step")
        if method == "step":
            return self.recurrence(u, state, rate)
        A_bar, B_bar, C = self.discretize(rate)
        scan = linear_scan if method == "scan" else fft_scan
        start = self.initial_state(u.shape[0]) if state is None else state
        w = u.to(self.D.dtype)
        v = drive(B_bar, w)                                     # B_bar u_k, (b, l, p)
        x = scan(A_bar, v, start)                               # (b, l, p)
        last = None if state is None else x[:, -1].to(torch.complex128)
        if self.bidirectional:
            future = scan(A_bar, v.flip(1), start).flip(1)
            x = torch.cat([x, future], -1)                      # (b, l, 2p)
        y = read(C, x) + self.D[:, None] * w                    # C has the 2 of (2)
        return y.to(u.dtype), last

    def recurrence(self, u, state, rate):
        """(2), one step after the other: equal to the parallel form up to rounding."""
        x = self.initial_state(u.shape[0]) if state is None else state
        discrete = self.discretize(rate)
        outputs = []
        for u_k in u.unbind(-1):
            y_k, x = self.step(u_k, x, discrete=discrete)
            outputs.append(y_k)
        return torch.stack(outputs, -1), None if state is None else x

    def check_input(self, u, dims, state):
        """dims 2: u (b, h) and a state; dims 3: u (b, h, l), and a state or None."""
        shape = f"(b, {self.h})" if dims == 2 else f"(b, {self.h}, l)"
        fits = u.dim() == dims and u.shape[1] == self.h and u.numel() > 0
        check(fits and u.is_floating_point(),
              f"u is {u.dtype} {tuple(u.shape)}: pass floats {shape}")
        if dims == 2 or state is not None:
            check(not self.bidirectional, "bidirectional=True: it has no state and no step")
            fits = state is not None and state.shape == (u.shape[0], self.p)
            check(fits and state.is_complex(),
                  "state: pass one of the shape and type of initial_state()")


# ---- all states at once: a (n), v (.., l, n), x (.., n) -> (.., l, n), with n = p ----

def drive(B_bar, u):
    """B_bar u_k for all k: B_bar (n, h), u (b, h, l) -> (b, l, n) complex. One product of
    real matrices, Re and Im of B_bar side by side: twice as fast as a complex one."""
    B = torch.view_as_real(B_bar.mT).flatten(-2).to(u.dtype)            # (h, 2n)
    with full_precision(u):
        v = torch.bmm(u.mT, B.expand(u.shape[0], -1, -1))   # (b, l, 2n); @ copies u.mT
    return torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())


def read(C, x):
    """Re(C x_k) for all k: C (h, n), x (b, l, n) -> (b, h, l). One real product likewise,
    for Re(C x) is Re C Re x - Im C Im x."""
    x = torch.view_as_real(x).flatten(-2)                               # (b, l, 2n)
    C = torch.view_as_real(C.conj().resolve_conj()).flatten(-2).to(x.dtype)   # (h, 2n)
    with full_precision(x):
        return C @ x.mT


def combine(first, second):
    """(3): two steps in a row as one step. A step is the pair (a, v) of x -> a x + v."""
    a, v = first
    a_next, v_next = second
    return a_next * a, a_next * v + v_next


def loop_scan(a, v, x):
    """The definition: x_k = a x_{k-1} + v_k from x_{-1} = x."""
    states = []
    for v_k in v.unbind(-2):
        x = torch.addcmul(v_k, a, x)                    # a x + v_k
        states.append(x)
    return torch.stack(states, -2)


def linear_scan(a, v, x, T=32):
    """The same, in J blocks of T steps, side by side. Here J = 3 and T = 2:

        steps     v0 v1 | v2 v3 | v4 v5
        ends         e0 |    e1 |    e2   of each block, begun at 0: e0 = a v0 + v1
        starts    x     | x1    | x3      a scan of the ends, by (3): x1 = a^2 x + e0
        states    x0 x1 | x2 x3 | x4 x5   each block from its start: x2 = a x1 + v2

    So a loop of l steps becomes 2T steps on each of log_T(l) levels. Rounding a to the
    precision of v adds up over T steps, not over l: a^T is computed in double precision.
    """
    check(T > 1, f"{T=}: pass a block length of 2 or more")
    l = v.shape[-2]
    a_v = a.to(v.dtype)
    x_v = x.to(v.dtype)
    if l <= T:
        return loop_scan(a_v, v, x_v)
    blocks = F.pad(v, (0, 0, 0, -l % T)).unflatten(-2, (-1, T))     # (.., J, T, n)
    end = torch.zeros_like(blocks[..., 0, :])                       # (.., J, n)
    for v_i in blocks.unbind(-2):
        end = torch.addcmul(v_i, a_v, end)
    later = linear_scan(a ** T, end[..., :-1, :], x, T)
    starts = torch.cat([x_v[..., None, :], later], -2)              # (.., J, n)
    return loop_scan(a_v, blocks, starts).flatten(-3, -2)[..., :l, :]


def fft_scan(a, v, x):
    """The same by FFT, in double precision: v convolved with the powers of a, per state.
    l zeros keep the FFT, which convolves on a circle, from wrapping around."""
    l = v.shape[-2]
    k = torch.arange(l + 1, dtype=torch.float64, device=a.device)[:, None]
    a = torch.where(a.abs() < 1e-300, 1e-300, a)        # log 0 is infinite
    a_k = torch.exp(k * a.log())                        # (l + 1, n)
    product = torch.fft.fft(v.to(a.dtype), 2 * l, -2) * torch.fft.fft(a_k[:l], 2 * l, -2)
    states = torch.fft.ifft(product, dim=-2)[..., :l, :]
    return (states + a_k[1:] * x[..., None, :]).to(v.dtype)


def full_precision(u):
    """Switch autocast off: half precision is too coarse for a long recurrence."""
    return torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False)


# ---- where Lambda and C start ----

def make_HiPPO(n):
    """HiPPO-LegS (arXiv 2008.07669): -sqrt((2i+1)(2j+1)) for i > j, -(i+1) for i = j."""
    i = torch.arange(n, dtype=torch.float64)
    root = torch.sqrt(2 * i + 1)
    return -torch.outer(root, root).tril(-1) - torch.diag(i + 1)


def make_NPLR_HiPPO(n):
    """A (n, n) of HiPPO-LegS and P (n), for which A + P P^T is normal."""
    return make_HiPPO(n), torch.sqrt(torch.arange(n, dtype=torch.float64) + 0.5)


def make_DPLR_HiPPO(n):
    """Eigenvalues Lambda (n), by ascending Im, and eigenvectors V (n, n) of A + P P^T.

    A + P P^T = -1/2 + S with S = -S^T, so that -i S is Hermitian.
    """
    A, P = make_NPLR_HiPPO(n)
    normal = A + torch.outer(P, P)
    imag, V = torch.linalg.eigh(-0.5j * (normal - normal.mT))
    return torch.complex(torch.full_like(imag, -0.5), imag), V


def initial_C(C_init, h, V):
    """C V (h, p) for V (n, p). Real and imaginary part of C have variance 1/n each
    (lecun_normal), or are standard normal, cut at +-2 (trunc_standard_normal; in the
    official code 1/n of that variance); complex_normal draws C V itself, of variance 1."""
    choices = ("lecun_normal", "trunc_standard_normal", "complex_normal")
    check(C_init in choices, f"{C_init=}: choose from {choices}")
    n, p = V.shape
    if C_init == "complex_normal":
        return torch.randn(h, p, dtype=V.dtype)
    C = torch.randn(2, h, n, dtype=torch.float64) / n ** 0.5
    if C_init == "trunc_standard_normal":
        nn.init.trunc_normal_(C, a=-2.0, b=2.0)
    return torch.complex(C[0], C[1]) @ V


def check(ok, message):
    """Raise a ValueError unless ok. Not for rate or l: torch.compile can't print them."""
    if not ok:
        raise ValueError(message)


# ---- one signal in every mode ----

if __name__ == "__main__":
    torch.manual_seed(0)
    l, layer = 1024, S5(d_model=4)
    u = torch.randn(2, 4, l)
    y, state = layer(u, layer.initial_state(2))
    A_bar, B_bar, _ = layer.discretize()
    steps = [(A_bar, u_k.to(A_bar.dtype) @ B_bar.mT) for u_k in u.unbind(-1)]
    while len(steps) > 1:                               # combine by twos: a tree
        steps = [combine(*pair) for pair in zip(steps[::2], steps[1::2])]
    first, x = layer(u[..., :300], layer.initial_state(2))
    second, _ = layer(u[..., 300:], x)
    smooth = torch.linspace(0, 6, l).sin().expand(2, 4, l)
    full, _ = layer(smooth)
    half, _ = layer(smooth[..., 1::2], rate=2.0)
    for what, a, b in (("scan, recurrence", y, layer(u, method="step")[0]),
                       ("scan, convolution", y, layer(u, method="conv")[0]),
                       ("last state, tree of steps", state, steps[0][1]),
                       ("whole, two pieces", y, torch.cat([first, second], -1)),
                       ("rate 1, rate 2 (about equal)", full[..., 1::2], half)):
        print(f"{what:<36} differ by {(a - b).abs().max() / b.abs().max():.1e}")
