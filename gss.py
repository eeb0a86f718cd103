"""GSS, the gated state space layer: fewer channels for the SSM, more matrix products for the hardware.

    Mehta, Gupta, Cutkosky, Neyshabur: Long Range Language Modeling via Gated State Spaces (2022),
    arXiv 2206.13947

`python gss.py` checks all modes against each other, `python gss.py figures/gss.png` draws the figure.

The block. For an input u (b, h, l), with an SSM over time on h / bottleneck channels,

    v = GELU(W_u u),    y = SSM(v),    o = W_o((W_y y) * GELU(W_v u)),                                (1)

and the SSM has n complex numbers x for each of its channels, all independent as in dss.py:

    x_k = A_bar x_{k-1} + B_bar v_k,     y_k = Re(C x_k) + D v_k,                                     (2)
    K_k = Re sum_n C_n B_bar_n A_bar_n^k,   A_bar = exp(dt A),   B_bar = A^{-1} (exp(dt A) - 1) B.    (3)

What was wrong before. An FFT over h channels is slow on hardware that is made for matrix products. GSS
shrinks the SSM to h / bottleneck channels and spends the time in the linear maps around it: W_y y is
multiplied by a gate of h expand features. That is what the gating is for; whether it is more accurate depends
on the task.

The simplification. With B = 1 and dt = 1 fixed, a random A works as well as HiPPO. Only A, C and D remain of
the SSM. Differs from the paper: -Re A starts log-uniform in (1e-3, 1), so that
memory ranges from 1 to 1000 steps, and Im A uniform in (0, pi); draws of order 1 for both would forget within
a few steps.

Each simplification can be undone: gate=False, bottleneck=1, measure="diag-lin" with dt_min and dt_max of
s4d.py, train_B and train_dt.

State, step and rate. The maps of (1) act on one time step each, so that the state is that of the SSM, and a
step of the block is (1) with (2). The rate multiplies dt; with dt = 1 the unit of time is the step of
training.

The fast kernel is the one of s4d.py: two digits of time, k = jT + i, A_bar^k = A_bar^{jT} A_bar^i, a product
of two small matrices of powers, from factors in double precision, which also turn states into outputs and
inputs into states.

What is trained: A, C, D and the linear maps.

Symbols: b batch, h features (d_model), c = h / bottleneck channels of the SSM, n states (d_state), l length;
u, o (b, h, l); v, y (b, c, l); x (b, c, n) complex; A, B, A_bar, B_bar, C (c, n) complex; dt, D (c); K (c,
l). The functions shared with s4d.py write h for c.
"""

import math
import sys
import time
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn


COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


# ---- arguments ----

def require(ok: bool, name: str, value, remedy: str) -> None:
    """Raise a ValueError that names the argument, the value received and the remedy."""
    if not ok:
        raise ValueError(f"{name} = {value!r}: {remedy}")


def check_number(name: str, value, kind: type = float, even: bool = False) -> None:
    """value must be a positive, finite number; with kind=int a whole one."""
    ok = isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 < value < math.inf
    remedy = f"pass a positive {'even ' * even}int" if kind is int else "pass a positive, finite number"
    require(ok and not (even and value % 2), name, value, remedy)


def check_tensor(name: str, x, shape: tuple, kind: str = "floating_point") -> None:
    """x must be a tensor of this kind and shape, in which a letter stands for any size from 1 up."""
    ok = isinstance(x, Tensor) and getattr(x, f"is_{kind}")() and x.ndim == len(shape)
    ok = ok and all(got > 0 if isinstance(want, str) else got == want for got, want in zip(x.shape, shape))
    got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else x
    require(ok, name, got, f"pass a {kind.replace('_', ' ')} tensor ({', '.join(map(str, shape))})")


def learning_rates(layer: nn.Module, lr, names: dict) -> dict:
    """{parameter: learning rate} for lr = one rate, a dict by short name (1e-3 if left out) or None (empty).

    names: {short name: its parameters}. The rate 0.0 freezes a parameter.
    """
    rates = {} if lr is None else dict.fromkeys(names, 1e-3 if isinstance(lr, dict) else lr)
    rates |= lr if isinstance(lr, dict) else {}
    for short, rate in rates.items():
        ok = short in names and isinstance(rate, (int, float)) and 0 <= rate < math.inf
        require(ok, "lr", lr, f"pass None, a rate >= 0, or a dict of such rates for {', '.join(names)}")
    found = {name: rate for short, rate in rates.items() for name in names[short]}
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(found.get(name, 1.0) > 0)
    return {name: float(found[name]) for name, _ in layer.named_parameters() if name in found}


