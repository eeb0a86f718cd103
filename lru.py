"""LRU, the linear recurrent unit: the same recurrence without a differential equation behind it.

    Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu, De: Resurrecting Recurrent Neural Networks for Long
    Sequences (2023), arXiv 2303.06349

`python lru.py` checks all modes against each other, `python lru.py figures/lru.png` draws the figure.

The model. All h features u together drive n complex numbers x, all independent,

    x_k = lambda x_{k-1} + gamma B u_k,     y_k = Re(C x_k) + D u_k.                                  (1)

What was wrong before. S4 to S5 start from a differential equation, HiPPO and a discretization. LRU asks what
of it is needed, starting from a plain linear RNN: a complex diagonal recurrence, stable by construction,
initialized near the unit circle, with a normalized input. That suffices.

The exponential parameterization (paper, section 3.3): lambda = exp(-exp(nu_log) + i exp(theta_log)), so
|lambda| < 1 whatever the parameters. The ring: |lambda|^2 starts uniform in (r_min^2, r_max^2), the phase in
(0, max_phase).

The normalization (paper, section 3.4): with white noise as input, |x|^2 grows to 1 / (1 - |lambda|^2), which
near the unit circle is large. So gamma starts as sqrt(1 - |lambda|^2), and is trained as gamma =
exp(gamma_log).

Why no factor 2? Nothing makes the n states conjugate pairs; the real part alone makes the output
real.

What rate means here. (1) is the zero-order hold of x' = Lambda x + b u with step size 1, if Lambda = log
lambda and (lambda - 1) / Lambda b = gamma B. With step size rate, the same differential equation gives

    x_k = lambda^rate x_{k-1} + (lambda^rate - 1) / (lambda - 1) gamma B u_k,                         (2)

where log lambda has its imaginary part in [-pi, pi): a phase just below 2 pi is a slow rotation backwards.

Why a scan? With many inputs the kernel is an (h, h) matrix for each lag, so a convolution does not pay. But
(1) is associative: two steps in a row, x -> a x + v and then x -> a' x + v', are one, x -> a'a x + (a' v +
v'). So steps can be combined in any order, in a tree of depth log2(l) ("associative scan"). A tree goes
through memory once or more for each of its levels. Two levels are enough here: cut time into blocks of about
sqrt(l) steps and run the plain recurrence in all blocks at once. That is 3 sqrt(l) steps, each of them wide,
and two passes over memory.

Free-running dynamics, without input, from a state (b, n):

    y, last = layer(torch.zeros(b, h, n_steps), state)

What is trained: nu_log, theta_log, gamma_log, B, C, D.

Symbols: b batch, h features (d_model), n states (d_state), l length; u, y (b, h, l); x (b, n) complex;
lambda, gamma, A_bar = lambda^rate (n); B, B_bar (n, h); C (h, n); D (h).
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


# ---- lambda ----

def ring(n: int, r_min: float, r_max: float, max_phase: float) -> tuple[Tensor, Tensor, Tensor]:
    """nu_log, theta_log and gamma_log (n): lambda uniform in area on a ring, gamma = sqrt(1 - |lambda|^2).

    |lambda|^2 = u1 (r_max^2 - r_min^2) + r_min^2, phase = max_phase u2 (paper, Lemma 3.2 and section 3.4).
    """
    u1, u2 = 1e-6 + (1 - 2e-6) * torch.rand(2, n, dtype=torch.float64)       # never 0 or 1: finite logarithms
    square = u1 * (r_max ** 2 - r_min ** 2) + r_min ** 2
    return torch.log(-0.5 * torch.log(square)), torch.log(max_phase * u2), 0.5 * torch.log(1 - square)


# ---- rate ----

def phi(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, which is 1 at z = 0. Near 0 the difference would cancel: there its Taylor series."""
    small = z.abs() < 0.02
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7)))))
    z = torch.where(small, 1, z)             # or the branch not taken would turn gradients into 0 * inf = nan
    return torch.where(small, series, (z.exp() - 1) / z)


class Discrete(NamedTuple):
    """The recurrence (2): A_bar (n), B_bar (n, h), C (h, n), complex."""
    A_bar: Tensor
    B_bar: Tensor
    C: Tensor


