"""LSSL: the dense layer that became S4, and what its state means.

    Gu, Johnson, Goel, Saab, Dao, Rudra, Re: Combining Recurrent, Convolutional, and
    Continuous-time Models with Linear State-Space Layers (2021), arXiv 2110.13985.
    HiPPO: arXiv 2008.07669.                          Try it: python lssl.py

Each of the h features u(t) drives a linear system of its own, with n states:

    x'(t) = A x(t) + B u(t),    y(t) = C x(t) + D u(t).                            (1)

Sampled every dt, this is a recurrence, and unrolled, from x_{-1} = 0, a convolution:

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = C x_k + D u_k,                       (2)
    y = K * u + D u,    K_k = C A_bar^k B_bar.                                     (3)

What was wrong before. An ODE, a recurrent or a convolutional network alone lacks what the
others have. The idea. One model, three views: (1) has a time scale, so the sampling rate
can change, (2) generates in constant time per step, (3) trains in parallel.

What does the state mean? HiPPO chooses A and B so that x(t) holds the coefficients of the
past of u in a basis of Legendre polynomials P_i. With s the time before t:

    legt, a sliding window:    u(t - s) ~ sum_i x_i(t) sqrt(2i+1) P_i(1 - 2s)      (4)
    legs, all of the past:     u(t - s) ~ sum_i x_i(t) sqrt(2i+1) P_i(2 e^{-s} - 1)

The state is a compressed history, and C reads from it what the task needs. The window is
0 < s < 1, and the unit of time, that of A, is 1/dt samples. Differs from HiPPO: LegS there
has a factor 1/t and weighs all of the past equally. Here, as in LSSL, it fades with e^{-s}.

How can a sliding window know what leaves it? It reads u(t - 1) from x, by (4). So in legt x
is not quite the projection of u: for sin(12 t) it is off by 150% with n = 4, 10% with 8 and
2e-6 with 16. In legs nothing leaves, and x is the projection. Take legs if it is not known
how far back to look, legt if all of a window of known length matters alike.

Discretization. The generalized bilinear transform takes A x at the end of a step with
weight alpha, at its beginning with 1 - alpha, and u_k for the whole step. Solve for x_k:

    (x_k - x_{k-1}) / dt = A (alpha x_k + (1 - alpha) x_{k-1}) + B u_k,            (5)
    A_bar = (1 - alpha dt A)^{-1} (1 + (1 - alpha) dt A),
    B_bar = (1 - alpha dt A)^{-1} dt B.

alpha = 0 is forward Euler, 1 backward Euler, 1/2 bilinear. From 1/2 up a stable A gives a
stable A_bar at any dt; below, only if dt is small.

Why S4? A dense A_bar costs n^2 operations a step and n^3 log l a kernel, and nothing keeps
a trained A stable. Differs from the paper: train_A trains all of A, not a structured class.
Differs from the official code: C starts with variance 1/n, there 1. The size of y does not
depend on n, then, if u is white noise; with variance 1 it does not if u is smooth.

Symbols: b batch, h features (d_model), n states (d_state), l length, m channels.
u (b, h, l); y (b, m h, l); x (b, h, n); A (n, n), B (n), or one for each feature;
A_bar (h, n, n); B_bar (h, n); C (m, h, n); D (m, h); dt (h); K (m h, l).
"""

