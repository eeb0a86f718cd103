"""DSS, the diagonal state space layer that came first: softmax over the length, and its variant "exp".

    Gupta, Gu, Berant: Diagonal State Spaces are as Effective as Structured State Spaces (2022),
    arXiv 2203.14343

`python dss.py` checks all modes against each other, `python dss.py figures/dss.png` draws the figure.

The model. Each of the h features u(t) drives n numbers x of its own, with the same complex Lambda for all
features,

    x'(t) = Lambda x(t) + u(t),     y(t) = Re(C x(t)) + D u(t),                                       (1)

and with step size dt, zero-order hold, and z = dt Lambda

    x_k = e^z x_{k-1} + (e^z - 1) / Lambda u_k,     y_k = Re(C x_k) + D u_k,     B = 1,               (2)
    K_k = Re sum_n C_n (e^{z_n} - 1) / Lambda_n e^{k z_n}.                                            (3)

What was wrong before. S4 says that memory needs the HiPPO matrix, which is not diagonal. DSS found that a
diagonal matrix with the eigenvalues of its normal part does as well: -1/2 + i w from the skew part of
HiPPO-LegS.

The idea. To keep (3) bounded for any sign of Re Lambda, DSS normalizes each exponential over the length l_max
that it will be used for, a softmax over time (paper, Proposition 1):

    K_k = Re sum_n W_n / Lambda_n  e^{k z_n} / sum_{r < l_max} e^{r z_n}.                             (4)

The geometric sum is (e^{l_max z} - 1) / (e^z - 1), so (4) is (3) with C = W / (e^{l_max z} - 1), kept finite
at its poles (discretize_dss). That is how it gets a state, a step and a rate here, none of which the official
code has: C depends on the step size through dt l_max alone, with the dt of rate 1, and the rate changes e^z
and the hold. Version "exp" has no normalizer, C = W and Re Lambda = -exp(Lambda_re) < 0,
which S4D continues.

Why no factor 2? Lambda starts with Im Lambda > 0 only, but all n values are independent: the real
part alone makes the output real. A conjugate pair with half the weights would give the same.

How the recurrence stays finite if Re Lambda > 0. Then e^{kz} grows, and C is as small as e^{-l_max z}. So the
factor e^{-l_max z} is shared equally between C and the input (x is then (2) times e^{-l_max z / 2}), and a =
l_max Re z is capped at 80: states stay between e^{-a/2} and e^{a/2}, powers of A_bar below e^a, all inside
float32. At the cap the kernel lives on the oldest 1/80 of the lags, k near l_max, anyway. This holds for
l_max steps: a longer call is an error, but chunks and steps are not counted, and beyond l_max such states
grow on.

The fast kernel is the one of s4d.py: two digits of time, k = jT + i, e^{kz} = e^{jTz} e^{iz}, a product of
two small matrices of powers, from factors in double precision, which also turn states into outputs and inputs
into states.

What is trained: log_dt (one step size per feature), Lambda, W and D.

Symbols: b batch, h features (d_model), n states (d_state), l length; u, y (b, h, l); x (b, h, n) complex;
Lambda (n), W, C (h, n) complex; A_bar = e^z, B_bar (h, n); dt, D (h); K (h, l).
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

def legs_eigenvalues(n: int) -> Tensor:
    """Imaginary parts > 0 of the eigenvalues of -1/2 + S, the normal part of HiPPO-LegS, descending: (n/2).

    S is skew-symmetric with S_ij = sqrt((2i+1)(2j+1)) / 2 above the diagonal (arXiv 2206.11893, section 4),
    so i S is Hermitian and its eigenvalues are real and sorted.
    """
    p = torch.sqrt(2 * torch.arange(n, dtype=torch.float64) + 1)
    S = torch.triu(p[:, None] * p / 2, 1)
    return torch.linalg.eigvalsh(1j * (S - S.mT)).flip(0)[:n // 2]


# ---- from (1) to (2) ----

def phi(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, which is 1 at z = 0. Near 0 the difference would cancel: there its Taylor series."""
    small = z.abs() < 0.02
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7)))))
    z = torch.where(small, 1, z)             # or the branch not taken would turn gradients into 0 * inf = nan
    return torch.where(small, series, (z.exp() - 1) / z)