# ---- the scan ----

def as_real(z: Tensor, dtype: torch.dtype, conj: bool = False) -> Tensor:
    """Re z_1, Im z_1, Re z_2, ... (conj: of the conjugate), (.., n) -> (.., 2n).

    Re sum_n v_n w_n is then as_real(v) times as_real(w, conj=True): Re (a + ib)(c + id) = (a, b) (c, -d).
    """
    z = z.to(COMPLEX[dtype])
    return torch.view_as_real(z.conj().resolve_conj() if conj else z).flatten(-2)


def scan_in_place(v: Tensor, a: Tensor, x: Tensor, reverse: bool = False) -> None:
    """Replace v_k by x_k = a x_{k-1} + v_k, with reverse by x_k = a x_{k+1} + v_k: v (b, J, T, n), x (b, n).

    Time is k = jT + i. Two levels: the end of each block j if it started from 0; then the true starts of the
    blocks, one by one; then all blocks again from there. So there are T steps over all blocks at once, J
    small ones, and T again.
    """
    steps, blocks = [v[:, :, i] for i in range(v.shape[2])], range(v.shape[1])
    if reverse:
        steps, blocks = steps[::-1], blocks[::-1]
    a, a_T = a.to(v.dtype), (a ** len(steps)).to(v.dtype)                    # a^T in double precision
    ends = steps[0]
    for v_i in steps[1:]:
        ends = torch.addcmul(v_i, ends, a)
    starts = torch.empty_like(ends)
    for j in blocks:
        starts[:, j] = x
        x = torch.addcmul(ends[:, j], x, a_T)
    for v_i in steps:
        starts = v_i.addcmul_(starts, a)


