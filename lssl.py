"""LSSL, the linear state space layer: the dense predecessor of S4, and the meaning of its state.

    Gu, Johnson, Goel, Saab, Dao, Rudra, Re: Combining Recurrent, Convolutional, and Continuous-time Models
    with Linear State-Space Layers (2021), arXiv 2110.13985
    Gu, Dao, Ermon, Rudra, Re: HiPPO: Recurrent Memory with Optimal Polynomial Projections (2020),
    arXiv 2008.07669

`python lssl.py` checks all modes against each other, `python lssl.py figures/lssl.png` draws the figure.

The model. Each of the h features u(t) drives a linear system of its own with n states,

    x'(t) = A x(t) + B u(t),     y(t) = C x(t) + D u(t).                                              (1)

Sampled with step size dt this becomes a recurrence, and unrolled D u plus a convolution with a kernel K:

    x_k = A_bar x_{k-1} + B_bar u_k,     y_k = C x_k + D u_k,                                         (2)
    K_k = C A_bar^k B_bar.                                                                            (3)

The idea. One model, three views: (1) has a time scale, so the sampling rate can change; (2) generates in
constant time per step; (3) trains in parallel. The A that makes it work is the HiPPO matrix.

What the state means. HiPPO chooses A and B so that x(t) holds the coefficients of the past of u in a basis of
Legendre polynomials P_i. With s the time before t, in the unit in which A is written (1/dt samples),

    LegT, a sliding window 0 < s < 1:    u(t - s) ~ sum_i x_i(t) sqrt(2i+1) P_i(1 - 2s)                (4)
    LegS, all of the past, fading:       u(t - s) ~ sum_i x_i(t) sqrt(2i+1) P_i(2 e^{-s} - 1)          (5)

The state is a compressed history, and C reads from it what the task needs. Differs from HiPPO: LegS there has
a factor 1/t and weighs all of the past equally; without it, as in this paper, the past fades with e^{-s}.

Discretization. The generalized bilinear transform takes A x at the end of a step with weight alpha, and at
its beginning with 1 - alpha, and u_k for the whole step:

    A_bar = (1 - alpha dt A)^{-1} (1 + (1 - alpha) dt A),     B_bar = (1 - alpha dt A)^{-1} dt B       (6)

alpha = 0 is forward Euler, 1 backward Euler, 1/2 bilinear (second order in A). For alpha >= 1/2, the
eigenvalues stay in the unit disk for every dt > 0 if those of A lie in the left half plane. Below, dt must be
small: with LegS they allow dt <= 2 / ((1 - 2 alpha) n), but the powers of A_bar grow before they decay, and
at alpha = 0, n = 64 already dt = 0.01 is too much.

The fast kernel. l products with A_bar, one after another, are slow. Write time with two digits, k = jT + i:
K_{jT+i} = (C A_bar^i) (A_bar^{jT} B_bar). Both factors come from the squares A_bar, A_bar^2, A_bar^4, ... by
doubling, and one matrix product is the kernel. It still costs n^3 log l: this is what S4 was invented for.

What is trained: C and D (LSSL-f, fixed A and dt), and on request A with B (one for all features or one each)
and dt. A trained dense A is not kept stable by anything; S4 repairs that as well. Differs from the paper,
which restricts a trained A to a structured class.

Symbols: b batch, h features (d_model), n states (d_state), l length, m channels; u (b, h, l), y (b, m h, l);
x (b, h, n); A (n, n) or (h, n, n), B (n) or (h, n), C (m, h, n), D (m, h), dt (h); A_bar and B_bar as A and B
of each feature.
"""

import math
import sys
import time
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn


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


# ---- HiPPO ----

MEASURES = ("legs", "legt")


