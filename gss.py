"""GSS: a small state space layer between large matrix products.

    Mehta, Gupta, Cutkosky, Neyshabur: Long Range Language Modeling via Gated State Spaces
    (2022), arXiv 2206.13947.                         Try it: python gss.py

What was wrong before. An FFT over each of h channels is slow on hardware made for matrix
products. GSS shrinks the SSM to c = h / bottleneck channels, and spends the time in
linear maps, with biases: the output is multiplied by a gate of h expand features.

    v = GELU(W_u u),    y = SSM(v),    o = W_o((W_y y) * GELU(W_v u))              (1)

The SSM drives n complex numbers for each of its channels, all independent as in dss.py:

    x_k = A_bar x_{k-1} + B_bar v_k,    y_k = Re(C x_k) + D v_k,                   (2)
    A_bar = exp(dt A),    B_bar = A^{-1} (A_bar - 1) B,
    y = K * v + D v,    K_k = Re(C A_bar^k B_bar).                                 (3)

The simplification. With B = 1 and dt = 1 fixed, a random A does as well as HiPPO. Only A,
C and D are trained, and the linear maps. Each simplification can be undone: gate=False,
bottleneck=1, train_B, train_dt, and measure="diag-lin" with the dt_min and dt_max of S4D.

Differs from the paper: -Re A starts log-uniform in (1e-3, 1), so that memory ranges from 1
to 1000 steps, and Im A uniform in (0, pi). Draws of order 1 forget within a few steps.

Why no factor 2? The n numbers are independent, no conjugate pairs: the real part alone
makes the output real.

State, step and rate. The maps in (1) see one time step each. So the state is that of the
SSM, and a step of the block is (1) around (2). With dt = 1 the unit of time is one step.

Symbols: b batch, h features (d_model), c channels of the SSM, n states (d_state), l length.
u, o (b, h, l); v, y (b, c, l); x (b, c, n) and A, B, A_bar, B_bar, C (c, n) complex;
dt, D (c); K (c, l). In the functions below the layer, h stands for c.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class GSS(nn.Module):
    """(b, h, l) -> (b, h, l): the block (1), without norm and residual connection.

    d_model, d_state: h, and n
    expand: the gate has h expand features
    bottleneck: the SSM has h / bottleneck channels
    gate: False leaves the gate out: o = W_o SSM(GELU(W_u u))
    measure: where A starts: diag-rand, or diag-lin (with dt_min=1e-3, dt_max=1e-1)
    train_B, train_dt: train B, which starts from 1, and dt
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of A
    lr: learning rate of A, and of B and dt if trained, stored in ssm_lr for the optimizer
    """

    def __init__(self, d_model, d_state=64, *, expand=4, bottleneck=4, gate=True,
                 measure="diag-rand", train_B=False, train_dt=False, dt_min=1.0, dt_max=1.0,
                 lr=1e-3):
        super().__init__()
        check(expand > 0, f"{expand=}: pass a positive number")
        check(bottleneck > 0 and d_model % bottleneck == 0,
              f"{bottleneck=}: pass a divisor of d_model = {d_model}")
        check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")
        self.h, self.c, self.n = d_model, d_model // bottleneck, d_state
        A = initial_eigenvalues(measure, self.c, d_state)                 # (c, n)
        log_dt = math.log(dt_min) + torch.rand(self.c) * math.log(dt_max / dt_min)
        self.log_dt = nn.Parameter(log_dt, requires_grad=train_dt)
        self.log_A_real = nn.Parameter((-A.real).log().to(log_dt))      # keeps Re A < 0
        self.A_imag = nn.Parameter(A.imag.to(log_dt))
        self.B = None
        if train_B:
            self.B = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(*A.shape, 1))
        self.C = nn.Parameter(torch.randn(*A.shape, 2) * 0.5 ** 0.5)    # real, imaginary
        self.D = nn.Parameter(torch.randn(self.c))
        self.ssm_lr = {"log_A_real": lr, "A_imag": lr}
        if train_dt:
            self.ssm_lr["log_dt"] = lr
        if train_B:
            self.ssm_lr["B"] = lr
        width = d_model * expand if gate else self.c
        self.input_linear = nn.Linear(d_model, self.c)                          # W_u
        self.input_gate = nn.Linear(d_model, width) if gate else None           # W_v
        self.output_gate = nn.Linear(self.c, width) if gate else None           # W_y
        self.output_linear = nn.Linear(width, d_model)                          # W_o

    def discretize(self, rate=1.0):
        """(2) at step size rate * dt: A_bar, B_bar, C, (c, n) complex128,
        because an error of A_bar grows k-fold in A_bar^k."""
        if not 0 < rate < math.inf:
            raise ValueError(f"{rate=}: pass a positive number")
        check(self.D.dtype.itemsize > 2, f"parameters are {self.D.dtype}: use autocast")
        dt = rate * self.log_dt.double().exp()[:, None]         # (c, 1)
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        B_bar = torch.expm1(dt * A) / A
        if self.B is not None:
            B_bar = B_bar * torch.view_as_complex(self.B.double())
        return torch.exp(dt * A), B_bar, torch.view_as_complex(self.C.double())

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, c, n) complex128, for rounding adds up over the steps."""
        return self.D.new_zeros(batch_size, self.c, self.n, dtype=torch.complex128)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(1) around (2): u (b, h), state (b, c, n) -> o (b, h), next state.
        discrete: what discretize() returned, to use it for many steps."""
        self.check_input(u, 2, state)
        A_bar, B_bar, C = discrete or self.discretize(rate)
        v = self._enter(u)                              # (b, c)
        x = A_bar * state + B_bar * v[..., None]        # (b, c, n)
        y = (C * x).sum(-1).real + self.D * v           # (b, c)
        return self._leave(y, u), x

    def kernel(self, l, rate=1.0):
        """(3), of the SSM alone: K_0 ... K_{l-1}, (c, l)."""
        if l < 1:
            raise ValueError(f"{l=}: pass a positive length")
        A_bar, B_bar, C = self.discretize(rate)
        with full_precision(self.D):
            digits = two_digits(A_bar, l, torch.view_as_complex(self.C).dtype)
            return vandermonde(C * B_bar, digits, l)

    def forward(self, u, state=None, *, rate=1.0, method="conv"):
        """u (b, h, l), state (b, c, n) or None -> o (b, h, l), last state or None.

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
        v = self._enter(u).to(self.D.dtype)             # (b, c, l)
        last = None
        with full_precision(u):
            digits = two_digits(A_bar, l, torch.view_as_complex(self.C).dtype)
            K = vandermonde(C * B_bar, digits, l)       # as kernel(), with digits at hand
            D = F.pad(self.D[:, None], (0, l - 1))      # D v: an impulse at k = 0
            y = fft_conv(v, K + D)                      # (b, c, l)
            if state is not None:
                # it adds C A_bar^{k+1} x to y_k, and A_bar^l x to the last state
                y = y + vandermonde(C * A_bar * state, digits, l)
                last = A_bar ** l * state + last_state(v, B_bar, digits)
        return self._leave(y, u), last

    def _enter(self, u):
        """v of (1): u (b, h, l) -> (b, c, l), or without l."""
        return F.gelu(channel_map(self.input_linear, u))

    def _leave(self, y, u):
        """o of (1): y (b, c, l), u (b, h, l) -> (b, h, l), or without l."""
        if self.input_gate is not None:
            gate = F.gelu(channel_map(self.input_gate, u))      # (b, h expand, l)
            y = channel_map(self.output_gate, y) * gate
        return channel_map(self.output_linear, y).to(u.dtype)

    def check_input(self, u, dims, state):
        """dims 2: u (b, h); dims 3: u (b, h, l); state (b, c, n) or None."""
        fits = u.dim() == dims and u.shape[1] == self.h and u.numel() > 0
        check(fits and u.is_floating_point(),
              f"u is {u.dtype} {tuple(u.shape)}: pass floats, {self.h} features, {dims}-d")
        if state is not None:
            check(state.shape == (len(u), self.c, self.n) and state.is_complex(),
                  "state: pass one of the shape and type of initial_state()")


