"""S4D: S4 with a diagonal state matrix.

    Gu, Gupta, Goel, Re: On the Parameterization and Initialization of Diagonal State
    Space Models (2022), arXiv 2206.11893.            Try it: python s4d.py

Each of the h features u(t) drives a linear system of its own, with n states:

    x'(t) = A x(t) + B u(t),    y(t) = C x(t) + D u(t).                            (1)

Hold u at u_k on the step of length dt that ends at sample k (zero-order hold), so that x_k
contains u_k. (Textbooks hold u_k on the step that starts at k.) Then this is a recurrence,

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = C x_k + D u_k,                       (2)
    A_bar = exp(dt A),    B_bar = A^{-1} (A_bar - 1) B,

and unrolled, from x_{-1} = 0, a convolution with a kernel:

    y = K * u + D u,    K_k = C A_bar^k B_bar.                                     (3)

Train with (3): the whole sequence at once, by FFT. Generate with (2): one sample at a
time. They are one function, so a state can also enter and leave a convolution.

What was wrong before. S4's HiPPO matrix is dense, and its kernel needs much algebra. DSS
found that the eigenvalues of its normal part do as well, with a softmax over time or
without (dss.py). S4D explained why, and showed that simple formulas for them do, too. Then
A is a vector, and (3) multiplies powers of A_bar, a Vandermonde matrix, by C B_bar.

Why complex, and why 2 Re? Eigenvalues of a real system come in conjugate pairs, as do B
and C, and the second of a pair adds the conjugate of what the first adds. So n/2 are
stored, and C x over all n is 2 Re(C x) over these n/2, in (3) too. (A real one counts as
two equal ones.) Differs from the paper, which trains B: B stays 1, for in (3) only the
product C B_bar matters.

Symbols: b batch, h features (d_model), n states (d_state), l length.
u, y (b, h, l); x (b, h, n/2) and A, A_bar, B_bar, C (h, n/2) complex; dt, D (h); K (h, l).
"""

