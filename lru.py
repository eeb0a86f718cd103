"""LRU: the linear recurrent unit, a diagonal recurrence without a differential equation.

    Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De: Resurrecting Recurrent Neural
    Networks for Long Sequences (2023), arXiv 2303.06349.        Try it: python lru.py

All h features u together drive n complex numbers x:

    x_k = lambda x_{k-1} + gamma B u_k,    y_k = Re(C x_k) + D u_k.                (1)

What was wrong before. S4 to S5 start from a differential equation, HiPPO and a
discretization. LRU asks what of it is needed, and finds: a complex diagonal recurrence,
stable by construction, that starts near the unit circle, with a normalized input.

Stable: lambda = exp(-exp(nu_log) + i exp(theta_log)), so |lambda| < 1 (section 3.3).
Near the circle: |lambda|^2 starts uniform in (r_min^2, r_max^2), a ring (Lemma 3.2); by
default the whole disk, for long sequences r_min near 1.
Normalized: with white noise as input |x|^2 grows to 1 / (1 - |lambda|^2) if gamma is 1. So
gamma starts as sqrt(1 - |lambda|^2), and is trained as exp(gamma_log) (section 3.4).

Why no factor 2? The n numbers are independent, no conjugate pairs: the real part alone
makes the output real.

What does rate mean, without a step size? Rate 2 is two steps of (1) with the same u: then
lambda becomes lambda^2, and gamma B becomes (lambda + 1) gamma B. For any rate, likewise,

    x_k = A_bar x_{k-1} + B_bar u_k,    A_bar = lambda^rate,                       (2)
    B_bar = (lambda^rate - 1) / (lambda - 1) gamma B.

Why a scan? With many inputs K_k = C A_bar^k B_bar is an (h, h) matrix for each k, too
large to convolve with. But two steps in a row, x -> a x + v and x -> a' x + v', are one:

    x -> a'a x + (a'v + v').                                                       (3)

This is associative: steps can be combined in any order, so in parallel: linear_scan.

Free-running dynamics from a state: layer(torch.zeros(b, h, n_steps), state).

Symbols: b batch, h features (d_model), n states (d_state), l length. u, y (b, h, l);
x (b, n), lambda, A_bar (n), B, B_bar (n, h), C (h, n) complex; gamma (n), D (h) real.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class LRU(nn.Module):
    """(b, h, l) -> (b, h, l), with D, without activation.

    d_model, d_state: h, and n
    r_min, r_max: |lambda| starts between these, 0 <= r_min < r_max <= 1
    max_phase: the phase of lambda starts between 0 and this, in radians per step
    lr: learning rate of lambda, gamma and B, stored in ssm_lr for the optimizer
    """

    def __init__(self, d_model, d_state=64, *, r_min=0.0, r_max=1.0, max_phase=6.283,
                 lr=1e-3):
        super().__init__()
        check(d_state > 0, f"{d_state=}: pass a positive number")
        check(0 <= r_min < r_max <= 1, f"{r_min=}, {r_max=}: pass 0 <= r_min < r_max <= 1")
        check(0 < max_phase < math.inf, f"{max_phase=}: pass a positive number")
        self.h, self.n = d_model, d_state
        D = torch.randn(d_model)
        # uniform in area on a ring, without the very ends, where a logarithm is infinite
        uniform = 1e-6 + (1 - 2e-6) * torch.rand(2, d_state, dtype=torch.float64)
        square = uniform[0] * (r_max ** 2 - r_min ** 2) + r_min ** 2    # |lambda|^2
        self.nu_log = nn.Parameter(torch.log(-0.5 * torch.log(square)).to(D))
        self.theta_log = nn.Parameter(torch.log(max_phase * uniform[1]).to(D))
        self.gamma_log = nn.Parameter(0.5 * torch.log(1 - square).to(D))
        self.B = nn.Parameter(torch.randn(d_state, d_model, 2) / (2 * d_model) ** 0.5)
        self.C = nn.Parameter(torch.randn(d_model, d_state, 2) / d_state ** 0.5)
        self.D = nn.Parameter(D)
        self.ssm_lr = {"nu_log": lr, "theta_log": lr, "gamma_log": lr, "B": lr}

    def discretize(self, rate=1.0):
        """(2): A_bar (n), B_bar (n, h), C (h, n) complex128,
        because an error of A_bar grows k-fold in A_bar^k."""
        if not 0 < rate < math.inf:
            raise ValueError(f"{rate=}: pass a positive number")
        check(self.D.dtype.itemsize > 2, f"parameters are {self.D.dtype}: use autocast")
        # a phase just below 2 pi is a slow rotation backwards: theta in [-pi, pi)
        theta = self.theta_log.double().exp()
        theta = torch.remainder(theta + math.pi, 2 * math.pi) - math.pi
        log = torch.complex(-self.nu_log.double().exp(), theta)         # of lambda
        gain = self.gamma_log.double().exp() * torch.expm1(rate * log) / torch.expm1(log)
        B_bar = gain[:, None] * torch.view_as_complex(self.B.double())
        return torch.exp(rate * log), B_bar, torch.view_as_complex(self.C.double())

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, n) complex128, for rounding adds up over the steps."""
        return self.D.new_zeros(batch_size, self.n, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, n) -> y (b, h), next state.
        discrete: what discretize() returned, to use it for many steps."""
        self.check_input(u, 2, state)
        A_bar, B_bar, C = discrete or self.discretize(rate)
        x = A_bar * state + u.to(B_bar.dtype) @ B_bar.mT        # (b, n)
        y = (x @ C.mT).real + self.D * u                        # (b, h)
        return y.to(u.dtype), x

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, h, l), state (b, n) or None -> y (b, h, l), last state or None.

        rate: 2.0 for the same signal sampled half as often, see (2)
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
            B = as_real(B_bar.mT).to(dtype).expand(len(u), -1, -1)      # (b, h, 2n)
            v = torch.bmm(u.to(dtype).mT, B)        # (b, l, 2n); @ would copy u
            v = torch.view_as_complex(v.unflatten(-1, (-1, 2)))         # (b, l, n)
            x = scan(A_bar, v, start)
            y = as_real(C.conj()).to(dtype) @ as_real(x).to(dtype).mT   # (b, h, l)
            y = torch.addcmul(y, self.D[:, None], u.to(dtype))
        return y.to(u.dtype), None if state is None else x[:, -1].to(torch.complex128)

    def check_input(self, u, dims, state):
        """dims 2: u (b, h); dims 3: u (b, h, l); state (b, n) or None."""
        fits = u.dim() == dims and u.shape[1] == self.h and u.numel() > 0
        check(fits and u.is_floating_point(),
              f"u is {u.dtype} {tuple(u.shape)}: pass floats, {self.h} features, {dims}-d")
        if state is not None:
            check(state.shape == (len(u), self.n) and state.is_complex(),
                  "state: pass one of the shape and type of initial_state()")


# ---- all states at once, in three ways: a (n), v (b, l, n), x (b, n) -> (b, l, n) ----

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


def check(ok, message):
    """Raise a ValueError unless ok. Not for rate or l: torch.compile can't print them."""
    if not ok:
        raise ValueError(message)


# ---- one signal in every mode ----

if __name__ == "__main__":
    torch.manual_seed(0)
    l, layer = 1000, LRU(d_model=4, r_min=0.9, max_phase=0.3)
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