# ---- the matrix A ----

MEASURES = ("diag-rand", "diag-lin")


def random_or_linear_A(measure: str, c: int, n: int) -> Tensor:
    """The initial eigenvalues: (c, n) complex128.

    diag-rand: -Re log-uniform in (1e-3, 1), Im uniform in (0, pi), per sample if dt = 1
    diag-lin: -1/2 + i pi k for k = 0 ... n - 1 (S4D-Lin, arXiv 2206.11893)
    """
    require(measure in MEASURES, "measure", measure, f"choose one of {', '.join(MEASURES)}")
    if measure == "diag-lin":
        imag = math.pi * torch.arange(n, dtype=torch.float64).expand(c, -1)
        return torch.complex(torch.full_like(imag, -0.5), imag)
    real, imag = torch.rand(2, c, n, dtype=torch.float64)
    return torch.complex(-torch.exp(math.log(1e-3) * real), math.pi * imag)


# ---- discretization ----

def phi(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, which is 1 at z = 0. Near 0 the difference would cancel: there its Taylor series."""
    small = z.abs() < 0.02
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7)))))
    z = torch.where(small, 1, z)             # or the branch not taken would turn gradients into 0 * inf = nan
    return torch.where(small, series, (z.exp() - 1) / z)


def discretize_zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: A_bar = exp(dt A), B_bar = A^-1 (exp(dt A) - 1) B."""
    return torch.exp(dt * A), dt * phi(dt * A) * B


class Discrete(NamedTuple):
    """The matrices of the recurrence (2), each (c, n) complex."""
    A_bar: Tensor
    B_bar: Tensor
    C: Tensor


# ---- time in two digits ----

def powers(a: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """a^0, a^1, ..., a^(count - 1) on a new axis, (h, n) -> (h, count, n).

    By a^(r j + i) = (a^r)^j a^i with r about sqrt(count), so that autograd keeps little.
    """
    def first(a, count):
        """a^0 ... a^(count - 1) by one product after another: (h, n) -> (h, count, n)."""
        p = [torch.ones_like(a)]
        while len(p) < count:
            p.append(p[-1] * a)
        return torch.stack(p, 1).to(dtype)

    r = math.isqrt(count - 1) + 1
    low, high = first(a, r), first(a ** r, -(-count // r))
    return (high[:, :, None] * low[:, None]).flatten(1, 2)[:, :count]


def two_digits(a: Tensor, l: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """low = a^i (h, T, n) in the precision of dtype, high = a^{jT} (h, J, n) in double precision, JT >= l."""
    T = min(l, 2 * (math.isqrt(l - 1) + 1))                                  # 2 sqrt(l) is fastest, measured
    return powers(a, T, COMPLEX[dtype]), powers(a ** T, -(-l // T), a.dtype)


def as_real(z: Tensor, dtype: torch.dtype, conj: bool = False) -> Tensor:
    """Re z_1, Im z_1, Re z_2, ... (conj: of the conjugate), (.., n) -> (.., 2n).

    Re sum_n v_n w_n is then as_real(v) times as_real(w, conj=True): Re (a + ib)(c + id) = (a, b) (c, -d).
    """
    z = z.to(COMPLEX[dtype])
    return torch.view_as_real(z.conj().resolve_conj() if conj else z).flatten(-2)


def ssm_kernel(d: Discrete, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """K_{jT+i} = Re sum_n (C_n B_bar_n A_bar_n^{jT}) (A_bar_n^i): (h, JT)."""
    high = high * (d.C * d.B_bar)[:, None]
    return (as_real(high, dtype) @ as_real(low, dtype, conj=True).mT).flatten(1)


def output_of_state(d: Discrete, low: Tensor, high: Tensor, x: Tensor) -> Tensor:
    """What the state x (b, h, n) adds to the next outputs: Re sum_n C_n A_bar_n^{k+1} x_n, (b, h, JT)."""
    x = x[:, :, None] * (high * (d.C * d.A_bar)[:, None]).to(x.dtype)        # (b, h, J, n)
    x, low = as_real(x, x.real.dtype), as_real(low, x.real.dtype, conj=True)
    return torch.einsum("bhjn,hin->bhji", x, low).flatten(-2)


def state_of_input(d: Discrete, low: Tensor, high: Tensor, u: Tensor) -> Tensor:
    """The state that u (b, h, l) leaves: sum_k A_bar^{l-1-k} B_bar u_k, (b, h, n) complex."""
    T, J = low.shape[1], high.shape[1]
    u = nn.functional.pad(u, (J * T - u.shape[-1], 0)).unflatten(-1, (J, T))     # zeros in front add nothing
    x = torch.einsum("bhji,hin->bhjn", u, as_real(low.flip(1), u.dtype))     # each block of T by itself, ...
    x = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return (x * (high.flip(1) * d.B_bar[:, None]).to(x.dtype)).sum(2)        # ... decayed to the end, summed


def fft_conv(u: Tensor, K: Tensor) -> Tensor:
    """Causal convolution y_k = sum_{i <= k} K_i u_{k-i} of u (.., l) with K (.., l), broadcast.

    The FFT convolves on a circle: zeros up to length 2l - 1 or more keep the end out of the beginning. It is
    fast for lengths 2^i, 3 2^i and 5 2^i.
    """
    l = u.shape[-1]
    size = min(odd << ((2 * l - 2) // odd).bit_length() for odd in (1, 3, 5))
    return torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(K, size), size)[..., :l]


# ---- the layer ----

def channel_map(linear: nn.Linear, u: Tensor) -> Tensor:
    """A linear layer over the features of u (b, h, l)."""
    return linear.weight @ u.to(linear.weight.dtype) + linear.bias[:, None]


class GSS(nn.Module):
    """Gated state space layer (b, h, l) -> (b, h, l), equation (1), without norm and residual connection.

    d_model, d_state: number of features h; number of states n per channel, all complex and independent
    expand: the gate has h expand features (unused without it)
    bottleneck: the SSM has h / bottleneck channels
    gate: False leaves out the gate: o = W_o SSM(GELU(W_u u))
    measure: initial A: "diag-rand", or "diag-lin" with dt_min=1e-3, dt_max=1e-1 (at dt = 1 its exp(i pi k)
        are all 1 or -1)
    train_B, train_dt: train B, starting from 1, and the step sizes
    dt_min, dt_max: the initial step sizes are log-uniform in between, in the unit of time of A
    lr: learning rates of dt, A and B for the optimizer, recorded in `ssm_lr` (see learning_rates),
        0.0 for log_dt unless train_dt
    Raises ValueError for any other value.
    """

    def __init__(self, d_model: int, d_state: int = 64, *, expand: int = 4, bottleneck: int = 4,
                 gate: bool = True, measure: str = "diag-rand", train_B: bool = False, train_dt: bool = False,
                 dt_min: float = 1.0, dt_max: float = 1.0, lr=1e-3):
        super().__init__()
        check_number("d_model", d_model, int)
        check_number("d_state", d_state, int)
        check_number("expand", expand, int)
        check_number("bottleneck", bottleneck, int)
        check_number("dt_min", dt_min)
        check_number("dt_max", dt_max)
        require(dt_min <= dt_max, "dt_max", dt_max, f"pass at least dt_min = {dt_min}")
        for name, flag in {"gate": gate, "train_B": train_B, "train_dt": train_dt}.items():
            require(isinstance(flag, bool), name, flag, "pass True or False")
        require(d_model % bottleneck == 0, "bottleneck", bottleneck, f"pass a divisor of d_model = {d_model}")
        self.d_model, self.d_inner, self.d_state = d_model, d_model // bottleneck, d_state
        c, n = self.d_inner, d_state
        A, dtype = random_or_linear_A(measure, c, n), torch.get_default_dtype()
        self.log_dt = nn.Parameter(math.log(dt_min) + torch.rand(c) * math.log(dt_max / dt_min))
        self.log_A_real = nn.Parameter(torch.log(-A.real).to(dtype))
        self.A_imag = nn.Parameter(A.imag.to(dtype).contiguous())
        self.B = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(c, n, 1)) if train_B else None
        self.C = nn.Parameter(torch.randn(c, n, 2) * 0.5 ** 0.5)
        self.D = nn.Parameter(torch.randn(c))
        self.ssm_lr = learning_rates(self, lr, {"dt": ["log_dt"], "A": ["log_A_real", "A_imag"], "B": ["B"]})
        if not train_dt:
            self.log_dt.requires_grad_(False)
            self.ssm_lr["log_dt"] = 0.0
        self.input_linear = nn.Linear(d_model, c)                            # W_u
        self.input_gate = nn.Linear(d_model, d_model * expand) if gate else None                 # W_v
        self.output_gate = nn.Linear(c, d_model * expand) if gate else None                      # W_y
        self.output_linear = nn.Linear(d_model * expand if gate else c, d_model)                 # W_o

    @property
    def dtype(self) -> torch.dtype:
        """The real dtype of the computation: that of the parameters, float32 at least."""
        return torch.promote_types(self.D.dtype, torch.float32)

    def _discretize(self, rate: float) -> Discrete:
        """discretize() in double precision, for the powers of A_bar."""
        check_number("rate", rate)
        dt = rate * self.log_dt.double().exp()[:, None]
        A = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        B = torch.ones_like(A) if self.B is None else torch.view_as_complex(self.B.double())
        return Discrete(*discretize_zoh(A, B, dt), torch.view_as_complex(self.C.double()))

    def discretize(self, rate: float = 1.0) -> Discrete:
        """A_bar, B_bar and C of the recurrence (2) at step size rate * dt."""
        return Discrete(*(matrix.to(COMPLEX[self.dtype]) for matrix in self._discretize(rate)))

    def kernel(self, l: int, rate: float = 1.0) -> Tensor:
        """The impulse response K_0 ... K_{l-1} of equation (3), of the SSM alone, without D: (c, l)."""
        check_number("l", l, int)
        with torch.autocast("cuda" if self.D.is_cuda else "cpu", enabled=False):
            d = self._discretize(rate)
            return ssm_kernel(d, *two_digits(d.A_bar, l, self.dtype), self.dtype)[:, :l]

    def initial_state(self, batch_size: int) -> Tensor:
        """x_{-1} = 0, (b, c, n) complex."""
        check_number("batch_size", batch_size, int)
        shape = batch_size, self.d_inner, self.d_state
        return torch.zeros(shape, dtype=COMPLEX[self.dtype], device=self.D.device)

    def check_state(self, state: Tensor, b: int) -> None:
        """state must be complex (b, c, n)."""
        check_tensor("state", state, (b, self.d_inner, self.d_state), "complex")

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0,
             discrete: Optional[Discrete] = None) -> tuple[Tensor, Tensor]:
        """One step of the block (1): u (b, h), state (b, c, n) -> o (b, h) and the next state.

        discrete: what discretize(rate) returned, to reuse it for many steps; rate is then ignored.
        """
        check_tensor("u", u, ("b", self.d_model))
        self.check_state(state, u.shape[0])
        discrete = self.discretize(rate) if discrete is None else discrete
        y, x = self._gated(lambda v: self._step(v, state, discrete), u[..., None])
        return y[..., 0].to(u.dtype), x

    def _step(self, v: Tensor, x: Tensor, d: Discrete) -> tuple[Tensor, Tensor]:
        """The recurrence (2) as it stands: v (b, c, 1) -> y (b, c, 1), x."""
        x = (d.A_bar * x + d.B_bar * v).to(d.A_bar.dtype)
        return (d.C * x).real.sum(-1, keepdim=True) + self.D[:, None] * v, x

    def forward(self, u: Tensor, state: Optional[Tensor] = None, *, rate: float = 1.0,
                method: str = "conv") -> tuple[Tensor, Optional[Tensor]]:
        """A sequence: u (b, h, l), state (b, c, n) or None -> o (b, h, l) as u, final state or None.

        rate: factor on the step size: 2.0 for a signal sampled half as often as in training
        method: "conv", in parallel by FFT, or "step", the recurrence: the same numbers up to rounding,
            which with FFT is relative to the largest of the sequence
        """
        check_tensor("u", u, ("b", self.d_model, "l"))
        require(method in ("conv", "step"), "method", method, "choose conv or step")
        if state is not None:
            self.check_state(state, u.shape[0])
        run = self._conv if method == "conv" else self._steps
        y, last = self._gated(lambda v: run(v, state, rate), u)
        return y.to(u.dtype), last

    def _gated(self, ssm, u: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """Equation (1) around ssm(v) -> y, final state: u (b, h, l) -> o (b, h, l), final state."""
        v = nn.functional.gelu(channel_map(self.input_linear, u))
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):  # half precision is too coarse
            y, last = ssm(v.to(self.dtype))
        if self.input_gate is not None:
            y = channel_map(self.output_gate, y) * nn.functional.gelu(channel_map(self.input_gate, u))
        return channel_map(self.output_linear, y), last

    def _steps(self, u: Tensor, state: Optional[Tensor], rate: float) -> tuple[Tensor, Optional[Tensor]]:
        """The recurrence (2) over a sequence, in double precision: rounding adds up over the steps."""
        x = self.initial_state(u.shape[0]) if state is None else state
        outputs, discrete = [], self._discretize(rate)
        for u_k in u.double().unbind(-1):
            y_k, x = self._step(u_k[..., None], x, discrete)
            outputs.append(y_k)
        return torch.cat(outputs, -1), None if state is None else x.to(COMPLEX[self.dtype])

    def _conv(self, u: Tensor, state: Optional[Tensor], rate: float) -> tuple[Tensor, Optional[Tensor]]:
        """The convolution (3). A state x adds C A_bar^{k+1} x to y_k, and A_bar^l x to the final state."""
        d, l = self._discretize(rate), u.shape[-1]
        low, high = two_digits(d.A_bar, l, self.dtype)
        K = ssm_kernel(d, low, high, self.dtype)[:, :l]
        y = fft_conv(u, K + nn.functional.pad(self.D[:, None], (0, l - 1)))  # D u: an impulse at k = 0
        if state is None:
            return y, None
        state = state.to(COMPLEX[self.dtype])
        A_bar_l = d.A_bar * high[:, -1] * low[:, (l - 1) % low.shape[1]]     # pow would be slow
        last = (A_bar_l * state).to(state.dtype) + state_of_input(d, low, high, u)
        return y + output_of_state(d, low, high, state)[..., :l], last


# ---- demo ----

def demo(path: Optional[str] = None) -> None:
    """Print how the modes agree and how long they take; draw the figure if a path is given."""
    torch.manual_seed(0)
    l, layer = 1024, GSS(3, 64, bottleneck=1).requires_grad_(False)
    layer.log_dt.copy_(torch.tensor([1e-3, 1e-2, 1e-1]).log())
    t = torch.arange(l) / l
    u = torch.sin(2 * math.pi * torch.tensor([[2.0], [3.0], [5.0]]) * (t + t ** 2))[None]       # (1, 3, l)

    def chunks():
        """The same sequence in four uneven pieces: (1, 3, l)."""
        y, state = [], layer.initial_state(1)
        for piece in u.split([100, 1, 411, 512], -1):
            y_piece, state = layer(piece, state)
            y.append(y_piece)
        return torch.cat(y, -1)

    runs = {"convolution": lambda: layer(u)[0],
            "step by step": lambda: layer(u, method="step")[0],
            "four chunks, state forwarded": chunks,
            "every second sample, rate 2": lambda: layer(u[..., 1::2], rate=2.0)[0],
            "every second sample, rate 1 (wrong)": lambda: layer(u[..., 1::2])[0]}
    y, whole = {}, layer(u)[0]
    print(f"{f'GSS, h=3, n=64, l={l}':<36}{'difference':>12}{'time / ms':>12}")
    for name, run in runs.items():
        start = time.perf_counter()
        y[name] = run()
        duration = 1e3 * (time.perf_counter() - start)
        error = (y[name] - (whole[..., 1::2] if "second" in name else whole)).abs().max() / whole.abs().max()
        print(f"{name:<36}{error:12.1e}{duration:12.1f}")
    if path is None:
        return
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 8), layout="constrained")
    disk, kernels, modes, rates = axes = list(figure.subplots(2, 2).flat)
    disk.plot(torch.cos(2 * math.pi * t), torch.sin(2 * math.pi * t), color="0.7")
    for dt, A_bar, K in zip(layer.log_dt.exp(), layer.discretize().A_bar, layer.kernel(l)):
        disk.plot(A_bar.real, A_bar.imag, "o", ms=4, label=f"dt = {dt:.3f}")
        kernels.plot(K / K.abs().max(), lw=1, label=f"dt = {dt:.3f}")
    disk.set(title="Eigenvalues of A_bar in the unit disk", xlabel="Re A_bar", ylabel="Im A_bar", aspect=1)
    kernels.set(title="Kernels, each scaled to 1", xlabel="step k", ylabel="K_k / max |K|")
    modes.plot(u[0, 1], color="0.7", label="input u")
    for (name, line), style in zip(y.items(), ("-", "--", ":", "--", ":")):
        plot, step = (rates, 2) if "second" in name else (modes, 1)
        plot.plot(range(step - 1, l, step), line[0, 1], style, lw=3, label=name)
    rates.plot(whole[0, 1], color="0.7", label="all samples, rate 1")
    modes.set(title="One output, three ways to compute it (dt = 0.010)", xlabel="step k", ylabel="u, y")
    rates.set(title="Half the sampling frequency, no retraining", xlabel="step k", ylabel="y")
    for ax in axes:
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    print("wrote", path)


if __name__ == "__main__":
    demo(*sys.argv[1:2])
