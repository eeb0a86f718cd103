"""The selective scan of Mamba: a state space layer whose step size, B and C depend on the input.

    Gu, Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023), arXiv 2312.00752

`python selective_scan.py` checks all modes against each other, `python selective_scan.py
figures/selective_scan.png` draws the figure.

The model. Each of the d features u drives n real numbers x of its own (paper, section 3.2, Algorithm 2),

    x_k = exp(dt_k A) x_{k-1} + dt_k B_k u_k,     y_k = C_k x_k + D u_k,                              (1)
    dt_k = rate softplus(W u_k + bias),     B_k = W_B u_k,     C_k = W_C u_k.                         (2)

What was wrong before. All layers from LSSL to LRU are time-invariant: they treat every sample alike, so they
cannot decide by its content what to keep. In (1), dt_k -> 0 skips a sample and leaves the state as it is, and
a large dt_k forgets the past and takes the sample in. B_k and C_k decide what goes where. A stays constant:
it only ever appears as dt_k A, so that a selective dt makes exp(dt_k A) selective too (paper, section 3.5.2).

Why no convolution? y = K * u needs the same response to each sample, whatever else the input is. Here the
response to u_i at time k, C_k exp(A (dt_{i+1} + ... + dt_k)) dt_i B_i, depends on all samples between. So
method="conv" does not exist, and the parallel form is a scan: two steps (a, v), (a', v') in a row are one,
(a'a, a' v + v').

Why B_bar = dt B and not zero-order hold? (exp(dt A) - 1) / A B = dt B (1 + dt A / 2 + ...): for small dt they
agree, and B_k is learned anyway. The simpler one is what Mamba uses.

"Hardware-aware" (paper, section 3.3.2) means: the states (b, d, l, n) are n times as large as the input, so
do not write them to main memory; compute them where they are used, and once more in the backward pass. Its
CUDA kernel keeps them in fast on-chip memory. In PyTorch the same idea works in blocks of about sqrt(l)
steps:

    1. run all blocks at once from the state 0, step by step, keeping only the current state of each. This
       gives their ends, and exp(A sum dt) is the decay over a block: from both follows the true start of each
       block, one block after another;
    2. run all blocks again from their true starts, and emit y.

So forward, memory is O(b d n sqrt(l)) beyond input and output. Backward, the starts of the blocks are what
was saved. The adjoint m = dL/dx runs the same two passes backwards in time, and the states are recomputed for
an eighth of the blocks at a time: with their decays, b d n l / 4 numbers. A cumulative product of exp(dt A)
and a division by it would be shorter, but it underflows: exp(-110) is 0 in float32, and 0 / 0 is nan.

What is trained: x_proj (W_B, W_C and the first factor of W), dt_proj, A_log and D, all at the main learning
rate unless lr is given.

Symbols: b batch, d features, n states per feature (d_state), l length; u, dt, y, z (b, d, l); B, C (b, n, l);
A (d, n); x (b, d, n), inside the scan (b, n, d); blocks: time k = jT + i, as (T, J, ...).
"""

import math
import sys
import time
from typing import NamedTuple, Optional, Union

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


# ---- the scan ----