def hippo_legendre(measure: str, n: int) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n) of HiPPO, float64 (arXiv 2008.07669, signs of 2206.12037).

    legs: A_ij = -sqrt((2i+1)(2j+1)) for i > j, -(i+1) for i = j, 0 for i < j;   B_i = sqrt(2i+1)
    legt: A_ij = -sqrt((2i+1)(2j+1)), times (-1)^(i-j) for i < j;                B_i = sqrt(2i+1)
    """
    require(measure in MEASURES, "measure", measure, f"choose one of {', '.join(MEASURES)}")
    i = torch.arange(n, dtype=torch.float64)
    root = torch.sqrt(2 * i + 1)
    if measure == "legs":
        return -torch.tril(torch.outer(root, root), -1) - torch.diag(i + 1), root
    return -torch.outer(root, root) * torch.where(i[:, None] < i, (-1) ** (i[:, None] - i), 1.0), root


def reconstruct(measure: str, x: Tensor, s: Tensor) -> Tensor:
    """The input that the state x (.., n) remembers, at times s (k) before the present: (4) or (5), (.., k).

    s is in the unit in which A is written: one sample is dt. For legt 0 <= s <= 1.
    """
    require(measure in MEASURES, "measure", measure, f"choose one of {', '.join(MEASURES)}")
    z = 1 - 2 * s if measure == "legt" else 2 * torch.exp(-s) - 1
    previous, P, past = torch.zeros_like(z), torch.ones_like(z), 0
    for i in range(x.shape[-1]):
        past = past + x[..., i, None] * (2 * i + 1) ** 0.5 * P
        previous, P = P, ((2 * i + 1) * z * P - i * previous) / (i + 1)      # P_{i+1} from P_i and P_{i-1}
    return past


# ---- from (1) to (2) ----

def discretize_gbt(A: Tensor, B: Tensor, dt: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Equation (6): A (h, n, n) or (n, n), B (h, n) or (n), dt (h) -> A_bar (h, n, n), B_bar (h, n)."""
    identity, dtA = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device), dt[:, None, None] * A
    right = torch.cat([identity + (1 - alpha) * dtA, (dt[:, None] * B)[..., None]], -1)
    solved = torch.linalg.solve(identity - alpha * dtA, right)
    return solved[..., :-1], solved[..., -1]


class Discrete(NamedTuple):
    """The matrices of the recurrence (2): A_bar (h, n, n), B_bar (h, n), C (m, h, n)."""
    A_bar: Tensor
    B_bar: Tensor
    C: Tensor


# ---- powers of a dense matrix, by squaring ----

def squares(A_bar: Tensor, l: int) -> list[Tensor]:
    """A_bar, A_bar^2, A_bar^4, ..., each (h, n, n), as many as l - 1 has binary digits (at least one)."""
    powers = [A_bar]
    while 2 ** len(powers) < l:
        powers.append(powers[-1] @ powers[-1])
    return powers


def krylov(powers: list[Tensor], x: Tensor) -> Tensor:
    """x_k A_bar^i for i < 2^len(powers), the rows for i one block: (h, k, n) -> (h, 2^len(powers) k, n)."""
    for power in powers:
        x = torch.cat([x, x @ power], 1)
    return x


