"""DSS: the first diagonal state space layer, normalized by a softmax over time.

    Gupta, Gu, Berant: Diagonal State Spaces are as Effective as Structured State Spaces
    (2022), arXiv 2203.14343.                         Try it: python dss.py

Each of the h features u(t) drives n complex numbers of its own, by the same Lambda:

    x'(t) = Lambda x(t) + u(t),    y(t) = Re(C x(t)) + D u(t).                     (1)

With step size dt, z = dt Lambda and zero-order hold, this is a recurrence and a kernel:

    x_k = e^z x_{k-1} + (e^z - 1) / Lambda u_k,    y_k = Re(C x_k) + D u_k,        (2)
    K_k = Re sum_n C_n (e^{z_n} - 1) / Lambda_n e^{k z_n}.                         (3)

What was wrong before. S4 says that memory needs the HiPPO matrix, which is not diagonal.

The idea. The eigenvalues of its normal part alone, -1/2 + i w, do as well. For (3) to stay
bounded for any sign of Re Lambda, each exponential is divided by its sum over the l_max
steps that it is for, a softmax over time (paper, Proposition 1):

    K_k = Re sum_n W_n / Lambda_n e^{k z_n} / sum_{r < l_max} e^{r z_n}.           (4)

The geometric sum is (e^{l_max z} - 1) / (e^z - 1). So (4) is (3) with
C = W / (e^{l_max z} - 1), and DSS has a state, a step and a rate like every other layer:
the rate changes z in (2), but not in C. The official code has none of them.

Version exp has no normalizer: C = W, and Re Lambda = -exp(.) < 0. S4D continues from there.

Why no factor 2? Lambda starts with Im Lambda > 0 only, but all n numbers are independent:
the real part alone makes the output real.

What if Re Lambda > 0? Then e^{kz} grows, and C is as small as e^{-l_max z}. So B and C take
half of that each, and growth over l_max is capped at e^80: float32 holds all of it.

Symbols: b batch, h features (d_model), n states (d_state), l length. u, y (b, h, l);
x (b, h, n), Lambda (n), W, C, A_bar = e^z, B_bar (h, n) complex; dt, D (h); K (h, l).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class DSS(nn.Module):
    """(b, h, l) -> (b, h, l), with D, without activation and without mixing of features.

    d_model, d_state: h, and n
    version: softmax, as in (4), or exp, without normalization
    l_max: longest sequence of version softmax, in steps at rate 1; exp takes any length
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of Lambda
    lr: learning rate of dt and Lambda, stored in ssm_lr for the optimizer
    """

    def __init__(self, d_model, d_state=64, *, version="softmax", l_max=1024, dt_min=1e-3,
                 dt_max=1e-1, lr=1e-3):
        super().__init__()
        check(d_state > 0, f"{d_state=}: pass a positive number")
        check(l_max > 0, f"{l_max=}: pass a positive number of steps")
        check(version in ("softmax", "exp"), f"{version=}: choose softmax or exp")
        check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")
        self.h, self.n, self.version, self.l_max = d_model, d_state, version, l_max
        log_dt = math.log(dt_min) + torch.rand(d_model) * math.log(dt_max / dt_min)
        self.log_dt = nn.Parameter(log_dt)
        real = -0.5 if version == "softmax" else math.log(0.5)
        self.Lambda_re = nn.Parameter(torch.full((d_state,), real))
        self.Lambda_im = nn.Parameter(legs_eigenvalues(2 * d_state).to(log_dt))
        self.W = nn.Parameter(torch.randn(d_model, d_state, 2))         # real, imaginary
        self.D = nn.Parameter(torch.randn(d_model))
        self.ssm_lr = {"log_dt": lr, "Lambda_re": lr, "Lambda_im": lr}

    def discretize(self, rate=1.0):
        """(2) at step size rate * dt: A_bar, B_bar, C, (h, n) complex128,
        because an error of A_bar grows k-fold in A_bar^k. See also softmax_weights."""
        if not 0 < rate < math.inf:
            raise ValueError(f"{rate=}: pass a positive number")
        check(self.D.dtype.itemsize > 2, f"parameters are {self.D.dtype}: use autocast")
        dt = self.log_dt.double().exp()[:, None]                # (h, 1)
        W = torch.view_as_complex(self.W.double())              # (h, n)
        real = self.Lambda_re.double()
        imag = self.Lambda_im.double()
        if self.version == "exp":
            Lambda = torch.complex(-real.exp(), imag)           # (n)
            z = rate * dt * Lambda
            return torch.exp(z), torch.expm1(z) / Lambda, W
        real = torch.minimum(real, 80 / (self.l_max * dt))      # the cap: (h, n)
        Lambda = torch.complex(real, imag.expand_as(real))
        Lambda = torch.where(Lambda == 0, 1e-12, Lambda)        # there B_bar is its limit
        C, share = softmax_weights(W, Lambda, dt * Lambda, self.l_max)
        z = rate * dt * Lambda
        return torch.exp(z), torch.expm1(z) / Lambda * share, C

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, h, n) complex128, for rounding adds up over the steps."""
        return self.D.new_zeros(batch_size, self.h, self.n, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, h, n) -> y (b, h), next state.
        discrete: what discretize() returned, to use it for many steps."""
        self.check_input(u, 2, state)
        A_bar, B_bar, C = discrete or self.discretize(rate)
        x = A_bar * state + B_bar * u[..., None]        # (b, h, n)
        y = (C * x).sum(-1).real + self.D * u           # (b, h)
        return y.to(u.dtype), x

    def kernel(self, l, rate=1.0):
        """(3) or (4): K_0 ... K_{l-1}, (h, l)."""
        if l < 1:
            raise ValueError(f"{l=}: pass a positive length")
        A_bar, B_bar, C = self.discretize(rate)
        self.check_length(l, rate)
        with full_precision(self.D):
            digits = two_digits(A_bar, l, torch.view_as_complex(self.W).dtype)
            return vandermonde(C * B_bar, digits, l)

    def forward(self, u, state=None, *, rate=1.0, method="conv"):
        """u (b, h, l), state (b, h, n) or None -> y (b, h, l), last state or None.

        rate: factor on dt: 2.0 for the same signal sampled half as often
        method: conv is (3), step is (2): the same numbers
        Raises ValueError for a u, state, rate or method that does not fit, and for more
        than l_max steps. Pieces that hand on the state are not counted together.
        """
        self.check_input(u, 3, state)
        check(method in ("conv", "step"), f"{method=}: choose conv or step")
        discrete = self.discretize(rate)
        self.check_length(u.shape[-1], rate)
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
            digits = two_digits(A_bar, l, torch.view_as_complex(self.W).dtype)
            K = vandermonde(C * B_bar, digits, l)       # as kernel(), with digits at hand
            D = F.pad(self.D[:, None], (0, l - 1))      # D u: an impulse at k = 0
            y = fft_conv(v, K + D)                      # (b, h, l)
            if state is not None:
                # it adds C A_bar^{k+1} x to y_k, and A_bar^l x to the last state
                y = y + vandermonde(C * A_bar * state, digits, l)
                last = A_bar ** l * state + last_state(v, B_bar, digits)
        return y.to(u.dtype), last

    def check_input(self, u, dims, state):
        """dims 2: u (b, h); dims 3: u (b, h, l); state (b, h, n) or None."""
        fits = u.dim() == dims and u.shape[1] == self.h and u.numel() > 0
        check(fits and u.is_floating_point(),
              f"u is {u.dtype} {tuple(u.shape)}: pass floats, {self.h} features, {dims}-d")
        if state is not None:
            check(state.shape == (len(u), self.h, self.n) and state.is_complex(),
                  "state: pass one of the shape and type of initial_state()")

    def check_length(self, l, rate):
        """The softmax is over l_max steps, at rate 1. 1e-9: l (l_max / l) may round up."""
        if self.version == "softmax" and l * rate > self.l_max * (1 + 1e-9):
            raise ValueError(f"{l=}: {rate=} times l is more than l_max = {self.l_max}; "
                             "raise l_max, or use version exp")


# ---- the softmax ----

def softmax_weights(W, Lambda, z, l_max):
    """C = W / (e^{l_max z} - 1) and what B is multiplied by, 1 unless z grows: (h, n).

    1/x is conj(x) / (|x|^2 + 1e-7), finite at the poles, with x = Lambda (e^{l_max z} - 1)
    (official code). If z grows, x would overflow, and the quotient is multiplied by
    e^{-l_max z} above and below; above, C and B take half of the exponent each.
    """
    growing = z.real > 0
    sign = torch.where(growing, -1.0, 1.0)
    share = torch.exp(-l_max / 2 * torch.where(growing, z, 0))
    x = Lambda * torch.expm1(sign * l_max * z)
    C = sign * W * Lambda * x.conj() / (x.abs() ** 2 + 1e-7)
    return C * share, share


# ---- powers of A_bar ----

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


# ---- where Lambda starts ----

def legs_eigenvalues(n):
    """Im Lambda > 0 of the normal part of HiPPO-LegS, -1/2 + S - S^T: (n/2) float64."""
    root = torch.sqrt(2 * torch.arange(n, dtype=torch.float64) + 1)
    S = torch.outer(root, root).triu(1) / 2
    imag = torch.linalg.eigvalsh(1j * (S - S.mT))       # ascending, in pairs +-
    return imag.flip(0)[:n // 2]


def check(ok, message):
    """Raise a ValueError unless ok. Not for rate or l: torch.compile can't print them."""
    if not ok:
        raise ValueError(message)


# ---- one signal in every mode ----

if __name__ == "__main__":
    torch.manual_seed(0)
    l, layer = 1000, DSS(d_model=4)
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
