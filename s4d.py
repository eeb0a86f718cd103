"""S4D: S4 with a diagonal state matrix.

    Gu, Gupta, Goel, Re: On the Parameterization and Initialization of Diagonal State
    Space Models (2022), arXiv 2206.11893.            Try it: python s4d.py

Each of the h features u(t) drives a linear system of its own, with n states:

    x'(t) = A x(t) + B u(t),    y(t) = C x(t) + D u(t).                            (1)

If u is u_k on the step of length dt that ends at sample k (zero-order hold), this is

    x_k = A_bar x_{k-1} + B_bar u_k,    y_k = C x_k + D u_k,                       (2)
    A_bar = exp(dt A),    B_bar = A^{-1} (A_bar - 1) B,

and unrolled, from x_{-1} = 0, a convolution with a kernel:

    y = K * u + D u,    K_k = C A_bar^k B_bar.                                     (3)

Train with (3): the whole sequence at once, by FFT. Generate with (2): one sample at a
time. They are one function, so a state can also enter and leave a convolution.

What was wrong before. S4's HiPPO matrix is dense, normal plus low rank, and its kernel
needs much algebra. S4D keeps the n eigenvalues of a normal part alone. A is then a vector,
and (3) is the product of C B_bar with the powers of A_bar, a Vandermonde matrix.

Why complex, and why 2 Re? The eigenvalues of a real system come in conjugate pairs, as do
B and C, and the second of a pair adds the conjugate of what the first adds. So n/2 are
stored, and C x stands for 2 Re(C x), in (3) too.

Why is B not trained? In (3) only the product C B_bar matters. B is 1.

Symbols: b batch, h features (d_model), n states (d_state), l length.
u, y (b, h, l); x (b, h, n/2) and A, A_bar, B_bar, C (h, n/2) complex; dt, D (h); K (h, l).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class S4D(nn.Module):
    """(b, h, l) -> (b, h, l), with D, without activation and without mixing of features.

    d_model, d_state: h, and n (even)
    measure: where A starts: diag-lin, diag-inv, diag-quad, diag-real or diag-legs
    disc: zoh (zero-order hold, as above) or bilinear (trapezoid rule in x, u_k throughout)
    real_random, imag_random: draw the real or the imaginary parts of A, see initial_A
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of A
    lr: learning rate of dt and A, stored in ssm_lr for the optimizer
    """

    def __init__(self, d_model, d_state=64, *, measure="diag-lin", disc="zoh",
                 real_random=False, imag_random=False, dt_min=1e-3, dt_max=1e-1, lr=1e-3):
        super().__init__()
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
        """(2) at step size rate * dt: A_bar, B_bar, 2 C, (h, n/2) complex128,
        because an error of A_bar grows k-fold in A_bar^k."""
        if not 0 < rate < math.inf:
            raise ValueError(f"{rate=}: pass a positive number")
        check(self.D.dtype.itemsize > 2, f"parameters are {self.D.dtype}: use autocast")
        dt = rate * self.log_dt.double().exp()[:, None]         # (h, 1)
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        C = 2 * torch.view_as_complex(self.C.double())          # 2 for the pairs
        if self.disc == "bilinear":
            return (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2), C
        return torch.exp(dt * A), torch.expm1(dt * A) / A, C

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, h, n/2) complex128, for rounding adds up over the steps."""
        return self.D.new_zeros(batch_size, self.h, self.n // 2, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, h, n/2) -> y (b, h), next state.
        discrete: what discretize() returned, to use it for many steps."""
        self.check_input(u, 2, state)
        A_bar, B_bar, C = discrete or self.discretize(rate)
        x = A_bar * state + B_bar * u[..., None]        # (b, h, n/2)
        y = (C * x).sum(-1).real + self.D * u           # (b, h)
        return y.to(u.dtype), x

    def kernel(self, l, rate=1.0):
        """(3): K_0 ... K_{l-1}, (h, l)."""
        if l < 1:
            raise ValueError(f"{l=}: pass a positive length")
        A_bar, B_bar, C = self.discretize(rate)
        with full_precision(self.D):
            digits = two_digits(A_bar, l, torch.view_as_complex(self.C).dtype)
            return vandermonde(C * B_bar, digits, l)

    def forward(self, u, state=None, *, rate=1.0, method="conv"):
        """u (b, h, l), state (b, h, n/2) or None -> y (b, h, l), last state or None.

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
        last = None
        with full_precision(u):
            digits = two_digits(A_bar, l, torch.view_as_complex(self.C).dtype)
            K = vandermonde(C * B_bar, digits, l)       # as kernel(), with digits at hand
            D = F.pad(self.D[:, None], (0, l - 1))      # D u: an impulse at k = 0
            y = fft_conv(v, K + D)                      # (b, h, l)
            if state is not None:
                # it adds C A_bar^{k+1} x to y_k, and A_bar^l x to the last state
                y = y + vandermonde(C * A_bar * state, digits, l)
                last = A_bar ** l * state + last_state(v, B_bar, digits)
        return y.to(u.dtype), last

    def check_input(self, u, dims, state):
        """dims 2: u (b, h); dims 3: u (b, h, l); state (b, h, n/2) or None."""
        fits = u.dim() == dims and u.shape[1] == self.h and u.numel() > 0
        check(fits and u.is_floating_point(),
              f"u is {u.dtype} {tuple(u.shape)}: pass floats, {self.h} features, {dims}-d")
        if state is not None:
            check(state.shape == (len(u), self.h, self.n // 2) and state.is_complex(),
                  "state: pass one of the shape and type of initial_state()")


# ---- powers of A_bar; below, n counts what is stored ----

def two_digits(A_bar, l, dtype):
    """A_bar^{jT} (h, J, n) and A_bar^i (h, T, n), whose products are all A_bar^k, k < l.

    Time has two digits, k = jT + i, as with T = 10 the tens and the ones: about 2.5 sqrt(l)
    powers take the place of l, and with matrix products no (h, n, l) array appears.
    i in turn counts eights and ones: only m + 8 of the powers need double precision.
    """
    m = max(1, int(l ** 0.5) // 4)                      # T = 8m, about 2 sqrt(l): fastest
    ones = torch.linalg.vander(A_bar, N=8).mT.contiguous()          # A_bar^i (h, 8, n)
    eights = torch.linalg.vander(ones[:, -1] * A_bar, N=m + 1).mT.contiguous()
    low = eights[:, :m, None].to(dtype) * ones[:, None].to(dtype)   # (h, m, 8, n)
    low = low.flatten(1, 2)[:, :l]                                  # (h, T, n)
    J = -(-l // low.shape[1])
    high = torch.linalg.vander(eights[:, -1], N=J + 1).mT[:, :J]    # N = 1 is an error
    return high.to(dtype).contiguous(), low


def vandermonde(v, digits, l):
    """Re sum_n v_n A_bar_n^k for k < l: v (.., h, n), digits of A_bar -> (.., h, l)."""
    high, low = digits
    v = v.to(high.dtype)[..., None, :] * high           # (.., h, J, n)
    K = torch.einsum("...hjn,hin->...hji", as_real(v), as_real(low.conj()))
    return K.flatten(-2)[..., :l]


def last_state(u, B_bar, digits):
    """sum_k A_bar^{l-1-k} B_bar u_k, the state that u (b, h, l) leaves: (b, h, n)."""
    high, low = digits
    J, T = high.shape[1], low.shape[1]
    u = F.pad(u, (J * T - u.shape[-1], 0)).unflatten(-1, (J, T))        # zeros in front
    x = torch.einsum("bhji,hin->bhjn", u, as_real(low.flip(1)))     # the last i: power 0
    x = torch.view_as_complex(x.unflatten(-1, (-1, 2)))             # (b, h, J, n)
    return (x * high.flip(1)).sum(2) * B_bar                        # the last j: power 0


def as_real(z):
    """(.., n) complex as (.., 2n) real: Re(v w) is as_real(v) times as_real(w conj)."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def fft_conv(u, K):
    """y_k = sum_{i <= k} K_i u_{k-i}: u (.., l), K (.., l). l zeros keep the FFT, which
    convolves on a circle, from wrapping the end around to the beginning."""
    l = u.shape[-1]
    product = torch.fft.rfft(u, 2 * l) * torch.fft.rfft(K, 2 * l)
    return torch.fft.irfft(product, 2 * l)[..., :l]


def full_precision(u):
    """Switch autocast off: half precision is too coarse for a long recurrence."""
    return torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False)


# ---- where A starts ----

def initial_A(measure, h, n, real_random=False, imag_random=False):
    """One eigenvalue of each conjugate pair (paper, section 4): (h, n/2) complex128.

    real_random: -Re A uniform in (0, 1), in diag-real in (1, 1 + n/2)
    imag_random: the index i uniform in (0, n/2)
    """
    check(n > 0 and n % 2 == 0, f"d_state={n}: pass an even number, 2 or more")
    check(not imag_random or measure not in ("diag-real", "diag-legs"),
          f"{imag_random=}: {measure} prescribes Im A, pass False")
    i = torch.arange(n // 2, dtype=torch.float64).repeat(h, 1)
    real = torch.full_like(i, -0.5)
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
    if measure == "diag-real":                          # averages, without oscillation
        if real_random:
            i = n / 2 * torch.rand_like(i)
        return torch.complex(-(i + 1), 0 * i)
    if measure == "diag-legs":                          # HiPPO-LegS is low rank + this
        root = torch.sqrt(2 * torch.arange(n, dtype=torch.float64) + 1)
        S = torch.outer(root, root).triu(1) / 2         # -1/2 + S - S^T
        imag = torch.linalg.eigvalsh(1j * (S - S.mT))   # ascending, in pairs +-
        return torch.complex(real, imag.flip(0)[:n // 2].expand(h, -1))
    raise ValueError(f"{measure=}: choose diag-lin, -inv, -quad, -real or -legs")


def check(ok, message):
    """Raise a ValueError unless ok. Not for rate or l: torch.compile can't print them."""
    if not ok:
        raise ValueError(message)


# ---- one signal in every mode ----

if __name__ == "__main__":
    torch.manual_seed(0)
    l, layer = 1000, S4D(d_model=4)
    u = torch.randn(2, 4, l)
    A_bar, B_bar, C = layer.discretize()
    K = torch.stack([(C * A_bar ** k * B_bar).sum(-1).real for k in range(l)], -1)
    y, _ = layer(u)
    stepped, _ = layer(u, method="step")
    first, state = layer(u[..., :300], layer.initial_state(2))
    second, state = layer(u[..., 300:], state)
    smooth = torch.linspace(0, 6, l).sin().expand(2, 4, l)
    full, _ = layer(smooth)
    half, _ = layer(smooth[..., 1::2], rate=2.0)
    for what, a, b in (("kernel, definition", layer.kernel(l), K),
                       ("convolution, recurrence", y, stepped),
                       ("whole, two pieces", y, torch.cat([first, second], -1)),
                       ("rate 1, every second at rate 2: about", full[..., 1::2], half)):
        print(f"{what:<36} differ by {(a - b).abs().max() / b.abs().max():.1e}")