import math
import numbers

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class LSSL(nn.Module):
    """(b, h, l) -> (b, m h, l), with D, without activation and without mixing of features.

    d_model, d_state: h, and n real numbers for each feature
    measure: where A and B start: legs or legt, see hippo_legendre
    alpha: 0 forward Euler, 0.5 bilinear, 1 backward Euler, or in between
    channels: m outputs for each feature: channel c of feature i is output c h + i
    train_A: no, or train A and B: shared (one for all features) or each (one for each)
    train_dt: whether dt is trained too
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of A
    lr: learning rate of A, B and dt, if trained, which is for you to pass to the optimizer:
        ssm_lr has it for each name, and param_groups in example.py reads that

    forward computes the powers of A_bar at each call, also where A and dt are fixed. Once
    trained, K = layer.kernel(l) can be kept; with one channel, for any u of that length,
    y = fft_conv(u, K) + layer.D.mT * u.
    """

    def __init__(self, d_model, d_state=64, *, measure="legs", alpha=0.5, channels=1,
                 train_A="no", train_dt=False, dt_min=1e-3, dt_max=1e-1, lr=1e-3):
        super().__init__()
        check(d_model > 0 and lr >= 0, f"{d_model=}, {lr=}: pass d_model > 0 and lr >= 0")
        check(0 <= alpha <= 1, f"{alpha=}: pass a number from 0 to 1")
        check(channels > 0, f"{channels=}: pass a positive number")
        check(train_A in ("no", "shared", "each"), f"{train_A=}: choose no, shared or each")
        check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")
        self.h, self.n, self.alpha = d_model, d_state, alpha
        A, B = hippo_legendre(measure, d_state)
        if train_A == "each":
            A = A.repeat(d_model, 1, 1)                         # (h, n, n)
            B = B.repeat(d_model, 1)                            # (h, n)
        log_dt = math.log(dt_min) + torch.rand(d_model) * math.log(dt_max / dt_min)
        self.log_dt = nn.Parameter(log_dt, requires_grad=train_dt)
        self.A = nn.Parameter(A.to(log_dt), requires_grad=train_A != "no")
        self.B = nn.Parameter(B.to(log_dt), requires_grad=train_A != "no")
        self.C = nn.Parameter(torch.randn(channels, d_model, d_state) / d_state ** 0.5)
        self.D = nn.Parameter(torch.randn(channels, d_model))
        names = ("A", "B", "log_dt")
        self.ssm_lr = {name: lr for name in names if getattr(self, name).requires_grad}
        if alpha < 0.5 and not log_dt.is_meta:                  # meta: without numbers
            # needed, not enough: A is not normal, so that K may be huge before it fades
            radius = torch.linalg.eigvals(self.discretize()[0]).abs().max()
            check(radius <= 1, f"{alpha=}, {dt_max=}: A_bar has an eigenvalue outside of "
                  "the unit circle, pass a smaller dt_max, or alpha from 0.5")

    def discretize(self, rate=1.0):
        """(5) at step size rate * dt: A_bar (h, n, n), B_bar (h, n), C (m, h, n) float64,
        because an error of A_bar grows k-fold in A_bar^k."""
        check_rate(rate, self)
        dt = rate * self.log_dt.double().exp()[:, None]         # (h, 1)
        dtA = dt[..., None] * self.A.double()                   # (h, n, n)
        dtB = dt * self.B.double()                              # (h, n)
        eye = torch.eye(self.n, dtype=dt.dtype, device=dt.device)
        inverse = torch.linalg.inv(eye - self.alpha * dtA)
        A_bar = inverse @ (eye + (1 - self.alpha) * dtA)
        return A_bar, matvec(inverse, dtB), self.C.double()

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, h, n) float64, so that rounding stays small."""
        return self.D.new_zeros(batch_size, self.h, self.n, dtype=torch.float64)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, h, n) -> y (b, m h), next state.
        discrete: what discretize(rate) returned, to use it for many steps."""
        check_input(u, 2, self.h, state, (self.h, self.n))
        check(discrete is None or rate == 1.0, "rate is in discrete: pass it to discretize")
        A_bar, B_bar, C = discrete or self.discretize(rate)
        fits = A_bar.shape == (self.h, self.n, self.n)
        check(fits, "discrete: it was made by another layer")
        x = matvec(A_bar, state.double()) + B_bar * u[..., None]        # (b, h, n)
        y = (C * x[:, None]).sum(-1) + self.D * u[:, None]              # (b, m, h)
        return y.flatten(1).to(u.dtype), x

    def kernel(self, l, rate=1.0):
        """(3): (m h, l), K[:, k] = C A_bar^k B_bar for k < l, from the state B_bar."""
        if l < 1:
            raise ValueError(f"{l=}: pass a positive length")
        A_bar, B_bar, C = self.discretize(rate)
        with full_precision(self.D):
            A_k = squares(A_bar, l, self.D.dtype)
            K = free_response(C.to(self.D), A_k, B_bar[None].to(self.D), l)
        return K[0].flatten(0, 1)

    def forward(self, u, state=None, *, rate=1.0, method="conv"):
        """u (b, h, l), state (b, h, n) or None -> y (b, m h, l), last state or None.

        rate: factor on dt: 2.0 for the same signal sampled half as often
        method: conv, (3), whose rounding errors are in proportion to max |u|, or step, (2)
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        check_input(u, 3, self.h, state, (self.h, self.n))
        check(method in ("conv", "step"), f"{method=}: choose conv or step")
        if method == "step":
            return self.recurrence(u, state, rate)
        l = u.shape[-1]
        v = u.to(self.D.dtype)
        K = self.kernel(l, rate).unflatten(0, (-1, self.h))             # (m, h, l)
        y = fft_conv(v[:, None], K) + self.D[..., None] * v[:, None]    # (3): (b, m, h, l)
        if state is None:
            return y.flatten(1, 2).to(u.dtype), None
        A_bar, B_bar, C = self.discretize(rate)
        with full_precision(v):
            A_k = squares(A_bar, l, v.dtype)
            x = matvec(A_bar, state.double()).to(v)                     # (b, h, n)
            # x adds C A_bar^k x to y_k, and A_bar^{l-1} x to the last state
            y = y + free_response(C.to(v), A_k, x, l)
            last = advance(x, A_k, l - 1) + last_state(v, B_bar.to(v), A_k)
        return y.flatten(1, 2).to(u.dtype), last.double()

    def recurrence(self, u, state, rate):
        """(2), one step after the other: equal to the parallel form up to rounding."""
        x = self.initial_state(u.shape[0]) if state is None else state
        discrete = self.discretize(rate)
        outputs = []
        for u_k in u.unbind(-1):
            y_k, x = self.step(u_k, x, discrete=discrete)
            outputs.append(y_k)
        return torch.stack(outputs, -1), None if state is None else x


# ---- powers of A_bar ----

def squares(A_bar, l, dtype):
    """A_bar, A_bar^2, A_bar^4, ... in two lists: from A_bar^T on, and below it.

    Time is k = jT + i, like the high and the low digit of a number. T, about 2 sqrt(l),
    and J are powers of 2: each A_bar^{jT} and A_bar^i is a product of squares. So J + T
    vectors and one matrix product give all l numbers C A_bar^k x.
    """
    powers = [A_bar]
    while 2 ** len(powers) < l:
        powers.append(powers[-1] @ powers[-1])
    half = len(powers) // 2 + 1                         # T = 2^half
    powers = [A.to(dtype) for A in powers]
    return powers[half:], powers[:half]


def matvec(A, x):
    """A x: A (h, n, n), x (.., h, n) -> (.., h, n)."""
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
    C = krylov([A.mT for A in low], C)                      # C A_bar^i, (T, m, h, n)
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


def fft_conv(u, K):
    """y_k = sum_{i <= k} K_i u_{k-i}: u (.., l), K (.., l). l zeros keep the FFT, which
    convolves on a circle, from wrapping the end around to the beginning."""
    l = u.shape[-1]
    product = torch.fft.rfft(u, 2 * l) * torch.fft.rfft(K, 2 * l)
    return torch.fft.irfft(product, 2 * l)[..., :l]


def full_precision(u):
    """Switch autocast off: half precision is too coarse for a long recurrence."""
    return torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False)


# ---- HiPPO: where A and B start, and what x remembers ----

def hippo_legendre(measure, n):
    """A (n, n) and B (n), float64 (arXiv 2008.07669, signs of 2206.12037).

    A_ij = -sqrt((2i+1)(2j+1)) below the diagonal. On it and above, legs has -(i+1) and 0,
    legt the same, times (-1)^(i-j) above. B_i = sqrt(2i+1). The window of legt has length
    1; s4.py and the official S4 halve A and B of legt, which makes the length 2.
    """
    check(n > 0, f"d_state={n}: pass a positive number")
    i = torch.arange(n, dtype=torch.float64)
    root = torch.sqrt(2 * i + 1)
    A = -torch.outer(root, root)
    if measure == "legs":
        return A.tril(-1) - torch.diag(i + 1), root
    if measure == "legt":
        return A.tril() + A.triu(1) * (-1) ** (i[:, None] - i), root
    raise ValueError(f"{measure=}: choose legs or legt")


def reconstruct(measure, x, s):
    """(4): u(t - s) as a state x(t) (.., n) remembers it, for all s (k): (.., k).

    s is in the unit of time of A, where a sample is dt. For legt 0 <= s <= 1.
    """
    check(measure in ("legs", "legt"), f"{measure=}: choose legs or legt")
    z = 1 - 2 * s if measure == "legt" else 2 * torch.exp(-s) - 1
    i = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
    P = torch.special.legendre_polynomial_p(z, i[:, None])      # (n, k)
    return (x * torch.sqrt(2 * i + 1)) @ P.to(x.dtype)


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
        check(is_tensor and state.shape == wanted and state.is_floating_point(),
              f"state: {found}, pass floats {wanted} like initial_state()")
        check(state.device == u.device, f"state: on {state.device}, u is on {u.device}")


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
    l, layer = 1000, LSSL(d_model=4)
    u = torch.randn(2, 4, l)
    A_bar, B_bar, C = layer.discretize()
    K = [C[0] * matvec(torch.linalg.matrix_power(A_bar, k), B_bar) for k in range(l)]
    y, _ = layer(u)
    first, state = layer(u[..., :300], layer.initial_state(2))
    second, state = layer(u[..., 300:], state)
    smooth = torch.linspace(0, 6, l).sin().expand(2, 4, l)
    full, _ = layer(smooth)
    half, _ = layer(smooth[..., 1::2], rate=2.0)
    for what, a, b in (("kernel, definition", layer.kernel(l), torch.stack(K, -1).sum(1)),
                       ("convolution, recurrence", y, layer(u, method="step")[0]),
                       ("whole, two pieces", y, torch.cat([first, second], -1)),
                       ("rate 1, rate 2 (about equal)", full[..., 1::2], half)):
        print(f"{what:<36} differ by {(a - b).abs().max() / b.abs().max():.1e}")