def to_blocks(u: Tensor) -> Tensor:
    """(b, c, l) -> (T, J, b, c) with time k = jT + i, T about sqrt(l); a view, unless zeros are added."""
    l = u.shape[-1]
    T = math.isqrt(l - 1) + 1
    J = -(-l // T)
    u = u if l == J * T else nn.functional.pad(u, (0, J * T - l))
    return u.unflatten(-1, (J, T)).permute(3, 2, 0, 1)


def each_step(*blocks: Tensor, reverse: bool = False):
    """The steps i = 0 ... T - 1, or backwards, of (T, J, b, c) tensors; eight at a time are copied."""
    starts = range(0, len(blocks[0]), 8)
    for start in reversed(starts) if reverse else starts:
        rows = list(zip(*(block[start:start + 8].contiguous() for block in blocks)))
        yield from reversed(rows) if reverse else rows


class SelectiveScan(torch.autograd.Function):
    """Equation (1) without D, in blocks; dt = 0 after the end keeps the state.

    dt, u (b, d, l), B, C (b, n, l), A (n, d), x0 (b, n, d) -> y (b, d, l), last state (b, n, d). A step works
    on arrays (J, b, n, d). Gradient, with g_k = dL/dy_k: m_k = dL/dx_k = C_k g_k + exp(dt_{k+1} A) m_{k+1},
    where the gradient of the last state stands for m_l. With v_k = dt_k u_k, s_k = m_k exp(dt_k A) x_{k-1}:
    dL/dC_k = x_k g_k, dL/dB_k = m_k v_k, dL/dv_k = B_k m_k, dL/dA = sum_k dt_k s_k,
    dL/du_k = dt_k dL/dv_k and dL/ddt_k = u_k dL/dv_k + sum_n A s_k.
    """

    generate_vmap_rule = True                                                # for torch.func.vmap

    @staticmethod
    def forward(dt, u, B, C, A, x0):
        l, (dt, u, B, C) = u.shape[-1], map(to_blocks, (dt, u, B, C))
        y = u.new_empty(u.shape[2], u.shape[3], u.shape[1] * len(u))         # (b, d, JT)
        y_blocks = y.unflatten(-1, (-1, len(u))).permute(3, 2, 0, 1)
        x = u.new_zeros(*B.shape[1:], u.shape[-1])
        for dt_i, u_i, B_i in each_step(dt, u, B):
            x.mul_((dt_i[:, :, None] * A).exp_()).addcmul_(B_i[..., None], (dt_i * u_i)[:, :, None])
        decay, last = (dt.sum(0)[:, :, None] * A).exp_(), x0
        for j in range(len(x)):              # x[j]: the end of block j if it starts from 0, then its start
            last, x[j] = torch.addcmul(x[j], decay[j], last), last
        starts = x.clone()
        for i, (dt_i, u_i, B_i, C_i) in enumerate(each_step(dt, u, B, C)):
            x.mul_((dt_i[:, :, None] * A).exp_()).addcmul_(B_i[..., None], (dt_i * u_i)[:, :, None])
            y_blocks[i] = (C_i[:, :, None] @ x)[:, :, 0]
        return y[..., :l], last, starts

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        """Save what backward needs; the third output is only for that."""
        ctx.mark_non_differentiable(outputs[2])
        ctx.save_for_backward(*inputs, outputs[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_last, _):
        dt, u, B, C, A, x0, starts = ctx.saved_tensors
        l, (dt, u, B, C, g) = u.shape[-1], map(to_blocks, (dt, u, B, C, grad_y))
        m, grad_x0 = torch.zeros_like(starts), grad_last                     # first as if nothing came after
        for dt_i, C_i, g_i in each_step(dt, C, g, reverse=True):
            m.addcmul_(C_i[..., None], g_i[:, :, None]).mul_((dt_i[:, :, None] * A).exp_())
        decay = (dt.sum(0)[:, :, None] * A).exp_()
        for j in reversed(range(len(m))):    # now m[j] is what comes from behind the end of block j
            grad_x0, m[j] = torch.addcmul(m[j], decay[j], grad_x0), grad_x0
        grad_dt, grad_u, grad_B, grad_C = (torch.empty_like(t) for t in (dt, u, B, C))
        grad_A, group = torch.zeros_like(A), -(-len(m) // 8)
        for first in range(0, len(m), group):                                # an eighth of the blocks each
            j = slice(first, first + group)
            steps = [[row[j] for row in rows] for rows in each_step(dt, u, B, C, g)]
            states, decays, w, total = [starts[j]], [], m[j], torch.zeros_like(m[j])
            for dt_i, u_i, B_i, _, _ in steps:
                decays.append((dt_i[:, :, None] * A).exp_())
                states.append((decays[-1] * states[-1]).addcmul_(B_i[..., None], (dt_i * u_i)[:, :, None]))
            for i in reversed(range(len(steps))):
                dt_i, u_i, B_i, C_i, g_i = steps[i]
                grad_C[i, j] = (states.pop() @ g_i[..., None])[..., 0]
                w.addcmul_(C_i[..., None], g_i[:, :, None])                  # dL/dx_k
                grad_B[i, j] = (w @ (dt_i * u_i)[..., None])[..., 0]
                grad_v = (B_i[:, :, None] @ w)[:, :, 0]                      # dL/d(dt_k u_k)
                w.mul_(decays.pop())                                         # dL/dx_{k-1} by what follows
                slope = w * states[-1]                                       # dL/d(dt_k A)
                grad_u[i, j] = dt_i * grad_v
                grad_dt[i, j] = (slope * A).sum(2).addcmul_(u_i, grad_v)
                total.addcmul_(slope, dt_i[:, :, None])
            grad_A = grad_A + total.sum((0, 1))
        grads = [t.permute(2, 3, 1, 0).flatten(2)[..., :l] for t in (grad_dt, grad_u, grad_B, grad_C)]
        return *grads, grad_A, grad_x0


def step_by_step(dt: Tensor, u: Tensor, B: Tensor, C: Tensor, A: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (1) as it stands: dt, u (b, d, l), x (b, d, n) -> y (b, d, l) without D, last x.

    In double precision: rounding adds up over the steps.
    """
    dtype, outputs = x.dtype, []
    dt, u, B, C, A, x = (t.double() for t in (dt, u, B, C, A, x))
    for k in range(u.shape[-1]):
        x = torch.exp(dt[:, :, k, None] * A) * x + (dt[:, :, k] * u[:, :, k])[..., None] * B[:, None, :, k]
        outputs.append((C[:, None, :, k] * x).sum(-1))
    return torch.stack(outputs, -1).to(dtype), x.to(dtype)


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor] = None,
                      z: Optional[Tensor] = None, delta_bias: Optional[Tensor] = None,
                      delta_softplus: bool = False, return_last_state: bool = False,
                      initial_state: Optional[Tensor] = None, scan=None):
    """Equation (1) for given dt, B and C; stands in for the CUDA function of the same name on any device, for
    real A, and B and C that vary in time.

    u, delta, z (b, d, l), A (d, n), B, C (b, n, l), D, delta_bias (d), initial_state (b, d, n) or None: zeros
    dt = delta + delta_bias, or with delta_softplus the softplus of that; z: multiplies the output by silu(z)
    -> y (b, d, l) as u, and with return_last_state also the last state (b, d, n)
    scan: None for the blocks, or another function (dt, u, B, C, A, x) -> y, x such as step_by_step
    Raises ValueError for other shapes or types. Differentiable once: a second derivative raises RuntimeError.
    """
    check_tensor("u", u, ("b", "d", "l"))
    check_tensor("A", A, (u.shape[1], "n"))
    (b, d, l), n = u.shape, A.shape[1]
    for name, x, shape in (("delta", delta, (b, d, l)), ("B", B, (b, n, l)), ("C", C, (b, n, l))):
        check_tensor(name, x, shape)
    for name, x, shape in (("D", D, (d,)), ("z", z, (b, d, l)), ("delta_bias", delta_bias, (d,)),
                           ("initial_state", initial_state, (b, d, n))):
        if x is not None:
            check_tensor(name, x, shape)
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):      # half precision is too coarse
        v, A, B, C = (x.to(dtype) for x in (u, A, B, C))
        dt = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)[:, None]
        dt = nn.functional.softplus(dt) if delta_softplus else dt
        x = v.new_zeros(b, d, n) if initial_state is None else initial_state.to(dtype)
        if scan is not None:
            y, x = scan(dt, v, B, C, A, x)
        else:
            y, x, _ = SelectiveScan.apply(dt, v, B, C, A.mT.contiguous(), x.mT.contiguous())
            x = x.mT
        y = y if D is None else torch.addcmul(y, v, D.to(dtype)[:, None])
        y = y if z is None else y * nn.functional.silu(z.to(dtype))
    return (y.to(u.dtype), x) if return_last_state else y.to(u.dtype)


def selective_scan_seq(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor] = None,
                       z: Optional[Tensor] = None, delta_bias: Optional[Tensor] = None,
                       delta_softplus: bool = False, return_last_state: bool = False,
                       initial_state: Optional[Tensor] = None):
    """selective_scan_fn by the recurrence as it stands, one step after another."""
    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state,
                             initial_state, scan=step_by_step)


# ---- the layers ----

class Discrete(NamedTuple):
    """What of (1) does not depend on the input: A (d, n), and the rate, the factor on every dt_k."""
    A: Tensor
    rate: float


class SelectiveSSM(nn.Module):
    """Selective state space layer (b, d, l) -> (b, d, l): equations (1) and (2), no activation.

    d_model, d_state: number of features d; number of states n per feature
    dt_rank: W in (2) has this rank; "auto" for d / 16, rounded up
    dt_min, dt_max: the step sizes start log-uniform in between, for u = 0
    lr: learning rates of dt (dt_proj), A and B (x_proj: B, C and the first factor of W) for the optimizer,
        recorded in `ssm_lr` (see learning_rates)
    Raises ValueError for any other value. A starts at -1, ..., -n (S4D-Real), D at 1.
    """

    def __init__(self, d_model: int, d_state: int = 16, *, dt_rank: Union[int, str] = "auto",
                 dt_min: float = 1e-3, dt_max: float = 1e-1, lr=None):
        super().__init__()
        check_number("d_model", d_model, int)
        check_number("d_state", d_state, int)
        check_number("dt_min", dt_min)
        check_number("dt_max", dt_max)
        require(dt_min <= dt_max, "dt_max", dt_max, f"pass at least dt_min = {dt_min}")
        if dt_rank != "auto":
            check_number("dt_rank", dt_rank, int)
        d, n, rank = d_model, d_state, -(-d_model // 16) if dt_rank == "auto" else dt_rank
        self.d_model, self.d_inner, self.d_state, self.dt_rank = d, d, n, rank
        self.x_proj = nn.Linear(d, rank + 2 * n, bias=False)                 # dt (low rank), B, C
        self.dt_proj = nn.Linear(rank, d)
        nn.init.uniform_(self.dt_proj.weight, -rank ** -0.5, rank ** -0.5)
        dt = torch.exp(math.log(dt_min) + torch.rand(d) * math.log(dt_max / dt_min))
        self.dt_proj.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1)).repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        names = {"dt": ["dt_proj.weight", "dt_proj.bias"], "A": ["A_log"], "B": ["x_proj.weight"]}
        self.ssm_lr = learning_rates(self, lr, names)

    @property
    def dtype(self) -> torch.dtype:
        """The real dtype of the computation: that of the parameters, float32 at least."""
        return torch.promote_types(self.D.dtype, torch.float32)

    def discretize(self, rate: float = 1.0) -> Discrete:
        """A and rate: exp(dt_k A) and dt_k B_k are known only with the input."""
        check_number("rate", rate)
        return Discrete(-self.A_log.to(self.dtype).exp(), rate)

    def initial_state(self, batch_size: int) -> Tensor:
        """x_{-1} = 0, (b, d, n)."""
        check_number("batch_size", batch_size, int)
        return torch.zeros(batch_size, self.d_inner, self.d_state, dtype=self.dtype, device=self.D.device)

    def check_state(self, state: Tensor, b: int) -> None:
        """state must be real (b, d, n)."""
        check_tensor("state", state, (b, self.d_inner, self.d_state))

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0,
             discrete: Optional[Discrete] = None) -> tuple[Tensor, Tensor]:
        """One step of (1): u (b, d), state (b, d, n) -> y (b, d) and the next state.

        discrete: what discretize(rate) returned, to reuse it for many steps; rate is then ignored.
        """
        check_tensor("u", u, ("b", self.d_model))
        self.check_state(state, u.shape[0])
        d = self.discretize(rate) if discrete is None else discrete
        dt, B, C = (p[..., 0] for p in self._selected(u[..., None].to(self.dtype), d.rate))
        x = torch.exp(dt[..., None] * d.A) * state + (dt * u)[..., None] * B[:, None]
        return ((x * C[:, None]).sum(-1) + self.D.to(self.dtype) * u).to(u.dtype), x.to(self.dtype)

    def forward(self, u: Tensor, state: Optional[Tensor] = None, *, rate: float = 1.0,
                method: str = "scan") -> tuple[Tensor, Optional[Tensor]]:
        """A sequence: u (b, d, l), state (b, d, n) or None -> y (b, d, l) as u, final state or None.

        rate: factor on every dt_k: 2.0 for a signal sampled half as often as in training
        method: "scan", in parallel, or "step", the recurrence; "conv" cannot exist for a time-varying system
        """
        check_tensor("u", u, ("b", self.d_model, "l"))
        require(method in ("scan", "step"), "method", method, "choose scan or step")
        if state is not None:
            self.check_state(state, u.shape[0])
        y, last = self._ssm(u.to(self.dtype), None, state, self.discretize(rate), method)
        return y.to(u.dtype), None if state is None else last

    def _selected(self, u: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Equation (2): u (b, d, l) -> dt (b, d, l), B (b, n, l), C (b, n, l)."""
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):  # half precision is too coarse
            selected = self.x_proj.weight.to(u.dtype) @ u
            low, B, C = selected.split([self.dt_rank, self.d_state, self.d_state], 1)
            dt = self.dt_proj.weight.to(u.dtype) @ low + self.dt_proj.bias.to(u.dtype)[:, None]
            return rate * nn.functional.softplus(dt), B, C

    def _ssm(self, u: Tensor, z: Optional[Tensor], state: Optional[Tensor], d: Discrete,
             method: str) -> tuple[Tensor, Tensor]:
        """Equations (1) and (2), gated by z: u, z (b, d, l) -> y (b, d, l), last state."""
        dt, B, C = self._selected(u, d.rate)
        run = selective_scan_fn if method == "scan" else selective_scan_seq
        return run(u, dt, d.A, B, C, self.D, z, return_last_state=True, initial_state=state)


class MambaState(NamedTuple):
    """The last d_conv - 1 inputs of the convolution (b, d, d_conv - 1) and the state of the SSM (b, d, n)."""
    inputs: Tensor
    ssm: Tensor


class Mamba(SelectiveSSM):
    """The Mamba block (b, h, l) -> (b, h, l), without norm and residual connection (paper, Figure 3):

        v, z = W_in u,     o = W_out (SSM(silu(conv(v))) * silu(z)),    d = expand h features inside.

    d_model, d_state: number of features h; number of states n per inner feature
    d_conv: length of the causal convolution over each feature. It counts samples: rate does not change it
    expand, dt_rank: d = expand h; "auto" for h / 16, rounded up
    dt_min, dt_max, lr: as of SelectiveSSM
    Raises ValueError for any other value. Parameters are named as in the official block.
    """

    def __init__(self, d_model: int, d_state: int = 16, *, d_conv: int = 4, expand: int = 2,
                 dt_rank: Union[int, str] = "auto", dt_min: float = 1e-3, dt_max: float = 1e-1, lr=None):
        check_number("d_model", d_model, int)
        check_number("d_conv", d_conv, int)
        check_number("expand", expand, int)
        rank = -(-d_model // 16) if dt_rank == "auto" else dt_rank
        super().__init__(expand * d_model, d_state, dt_rank=rank, dt_min=dt_min, dt_max=dt_max, lr=lr)
        self.d_model, self.d_conv = d_model, d_conv
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def initial_state(self, batch_size: int) -> MambaState:
        """No inputs yet, and x_{-1} = 0."""
        ssm = super().initial_state(batch_size)
        return MambaState(ssm.new_zeros(batch_size, self.d_inner, self.d_conv - 1), ssm)

    def check_state(self, state: MambaState, b: int) -> None:
        """state must be the pair (inputs (b, d, d_conv - 1), ssm (b, d, n))."""
        ok = isinstance(state, tuple) and len(state) == 2
        require(ok, "state", type(state).__name__, "pass a pair (inputs, ssm) such as initial_state returns")
        if self.d_conv > 1:
            check_tensor("state", state[0], (b, self.d_inner, self.d_conv - 1))
        super().check_state(state[1], b)

    def step(self, u: Tensor, state: MambaState, *, rate: float = 1.0,
             discrete: Optional[Discrete] = None) -> tuple[Tensor, MambaState]:
        """One step of the block: u (b, h) -> o (b, h) and the next state; discrete: see SelectiveSSM.step."""
        check_tensor("u", u, ("b", self.d_model))
        self.check_state(state, u.shape[0])
        d = self.discretize(rate) if discrete is None else discrete
        y, state = self._block(u[..., None], state, d, "step")
        return y[..., 0].to(u.dtype), state

    def forward(self, u: Tensor, state: Optional[MambaState] = None, *, rate: float = 1.0,
                method: str = "scan") -> tuple[Tensor, Optional[MambaState]]:
        """A sequence: u (b, h, l), state or None -> o (b, h, l), final state or None; see SelectiveSSM."""
        check_tensor("u", u, ("b", self.d_model, "l"))
        require(method in ("scan", "step"), "method", method, "choose scan or step")
        if state is not None:
            self.check_state(state, u.shape[0])
        start = self.initial_state(u.shape[0]) if state is None else state
        y, last = self._block(u, start, self.discretize(rate), method)
        return y.to(u.dtype), None if state is None else last

    def _block(self, u: Tensor, state: MambaState, d: Discrete, method: str) -> tuple[Tensor, MambaState]:
        """The block from a state: u (b, h, l) -> o (b, h, l), final state."""
        v, z = (self.in_proj.weight @ u.to(self.in_proj.weight.dtype)).chunk(2, 1)
        v = torch.cat([state[0].to(v.dtype), v], -1)                         # what the convolution still sees
        inputs = v[..., v.shape[-1] - self.d_conv + 1:].to(self.dtype)
        v = nn.functional.silu(self.conv1d(v)).to(self.dtype)
        y, ssm = self._ssm(v, z, state[1], d, method)
        return self.out_proj.weight @ y.to(self.out_proj.weight.dtype), MambaState(inputs, ssm)


# ---- demo ----

def demo(path: Optional[str] = None) -> None:
    """Print how the modes agree and how long they take; draw the figure if a path is given."""
    torch.manual_seed(0)
    l, layer = 1024, SelectiveSSM(3, 16).requires_grad_(False)
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
            "step by step": lambda: layer(u, method="step")[0],
            "four chunks, state forwarded": chunks,
            "every second sample, rate 2": lambda: layer(u[..., 1::2], rate=2.0)[0],
            "every second sample, rate 1 (wrong)": lambda: layer(u[..., 1::2])[0]}
    y, whole = {}, layer(u)[0]
    print(f"{f'SelectiveSSM, d=3, n=16, l={l}':<36}{'difference':>12}{'time / ms':>12}")
    for name, run in runs.items():
        start = time.perf_counter()
        y[name] = run()
        duration = 1e3 * (time.perf_counter() - start)
        error = (y[name] - (whole[..., 1::2] if "second" in name else whole)).abs().max() / whole.abs().max()
        print(f"{name:<36}{error:12.1e}{duration:12.1f}")
    if path is None:
        return
    # a layer set by hand: features (value, flag, 1); the flag opens dt, and the state holds the flagged value
    hand = SelectiveSSM(3, 1, dt_rank=1).requires_grad_(False)
    hand.x_proj.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 1.0]]))  # dt, B, C
    hand.dt_proj.weight.fill_(18.0)
    hand.dt_proj.bias.fill_(-8.0)
    hand.D.zero_()
    value = 0.7 * torch.randn(200)
    flag = torch.zeros(200).index_fill(0, torch.tensor([20, 60, 95, 150]), 1.0)
    u = torch.stack([value, flag, torch.ones(200)])[None]
    dt = hand._selected(u, 1.0)[0][0, 0]
    one = torch.ones(1, 1, 200)
    even = selective_scan_fn(u[:, :1], 0.1 * one, -torch.ones(1, 1), one, one)
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 8), layout="constrained")
    signal, steps, memory = axes = list(figure.subplots(3, 1, sharex=True))
    signal.plot(value, ".-", color="0.7", label="value")
    signal.plot(*(flag.nonzero()[:, 0], value[flag > 0]), "o", color="C1", label="flagged: to be remembered")
    signal.set(title="Selective copying: remember the flagged values, ignore the others", ylabel="input u")
    steps.semilogy(dt, color="C2", label="dt_k = softplus(18 flag - 8)")
    steps.set(title="The step size depends on the input", ylabel="dt_k")
    memory.plot(hand(u)[0][0, 0], color="C1", label="selective: exp(dt_k A) = 1 between flags, 0 at a flag")
    memory.plot(even[0, 0], color="C0", label="time-invariant: dt = 0.1 for every sample")
    memory.set(title="The memory, y_k", xlabel="step k", ylabel="y")
    for ax in axes:
        ax.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=100)
    print("wrote", path)


if __name__ == "__main__":
    demo(*sys.argv[1:2])
