"""DSS: the first diagonal state space layer, normalized by a softmax over time.

    Gupta, Gu, Berant: Diagonal State Spaces are as Effective as Structured State Spaces
    (2022), arXiv 2203.14343.                         Try it: python dss.py

Each of the h features u(t) drives n complex numbers x, with one Lambda, and with B = 1:

    x'(t) = Lambda x(t) + u(t),    y(t) = Re(C x(t)) + D u(t).                     (1)

With step size dt, z = dt Lambda and zero-order hold, this is a recurrence and a kernel:

    x_k = e^z x_{k-1} + (e^z - 1) / Lambda u_k,    y_k = Re(C x_k) + D u_k,        (2)
    y = K * u + D u,    K_k = Re sum_n C_n (e^{z_n} - 1) / Lambda_n e^{k z_n}.     (3)

What was wrong before. S4 makes HiPPO diagonal only up to a low-rank part, and that part
costs its kernel Cauchy sums and the Woodbury identity.

The idea. The eigenvalues of the normal part alone, -1/2 + i w, do as well. Training may
make Re Lambda positive, so each exponential is divided by its sum over l_max steps, a
softmax over time (paper, Proposition 1):

    K_k = Re sum_n W_n / Lambda_n e^{k z_n} / sum_{r < l_max} e^{r z_n}.           (4)

The geometric sum is (e^{l_max z} - 1) / (e^z - 1). So (4) is (3) with
C = W / (e^{l_max z} - 1), about -W where e^{l_max z} has died out; for its poles, where
e^{l_max z} = 1, see softmax_weights.
Version exp has no normalizer: C = W, and Re Lambda = -exp(.) < 0. S4D continues from there.

What does the softmax buy once Re Lambda < 0? A scale: however slowly an exponential decays,
it sums to 1 over l_max steps. C can learn that, and version exp does without it.

Differs from the paper: there the sum has the length of each sequence, here l_max. So C is
the same at all lengths and rates: a shorter sequence sees the beginning of the kernel, a
longer one how it goes on, and a state can be handed on. The official code has no state, no
rate, and two step sizes, for Re z and for Im z.

What if Re Lambda > 0? Then e^{kz} grows, and C has e^{-l_max z}. Re Lambda is capped where
growth in l_max steps at rate 1 is e^40, so that float32 holds both up to twice l_max.

Why no factor 2? Lambda starts with Im Lambda > 0 only, but the n numbers are independent,
no conjugate pairs: the real part alone makes the output real.

Symbols: b batch, h features (d_model), n states (d_state), l length. u, y (b, h, l);
x (b, h, n), Lambda (n), W, C, A_bar = e^z, B_bar (h, n) complex; dt, D (h); K (h, l).
"""