def split_digits(powers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The squares that make up A_bar^i, i < T, and those of A_bar^{jT}, where k = jT + i, T a power of 2."""
    return powers[:len(powers) // 2 + 2], powers[len(powers) // 2 + 2:]      # T = 4 sqrt(l) is fastest


def output_of_dense_state(C: Tensor, powers: list[Tensor], x: Tensor) -> Tensor:
    """C A_bar^k x for the states x (b, h, n), C (h, m, n) and k < JT, by two digits of k: (b, m, h, JT)."""
    low, high = split_digits(powers)
    rows = krylov(low, C)                                                    # C A_bar^i: (h, T m, n)
    x = krylov([power.mT for power in high], x.transpose(0, 1))              # A_bar^{jT} x: (h, J b, n)
    y = (x @ rows.mT).unflatten(2, (-1, C.shape[1])).unflatten(1, (2 ** len(high), -1))    # (h, J, b, T, m)
    return y.permute(2, 4, 0, 1, 3).flatten(-2)


def dense_state_of_input(B_bar: Tensor, powers: list[Tensor], u: Tensor) -> Tensor:
    """The state that u (b, h, l) leaves: sum_k A_bar^{l-1-k} B_bar u_k with B_bar (h, n), (b, h, n)."""
    low, high = split_digits(powers)
    T, J = 2 ** len(low), 2 ** len(high)
    columns = krylov([power.mT for power in low], B_bar[:, None]).flip(1)    # A_bar^{T-1-i} B_bar: (h, T, n)
    u = nn.functional.pad(u, (J * T - u.shape[-1], 0)).unflatten(-1, (J, T))     # zeros in front add nothing
    x = torch.einsum("bhji,hin->hjbn", u, columns)                           # each block of T by itself, ...
    for power in high:                                                       # ... then pairs of blocks
        x = (x[:, ::2].flatten(1, 2) @ power.mT).unflatten(1, (-1, u.shape[0])) + x[:, 1::2]
    return x[:, 0].transpose(0, 1)


def advance(powers: list[Tensor], x: Tensor, k: int) -> Tensor:
    """A_bar^k x for x (b, h, n), by the binary digits of k < 2^len(powers)."""
    x = x.transpose(0, 1)
    for digit, power in enumerate(powers):
        x = x @ power.mT if k >> digit & 1 else x
    return x.transpose(0, 1)


def fft_conv(u: Tensor, K: Tensor) -> Tensor:
    """Causal convolution y_k = sum_{i <= k} K_i u_{k-i} of u (.., l) with K (.., l), broadcast.

    The FFT convolves on a circle: zeros up to length 2l - 1 or more keep the end out of the beginning. It is
    fast for lengths 2^i, 3 2^i and 5 2^i.
    """
    l = u.shape[-1]
    size = min(odd << ((2 * l - 2) // odd).bit_length() for odd in (1, 3, 5))
    return torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(K, size), size)[..., :l]


# ---- the layer ----

class LSSL(nn.Module):
    """Linear state space layer (b, h, l) -> (b, m h, l): the SSM with D, no activation, no feature mixing.

    d_model, d_state: number of features h; number of states n per feature
    measure: initial A and B: "legs" or "legt" (see hippo_legendre)
    alpha: 0 forward Euler, 0.5 bilinear, 1 backward Euler, or anything in between (below 0.5 lower dt_max)
    channels: number m of outputs per feature; channel c of feature i is output c h + i
    train_A: "no" (LSSL-f), "shared" (one A and B for all features) or "each" (one for each feature)
    train_dt: train the step sizes
    dt_min, dt_max: the initial step sizes are log-uniform in between, in the unit of time of A
    lr: learning rates of dt, A and B for the optimizer, recorded in `ssm_lr` (see learning_rates), as 0.0 for
        what train_A and train_dt do not train
    Raises ValueError for any other value.
    """

    def __init__(self, d_model: int, d_state: int = 64, *, measure: str = "legs", alpha: float = 0.5,
                 channels: int = 1, train_A: str = "no", train_dt: bool = False, dt_min: float = 1e-3,
                 dt_max: float = 1e-1, lr=1e-3):
        super().__init__()
        check_number("d_model", d_model, int)
        check_number("d_state", d_state, int)
        check_number("channels", channels, int)
        check_number("dt_min", dt_min)
        check_number("dt_max", dt_max)
        require(dt_min <= dt_max, "dt_max", dt_max, f"pass at least dt_min = {dt_min}")
        ok = isinstance(alpha, (int, float)) and 0 <= alpha <= 1
        require(ok, "alpha", alpha, "pass a number from 0 to 1")
        require(train_A in ("no", "shared", "each"), "train_A", train_A, "choose no, shared or each")
        require(isinstance(train_dt, bool), "train_dt", train_dt, "pass True or False")
        self.d_model, self.d_state, self.alpha = d_model, d_state, alpha
        A, B = (matrix.to(torch.get_default_dtype()) for matrix in hippo_legendre(measure, d_state))
        self.log_dt = nn.Parameter(math.log(dt_min) + torch.rand(d_model) * math.log(dt_max / dt_min))
        self.A = nn.Parameter(A.repeat(d_model, 1, 1) if train_A == "each" else A)
        self.B = nn.Parameter(B.repeat(d_model, 1) if train_A == "each" else B)
        self.C = nn.Parameter(torch.randn(channels, d_model, d_state) / d_state ** 0.5)
        self.D = nn.Parameter(torch.randn(channels, d_model))
        self.ssm_lr = learning_rates(self, lr, {"dt": ["log_dt"], "A": ["A"], "B": ["B"]})
        frozen = ("A", "B") * (train_A == "no") + ("log_dt",) * (not train_dt)
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)
            self.ssm_lr[name] = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The real dtype of the computation: that of the parameters, float32 at least."""
        return torch.promote_types(self.D.dtype, torch.float32)

    def _discretize(self, rate: float) -> Discrete:
        """discretize() in double precision, for the powers of A_bar."""
        check_number("rate", rate)
        dt = rate * self.log_dt.double().exp()
        return Discrete(*discretize_gbt(self.A.double(), self.B.double(), dt, self.alpha), self.C.double())

    def discretize(self, rate: float = 1.0) -> Discrete:
        """A_bar, B_bar and C of the recurrence (2) at step size rate * dt."""
        return Discrete(*(matrix.to(self.dtype) for matrix in self._discretize(rate)))

    def kernel(self, l: int, rate: float = 1.0) -> Tensor:
        """The impulse response K_0 ... K_{l-1} of equation (3), without D: (m h, l)."""
        check_number("l", l, int)
        d = self._discretize(rate)
        with torch.autocast("cuda" if self.D.is_cuda else "cpu", enabled=False):
            K = output_of_dense_state(d.C.transpose(0, 1), squares(d.A_bar, l), d.B_bar[None])[0]
        return K.flatten(0, 1)[:, :l].to(self.dtype)

    def initial_state(self, batch_size: int) -> Tensor:
        """x_{-1} = 0, (b, h, n)."""
        check_number("batch_size", batch_size, int)
        return torch.zeros(batch_size, self.d_model, self.d_state, dtype=self.dtype, device=self.D.device)

    def check_state(self, state: Tensor, b: int) -> None:
        """state must be real (b, h, n)."""
        check_tensor("state", state, (b, self.d_model, self.d_state))

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0,
             discrete: Optional[Discrete] = None) -> tuple[Tensor, Tensor]:
        """One step of the recurrence (2): u (b, h), state (b, h, n) -> y (b, m h) and the next state.

        discrete: what discretize(rate) returned, to reuse it for many steps; rate is then ignored.
        """
        check_tensor("u", u, ("b", self.d_model))
        self.check_state(state, u.shape[0])
        A_bar, B_bar, C = self.discretize(rate) if discrete is None else discrete
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):  # half precision is too coarse
            x = torch.einsum("hij,bhj->bhi", A_bar, state.to(A_bar.dtype)) + B_bar * u[..., None]
            y = torch.einsum("mhn,bhn->bmh", C, x.to(C.dtype)) + self.D * u[:, None]
        return y.flatten(1).to(u.dtype), x.to(A_bar.dtype)

    def forward(self, u: Tensor, state: Optional[Tensor] = None, *, rate: float = 1.0,
                method: str = "conv") -> tuple[Tensor, Optional[Tensor]]:
        """A sequence: u (b, h, l), state (b, h, n) or None -> y (b, m h, l) as u, final state or None.

        rate: factor on the step size: 2.0 for a signal sampled half as often as in training
        method: "conv", in parallel by FFT, or "step", the recurrence: the same numbers up to rounding,
            which with FFT is relative to the largest of the sequence
        """
        check_tensor("u", u, ("b", self.d_model, "l"))
        require(method in ("conv", "step"), "method", method, "choose conv or step")
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
        return torch.stack(outputs, -1), None if state is None else x.to(self.dtype)

    def _conv(self, u: Tensor, state: Optional[Tensor], rate: float) -> tuple[Tensor, Optional[Tensor]]:
        """The convolution (3). A state x adds C A_bar^{k+1} x to y_k, and A_bar^l x to the final state."""
        d, l = self._discretize(rate), u.shape[-1]
        powers, C = squares(d.A_bar, l), d.C.transpose(0, 1)
        K = output_of_dense_state(C, powers, d.B_bar[None])[0, ..., :l].to(u.dtype)
        K = K + nn.functional.pad(self.D[..., None], (0, l - 1))             # D u: an impulse at k = 0
        y = fft_conv(u[:, None], K)                                          # (b, m, h, l)
        if state is None:
            return y.flatten(1, 2), None
        powers = [power.to(u.dtype) for power in powers]
        B_bar, C, x = d.B_bar.to(u.dtype), C.to(u.dtype), state.to(u.dtype)
        x = advance(powers, x, 1)
        y = y + output_of_dense_state(C, powers, x)[..., :l]
        return y.flatten(1, 2), advance(powers, x, l - 1) + dense_state_of_input(B_bar, powers, u)