def discretize_dss(Lambda: Tensor, W: Tensor, dt: Tensor, rate: float, l_max: int) -> tuple[Tensor, Tensor]:
    """B_bar and C of DSS-softmax: C B_bar = W (e^{rate z} - 1) / (Lambda (e^{l_max z} - 1)), z = dt Lambda.

    Zero-order hold of B = 1, and the normalizer in C. 1/x is conj(x) / (|x|^2 + 1e-7), finite at its poles
    e^{l_max z} = 1. If Re z > 0, e^{l_max z} could overflow: 1 / (e^{l_max z} - 1) is
    -e^{-l_max z} / (e^{-l_max z} - 1), and B_bar and C take half of the numerator's exponent each.
    """
    growing = (dt * Lambda).real > 0
    sign = 1 - 2 * growing.to(dt.dtype)
    x = (torch.exp(sign * l_max * dt * Lambda) - 1) * Lambda
    share = torch.exp(-l_max / 2 * dt * torch.where(growing, Lambda, 0))
    C = sign * W * Lambda * x.conj() / (x.real ** 2 + x.imag ** 2 + 1e-7)
    return rate * dt * phi(rate * dt * Lambda) * share, C * share


class Discrete(NamedTuple):
    """The recurrence (2): A_bar, B_bar and C, each (h, n) complex; y = Re(C x)."""
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

