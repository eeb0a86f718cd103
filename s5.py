"""S5: one state space system for all features, and a scan.

    Smith, Warrington, Linderman: Simplified State Space Layers for Sequence Modeling
    (2022), arXiv 2208.04933.                         Try it: python s5.py

All h features u(t) together drive one linear system with n states, Lambda diagonal:

    x'(t) = Lambda x(t) + B u(t),    y(t) = C x(t) + D u(t).                       (1)

Each state has its step size dt. Hold u at u_k on the step that ends at sample k
(zero-order hold), and this is a recurrence:

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = 2 Re(C x_k) + D u_k,                 (2)
    A_bar = exp(dt Lambda),    B_bar = Lambda^{-1} (A_bar - 1) B.

With disc="bilinear" A_bar = (1 + dt/2 Lambda) / (1 - dt/2 Lambda), and
B_bar = dt / (1 - dt/2 Lambda) B.

What was wrong before. S4 and its relatives are h systems side by side, each with a single
input and a single output, and need another layer to mix the features. S5 is one system with
many inputs and many outputs: B and C mix, and the state has n numbers instead of h n.

Why a scan? An (h, h) kernel C A_bar^k B_bar for each k is too large. One FFT for each
state works too (fft_scan), but only while A_bar is the same at every step. A scan
needs no constant A_bar, so that samples may come at irregular times: rate may be one number
for each of them (section 6.3). With v = B_bar u_k two steps,

    x -> a x + v,  x -> a' x + v'    are one    x -> a'a x + (a'v + v').           (3)

This is associative: steps may be grouped in any way, so also in parallel: linear_scan.

Why complex, and why 2 Re? Eigenvalues of a real system come in conjugate pairs, as do B
and C, and the second of a pair adds the conjugate of what the first adds. So p = n/2 are
stored. With conj_sym=False, p = n independent ones, and y_k = Re(C x_k) + D u_k.

Where it starts. Lambda are the eigenvalues of the normal part of HiPPO-LegS, of size
n / blocks, once for each block. B and C are random, in the basis of its eigenvectors V:
V^{-1} B = V* B and C V. Differs from the official code: B has variance 1/h (there 1/n) and
C 1/n (there 1/(h n)), so that h does not change the size of y. n does: if u is constant,
y - D u has 0.91, 0.54, 0.31 of its size for n = 16, 64, 256.

Free-running dynamics from a state: layer(torch.zeros(b, h, n_steps), state).

Symbols: b batch, h features (d_model), n states (d_state), p stored states, l length.
u, y (b, h, l); x (b, p), Lambda, A_bar (p), B, B_bar (p, h), C (h, p) complex; dt (p);
D (h). If bidirectional, C is (h, 2p).
"""

import math
import numbers
from functools import reduce

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

    def hold(self, rate=1.0):
        """A_bar of (2), and what B is multiplied by in B_bar, at the step size rate * dt:
        (p) or, if rate is (..), (.., p), complex128."""
        check_rate(rate, self)
        if isinstance(rate, torch.Tensor):
            rate = rate.double()[..., None]             # the same for all states
        dt = rate * self.step_rescale * self.log_step.double().exp()
        real = self.Lambda_re.double()
        if self.clip_eigs:
            real = real.clamp(max=-1e-4)
        Lambda = torch.complex(real, self.Lambda_im.double())
        z = dt * Lambda
        if self.disc == "bilinear":
            return (1 + z / 2) / (1 - z / 2), dt / (1 - z / 2)
        limit = dt * (1 + z / 2 + z ** 2 / 6)           # at Lambda = 0, and 2 derivatives
        hold = torch.expm1(z) / torch.where(Lambda == 0, 1, Lambda)
        return torch.exp(z), torch.where(Lambda == 0, limit, hold)

    def matrices(self):
        """B (p, h) and C (h, p) complex128. If conj_sym, C is doubled: the 2 of (2)."""
        B = torch.complex(*self.B.double().unbind(-1))
        C = torch.complex(*self.C.double().unbind(-1))
        return B, 2 * C if self.conj_sym else C

    def discretize(self, rate=1.0):
        """(2) at rate * dt: A_bar (p), B_bar (p, h), C (h, p), see matrices, complex128,
        because an error of A_bar grows k-fold in A_bar^k."""
        A_bar, hold = self.hold(rate)
        B, C = self.matrices()
        return A_bar, hold[..., None] * B, C

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, p) complex128, so that rounding stays small."""
        return self.D.new_zeros(batch_size, self.p, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, p), rate one or (b) -> y (b, h), next state.
        discrete: what discretize(rate) returned, to use it for many steps."""
        check(not self.bidirectional, "bidirectional=True: it has no state and no step")
        check_input(u, 2, self.h, state, (self.p,), rate)
        fixed = isinstance(rate, numbers.Real) and rate == 1.0
        check(discrete is None or fixed, "rate is in discrete: pass it to discretize")
        A_bar, B_bar, C = discrete or self.discretize(rate)
        check(A_bar.shape[-1:] == state.shape[1:], "discrete: it was made by another layer")
        v = u.to(B_bar.dtype)[..., None, :] @ B_bar.mT          # (b, 1, p)
        x = A_bar * state + v[..., 0, :]                        # (b, p)
        y = (x @ C.mT).real + self.D * u                        # (b, h)
        return y.to(u.dtype), x

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, h, l), state (b, p) or None -> y (b, h, l), last state or None.

        rate: factor on dt: 2.0 for the same signal sampled half as often;
            or (b, l), one for each sample, for a signal that is sampled irregularly
        method: scan, conv (FFT, whose rounding is relative to the largest u), or step, (2)
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        stateful = state is not None or method == "step"
        check(not (self.bidirectional and stateful),
              "bidirectional=True: it has no state and no step")
        check_input(u, 3, self.h, state, (self.p,), rate)
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
        v = drive(hold, B, w)                                   # B_bar u_k, (b, l, p)
        x = scan(A_bar, v, start)                               # (b, l, p)
        last = None if state is None else x[:, -1].to(torch.complex128, copy=True)
        if self.bidirectional:
            future = scan(A_bar.flip(1) if varies else A_bar, v.flip(1), start).flip(1)
            x = torch.cat([x, future], -1)                      # (b, l, 2p)
        y = read(C, x) + self.D[:, None] * w                    # C has the 2 of (2)
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


# ---- all states at once: a (n), v (.., l, n), x (.., n) -> (.., l, n), with n = p ----

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
    official code variance 1/n); complex_normal draws C V itself, of variance 1."""
    choices = ("lecun_normal", "trunc_standard_normal", "complex_normal")
    check(C_init in choices, f"{C_init=}: choose from {choices}")
    n, p = V.shape
    if C_init == "complex_normal":
        return torch.randn(h, p, dtype=V.dtype)
    C = torch.randn(2, h, n, dtype=torch.float64) / n ** 0.5
    if C_init == "trunc_standard_normal":
        nn.init.trunc_normal_(C, a=-2.0, b=2.0)
    return torch.complex(C[0], C[1]) @ V


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
    l, layer = 1024, S5(d_model=4)
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
