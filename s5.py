"""S5, one state space system for all features: many inputs, many outputs, and a scan.

    Smith, Warrington, Linderman: Simplified State Space Layers for Sequence Modeling (2022), arXiv 2208.04933

`python s5.py` checks all modes against each other, `python s5.py figures/s5.png` draws the figure.

The model. All h features u(t) together drive one system with n states,

    x'(t) = Lambda x(t) + B u(t),     y(t) = C x(t) + D u(t),                                         (1)

with a diagonal Lambda. Sampled with one step size for each state, this becomes the recurrence

    x_k = A_bar x_{k-1} + B_bar u_k,     y_k = 2 Re(C x_k) + D u_k.                                   (2)

What was wrong before. S4 and its relatives run h separate systems with n states each, mix the features only
afterwards, and convolve with h kernels of the length of the sequence. S5 has one system: the mixing is in B
and C, the state has n numbers instead of h n, and (2) itself runs in parallel.

Why a scan? With many inputs the kernel is an (h, h) matrix for each lag, so a convolution does not pay. But
(2) is associative: two steps in a row, x -> a x + v and then x -> a' x + v', are one, x -> a'a x + (a' v +
v'). So steps can be combined in any order, in a tree of depth log2(l) ("associative scan"). A tree goes
through memory once or more for each of its levels. Two levels are enough here: cut time into blocks of about
sqrt(l) steps and run the plain recurrence in all blocks at once. That is 3 sqrt(l) steps, each of them wide,
and two passes over memory.

Why complex, and why 2 Re? Eigenvalues of a real system come in conjugate pairs, and the second of a pair adds
the conjugate of what the first adds: p = n/2 are kept (conj_sym=True). With conj_sym=False all p = n are
kept, without the 2.

Initialization. Lambda are the eigenvalues of the normal part of HiPPO-LegS, of size n / blocks, once for each
block; B and C are random in the original basis and rotated into the eigenvectors V: V^-1 B, C V (paper,
section 4).

Free-running dynamics, without input, from a state (b, p):

    y, last = layer(torch.zeros(b, h, n_steps), state)

What is trained: Lambda, B, C, D and log_step (one step size per state).

Symbols: b batch, h features (d_model), n states (d_state), p stored complex states, l length; u, y (b, h, l);
x (b, p) complex; Lambda, A_bar (p); dt = rate step_rescale exp(log_step) (p); B, B_bar (p, h); C (h, p), or
(h, 2p) if bidirectional; D (h).
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

def make_HiPPO(n: int) -> Tensor:
    """HiPPO-LegS, -sqrt((2i+1)(2j+1)) for i > j and -(i+1) for i = j: (n, n), float64 (arXiv 2008.07669)."""
    i = torch.arange(n, dtype=torch.float64)
    root = torch.sqrt(2 * i + 1)
    return -torch.tril(torch.outer(root, root), -1) - torch.diag(i + 1)


def make_NPLR_HiPPO(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS A (n, n), its low-rank correction P (n) and input matrix B (n): A + P P^T is normal."""
    i = torch.arange(n, dtype=torch.float64)
    return make_HiPPO(n), torch.sqrt(i + 0.5), torch.sqrt(2 * i + 1)


def make_DPLR_HiPPO(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Lambda, P, B (n) in the basis of the eigenvectors V (n, n) of A + P P^T, V, and B before: complex128.

    A + P P^T = -1/2 + S with a skew-symmetric S: -i S is Hermitian. Lambda is sorted by ascending Im Lambda.
    """
    A, P, B = make_NPLR_HiPPO(n)
    normal = A + torch.outer(P, P)
    imag, V = torch.linalg.eigh(-1j * (normal - normal.mT) / 2)
    Lambda = torch.complex(normal.diagonal().mean().expand(n), imag)
    return Lambda, V.mH @ P.to(V.dtype), V.mH @ B.to(V.dtype), V, B


def initial_C(C_init: str, h: int, V: Tensor) -> Tensor:
    """C V (h, p) for V (n, p).

    Real and imaginary part of C have variance 1/n each (lecun_normal), or are standard normal, cut at +-2
    (trunc_standard_normal); complex_normal draws C V itself, with variance 1.
    """
    require(C_init in C_INITS, "C_init", C_init, f"choose one of {', '.join(C_INITS)}")
    n, p = V.shape
    if C_init == "complex_normal":
        return torch.randn(h, p, dtype=V.dtype)
    C = torch.randn(2, h, n, dtype=torch.float64) / n ** 0.5
    if C_init == "trunc_standard_normal":
        C = nn.init.trunc_normal_(C, a=-2.0, b=2.0)
    return torch.complex(*C) @ V


C_INITS = ("lecun_normal", "trunc_standard_normal", "complex_normal")


# ---- from (1) to (2) ----

def phi(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, which is 1 at z = 0. Near 0 the difference would cancel: there its Taylor series."""
    small = z.abs() < 0.02
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7)))))
    z = torch.where(small, 1, z)             # or the branch not taken would turn gradients into 0 * inf = nan
    return torch.where(small, series, (z.exp() - 1) / z)


