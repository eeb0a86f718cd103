"""LSSL: the dense layer that became S4, and what its state means.

    Gu, Johnson, Goel, Saab, Dao, Rudra, Re: Combining Recurrent, Convolutional, and
    Continuous-time Models with Linear State-Space Layers (2021), arXiv 2110.13985.
    HiPPO: arXiv 2008.07669.                          Try it: python lssl.py

Each of the h features u(t) drives a linear system of its own, with n states:

    x'(t) = A x(t) + B u(t),    y(t) = C x(t) + D u(t).                            (1)

Sampled every dt, this is a recurrence, and unrolled, from x_{-1} = 0, a convolution:

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = C x_k + D u_k,                       (2)
    y = K * u + D u,    K_k = C A_bar^k B_bar.                                     (3)

The idea. One model, three views: (1) has a time scale, so the sampling rate can change, (2)
generates in constant time per step, (3) trains in parallel. What was wrong before: each
view alone, as an ODE, a recurrent or a convolutional network, lacks what the others have.

What does the state mean? HiPPO chooses A and B so that x(t) holds the coefficients of the
past of u in a basis of Legendre polynomials P_i. With s the time before t:

    legt, a sliding window:    u(t - s) ~ sum_i x_i(t) sqrt(2i+1) P_i(1 - 2s)      (4)
    legs, all of the past:     u(t - s) ~ sum_i x_i(t) sqrt(2i+1) P_i(2 e^{-s} - 1)

The state is a compressed history, and C reads from it what the task needs. The window is
0 < s < 1, and the unit of time, that of A, is 1/dt samples. Differs from HiPPO: LegS there
has a factor 1/t and weighs all of the past equally. Here, as in LSSL, it fades with e^{-s}.

Discretization. The generalized bilinear transform takes A x at the end of a step with
weight alpha, at its beginning with 1 - alpha, and u_k for the whole step:

    A_bar = (1 - alpha dt A)^{-1} (1 + (1 - alpha) dt A),                          (5)
    B_bar = (1 - alpha dt A)^{-1} dt B.

alpha = 0 is forward Euler, 1 backward Euler, 1/2 bilinear, of second order in A. From 1/2
up a stable A stays stable at any dt, below only if dt is small.

Why S4? A dense A_bar costs n^3 log l, and nothing keeps a trained A stable. Differs from
the paper: train_A trains all of A, not a structured class.

Symbols: b batch, h features (d_model), n states (d_state), l length, m channels.
u (b, h, l); y (b, m h, l); x (b, h, n); A (n, n), B (n), or one for each feature;
A_bar (h, n, n); B_bar (h, n); C (m, h, n); D (m, h); dt (h); K (m h, l).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class LSSL(nn.Module):
    """(b, h, l) -> (b, m h, l), with D, without activation and without mixing of features.

    d_model, d_state: h, and n
    measure: where A and B start: legs or legt, see hippo_legendre
    alpha: 0 forward Euler, 0.5 bilinear, 1 backward Euler, or in between
    channels: m outputs for each feature: channel c of feature i is output c h + i
    train_A: no, shared (one A and B for all features) or each (one for each feature)
    train_dt: whether dt is trained too
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of A
    lr: learning rate of A, B and dt, if trained, stored in ssm_lr for the optimizer
    """

    def __init__(self, d_model, d_state=64, *, measure="legs", alpha=0.5, channels=1,
                 train_A="no", train_dt=False, dt_min=1e-3, dt_max=1e-1, lr=1e-3):
        super().__init__()
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

    def discretize(self, rate=1.0):
        """(5) at step size rate * dt: A_bar (h, n, n), B_bar (h, n), C (m, h, n) float64,
        because an error of A_bar grows k-fold in A_bar^k."""
        if not 0 < rate < math.inf:
            raise ValueError(f"{rate=}: pass a positive number")
        check(self.D.dtype.itemsize > 2, f"parameters are {self.D.dtype}: use autocast")
        dt = rate * self.log_dt.double().exp()[:, None]         # (h, 1)
        dtA = dt[..., None] * self.A.double()                   # (h, n, n)
        dtB = dt * self.B.double()                              # (h, n)
        one = torch.eye(self.n, dtype=dt.dtype, device=dt.device)
        inverse = torch.linalg.inv(one - self.alpha * dtA)
        A_bar = inverse @ (one + (1 - self.alpha) * dtA)
        return A_bar, times(inverse, dtB), self.C.double()

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, h, n) float64, for rounding adds up over the steps."""
        return self.D.new_zeros(batch_size, self.h, self.n, dtype=torch.float64)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, h, n) -> y (b, m h), next state.
        discrete: what discretize() returned, to use it for many steps."""
        self.check_input(u, 2, state)
        A_bar, B_bar, C = discrete or self.discretize(rate)
        x = times(A_bar, state.double()) + B_bar * u[..., None]         # (b, h, n)
        y = (C * x[:, None]).sum(-1) + self.D * u[:, None]              # (b, m, h)
        return y.flatten(1).to(u.dtype), x

    def kernel(self, l, rate=1.0):
        """(3): K_0 ... K_{l-1}, (m h, l)."""
        if l < 1:
            raise ValueError(f"{l=}: pass a positive length")
        A_bar, B_bar, C = self.discretize(rate)
        with full_precision(self.D):
            low, high = squares(A_bar, l, self.D.dtype)
            K = response(C.to(self.D), low, high, B_bar[None].to(self.D))
        return K[0, ..., :l].flatten(0, 1)

    def forward(self, u, state=None, *, rate=1.0, method="conv"):
        """u (b, h, l), state (b, h, n) or None -> y (b, m h, l), last state or None.

        rate: factor on dt: 2.0 for the same signal sampled half as often
        method: conv is (3), step is (2): the same numbers
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        self.check_input(u, 3, state)
        check(method in ("conv", "step"), f"{method=}: choose conv or step")
        discrete = self.discretize(rate)
        if method == "step":
            x = self.initial_state(len(u)) if state is None else state
            outputs = []
            for u_k in u.unbind(-1):
                y_k, x = self.step(u_k, x, discrete=discrete)
                outputs.append(y_k)
            return torch.stack(outputs, -1), None if state is None else x
        A_bar, B_bar, C = discrete
        l = u.shape[-1]
        v = u.to(self.D.dtype)
        x = B_bar[None]                                 # K is the answer to the state B_bar
        if state is not None:
            x = torch.cat([x, times(A_bar, state.double())])            # (1 + b, h, n)
        x = x.to(v)
        last = None
        with full_precision(u):
            low, high = squares(A_bar, l, v.dtype)
            answers = response(C.to(v), low, high, x)[..., :l]          # (1 + b, m, h, l)
            D = F.pad(self.D[..., None], (0, l - 1))    # D u: an impulse at k = 0
            y = fft_conv(v[:, None], answers[0] + D)    # (b, m, h, l)
            if state is not None:
                y = y + answers[1:]
                last = final_state(x[1:], v, x[0], low, high).double()
        return y.flatten(1, 2).to(u.dtype), last

    def check_input(self, u, dims, state):
        """dims 2: u (b, h); dims 3: u (b, h, l); state (b, h, n) or None."""
        fits = u.dim() == dims and u.shape[1] == self.h and u.numel() > 0
        check(fits and u.is_floating_point(),
              f"u is {u.dtype} {tuple(u.shape)}: pass floats, {self.h} features, {dims}-d")
        if state is not None:
            check(state.shape == (len(u), self.h, self.n) and state.is_floating_point(),
                  "state: pass one of the shape and type of initial_state()")