class DSS(nn.Module):
    """Diagonal state space layer (b, h, l) -> (b, h, l): the SSM with D, no activation, no feature mixing.

    d_model, d_state: number of features h; number of states n per feature, all complex and independent
    version: "softmax", normalized over l_max steps, or "exp", with Re Lambda < 0 and no normalization
    l_max: longest sequence of version "softmax", in steps at rate 1; "exp" takes any length
    dt_min, dt_max: the initial step sizes are log-uniform in between, in the unit of time of Lambda
    lr: learning rates of dt and A (Lambda) for the optimizer, recorded in `ssm_lr` (see learning_rates)
    Raises ValueError for any other value.
    """

    def __init__(self, d_model: int, d_state: int = 64, *, version: str = "softmax", l_max: int = 1024,
                 dt_min: float = 1e-3, dt_max: float = 1e-1, lr=1e-3):
        super().__init__()
        check_number("d_model", d_model, int)
        check_number("d_state", d_state, int)
        check_number("l_max", l_max, int)
        check_number("dt_min", dt_min)
        check_number("dt_max", dt_max)
        require(dt_min <= dt_max, "dt_max", dt_max, f"pass at least dt_min = {dt_min}")
        require(version in ("softmax", "exp"), "version", version, "choose softmax or exp")
        self.d_model, self.d_state, self.version, self.l_max = d_model, d_state, version, l_max
        real = -0.5 if version == "softmax" else math.log(0.5)
        self.log_dt = nn.Parameter(math.log(dt_min) + torch.rand(d_model) * math.log(dt_max / dt_min))
        self.Lambda_re = nn.Parameter(torch.full((d_state,), real))
        self.Lambda_im = nn.Parameter(legs_eigenvalues(2 * d_state).to(self.log_dt.dtype))
        self.W = nn.Parameter(torch.randn(d_model, d_state, 2))
        self.D = nn.Parameter(torch.randn(d_model))
        self.ssm_lr = learning_rates(self, lr, {"dt": ["log_dt"], "A": ["Lambda_re", "Lambda_im"]})

    @property
    def dtype(self) -> torch.dtype:
        """The real dtype of the computation: that of the parameters, float32 at least."""
        return torch.promote_types(self.D.dtype, torch.float32)

    def _discretize(self, rate: float) -> Discrete:
        """discretize() in double precision, for the powers of A_bar."""
        check_number("rate", rate)
        dt, W = self.log_dt.double().exp()[:, None], torch.view_as_complex(self.W.double())
        real, imag = self.Lambda_re.double(), self.Lambda_im.double()
        if self.version == "exp":
            Lambda = torch.complex(-real.exp(), imag)
            return Discrete(torch.exp(rate * dt * Lambda), rate * dt * phi(rate * dt * Lambda), W)
        real = torch.minimum(real, 80 / (dt * self.l_max))                   # so that all factors stay finite
        Lambda = torch.complex(real, imag.expand_as(real))
        return Discrete(torch.exp(rate * dt * Lambda), *discretize_dss(Lambda, W, dt, rate, self.l_max))

    def discretize(self, rate: float = 1.0) -> Discrete:
        """A_bar, B_bar and C of the recurrence (2) at step size rate * dt."""
        return Discrete(*(matrix.to(COMPLEX[self.dtype]) for matrix in self._discretize(rate)))

    def kernel(self, l: int, rate: float = 1.0) -> Tensor:
        """The impulse response K_0 ... K_{l-1} of equation (3) or (4), without D: (h, l)."""
        check_number("l", l, int)
        self.check_length(l, rate)
        with torch.autocast("cuda" if self.D.is_cuda else "cpu", enabled=False):
            d = self._discretize(rate)
            return ssm_kernel(d, *two_digits(d.A_bar, l, self.dtype), self.dtype)[:, :l]

    def initial_state(self, batch_size: int) -> Tensor:
        """x_{-1} = 0, (b, h, n) complex."""
        check_number("batch_size", batch_size, int)
        shape = batch_size, self.d_model, self.d_state
        return torch.zeros(shape, dtype=COMPLEX[self.dtype], device=self.D.device)

    def check_state(self, state: Tensor, b: int) -> None:
        """state must be complex (b, h, n)."""
        check_tensor("state", state, (b, self.d_model, self.d_state), "complex")

    def check_length(self, l: int, rate: float) -> None:
        """Version softmax is defined for at most l_max steps at rate 1."""
        check_number("rate", rate)
        ok = self.version == "exp" or l * rate <= self.l_max * (1 + 1e-9)    # l * (l_max / l) may round up
        require(ok, "l", l, f"softmax is for l rate <= l_max = {self.l_max}: raise l_max, or use version exp")

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0,
             discrete: Optional[Discrete] = None) -> tuple[Tensor, Tensor]:
        """One step of the recurrence (2): u (b, h), state (b, h, n) -> y (b, h) and the next state.

        discrete: what discretize(rate) returned, to reuse it for many steps; rate is then ignored.
        """
        check_tensor("u", u, ("b", self.d_model))
        self.check_state(state, u.shape[0])
        A_bar, B_bar, C = self.discretize(rate) if discrete is None else discrete
        x = A_bar * state + B_bar * u[..., None]
        y = (C * x).real.sum(-1) + self.D * u
        return y.to(u.dtype), x.to(A_bar.dtype)

    def forward(self, u: Tensor, state: Optional[Tensor] = None, *, rate: float = 1.0,
                method: str = "conv") -> tuple[Tensor, Optional[Tensor]]:
        """A sequence: u (b, h, l), state (b, h, n) or None -> y (b, h, l) as u, final state or None.

        rate: factor on the step size: 2.0 for a signal sampled half as often as in training
        method: "conv", in parallel by FFT, or "step", the recurrence: the same numbers up to rounding,
            which with FFT is relative to the largest of the sequence
        """
        check_tensor("u", u, ("b", self.d_model, "l"))
        require(method in ("conv", "step"), "method", method, "choose conv or step")
        self.check_length(u.shape[-1], rate)
        if state is not None:
            self.check_state(state, u.shape[0])
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):  # half precision is too coarse
            run = self._conv if method == "conv" else self._steps
            y, last = run(u.to(self.dtype), state, rate)
        return y.to(u.dtype), last

    def _steps(self, u: Tensor, state: Optional[Tensor], rate: float) -> tuple[Tensor, Optional[Tensor]]:
        """The recurrence (2) as it stands, in double precision: rounding adds up over the steps."""
        x = self.initial_state(u.shape[0]) if state is None else state
        outputs, discrete = [], self._discretize(rate)
        for u_k in u.double().unbind(-1):
            y_k, x = self.step(u_k, x, discrete=discrete)
            outputs.append(y_k)
        return torch.stack(outputs, -1), None if state is None else x.to(COMPLEX[self.dtype])

    def _conv(self, u: Tensor, state: Optional[Tensor], rate: float) -> tuple[Tensor, Optional[Tensor]]:
        """The convolution with K. A state x adds C A_bar^{k+1} x to y_k, and A_bar^l x to the final state."""
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
    l, layer = 1024, DSS(3, 64).requires_grad_(False)
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
    print(f"{f'DSS, h=3, n=64, l={l}':<36}{'difference':>12}{'time / ms':>12}")
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
    disk.set(title="Eigenvalues A_bar = exp(dt Lambda)", xlabel="Re A_bar", ylabel="Im A_bar", aspect=1)
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