def discretize_zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: A_bar = exp(dt A), B_bar = A^-1 (exp(dt A) - 1) B."""
    return torch.exp(dt * A), dt * phi(dt * A) * B


def discretize_bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Bilinear transform: A_bar = (1 + dt A / 2) / (1 - dt A / 2), B_bar = dt B / (1 - dt A / 2)."""
    return (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)


DISCRETIZATIONS = {"zoh": discretize_zoh, "bilinear": discretize_bilinear}


class Discrete(NamedTuple):
    """The recurrence (2): A_bar (p), B_bar (p, h), C (h, p) complex; y = Re(C x), so C holds the factor 2."""
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

class S5(nn.Module):
    """Multi-input multi-output state space layer (b, h, l) -> (b, h, l): the SSM with D, no activation.

    d_model, d_state: number of features h; number of states n of the one system
    blocks: number of HiPPO blocks of the initial Lambda, a divisor of n
    C_init: "lecun_normal", "trunc_standard_normal" or "complex_normal" (see initial_C)
    disc: discretization, "zoh" or "bilinear"
    conj_sym: keep one of each conjugate pair (n / blocks even), or all n as independent complex states
    clip_eigs: use min(Re Lambda, -1e-4), so that training cannot make the system unstable
    bidirectional: add C' x' with x'_k = A_bar x'_{k+1} + B_bar u_k, a scan from the end; no state and no step
    step_rescale: a constant factor on rate
    dt_min, dt_max: the initial step sizes are log-uniform in between, in the unit of time of A
    lr: learning rates of dt, A (Lambda) and B for the optimizer, recorded in `ssm_lr` (see learning_rates)
    Raises ValueError for any other value.
    """

    def __init__(self, d_model: int, d_state: int = 64, *, blocks: int = 1, C_init: str = "lecun_normal",
                 disc: str = "zoh", conj_sym: bool = True, clip_eigs: bool = False,
                 bidirectional: bool = False, step_rescale: float = 1.0, dt_min: float = 1e-3,
                 dt_max: float = 1e-1, lr=1e-3):
        super().__init__()
        check_number("d_model", d_model, int)
        flags = {"conj_sym": conj_sym, "clip_eigs": clip_eigs, "bidirectional": bidirectional}
        for name, flag in flags.items():
            require(isinstance(flag, bool), name, flag, "pass True or False")
        check_number("d_state", d_state, int, even=conj_sym)
        check_number("blocks", blocks, int)
        check_number("step_rescale", step_rescale)
        check_number("dt_min", dt_min)
        check_number("dt_max", dt_max)
        require(dt_min <= dt_max, "dt_max", dt_max, f"pass at least dt_min = {dt_min}")
        require(disc in tuple(DISCRETIZATIONS), "disc", disc, f"choose one of {', '.join(DISCRETIZATIONS)}")
        size = d_state // blocks
        ok = size * blocks == d_state and not (conj_sym and size % 2)
        require(ok, "blocks", blocks, f"pass a divisor of d_state = {d_state}, its quotient even if conj_sym")
        self.d_model, self.d_state, self.disc, self.step_rescale = d_model, d_state, disc, step_rescale
        self.conj_sym, self.clip_eigs, self.bidirectional = conj_sym, clip_eigs, bidirectional
        Lambda, _, _, V, _ = make_DPLR_HiPPO(size)
        if conj_sym:
            Lambda, V = Lambda[:size // 2], V[:, :size // 2]                 # Im Lambda < 0
        Lambda, V = Lambda.repeat(blocks), torch.block_diag(*[V] * blocks)
        B = V.mH @ (torch.randn(d_state, d_model, dtype=torch.float64) / d_model ** 0.5).to(V.dtype)
        C = torch.cat([initial_C(C_init, d_model, V) for _ in range(1 + self.bidirectional)], 1)
        dtype, p = torch.get_default_dtype(), len(Lambda)
        self.log_step = nn.Parameter(math.log(dt_min) + torch.rand(p) * math.log(dt_max / dt_min))
        self.Lambda_re = nn.Parameter(Lambda.real.to(dtype))
        self.Lambda_im = nn.Parameter(Lambda.imag.to(dtype))
        self.B = nn.Parameter(torch.view_as_real(B).to(dtype))
        self.C = nn.Parameter(torch.view_as_real(C).to(dtype))
        self.D = nn.Parameter(torch.randn(d_model))
        names = {"dt": ["log_step"], "A": ["Lambda_re", "Lambda_im"], "B": ["B"]}
        self.ssm_lr = learning_rates(self, lr, names)

    @property
    def dtype(self) -> torch.dtype:
        """The real dtype of the computation: that of the parameters, float32 at least."""
        return torch.promote_types(self.D.dtype, torch.float32)

    def _discretize(self, rate: float) -> Discrete:
        """discretize() in double precision, for the powers of A_bar."""
        check_number("rate", rate)
        dt = rate * self.step_rescale * self.log_step.double().exp()
        real = self.Lambda_re.double()
        Lambda = torch.complex(real.clamp(max=-1e-4) if self.clip_eigs else real, self.Lambda_im.double())
        B, C = torch.view_as_complex(self.B.double()), torch.view_as_complex(self.C.double())
        A_bar, B_bar = DISCRETIZATIONS[self.disc](Lambda[:, None], B, dt[:, None])
        return Discrete(A_bar[:, 0], B_bar, 2 * C if self.conj_sym else C)

    def discretize(self, rate: float = 1.0) -> Discrete:
        """A_bar, B_bar and C of the recurrence (2) at step size rate * step_rescale * dt."""
        self.check_causal()
        return Discrete(*(matrix.to(COMPLEX[self.dtype]) for matrix in self._discretize(rate)))

    def check_causal(self) -> None:
        """A bidirectional layer reads the whole sequence, so that it has no state."""
        require(not self.bidirectional, "bidirectional", True, "it has no state and no step, pass False")

    def initial_state(self, batch_size: int) -> Tensor:
        """x_{-1} = 0, (b, p) complex."""
        self.check_causal()
        check_number("batch_size", batch_size, int)
        return torch.zeros(batch_size, len(self.B), dtype=COMPLEX[self.dtype], device=self.D.device)

    def check_state(self, state: Tensor, b: int) -> None:
        """state must be complex (b, p)."""
        self.check_causal()
        check_tensor("state", state, (b, len(self.B)), "complex")

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0,
             discrete: Optional[Discrete] = None) -> tuple[Tensor, Tensor]:
        """One step of the recurrence (2): u (b, h), state (b, p) -> y (b, h) and the next state.

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
        """A sequence: u (b, h, l), state (b, p) or None -> y (b, h, l) as u, final state or None.

        rate: factor on the step size: 2.0 for a signal sampled half as often as in training
        method: "scan" or "conv", in parallel, or "step", the recurrence: the same numbers up to rounding,
            which with "conv" is relative to the largest of the sequence
        """
        check_tensor("u", u, ("b", self.d_model, "l"))
        require(method in ("scan", "conv", "step"), "method", method, "choose scan, conv or step")
        if state is not None:
            self.check_state(state, u.shape[0])
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):  # half precision is too coarse
            if method == "step":
                self.check_causal()
            run = {"scan": self._scan, "conv": self._conv, "step": self._steps}[method]
            d, zero = self._discretize(rate), u.new_zeros(len(u), len(self.B), dtype=COMPLEX[self.dtype])
            past, future = d.C[:, :len(self.B)], d.C[:, len(self.B):]
            x = zero if state is None else state.to(zero.dtype)
            y, last = run(u.to(self.dtype), x, d._replace(C=past))
            if self.bidirectional:
                reverse, _ = run(u.to(self.dtype).flip(-1), zero, d._replace(C=future))
                y = y + reverse.flip(-1) - self.D.to(y.dtype)[:, None] * u   # both have added D u
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
        v = torch.complex(d.B_bar.real.to(u.dtype) @ u, d.B_bar.imag.to(u.dtype) @ u)        # (b, p, l)
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
    l, layer = 1024, S5(3, 64).requires_grad_(False)
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
    print(f"{f'S5, h=3, n=64, l={l}':<36}{'difference':>12}{'time / ms':>12}")
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
    state = torch.randn(1, len(layer.B), dtype=torch.complex64)
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
