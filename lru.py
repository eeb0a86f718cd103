"""LRU: the linear recurrent unit, a diagonal recurrence without a differential equation.

    Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De: Resurrecting Recurrent Neural
    Networks for Long Sequences (2023), arXiv 2303.06349.        Try it: python lru.py

A recurrent network has a matrix A and a nonlinearity in its loop:

    x_k = tanh(A x_{k-1} + B u_k),    y_k = C x_k + D u_k.                         (1)

What was wrong before. (1) trains one step after the other, and its gradients vanish or
explode. S4 to S5 solve both, by a differential equation, HiPPO and a discretization. LRU
asks what of that is needed, and starts from (1): drop the nonlinearity (the network around
the layer has others) and diagonalize A. All h features then drive n complex numbers x:

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = Re(C x_k) + D u_k,                   (2)
    A_bar = lambda,    B_bar = gamma B.

Stable: lambda = exp(-exp(nu_log) + i exp(theta_log)), so |lambda| < 1 (section 3.3).
Long memory: |lambda|^2 starts uniform in (r_min^2, r_max^2), a ring (Lemma 3.2). By default
that is the disk; for long sequences the paper takes r_min near 1 and small phases.
Normalized: B starts so that B u has variance 1 for white noise u of variance 1. With
gamma = 1, E|x|^2 would tend to 1 / (1 - |lambda|^2). So gamma starts as
sqrt(1 - |lambda|^2), and is trained as exp(gamma_log) (section 3.4).

Why no factor 2? The n numbers are independent, no conjugate pairs: the real part alone
makes the output real.

What does rate mean, without a step size? Not in the paper; here rate 2 is two steps with
the same u: lambda becomes lambda^2, and gamma B becomes (lambda + 1) gamma B. In general
A_bar = lambda^rate = exp(rate log lambda), with the angle of lambda in [-pi, pi), and
B_bar = (lambda^rate - 1) / (lambda - 1) gamma B.

Why a scan? An (h, h) kernel C A_bar^k B_bar for each k is too large. One FFT for each
state works too (fft_scan), but only while A_bar is the same at every step. A scan needs no
constant A_bar: rate may be one number for each sample. With v = B_bar u_k two steps,

    x -> a x + v,  x -> a' x + v'    are one    x -> a'a x + (a'v + v').           (3)

This is associative: steps may be grouped in any way, so also in parallel: linear_scan.

Free-running dynamics from a state: layer(torch.zeros(b, h, n_steps), state).

Symbols: b batch, h features (d_model), n states (d_state), l length. u, y (b, h, l);
x (b, n), lambda, A_bar (n), B, B_bar (n, h), C (h, n) complex; gamma (n), D (h) real.
"""