import math
import numbers

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class S4D(nn.Module):
    """(b, h, l) -> (b, h, l), with D, without activation and without mixing of features.

    d_model, d_state: h, and n (even), stored as n/2 complex numbers for each feature
    measure: where A starts: diag-lin, diag-inv, diag-quad, diag-real or diag-legs. The
        paper's default is diag-lin; diag-inv has the higher frequencies, see initial_A
    disc: zoh (zero-order hold, as above) or bilinear (trapezoid rule for A x, u_k held)
    real_random, imag_random: draw the real or the imaginary parts of A, see initial_A
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of A
    lr: learning rate of dt and A, which is for you to pass to the optimizer: ssm_lr has it
        for each name, and param_groups in example.py reads that
    """

    def __init__(self, d_model, d_state=64, *, measure="diag-lin", disc="zoh",
                 real_random=False, imag_random=False, dt_min=1e-3, dt_max=1e-1, lr=1e-3):
        super().__init__()
        check(d_model > 0 and lr >= 0, f"{d_model=}, {lr=}: pass d_model > 0 and lr >= 0")
        check(disc in ("zoh", "bilinear"), f"{disc=}: choose zoh or bilinear")
        check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")
        self.h, self.n, self.disc = d_model, d_state, disc
        A = initial_A(measure, d_model, d_state, real_random, imag_random)      # (h, n/2)
        log_dt = math.log(dt_min) + torch.rand(d_model) * math.log(dt_max / dt_min)
        self.log_dt = nn.Parameter(log_dt)
        self.log_A_real = nn.Parameter((-A.real).log().to(log_dt))      # keeps Re A < 0
        self.A_imag = nn.Parameter(A.imag.to(log_dt))
        self.C = nn.Parameter(torch.randn(*A.shape, 2) * 0.5 ** 0.5)    # real, imaginary
        self.D = nn.Parameter(torch.randn(d_model))
        self.ssm_lr = {"log_dt": lr, "log_A_real": lr, "A_imag": lr}

    def discretize(self, rate=1.0):
        """(2) at step size rate * dt: A_bar, B_bar, C, (h, n/2) complex128,
        because an error of A_bar grows k-fold in A_bar^k."""
        check_rate(rate, self)
        dt = rate * self.log_dt.double().exp()[:, None]         # (h, 1)
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        C = torch.complex(*self.C.double().unbind(-1))
        if self.disc == "bilinear":
            return (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2), C
        return torch.exp(dt * A), torch.expm1(dt * A) / A, C    # expm1(z) is exp(z) - 1

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, h, n/2) complex128, so that rounding stays small."""
        return self.D.new_zeros(batch_size, self.h, self.n // 2, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, h, n/2) -> y (b, h), next state.
        discrete: what discretize(rate) returned, to use it for many steps."""
        check_input(u, 2, self.h, state, (self.h, self.n // 2))
        check(discrete is None or rate == 1.0, "rate is in discrete: pass it to discretize")
        A_bar, B_bar, C = discrete or self.discretize(rate)
        check(A_bar.shape == state.shape[1:], "discrete: it was made by another layer")
        x = A_bar * state + B_bar * u[..., None]                # (b, h, n/2)
        y = 2 * (C * x).sum(-1).real + self.D * u               # (b, h)
        return y.to(u.dtype), x

    def kernel(self, l, rate=1.0):
        """(3): (h, l), K[:, k] = 2 * (C * A_bar ** k * B_bar).sum(-1).real for k < l."""
        if l < 1:
            raise ValueError(f"{l=}: pass a positive length")
        A_bar, B_bar, C = self.discretize(rate)
        return vandermonde(2 * C * B_bar, powers(A_bar, l, self.D.dtype), l)

    def forward(self, u, state=None, *, rate=1.0, method="conv"):
        """u (b, h, l), state (b, h, n/2) or None -> y (b, h, l), last state or None.

        rate: factor on dt: 2.0 for the same signal sampled half as often
        method: conv, (3), whose rounding errors are in proportion to max |u|, or step, (2)
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        check_input(u, 3, self.h, state, (self.h, self.n // 2))
        check(method in ("conv", "step"), f"{method=}: choose conv or step")
        if method == "step":
            return self.recurrence(u, state, rate)
        l = u.shape[-1]
        v = u.to(self.D.dtype)
        y = fft_conv(v, self.kernel(l, rate)) + self.D[:, None] * v         # (3)
        if state is None:
            return y.to(u.dtype), None
        # a state x adds C A_bar^{k+1} x to y_k, and A_bar^l x to the last state
        A_bar, B_bar, C = self.discretize(rate)
        A_k = powers(A_bar, l, v.dtype)
        y = y + vandermonde(2 * C * A_bar * state, A_k, l)
        last = A_bar ** l * state + last_state(v, B_bar, A_k)
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


# ---- sums with all powers of A_bar; here n counts the stored numbers ----

def powers(A_bar, l, dtype):
    """A_bar^k, k < l, as two factors: A_bar^{jT} (h, J, n), A_bar^i (h, T, n), k = jT + i.

    Like the high and the low digit of a number: with T = sqrt(l), about 2 sqrt(l) powers
    take the place of l, and sums over n are matrix products, without an (h, n, l) array.
    """
    T = int(l ** 0.5)
    J = (l + T - 1) // T                                        # l / T, rounded up
    low = first_powers(A_bar, T)
    high = first_powers(low[:, -1] * A_bar, J)                  # powers of A_bar^T
    dtype = torch.promote_types(dtype, torch.complex64)         # its complex type
    return high.to(dtype), low.to(dtype)


def first_powers(a, count):
    """1, a, a^2, ... by doubling: a (h, n) -> (h, count, n)."""
    x = torch.ones_like(a)[:, None]
    a = a[:, None]
    while x.shape[1] < count:
        x = torch.cat([x, a * x], 1)                    # a is the m-th, x has m powers
        a = a * a
    return x[:, :count]


def vandermonde(v, A_k, l):
    """Re sum_n v_n A_bar_n^k for k < l: v (.., h, n), A_k from powers() -> (.., h, l)."""
    high, low = A_k                                             # (h, J, n), (h, T, n)
    v = v.to(high.dtype)[..., None, :] * high                   # (.., h, J, n)
    K = torch.einsum("...hjn,hin->...hji", v, low).real         # at time jT + i
    return K.flatten(-2)[..., :l]


def last_state(u, B_bar, A_k):
    """sum_k A_bar^k B_bar u_{l-1-k}, the state that u (b, h, l) leaves: (b, h, n)."""
    high, low = A_k
    J, T = high.shape[1], low.shape[1]
    u = F.pad(u.flip(-1), (0, J * T - u.shape[-1])).unflatten(-1, (J, T))
    return torch.einsum("bhji,hin,hjn->bhn", u.to(low.dtype), low, high) * B_bar


def fft_conv(u, K):
    """y_k = sum_{i <= k} K_i u_{k-i}: u (.., l), K (.., l). l zeros keep the FFT, which
    convolves on a circle, from wrapping the end around to the beginning."""
    l = u.shape[-1]
    product = torch.fft.rfft(u, 2 * l) * torch.fft.rfft(K, 2 * l)
    return torch.fft.irfft(product, 2 * l)[..., :l]


# ---- where A starts ----

def initial_A(measure, h, n, real_random=False, imag_random=False):
    """One eigenvalue of each conjugate pair (paper, section 4): (h, n/2) complex128.

    real_random: -Re A uniform in (0, 1), but 0.001 at least; in diag-real in (1, 1 + n/2)
    imag_random: the index i uniform in (0, n/2)
    """
    check(n > 0 and n % 2 == 0, f"d_state={n}: pass an even number, 2 or more")
    check(not imag_random or measure not in ("diag-real", "diag-legs"),
          f"{imag_random=}: {measure} prescribes Im A, pass False")
    real = torch.full((h, n // 2), -0.5, dtype=torch.float64)
    i = torch.arange(n // 2, dtype=torch.float64).repeat(h, 1)
    if real_random:
        real = -torch.rand_like(i).clamp(min=1e-3)
    if imag_random:
        i = n / 2 * torch.rand_like(i)
    if measure == "diag-lin":                           # a Fourier basis
        return torch.complex(real, math.pi * i)
    if measure == "diag-inv":                           # close to HiPPO-LegS
        return torch.complex(real, n / math.pi * (n / (2 * i + 1) - 1))
    if measure == "diag-quad":
        return torch.complex(real, (2 * i + 1) ** 2 / math.pi)
    if measure == "diag-real":                          # decays, without oscillation
        if real_random:
            i = n / 2 * torch.rand_like(i)
        return torch.complex(-(i + 1), 0 * i)
    if measure == "diag-legs":                          # HiPPO-LegS is low rank + this
        root = torch.sqrt(2 * torch.arange(n, dtype=torch.float64) + 1)
        S = torch.outer(root, root).triu(1) / 2         # -1/2 + S - S^T
        imag = torch.linalg.eigvalsh(1j * (S - S.mT))   # ascending, in pairs +-
        return torch.complex(real, imag.flip(0)[:n // 2].expand(h, -1))
    raise ValueError(f"{measure=}: choose diag-lin, -inv, -quad, -real or -legs")


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
    l, layer = 1000, S4D(d_model=4)
    u = torch.randn(2, 4, l)
    A_bar, B_bar, C = layer.discretize()
    K = [2 * (C * A_bar ** k * B_bar).sum(-1).real for k in range(l)]
    y, _ = layer(u)
    first, state = layer(u[..., :300], layer.initial_state(2))
    second, state = layer(u[..., 300:], state)
    smooth = torch.linspace(0, 6, l).sin().expand(2, 4, l)
    full, _ = layer(smooth)
    half, _ = layer(smooth[..., 1::2], rate=2.0)
    for what, a, b in (("kernel, definition", layer.kernel(l), torch.stack(K, -1)),
                       ("convolution, recurrence", y, layer(u, method="step")[0]),
                       ("whole, two pieces", y, torch.cat([first, second], -1)),
                       ("rate 1, rate 2 (about equal)", full[..., 1::2], half)):
        print(f"{what:<36} differ by {(a - b).abs().max() / b.abs().max():.1e}")