# ---- powers of A_bar ----

def squares(A_bar, l, dtype):
    """A_bar, A_bar^2, A_bar^4, ... (h, n, n), in two lists: below A_bar^T, and from it on.

    Time has two digits, k = jT + i, as with T = 10 the tens and the ones. T, about
    2 sqrt(l), and J are powers of 2: each A_bar^i and A_bar^{jT} is a product of squares.
    So T + J vectors and one matrix product give all l numbers C A_bar^k x.
    """
    powers = [A_bar]
    while 2 ** len(powers) < l:
        powers.append(powers[-1] @ powers[-1])
    half = len(powers) // 2 + 1                         # T = 2^half
    powers = [A.to(dtype) for A in powers]
    return powers[:half], powers[half:]


def times(A, x):
    """A x: A (h, n, n), x (.., h, n) -> (.., h, n)."""
    return torch.einsum("hij,...hj->...hi", A, x)


def krylov(powers, x):
    """x, A x, A^2 x, ... by doubling: A, A^2, A^4, ..; x (.., h, n) -> (T, .., h, n)."""
    x = x[None]
    for A in powers:
        x = torch.cat([x, times(A, x)])
    return x


def response(C, low, high, x):
    """C A_bar^k x: C (m, h, n), states x (b, h, n) -> (b, m, h, JT)."""
    C = krylov([A.mT for A in low], C)                      # C A_bar^i, (T, m, h, n)
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


# ---- HiPPO: where A and B start, and what x remembers ----

def hippo_legendre(measure, n):
    """A (n, n) and B (n), float64 (arXiv 2008.07669, signs of 2206.12037).

    A_ij = -sqrt((2i+1)(2j+1)) below the diagonal. On it and above, legs has -(i+1) and 0,
    legt goes on, with alternating signs above. B_i = sqrt(2i+1).
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
    """(4): the input that a state x (.., n) remembers, times s (k) before: (.., k).

    s is in the unit of time of A, where a sample is dt. For legt 0 <= s <= 1.
    """
    check(measure in ("legs", "legt"), f"{measure=}: choose legs or legt")
    z = 1 - 2 * s if measure == "legt" else 2 * torch.exp(-s) - 1
    i = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
    P = torch.special.legendre_polynomial_p(z, i[:, None])      # (n, k)
    return (x * torch.sqrt(2 * i + 1)) @ P.to(x.dtype)


def check(ok, message):
    """Raise a ValueError unless ok. Not for rate or l: torch.compile can't print them."""
    if not ok:
        raise ValueError(message)


# ---- one signal in every mode ----

if __name__ == "__main__":
    torch.manual_seed(0)
    l, layer = 1000, LSSL(d_model=4)
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