import math
import numbers
from functools import reduce

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class LRU(nn.Module):
    """(b, h, l) -> (b, h, l), with D, without activation.

    d_model, d_state: h, and n complex numbers for all features together
    r_min, r_max: |lambda| starts between these, 0 <= r_min < r_max <= 1
    max_phase: the phase of lambda starts in (0, max_phase), in radians; 2 pi is the disk
    lr: learning rate of lambda, gamma and B, stored in ssm_lr for the optimizer
    """

    def __init__(self, d_model, d_state=64, *, r_min=0.0, r_max=1.0, max_phase=2 * math.pi,
                 lr=1e-3):
        super().__init__()
        check(d_model > 0 and lr >= 0, f"{d_model=}, {lr=}: pass d_model > 0 and lr >= 0")
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

    def hold(self, rate=1.0):
        """A_bar of (2), and what B is multiplied by in B_bar, at this rate: (n) or, if rate
        is (..), (.., n), complex128."""
        check_rate(rate, self)
        if isinstance(rate, torch.Tensor):
            rate = rate.double()[..., None]             # the same for all states
        # a phase just below 2 pi is a slow rotation backwards: theta in [-pi, pi)
        theta = self.theta_log.double().exp()
        theta = torch.remainder(theta + math.pi, 2 * math.pi) - math.pi
        log = torch.complex(-self.nu_log.double().exp(), theta)         # log lambda
        gamma = self.gamma_log.double().exp()
        return torch.exp(rate * log), gamma * torch.expm1(rate * log) / torch.expm1(log)

    def matrices(self):
        """B (n, h) and C (h, n) complex128."""
        B = torch.complex(*self.B.double().unbind(-1))
        C = torch.complex(*self.C.double().unbind(-1))
        return B, C

    def discretize(self, rate=1.0):
        """(2) at this rate: A_bar (n), B_bar (n, h), C (h, n) complex128,
        because an error of A_bar grows k-fold in A_bar^k."""
        A_bar, hold = self.hold(rate)
        B, C = self.matrices()
        return A_bar, hold[..., None] * B, C

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, n) complex128, so that rounding stays small."""
        return self.D.new_zeros(batch_size, self.n, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, n), rate one or (b) -> y (b, h), next state.
        discrete: what discretize(rate) returned, to use it for many steps."""
        check_input(u, 2, self.h, state, (self.n,), rate)
        fixed = isinstance(rate, numbers.Real) and rate == 1.0
        check(discrete is None or fixed, "rate is in discrete: pass it to discretize")
        A_bar, B_bar, C = discrete or self.discretize(rate)
        check(A_bar.shape[-1:] == state.shape[1:], "discrete: it was made by another layer")
        v = u.to(B_bar.dtype)[..., None, :] @ B_bar.mT          # (b, 1, n)
        x = A_bar * state + v[..., 0, :]                        # (b, n)
        y = (x @ C.mT).real + self.D * u                        # (b, h)
        return y.to(u.dtype), x

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, h, l), state (b, n) or None -> y (b, h, l), last state or None.

        rate: 2.0 for the same signal sampled half as often, see above;
            or (b, l), one for each sample, for a signal that is sampled irregularly
        method: scan, conv (FFT, whose rounding is relative to the largest u), or step, (2)
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        check_input(u, 3, self.h, state, (self.n,), rate)
        check(method in ("scan", "conv", "step"), f"{method=}: choose scan, conv or step")
        varies = isinstance(rate, torch.Tensor)
        check(not varies or method != "conv", "rate varies: choose method scan or step")
        if method == "step":
            return self.recurrence(u, state, rate)
        A_bar, hold = self.hold(rate)
        B, C = self.matrices()
        scan = linear_scan if method == "scan" else fft_scan
        start = self.initial_state(u.shape[0]) if state is None else state
        w = u.to(self.D.dtype)
        v = drive(hold, B, w)                                   # B_bar u_k, (b, l, n)
        x = scan(A_bar, v, start)                               # (b, l, n)
        y = read(C, x) + self.D[:, None] * w                    # Re(C x_k) + D u_k
        last = None if state is None else x[:, -1].to(torch.complex128, copy=True)
        return y.to(u.dtype), last

    def recurrence(self, u, state, rate):
        """(2), one step after the other: equal to the parallel form up to rounding."""
        x = self.initial_state(u.shape[0]) if state is None else state
        if isinstance(rate, torch.Tensor):
            options = [{"rate": rate_k} for rate_k in rate.unbind(-1)]
        else:
            options = u.shape[-1] * [{"discrete": self.discretize(rate)}]
        outputs = []
        for u_k, how in zip(u.unbind(-1), options, strict=True):
            y_k, x = self.step(u_k, x, **how)
            outputs.append(y_k)
        return torch.stack(outputs, -1), None if state is None else x


# ---- all states at once: a (n), v (.., l, n), x (.., n) -> (.., l, n) ----

def drive(hold, B, u):
    """hold * (B u_k) for all k: hold (n) or (b, l, n), B (n, h), u (b, h, l) -> (b, l, n)
    complex. B u is one product of real matrices, Re and Im of B side by side, because
    u is real: half the arithmetic of a complex product."""
    if hold.dim() == 1:
        B = hold[:, None] * B
    B = torch.view_as_real(B.mT.contiguous()).flatten(-2).to(u.dtype)   # (h, 2n)
    with full_precision(u):
        v = torch.bmm(u.mT, B.expand(u.shape[0], -1, -1))   # (b, l, 2n); @ copies u.mT
    v = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())
    return v if hold.dim() == 1 else hold.to(v.dtype) * v


def read(C, x):
    """Re(C x_k) for all k: C (h, n), x (b, l, n) -> (b, h, l). One real product likewise,
    for Re(C x) is Re C Re x - Im C Im x."""
    x = torch.view_as_real(x).flatten(-2)                               # (b, l, 2n)
    C = torch.stack([C.real, -C.imag], -1).flatten(-2).to(x.dtype)      # (h, 2n)
    with full_precision(x):
        return C @ x.mT


def combine(first, second):
    """(3): two steps in a row as one step. A step is the pair (a, v) of x -> a x + v."""
    a, v = first
    a_next, v_next = second
    return a_next * a, torch.addcmul(v_next, a_next, v)


def loop_scan(a, v, x):
    """The definition: x_k = a_k x_{k-1} + v_k from x_{-1} = x."""
    states = []
    for a_k, v_k in zip(each(a, v.shape[-2]), v.unbind(-2)):
        x = torch.addcmul(v_k, a_k, x)                  # a_k x + v_k
        states.append(x)
    return torch.stack(states, -2)