# ---- the linear maps, and powers of A_bar ----

def channel_map(linear, u):
    """A linear layer over the features of u (b, h), or of u (b, h, l) as a convolution of
    length 1: twice as fast as a matrix product, for which torch copies u."""
    u = u.to(linear.weight.dtype)
    if u.dim() == 2:
        return linear(u)
    return F.conv1d(u, linear.weight[..., None], linear.bias)


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

def initial_eigenvalues(measure, c, n):
    """(c, n) complex128. diag-lin is that of S4D (arXiv 2206.11893)."""
    check(n > 0, f"d_state={n}: pass a positive number")
    check(measure in ("diag-rand", "diag-lin"), f"{measure=}: choose diag-rand or diag-lin")
    if measure == "diag-lin":
        imag = math.pi * torch.arange(n, dtype=torch.float64).repeat(c, 1)
        return torch.complex(torch.full_like(imag, -0.5), imag)
    real = -(1e-3 ** torch.rand(c, n, dtype=torch.float64))     # log-uniform in (1e-3, 1)
    return torch.complex(real, math.pi * torch.rand(c, n, dtype=torch.float64))


def check(ok, message):
    """Raise a ValueError unless ok. Not for rate or l: torch.compile can't print them."""
    if not ok:
        raise ValueError(message)


# ---- one signal in every mode ----

if __name__ == "__main__":
    torch.manual_seed(0)
    l, layer = 1000, GSS(d_model=4, bottleneck=2)
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