import math
import numbers

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class DSS(nn.Module):
    """(b, h, l) -> (b, h, l), with D, without activation and without mixing of features.

    d_model, d_state: h, and n, of which all are stored (S4D stores half of its n)
    version: softmax, as in (4), or exp, without normalization
    l_max: softmax normalizes over this many steps, at rate 1, say of the longest sequence
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of Lambda
    lr: learning rate of dt and Lambda, which is for you to pass to the optimizer: ssm_lr
        has it for each name, and param_groups in example.py reads that
    """

    def __init__(self, d_model, d_state=64, *, version="softmax", l_max=1024, dt_min=1e-3,
                 dt_max=1e-1, lr=1e-3):
        super().__init__()
        check(d_model > 0 and lr >= 0, f"{d_model=}, {lr=}: pass d_model > 0 and lr >= 0")
        check(d_state > 0, f"{d_state=}: pass a positive number")
        check(0 < l_max < math.inf, f"{l_max=}: pass a positive number of steps")
        check(version in ("softmax", "exp"), f"{version=}: choose softmax or exp")
        check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")
        self.h, self.n, self.version, self.l_max = d_model, d_state, version, l_max
        log_dt = math.log(dt_min) + torch.rand(d_model) * math.log(dt_max / dt_min)
        self.log_dt = nn.Parameter(log_dt)
        real = -0.5 if version == "softmax" else math.log(0.5)
        self.Lambda_re = nn.Parameter(torch.full((d_state,), real))     # exp: log(-Re)
        self.Lambda_im = nn.Parameter(legs_eigenvalues(2 * d_state).to(log_dt))
        self.W = nn.Parameter(torch.randn(d_model, d_state, 2))         # real, imaginary
        self.D = nn.Parameter(torch.randn(d_model))
        self.ssm_lr = {"log_dt": lr, "Lambda_re": lr, "Lambda_im": lr}

    def discretize(self, rate=1.0):
        """(2) at step size rate * dt: A_bar, B_bar, C, (h, n) complex128,
        because an error of A_bar grows k-fold in A_bar^k."""
        check_rate(rate, self)
        dt = self.log_dt.double().exp()[:, None]                # (h, 1)
        C = torch.complex(*self.W.double().unbind(-1))          # (h, n)
        real = self.Lambda_re.double()
        imag = self.Lambda_im.double()
        if self.version == "exp":
            Lambda = torch.complex(-real.exp(), imag)           # (n)
        else:
            real = torch.minimum(real, 40 / (self.l_max * dt))  # the cap: (h, n)
            Lambda = torch.complex(real, imag.expand_as(real))
            C = softmax_weights(C, Lambda, dt * Lambda, self.l_max)
        z = rate * dt * Lambda
        B_bar = torch.expm1(z) / torch.where(Lambda == 0, 1, Lambda)
        limit = rate * dt * (1 + z / 2)         # at Lambda = 0; z / 2 is for its gradient
        return torch.exp(z), torch.where(Lambda == 0, limit, B_bar), C

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, h, n) complex128, so that rounding stays small."""
        return self.D.new_zeros(batch_size, self.h, self.n, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(2) once: u (b, h), state (b, h, n) -> y (b, h), next state.
        discrete: what discretize(rate) returned, to use it for many steps."""
        check_input(u, 2, self.h, state, (self.h, self.n))
        check(discrete is None or rate == 1.0, "rate is in discrete: pass it to discretize")
        A_bar, B_bar, C = discrete or self.discretize(rate)
        check(A_bar.shape == state.shape[1:], "discrete: it was made by another layer")
        x = A_bar * state + B_bar * u[..., None]                # (b, h, n)
        y = (C * x).sum(-1).real + self.D * u                   # (b, h)
        return y.to(u.dtype), x

    def kernel(self, l, rate=1.0):
        """(3): (h, l), K[:, k] = (C * A_bar ** k * B_bar).sum(-1).real for k < l."""
        if l < 1:
            raise ValueError(f"{l=}: pass a positive length")
        A_bar, B_bar, C = self.discretize(rate)
        return vandermonde(C * B_bar, powers(A_bar, l, self.D.dtype), l)

    def forward(self, u, state=None, *, rate=1.0, method="conv"):
        """u (b, h, l), state (b, h, n) or None -> y (b, h, l), last state or None.

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
        y = fft_conv(v, self.kernel(l, rate)) + self.D[:, None] * v         # (3)
        if state is None:
            return y.to(u.dtype), None
        # a state x adds C A_bar^{k+1} x to y_k, and A_bar^l x to the last state
        A_bar, B_bar, C = self.discretize(rate)
        A_k = powers(A_bar, l, v.dtype)
        y = y + vandermonde(C * A_bar * state, A_k, l)
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


# ---- the softmax ----

def softmax_weights(W, Lambda, z, l_max):
    """C = W / (e^{l_max z} - 1): all (h, n) complex.

    As in the official code, 1/x is conj(x) / (|x|^2 + 1e-7), finite at the poles, with
    x = Lambda (e^{l_max z} - 1). Where Re z > 0, W and x are multiplied by e^{-l_max z},
    here only so that 1e-7 has the effect that it has there: the cap alone keeps x finite.
    """
    sign = torch.where(z.real > 0, -1.0, 1.0)
    x = sign * Lambda * torch.expm1(sign * l_max * z)
    W = W * torch.exp(-l_max * torch.where(z.real > 0, z, 0))
    return W * Lambda * x.conj() / (x.abs() ** 2 + 1e-7)


# ---- sums with all powers of A_bar ----

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


# ---- where Lambda starts ----

def legs_eigenvalues(n):
    """Im Lambda > 0 of the normal part of HiPPO-LegS, -1/2 + S - S^T: (n/2) float64."""
    root = torch.sqrt(2 * torch.arange(n, dtype=torch.float64) + 1)
    S = torch.outer(root, root).triu(1) / 2
    imag = torch.linalg.eigvalsh(1j * (S - S.mT))       # ascending, in pairs +-
    return imag.flip(0)[:n // 2]


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
    l, layer = 1000, DSS(d_model=4)
    u = torch.randn(2, 4, l)
    A_bar, B_bar, C = layer.discretize()
    K = [(C * A_bar ** k * B_bar).sum(-1).real for k in range(l)]
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
