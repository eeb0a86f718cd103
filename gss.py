"""GSS: a small state space layer between large matrix products.

    Mehta, Gupta, Cutkosky, Neyshabur: Long Range Language Modeling via Gated State Spaces
    (2022), arXiv 2206.13947.                         Try it: python gss.py

What was wrong before. An FFT over each of d features is slow on hardware made for matrix
products. GSS shrinks the SSM to h = d / bottleneck features, and spends the time in linear
maps, with biases, and in a gate of d * expand features that multiplies W_up y:

    v = GELU(W_in u),    y = SSM(v),    o = W_out((W_up y) * GELU(W_gate u)).      (1)

The SSM drives n complex numbers for each of its features, all independent as in dss.py:

    x_k = A_bar x_{k-1} + B_bar v_k,    y_k = Re(C x_k) + D v_k,                   (2)
    A_bar = exp(dt A),    B_bar = A^{-1} (A_bar - 1) B,
    y = K * v + D v,    K_k = Re(C A_bar^k B_bar).                                 (3)

The simplification. With B = 1 and dt = 1 fixed, a random A does as well as HiPPO. Only A,
C and D are trained, and the linear maps. Each choice can be undone: gate=False,
bottleneck=1, train_B, train_dt, and measure="diag-lin" with the dt_min and dt_max of S4D.

Differs from the paper: there one A serves all features, and -Re A and Im A start as
exponentials of normal numbers: most forget in a step or two, and the slowest of 64 in about
ten. Here each feature has an A of its own, -Re A log-uniform in (1e-3, 1), to remember 1 to
1000 steps, and Im A uniform in (0, pi), every frequency that samples can show.

Why h = d/4, and a gate 4d wide? FFTs and states cost in proportion to h, a quarter of d.
The block does the work of a feed-forward network, too, as the gated attention unit does
(2202.10447): its 9 d^2 products a step are about a Transformer's 8 d^2, 4d wide as well.

Why no factor 2? The n numbers are independent, no conjugate pairs: the real part alone
makes the output real.

State, step and rate. The maps in (1) act on each time step alone. So the state is that of
the SSM, a step of the block is (1) around (2), and rate scales dt, in (2) alone.

Symbols: b batch, d features (d_model), h features of the SSM, n states (d_state), l length.
u, o (b, d, l); v, y (b, h, l); x (b, h, n) and A, B, A_bar, B_bar, C (h, n) complex;
dt, D (h); K (h, l).
"""

import math
import numbers

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layer ----

