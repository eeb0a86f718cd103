"""S5: one state space system for all features, and a scan.

    Smith, Warrington, Linderman: Simplified State Space Layers for Sequence Modeling
    (2022), arXiv 2208.04933.                         Try it: python s5.py

All h features u(t) together drive one linear system with n states, Lambda diagonal:

    x'(t) = Lambda x(t) + B u(t),    y(t) = C x(t) + D u(t).                       (1)

Sampled with one step size dt for each state, and zero-order hold, it is a recurrence:

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = C x_k + D u_k,                       (2)
    A_bar = exp(dt Lambda),    B_bar = Lambda^{-1} (A_bar - 1) B.

What was wrong before. S4 and its relatives run h separate systems with n states each, and
mix the features only afterwards. S5 has one system: B and C mix, and the state has n
numbers instead of h n.

Why a scan? With many inputs K_k = C A_bar^k B_bar is an (h, h) matrix for each k, too
large to convolve with. But two steps in a row, x -> a x + v and x -> a' x + v', are one:

    x -> a'a x + (a'v + v').                                                       (3)

This is associative: steps can be combined in any order, so in parallel: linear_scan.

Why complex, and why 2 Re? The eigenvalues of a real matrix come in conjugate pairs, and
the second of a pair adds the conjugate of what the first adds. So p = n/2 are stored, and
C x stands for 2 Re(C x). With conj_sym=False, p = n independent ones, and Re(C x).

Where it starts. Lambda are the eigenvalues of the normal part of HiPPO-LegS, of size
n / blocks, once for each block. B and C are random, in the basis of its eigenvectors V:
V^{-1} B = V* B and C V.

Free-running dynamics from a state: layer(torch.zeros(b, h, n_steps), state).

Symbols: b batch, h features (d_model), n states (d_state), p stored states, l length.
u, y (b, h, l); x (b, p), Lambda, A_bar (p), B, B_bar (p, h), C (h, p) complex; dt (p);
D (h). In both directions C is (h, 2p).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class S5(nn.Module):
    """(b, h, l) -> (b, h, l), with D, without activation.

    d_model, d_state: h, and n
    blocks: number of HiPPO blocks that Lambda starts from, a divisor of n
    C_init: lecun_normal, trunc_standard_normal or complex_normal, see initial_C
    disc: zoh (zero-order hold, as above) or bilinear
    conj_sym: store one of each conjugate pair (n / blocks even)
    clip_eigs: use min(Re Lambda, -1e-4), so that training cannot make the system unstable
    bidirectional: add C_2 z, z_k = A_bar z_{k+1} + B_bar u_k, with the second half C_2 of
        C; then without a state
    step_rescale: a constant factor on rate
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of Lambda
    lr: learning rate of dt, Lambda and B, stored in ssm_lr for the optimizer
    """

    def __init__(self, d_model, d_state=64, *, blocks=1, C_init="lecun_normal", disc="zoh",
                 conj_sym=True, clip_eigs=False, bidirectional=False, step_rescale=1.0,
                 dt_min=1e-3, dt_max=1e-1, lr=1e-3):
        super().__init__()
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
        """(2) at step size rate * dt: A_bar (p), B_bar (p, h), C (h, p) complex128,
        because an error of A_bar grows k-fold in A_bar^k."""
        if not 0 < rate < math.inf:
            raise ValueError(f"{rate=}: pass a positive number")
        check(self.D.dtype.itemsize > 2, f"parameters are {self.D.dtype}: use autocast")
        dt = rate * self.step_rescale * self.log_step.double().exp()
        real = self.Lambda_re.double()
        if self.clip_eigs:
            real = real.clamp(max=-1e-4)
        Lambda = torch.complex(real, self.Lambda_im.double())
        Lambda = torch.where(Lambda == 0, 1e-12, Lambda)        # there B_bar is its limit
        B = torch.view_as_complex(self.B.double())
        C = torch.view_as_complex(self.C.double())
        if self.conj_sym:
            C = 2 * C                                           # 2 for the pairs
        if self.disc == "bilinear":
            half = dt * Lambda / 2
            return (1 + half) / (1 - half), (dt / (1 - half))[:, None] * B, C
        hold = torch.expm1(dt * Lambda) / Lambda
        return torch.exp(dt * Lambda), hold[:, None] * B, C

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, p) complex128, for rounding adds up over the steps."""
        return self.D.new_zeros(batch_size, self.p, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, p) -> y (b, h), next state.
        discrete: what discretize() returned, to use it for many steps."""
        self.check_input(u, 2, state)
        A_bar, B_bar, C = discrete or self.discretize(rate)
        x = A_bar * state + u.to(B_bar.dtype) @ B_bar.mT        # (b, p)
        y = (x @ C.mT).real + self.D * u                        # (b, h)
        return y.to(u.dtype), x

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, h, l), state (b, p) or None -> y (b, h, l), last state or None.

        rate: factor on dt: 2.0 for the same signal sampled half as often
        method: scan, conv (of each state, by FFT) or step: the same numbers
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        self.check_input(u, 3, state)
        check(method in ("scan", "conv", "step"), f"{method=}: choose scan, conv or step")
        A_bar, B_bar, C = self.discretize(rate)
        start = self.initial_state(len(u)) if state is None else state
        scan = {"scan": linear_scan, "conv": fft_scan, "step": loop_scan}[method]
        dtype = self.D.dtype
        with full_precision(u):
            B = as_real(B_bar.mT).to(dtype).expand(len(u), -1, -1)      # (b, h, 2p)
            v = torch.bmm(u.to(dtype).mT, B)        # (b, l, 2p); @ would copy u
            v = torch.view_as_complex(v.unflatten(-1, (-1, 2)))         # (b, l, p)
            x = scan(A_bar, v, start)
            last = x[:, -1].to(torch.complex128)
            if self.bidirectional:
                future = scan(A_bar, v.flip(1), start).flip(1)
                x = torch.cat([x, future], -1)                          # (b, l, 2p)
            y = as_real(C.conj()).to(dtype) @ as_real(x).to(dtype).mT   # (b, h, l)
            y = torch.addcmul(y, self.D[:, None], u.to(dtype))
        return y.to(u.dtype), None if state is None else last

    def check_input(self, u, dims, state):
        """dims 2: u (b, h); dims 3: u (b, h, l); state (b, p) or None."""
        fits = u.dim() == dims and u.shape[1] == self.h and u.numel() > 0
        check(fits and u.is_floating_point(),
              f"u is {u.dtype} {tuple(u.shape)}: pass floats, {self.h} features, {dims}-d")
        if state is not None:
            check(not self.bidirectional, "bidirectional=True: it has no state, pass False")
            check(state.shape == (len(u), self.p) and state.is_complex(),
                  "state: pass one of the shape and type of initial_state()")


# ---- all states at once, in three ways, n stored: a (n), v (b, l, n), x (b, n) ----

def loop_scan(a, v, x):
    """The definition: x_k = a x_{k-1} + v_k from x_{-1} = x, in the precision of a."""
    states = []
    for v_k in v.unbind(1):
        x = a * x + v_k
        states.append(x)
    return torch.stack(states, 1)


def linear_scan(a, v, x, T=32):
    """The same by (3), in J blocks of T steps: at most 2T steps on each of log_T l levels.

    First all blocks at once, each from 0: that combines the steps of a block to one,
    x -> a^T x + end. Where the blocks really start is then a scan of these ends, by this
    function, from x. Then all blocks at once again, from there. T is small: so a, rounded
    to the precision of v, is multiplied T times at most, and a^T comes from double
    precision. Of such T, 32 is the fastest, measured.
    """
    l = v.shape[1]
    T = min(l, T)                                       # a short sequence is one block
    if l % T > 0:
        v = F.pad(v, (0, 0, 0, (-l) % T))               # zeros at the end: a full block
    steps = v.unflatten(1, (-1, T)).unbind(2)           # T of (b, J, n)
    a_v = a.to(v.dtype)
    state = x[:, None].to(v.dtype)                      # (b, 1, n): where the first starts
    if l > T:
        end = steps[0]
        for step in steps[1:]:
            end = torch.addcmul(step, a_v, end)
        after = linear_scan(a ** T, end[:, :-1], x, T)
        state = torch.cat([state, after], 1)            # (b, J, n): where each starts
    states = []
    for step in steps:
        state = torch.addcmul(step, a_v, state)
        states.append(state)
    return torch.stack(states, 2).flatten(1, 2)[:, :l]


def fft_scan(a, v, x):
    """The same by FFT: each state convolves v with the powers of a. l zeros: no wrap."""
    l = v.shape[1]
    powers = torch.linalg.vander(a, N=l + 1).mT         # (l + 1, n)
    a_k = powers[:l].to(v.dtype)
    product = torch.fft.fft(v, 2 * l, dim=1) * torch.fft.fft(a_k, 2 * l, dim=0)
    states = torch.fft.ifft(product, dim=1)[:, :l]
    return states + (powers[1:] * x[:, None]).to(v.dtype)


def as_real(z):
    """(.., n) complex as (.., 2n) real: Re(v w) is as_real(v) times as_real(w conj)."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


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
    (lecun_normal), or are standard normal and cut at +-2 (trunc_standard_normal);
    complex_normal draws C V itself, with variance 1."""
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
    l, layer = 1000, S5(d_model=4)
    u = torch.randn(2, 4, l)
    y, _ = layer(u)
    stepped, _ = layer(u, method="step")
    convolved, _ = layer(u, method="conv")
    first, state = layer(u[..., :300], layer.initial_state(2))
    second, state = layer(u[..., 300:], state)
    smooth = torch.linspace(0, 6, l).sin().expand(2, 4, l)
    full, _ = layer(smooth)
    half, _ = layer(smooth[..., 1::2], rate=2.0)
    for what, a, b in (("scan, recurrence", y, stepped),
                       ("scan, convolution", y, convolved),
                       ("whole, two pieces", y, torch.cat([first, second], -1)),
                       ("rate 1, every second at rate 2: about", full[..., 1::2], half)):
        print(f"{what:<36} differ by {(a - b).abs().max() / b.abs().max():.1e}")