# ---- demo ----

def demo(path: Optional[str] = None) -> None:
    """Print how the modes agree and how long they take; draw the figure if a path is given."""
    torch.manual_seed(0)
    l, layer = 1024, LSSL(3, 64).requires_grad_(False)
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
    print(f"{f'LSSL, h=3, n=64, l={l}':<36}{'difference':>12}{'time / ms':>12}")
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
    axes = list(figure.subplots(2, 2).flat)
    steps = torch.arange(l, dtype=torch.float64)
    noise = torch.randn(l, dtype=torch.float64)
    history = torch.fft.irfft(torch.fft.rfft(noise)[:9], l)                  # smooth: up to 8 oscillations
    history = history / history.std()
    names = ["LegT, a window of 600 steps", "LegS, fading with 300 steps"]
    for row, (measure, dt) in enumerate([("legt", 1 / 600), ("legs", 1 / 300)]):
        ax, basis = axes[2 * row:2 * row + 2]
        ax.plot(history, color="0.7", lw=4, label="signal u")
        for n in (8, 16, 32):
            layer = LSSL(1, n, measure=measure, dt_min=dt, dt_max=dt).double()
            _, state = layer(history[None, None], layer.initial_state(1))
            s = torch.arange(600 if measure == "legt" else l, dtype=torch.float64) * dt
            past = reconstruct(measure, state[0, 0].detach(), s)
            ax.plot(l - 1 - s / dt, past, lw=1.5, label=f"from the last state, n = {n}")
        ax.set(ylim=(-3, 3), xlabel="step k", ylabel="u", title=f"What the state remembers: {names[row]}")
        for i in range(4):
            one = nn.functional.one_hot(torch.tensor(i), 4).double()
            window = steps[:600] if measure == "legt" else steps
            basis.plot(-window, reconstruct(measure, one, window * dt), label=f"i = {i}")
        basis.set(title=f"The first basis functions of {names[row]}", xlabel="step before the present",
                  ylabel="sqrt(2i+1) P_i")
    for ax in axes:
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    print("wrote", path)


if __name__ == "__main__":
    demo(*sys.argv[1:2])