class GSS(nn.Module):
    """(b, d, l) -> (b, d, l): the block (1), without norm and residual connection.

    d_model, d_state: d, and n, of which all are stored (S4D stores half of its n)
    expand: the gate has d * expand features
    bottleneck: the SSM has d / bottleneck features
    gate: False leaves the gate out: o = W_out SSM(GELU(W_in u))
    measure: where A starts: diag-rand, or diag-lin (needs dt_min=1e-3, dt_max=1e-1)
    train_B, train_dt: train B, which starts from 1, and dt
    dt_min, dt_max: step sizes start log-uniform in between, in the unit of time of A
    lr: learning rate of A, and of B and dt if trained, which is for you to pass to the
        optimizer: ssm_lr has it for each name, and param_groups in example.py reads that
    """

    def __init__(self, d_model, d_state=64, *, expand=4, bottleneck=4, gate=True,
                 measure="diag-rand", train_B=False, train_dt=False, dt_min=1.0, dt_max=1.0,
                 lr=1e-3):
        super().__init__()
        check(d_model > 0 and lr >= 0, f"{d_model=}, {lr=}: pass d_model > 0 and lr >= 0")
        check(expand > 0, f"{expand=}: pass a positive number")
        check(bottleneck > 0 and d_model % bottleneck == 0,
              f"{bottleneck=}: pass a divisor of d_model = {d_model}")
        check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")
        self.d_model, self.h, self.n = d_model, d_model // bottleneck, d_state
        A = initial_A(measure, self.h, d_state)                         # (h, n)
        log_dt = math.log(dt_min) + torch.rand(self.h) * math.log(dt_max / dt_min)
        self.log_dt = nn.Parameter(log_dt, requires_grad=train_dt)
        self.log_A_real = nn.Parameter((-A.real).log().to(log_dt))      # keeps Re A < 0
        self.A_imag = nn.Parameter(A.imag.to(log_dt))
        self.B = None
        if train_B:
            self.B = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(*A.shape, 1))
        self.C = nn.Parameter(torch.randn(*A.shape, 2) * 0.5 ** 0.5)    # real, imaginary
        self.D = nn.Parameter(torch.randn(self.h))
        self.ssm_lr = {"log_A_real": lr, "A_imag": lr}
        if train_dt:
            self.ssm_lr["log_dt"] = lr
        if train_B:
            self.ssm_lr["B"] = lr
        width = d_model * expand if gate else self.h
        self.input_linear = nn.Linear(d_model, self.h)                          # W_in
        self.input_gate = nn.Linear(d_model, width) if gate else None           # W_gate
        self.output_gate = nn.Linear(self.h, width) if gate else None           # W_up
        self.output_linear = nn.Linear(width, d_model)                          # W_out

    def discretize(self, rate=1.0):
        """(2) at step size rate * dt: A_bar, B_bar, C, (h, n) complex128,
        because an error of A_bar grows k-fold in A_bar^k."""
        check_rate(rate, self)
        dt = rate * self.log_dt.double().exp()[:, None]         # (h, 1)
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        B_bar = torch.expm1(dt * A) / A                         # expm1(z) is exp(z) - 1
        if self.B is not None:
            B_bar = B_bar * torch.complex(*self.B.double().unbind(-1))
        return torch.exp(dt * A), B_bar, torch.complex(*self.C.double().unbind(-1))

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, h, n) complex128, so that rounding stays small."""
        return self.D.new_zeros(batch_size, self.h, self.n, dtype=torch.complex128)

    def enter(self, u):
        """v of (1): u (.., d), features last -> (.., h)."""
        return F.gelu(self.input_linear(u))

    def leave(self, y, u):
        """o of (1): y (.., h), u (.., d), features last -> (.., d)."""
        if self.input_gate is not None:
            y = self.output_gate(y) * F.gelu(self.input_gate(u))
        return self.output_linear(y)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(1) around (2): u (b, d), state (b, h, n) -> o (b, d), next state.
        discrete: what discretize(rate) returned, to use it for many steps."""
        check_input(u, 2, self.d_model, state, (self.h, self.n))
        check(discrete is None or rate == 1.0, "rate is in discrete: pass it to discretize")
        A_bar, B_bar, C = discrete or self.discretize(rate)
        check(A_bar.shape == state.shape[1:], "discrete: it was made by another layer")
        w = u.to(self.D.dtype)
        v = self.enter(w)                                       # (b, h)
        x = A_bar * state + B_bar * v[..., None]                # (b, h, n)
        y = (C * x).sum(-1).real + self.D * v                   # (b, h)
        return self.leave(y.to(w.dtype), w).to(u.dtype), x

    def kernel(self, l, rate=1.0):
        """(3), of the SSM: (h, l), K[:, k] = (C * A_bar ** k * B_bar).sum(-1).real."""
        if l < 1:
            raise ValueError(f"{l=}: pass a positive length")
        A_bar, B_bar, C = self.discretize(rate)
        return vandermonde(C * B_bar, powers(A_bar, l, self.D.dtype), l)

    def forward(self, u, state=None, *, rate=1.0, method="conv"):
        """u (b, d, l), state (b, h, n) or None -> o (b, d, l), last state or None.

        rate: factor on dt: 2.0 for the same signal sampled half as often
        method: conv, (3), whose rounding errors are in proportion to max |u|, or step, (2)
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        check_input(u, 3, self.d_model, state, (self.h, self.n))
        check(method in ("conv", "step"), f"{method=}: choose conv or step")
        if method == "step":
            return self.recurrence(u, state, rate)
        l = u.shape[-1]
        K = self.kernel(l, rate)                                # (h, l)
        w = u.to(self.D.dtype).mT.contiguous()                  # (b, l, d), for the maps
        v = self.enter(w).mT.to(w.dtype).contiguous()           # (b, h, l)
        y = fft_conv(v, K) + self.D[:, None] * v                # (3)
        last = None
        if state is not None:
            # a state x adds C A_bar^{k+1} x to y_k, and A_bar^l x to the last state
            A_bar, B_bar, C = self.discretize(rate)
            A_k = powers(A_bar, l, v.dtype)
            y = y + vandermonde(C * A_bar * state, A_k, l)
            last = A_bar ** l * state + last_state(v, B_bar, A_k)
        return self.leave(y.mT.contiguous(), w).mT.to(u.dtype), last

    def recurrence(self, u, state, rate):
        """(1) around (2), step by step: equal to the parallel form up to rounding."""
        x = self.initial_state(u.shape[0]) if state is None else state
        discrete = self.discretize(rate)
        outputs = []
        for u_k in u.unbind(-1):
            y_k, x = self.step(u_k, x, discrete=discrete)
            outputs.append(y_k)
        return torch.stack(outputs, -1), None if state is None else x


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


# ---- where A starts ----

def initial_A(measure, h, n):
    """(h, n) complex128. diag-lin is S4D's with d_state = 2n (arXiv 2206.11893)."""
    check(n > 0, f"d_state={n}: pass a positive number")
    check(measure in ("diag-rand", "diag-lin"), f"{measure=}: choose diag-rand or diag-lin")
    if measure == "diag-lin":
        imag = math.pi * torch.arange(n, dtype=torch.float64).repeat(h, 1)
        return torch.complex(torch.full_like(imag, -0.5), imag)
    real = -(1e-3 ** torch.rand(h, n, dtype=torch.float64))     # log-uniform in (1e-3, 1)
    return torch.complex(real, math.pi * torch.rand(h, n, dtype=torch.float64))


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
    l, layer = 1000, GSS(d_model=4, bottleneck=2)
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