def each(a, l):
    """The a of each of l steps: a (n) is that of all, a (.., l, n) has one for each."""
    return l * [a] if a.dim() == 1 else a.unbind(-2)


def linear_scan(a, v, x, T=32):
    """The same, in J chunks of T steps, side by side. Here J = 3 and T = 2:

        steps     v0 v1 | v2 v3 | v4 v5
        ends         e0 |    e1 |    e2   of each chunk, begun at 0: e0 = a1 v0 + v1
        starts    x     | x1    | x3      a scan of the ends, by (3): x1 = a1 a0 x + e0
        states    x0 x1 | x2 x3 | x4 x5   each chunk from its start: x2 = a2 x1 + v2

    So a loop of l steps becomes at most 2T steps on each of about log_T(l) levels, 95 in
    all for l = 1024. Rounding a to the precision of v adds up over T steps, not over l: the
    product of a chunk is in double.
    """
    check(T > 1, f"{T=}: pass a chunk length of 2 or more")
    l = v.shape[-2]
    if l <= T:
        return loop_scan(a.to(v.dtype), v, x.to(v.dtype))
    chunks = F.pad(v, (0, 0, 0, -l % T)).unflatten(-2, (-1, T))     # (.., J, T, n)
    if a.dim() == 1:
        product = a ** T                                            # of a chunk
    else:                                                           # a (.., l, n) varies
        a = F.pad(a, (0, 0, 0, -l % T)).unflatten(-2, (-1, T))
        product = reduce(torch.mul, a.unbind(-2))[..., :-1, :]
    a_v = a.to(v.dtype)
    end = torch.zeros_like(chunks[..., 0, :])                       # (.., J, n)
    for a_i, v_i in zip(each(a_v, T), chunks.unbind(-2)):
        end = torch.addcmul(v_i, a_i, end)
    later = linear_scan(product, end[..., :-1, :], x, T)
    starts = torch.cat([x.to(v.dtype)[..., None, :], later], -2)    # (.., J, n)
    return loop_scan(a_v, chunks, starts).flatten(-3, -2)[..., :l, :]


def fft_scan(a, v, x):
    """The same by FFT, in double precision: v convolved with the powers of a, per state.
    l zeros keep the FFT, which convolves on a circle, from wrapping around."""
    l = v.shape[-2]
    a_k = all_powers(a, l + 1)                                          # (l + 1, n)
    product = torch.fft.fft(v.to(a.dtype), 2 * l, -2) * torch.fft.fft(a_k[:l], 2 * l, -2)
    states = torch.fft.ifft(product, dim=-2)[..., :l, :]
    return (states + a_k[1:] * x[..., None, :]).to(v.dtype)


def all_powers(a, count):
    """1, a, a^2, ... by doubling: a (n) -> (count, n)."""
    x = torch.ones_like(a)[None]
    while len(x) < count:
        x = torch.cat([x, a * x])                       # a is the m-th, x has m powers
        a = a * a
    return x[:count]


def full_precision(u):
    """Switch autocast off: half precision is too coarse for a long recurrence."""
    return torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False)


def check_input(u, dims, h, state, shape, rate):
    """dims 2: u (b, h), a state (b, *shape), rate a number or (b);
    dims 3: u (b, h, l), a state or None, rate a number or (b, l)."""
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
    if isinstance(rate, torch.Tensor):
        wanted = (u.shape[0], *u.shape[2:])
        check(rate.shape == wanted, f"rate is {tuple(rate.shape)}: pass one or {wanted}")


def check_rate(rate, layer):
    """Positive, one or a tensor, and parameters precise enough to be discretized."""
    if isinstance(rate, torch.Tensor):
        if not torch.compiler.is_compiling():           # a graph cannot look at numbers
            check((rate > 0).all() and rate.isfinite().all(),
                  "rate is not positive or not finite somewhere: pass positive numbers")
    elif not isinstance(rate, numbers.Real) or not 0 < rate < math.inf:
        raise ValueError(f"{rate=}: pass one positive number or a tensor of them")
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
    l, layer = 1024, LRU(d_model=4, r_min=0.9, max_phase=0.3)
    u = torch.randn(2, 4, l)
    y, state = layer(u, layer.initial_state(2))
    A_bar, B_bar, _ = layer.discretize()
    steps = [(A_bar, u_k.to(A_bar.dtype) @ B_bar.mT) for u_k in u.unbind(-1)]
    while len(steps) > 1:                   # combine by twos, a tree: l is a power of 2
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