class Scan(torch.autograd.Function):
    """x_k = a x_{k-1} + B u_k, y_k = Re(C x_k) + D u_k for k = 0 ... l-1, from x_{-1} = x0.

    u (b, h, l), a (n), B (n, h), C (h, n) complex128, D (h), x0 (b, n) -> y (b, h, l), x_{l-1} (b, n).
    Gradient, with g_k = dL/dy_k and w_k = conj(dL/d(B u_k)): the adjoint recurrence w_k = a w_{k+1} + C^T g_k
    is the same scan backwards in time, to whose last w the gradient of x_{l-1} is added.
    dL/da = conj(sum_k x_{k-1} w_k), dL/dB = conj(sum_k w_k u_k^T), dL/dC = conj(sum_k g_k x_k^T),
    dL/du_k = Re(B^T w_k) + D g_k, dL/dx0 = conj(a w_0), with dL/dz = dL/d Re z + i dL/d Im z as in PyTorch.
    """

    generate_vmap_rule = True                                                # for torch.func.vmap

    @staticmethod
    def forward(u, a, B, C, D, x0):
        b, l, T = len(u), u.shape[-1], math.isqrt(u.shape[-1] - 1) + 1       # about sqrt(l) blocks of T
        x = u.new_zeros(b, -(-l // T) * T, len(a), dtype=x0.dtype)           # zeros after the end
        v = torch.view_as_real(x[:, :l]).flatten(-2)                         # B u, written in place
        v.baddbmm_(u.mT, as_real(B.mT, u.dtype).expand(b, -1, -1), beta=0)
        scan_in_place(x.unflatten(1, (-1, T)), a, x0)
        y = torch.bmm(as_real(C, u.dtype, conj=True).expand(b, -1, -1), as_real(x[:, :l], u.dtype).mT)
        return y.addcmul_(D[:, None], u), x[:, l - 1].clone(), x

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        """Save what backward needs; the third output is only for that."""
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)                                     # or zeros like x would come
        ctx.save_for_backward(*inputs, outputs[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_last, _):
        u, a, B, C, D, x0, x = ctx.saved_tensors
        g = torch.zeros_like(u) if g is None else g
        g_last = torch.zeros_like(x0) if g_last is None else g_last
        grad_D, grad_u = (g * u).sum((0, 2)), g * D[:, None]
        halves = zip(*(t.chunk(2) for t in (u, x, x0, g, g_last, grad_u)))   # w is as large as x
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):  # if it is called inside of one
            grad_a, grad_B, grad_C, grad_x0 = zip(*(Scan.adjoint(a, B, C, *half) for half in halves))
        return grad_u, sum(grad_a), sum(grad_B), sum(grad_C), grad_D, torch.cat(grad_x0)

    @staticmethod
    def adjoint(a, B, C, u, x, x0, g, g_last, grad_u):
        """dL/da, dL/dB, dL/dC and dL/dx0 of a part of the batch; adds Re(B^T w) to grad_u."""
        def conj(z):
            """The conjugate of z (.., 2n) real, as (.., n) complex128."""
            return torch.view_as_complex(z.unflatten(-1, (-1, 2))).conj().to(a.dtype)

        b, l, T = len(u), u.shape[-1], math.isqrt(u.shape[-1] - 1) + 1
        w = torch.zeros_like(x)
        direct = torch.view_as_real(w[:, :l]).flatten(-2)                    # C^T g, written in place
        direct.baddbmm_(g.mT, as_real(C, u.dtype).expand(b, -1, -1), beta=0)
        w[:, l - 1] += g_last.conj()
        scan_in_place(w.unflatten(1, (-1, T)), a, torch.zeros_like(x0), reverse=True)
        w, x = w[:, :l], x[:, :l]                                            # without the zeros after the end
        grad_u.baddbmm_(as_real(B.mT, u.dtype, conj=True).expand(b, -1, -1), as_real(w, u.dtype).mT)
        grad_B = conj(torch.bmm(u, as_real(w, u.dtype)).sum(0)).mT
        grad_C = conj(torch.bmm(g, as_real(x, u.dtype)).sum(0))
        grad_x0 = (a.to(x0.dtype) * w[:, 0]).conj()
        w[:, 0] *= x0                                                        # from here on w_k is x_{k-1} w_k
        w[:, 1:] *= x[:, :-1]
        return w.sum((0, 1)).conj().to(a.dtype), grad_B, grad_C, grad_x0


def powers_of(a: Tensor, count: int) -> Tensor:
    """a^0, a^1, ..., a^(count - 1), by doubling: (p) -> (p, count)."""
    p = torch.ones_like(a)[:, None]
    while p.shape[1] < count:
        p = torch.cat([p, p * (p[:, -1:] * a[:, None])], 1)
    return p[:, :count]


# ---- the layer ----

class LRU(nn.Module):
    """Linear recurrent unit (b, h, l) -> (b, h, l): the recurrence with D, no activation.

    d_model, d_state: number of features h; number of complex states n
    r_min, r_max: |lambda| starts between these, 0 <= r_min < r_max <= 1
    max_phase: the phase of lambda starts between 0 and this, in radians per step
    lr: learning rates of A (nu_log, theta_log) and B (with gamma_log) for the optimizer, recorded in `ssm_lr`
        (see learning_rates)
    Raises ValueError for any other value.
    """

    def __init__(self, d_model: int, d_state: int = 64, *, r_min: float = 0.0, r_max: float = 1.0,
                 max_phase: float = 6.283, lr=1e-3):
        super().__init__()
        check_number("d_model", d_model, int)
        check_number("d_state", d_state, int)
        check_number("r_max", r_max)
        check_number("max_phase", max_phase)
        require(r_max <= 1, "r_max", r_max, "pass at most 1, the unit circle")
        ok = isinstance(r_min, (int, float)) and 0 <= r_min < r_max
        require(ok, "r_min", r_min, f"pass a number >= 0 and < r_max = {r_max}")
        self.d_model, self.d_state = d_model, d_state
        dtype = torch.get_default_dtype()
        logs = (value.to(dtype) for value in ring(d_state, r_min, r_max, max_phase))
        self.nu_log, self.theta_log, self.gamma_log = map(nn.Parameter, logs)
        self.B = nn.Parameter(torch.randn(d_state, d_model, 2) / (2 * d_model) ** 0.5)
        self.C = nn.Parameter(torch.randn(d_model, d_state, 2) / d_state ** 0.5)
        self.D = nn.Parameter(torch.randn(d_model))
        self.ssm_lr = learning_rates(self, lr, {"A": ["nu_log", "theta_log"], "B": ["B", "gamma_log"]})

    @property
    def dtype(self) -> torch.dtype:
        """The real dtype of the computation: that of the parameters, float32 at least."""
        return torch.promote_types(self.D.dtype, torch.float32)

    def _discretize(self, rate: float) -> Discrete:
        """discretize() in double precision, for the powers of A_bar."""
        check_number("rate", rate)
        theta = torch.remainder(self.theta_log.double().exp() + math.pi, 2 * math.pi) - math.pi
        log_lambda = torch.complex(-self.nu_log.double().exp(), theta)
        gain = self.gamma_log.double().exp() * rate * phi(rate * log_lambda) / phi(log_lambda)       # see (2)
        B, C = torch.view_as_complex(self.B.double()), torch.view_as_complex(self.C.double())
        return Discrete(torch.exp(rate * log_lambda), gain[:, None] * B, C)

    def discretize(self, rate: float = 1.0) -> Discrete:
        """A_bar, B_bar and C of the recurrence (2)."""
        return Discrete(*(matrix.to(COMPLEX[self.dtype]) for matrix in self._discretize(rate)))

    def initial_state(self, batch_size: int) -> Tensor:
        """x_{-1} = 0, (b, n) complex."""
        check_number("batch_size", batch_size, int)
        return torch.zeros(batch_size, len(self.B), dtype=COMPLEX[self.dtype], device=self.D.device)

    def check_state(self, state: Tensor, b: int) -> None:
        """state must be complex (b, n)."""
        check_tensor("state", state, (b, len(self.B)), "complex")

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0,
             discrete: Optional[Discrete] = None) -> tuple[Tensor, Tensor]:
        """One step of the recurrence (2): u (b, h), state (b, n) -> y (b, h) and the next state.

        discrete: what discretize(rate) returned, to reuse it for many steps; rate is then ignored.
        """
        check_tensor("u", u, ("b", self.d_model))
        self.check_state(state, u.shape[0])
        return self._step(u, state, self.discretize(rate) if discrete is None else discrete)

    def _step(self, u: Tensor, x: Tensor, d: Discrete) -> tuple[Tensor, Tensor]:
        """The recurrence (2) as it stands."""
        x = d.A_bar * x.to(d.A_bar.dtype) + u.to(d.B_bar.dtype) @ d.B_bar.mT
        return ((x @ d.C.mT).real + self.D.to(self.dtype) * u).to(u.dtype), x

    def forward(self, u: Tensor, state: Optional[Tensor] = None, *, rate: float = 1.0,
                method: str = "scan") -> tuple[Tensor, Optional[Tensor]]:
        """A sequence: u (b, h, l), state (b, n) or None -> y (b, h, l) as u, final state or None.

        rate: factor on the step size: 2.0 for a signal sampled half as often as in training
        method: "scan" or "conv", in parallel, or "step", the recurrence: the same numbers up to rounding,
            which with "conv" is relative to the largest of the sequence
        """
        check_tensor("u", u, ("b", self.d_model, "l"))
        require(method in ("scan", "conv", "step"), "method", method, "choose scan, conv or step")
        if state is not None:
            self.check_state(state, u.shape[0])
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):  # half precision is too coarse
            run = {"scan": self._scan, "conv": self._conv, "step": self._steps}[method]
            d, zero = self._discretize(rate), u.new_zeros(len(u), len(self.B), dtype=COMPLEX[self.dtype])
            x = zero if state is None else state.to(zero.dtype)
            y, last = run(u.to(self.dtype), x, d)
        return y.to(u.dtype), None if state is None else last.to(zero.dtype)

    def _steps(self, u: Tensor, x: Tensor, d: Discrete) -> tuple[Tensor, Tensor]:
        """The recurrence (2) as it stands, in double precision: rounding adds up over the steps."""
        outputs = []
        for u_k in u.double().unbind(-1):
            y_k, x = self._step(u_k, x, d)
            outputs.append(y_k)
        return torch.stack(outputs, -1), x

    def _scan(self, u: Tensor, x: Tensor, d: Discrete) -> tuple[Tensor, Tensor]:
        """The scan in two levels."""
        return Scan.apply(u, d.A_bar, d.B_bar, d.C, self.D.to(u.dtype), x)[:2]

    def _conv(self, u: Tensor, x: Tensor, d: Discrete) -> tuple[Tensor, Tensor]:
        """The same by FFT: each state convolves its input B_bar u with the powers A_bar^k."""
        l = u.shape[-1]
        size = min(odd << ((2 * l - 2) // odd).bit_length() for odd in (1, 3, 5))
        v = torch.complex(d.B_bar.real.to(u.dtype) @ u, d.B_bar.imag.to(u.dtype) @ u)        # (b, n, l)
        start = v[..., :1] + (d.A_bar.to(v.dtype) * x)[..., None]            # x_{-1} enters as part of v_0
        v = torch.cat([start, v[..., 1:]], -1)
        K = powers_of(d.A_bar, l).to(v.dtype)
        x = torch.fft.ifft(torch.fft.fft(v, size) * torch.fft.fft(K, size))[..., :l]
        y = d.C.real.to(u.dtype) @ x.real - d.C.imag.to(u.dtype) @ x.imag
        return y + self.D[:, None] * u, x[..., -1]


# ---- demo ----

def demo(path: Optional[str] = None) -> None:
    """Print how the modes agree and how long they take; draw the figure if a path is given."""
    torch.manual_seed(0)
    l, layer = 1024, LRU(3, 64, r_min=0.9, max_phase=0.3).requires_grad_(False)
    t = torch.arange(l) / l
    u = torch.sin(2 * math.pi * torch.tensor([[2.0], [3.0], [5.0]]) * (t + t ** 2))[None]       # (1, 3, l)

    def chunks():
        """The same sequence in four uneven pieces: (1, 3, l)."""
        y, state = [], layer.initial_state(1)
        for piece in u.split([100, 1, 411, 512], -1):
            y_piece, state = layer(piece, state)
            y.append(y_piece)
        return torch.cat(y, -1)

    runs = {"scan": lambda: layer(u)[0],
            "convolution": lambda: layer(u, method="conv")[0],
            "step by step": lambda: layer(u, method="step")[0],
            "four chunks, state forwarded": chunks,
            "every second sample, rate 2": lambda: layer(u[..., 1::2], rate=2.0)[0],
            "every second sample, rate 1 (wrong)": lambda: layer(u[..., 1::2])[0]}
    y, whole = {}, layer(u)[0]
    print(f"{f'LRU, h=3, n=64, l={l}':<36}{'difference':>12}{'time / ms':>12}")
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
    disk, free, modes, rates = axes = list(figure.subplots(2, 2).flat)
    disk.plot(torch.cos(2 * math.pi * t), torch.sin(2 * math.pi * t), color="0.7")
    for rate in (1.0, 4.0):
        A_bar = layer.discretize(rate).A_bar
        disk.plot(A_bar.real, A_bar.imag, "o", ms=4, label=f"rate {rate:.0f}")
    disk.set(title="Eigenvalues of A_bar in the unit disk", xlabel="Re A_bar", ylabel="Im A_bar", aspect=1)
    state = torch.randn(1, 64, dtype=torch.complex64)
    for i, line in enumerate(layer(torch.zeros(1, 3, l), state)[0][0]):
        free.plot(line, lw=1, label=f"output {i}")
    free.set(title="Free-running from a random state, u = 0", xlabel="step k", ylabel="y")
    modes.plot(u[0, 1], color="0.7", label="input u")
    for (name, line), style in zip(y.items(), ("-", "--", ":", "-.", "--", ":")):
        plot, step = (rates, 2) if "second" in name else (modes, 1)
        plot.plot(range(step - 1, l, step), line[0, 1], style, lw=3, label=name)
    rates.plot(whole[0, 1], color="0.7", label="all samples, rate 1")
    modes.set(title="One output, four ways to compute it", xlabel="step k", ylabel="u, y")
    rates.set(title="Half the sampling frequency, no retraining", xlabel="step k", ylabel="y")
    for ax in axes:
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    print("wrote", path)


if __name__ == "__main__":
    demo(*sys.argv[1:2])
