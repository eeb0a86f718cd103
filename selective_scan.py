"""Selective scan: the layer of Mamba, whose step size, B and C depend on the input.

    Gu, Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023),
    arXiv 2312.00752.                                 Try it: python selective_scan.py

Each of the d features has n real numbers x of its own, from which y is read:

    x_k = exp(dt_k A) x_{k-1} + dt_k B_k u_k,    y_k = C_k x_k + D u_k.            (1)

Here u_k is the number of that feature, as are dt_k and D, and A has n numbers. B_k and C_k,
n numbers each, are the same for all features. They depend on all, the vector u_k:

    dt_k = rate softplus(W u_k + bias),    B_k = W_B u_k,    C_k = W_C u_k.        (2)

rate is ours, 1 in the paper: at rate 2 a model runs on its signal sampled half as often.

What was wrong before. All layers from LSSL to LRU treat every sample alike: they cannot
decide by its content what to keep. Here dt_k -> 0 skips a sample and leaves the state as it
is, a large dt_k forgets the past and takes the sample in, and B_k, C_k decide what goes
where. A stays constant: in dt_k A, a selective dt makes it selective too (section 3.5.2).

Why no convolution? The response to u_i at time k, C_k exp((dt_{i+1} + ... + dt_k) A) dt_i
B_i, depends on all samples between. There is no one kernel. But two steps in a row,

    x -> a x + v,  x -> a' x + v'    are one    x -> a'a x + (a'v + v').           (3)

So a block of T steps is one step too. A short scan over the blocks gives the state before
each of them, and then all blocks run side by side: selective_scan. Does it pay on a CPU?
Forward and backward, two cores, l = 1024, n = 16: 15 times as fast as the loop at b d = 64,
1.9 times at 1024. At 4096 one step keeps the cores busy (0.9), and it saves memory alone.

Why are the states not kept for the gradient? All states (b, d, l, n) are n times as large
as the input. As in the paper (section 3.3.2) they are computed again, and the gradient is a
scan like (1), from the end to the beginning: GroupScan.

Differs from the paper, as the official code does: dt B stands for the zero-order hold
A^{-1} (exp(dt A) - 1) B (its equation 4). They agree where dt |A| is small; at 1.6 = 0.1 *
16, the largest start by default, dt B is twice the hold.

Symbols: b batch, d features, l length; the paper's x, h are our u, x. u, y (b, d, l),
x (b, d, n), A (d, n), D (d). Inside time comes first: u, dt (b, l, d), B, C (b, l, n).
"""

import math
import numbers
from functools import partial, reduce

import torch
from torch import nn
from torch.nn import functional as F


# ---- the layers ----

class SelectiveSSM(nn.Module):
    """(b, d, l) -> (b, d, l): (1) and (2), with D, without activation.

    d_model, d_state: d, and n
    dt_rank: W in (2) is a product with this inner size; auto is d / 16, rounded up
    dt_min, dt_max: step sizes start log-uniform in between, for u = 0
    lr: learning rate of dt_proj, A and x_proj, stored in ssm_lr for the optimizer, or None

    As in the official code A_log and D do not decay: no_weight_decay names them for the
    optimizer. dt_proj.bias has its start here: do not initialize it again.
    """
    no_weight_decay = ("A_log", "D")

    def __init__(self, d_model, d_state=16, *, dt_rank="auto", dt_min=1e-3, dt_max=1e-1,
                 lr=None):
        super().__init__()
        dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        check(d_model > 0 and d_state > 0, f"{d_model=}, {d_state=}: pass positive numbers")
        check(dt_rank > 0, f"{dt_rank=}: pass auto, or a positive number")
        check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")
        check(lr is None or lr >= 0, f"{lr=}: pass None, or lr >= 0")
        self.d, self.n, self.dt_rank = d_model, d_state, dt_rank
        self.x_proj = nn.Linear(d_model, dt_rank + 2 * d_state, bias=False)     # dt, B, C
        self.dt_proj = nn.Linear(dt_rank, d_model)
        dt = torch.exp(math.log(dt_min) + torch.rand(d_model) * math.log(dt_max / dt_min))
        inverse_softplus = dt + torch.log(-torch.expm1(-dt))
        self.dt_proj.bias = nn.Parameter(inverse_softplus)
        minus_A = torch.arange(1.0, d_state + 1)                # as S4D-Real
        self.A_log = nn.Parameter(minus_A.log().repeat(d_model, 1))
        self.D = nn.Parameter(torch.ones(d_model))
        names = ("dt_proj.weight", "dt_proj.bias", "A_log", "x_proj.weight")
        self.ssm_lr = {} if lr is None else dict.fromkeys(names, lr)

    def discretize(self, rate=1.0):
        """A (d, n) float64, and rate. No exp(dt_k A) yet: dt_k depends on the input."""
        check_rate(rate, self)
        A = -self.A_log.double().exp()
        return A.clamp(min=-1e38), rate         # 0 * A is 0 in single precision, too

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, d, n) float64. step stays in it, the scan takes the type of D."""
        return self.D.new_zeros(batch_size, self.d, self.n, dtype=torch.float64)

    def select(self, u, rate):
        """(2): u (.., d) -> dt (.., d), B (.., n), C (.., n). In single precision under
        autocast, too, for a recurrence adds up rounding."""
        if isinstance(rate, torch.Tensor):
            rate = rate[..., None].to(u.dtype)                  # the same for all features
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):
            low, B, C = self.x_proj(u).split([self.dt_rank, self.n, self.n], -1)
            dt = rate * F.softplus(self.dt_proj(low))
        return dt, B, C

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(1) once: u (b, d), state (b, d, n), rate one or (b) -> y (b, d), next state.
        discrete: what discretize(rate) returned, to use it for many steps."""
        check_input(u, 2, self.d, state, (self.d, self.n), rate)
        fixed = isinstance(rate, numbers.Real) and rate == 1.0
        check(discrete is None or fixed, "rate is in discrete: pass it to discretize")
        A, rate = discrete or self.discretize(rate)
        check(A.shape == state.shape[1:], "discrete: it was made by another layer")
        v = u.to(self.D.dtype)
        dt, B, C = self.select(v, rate)
        y, x = one_step(v, dt, B, C, A, state)
        return (y + self.D * v).to(u.dtype), x

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, d, l), state (b, d, n) or None -> y (b, d, l), last state or None.

        rate: factor on every dt_k: 2.0 for about the same signal sampled half as often; or
            (b, l), one for each sample, for a signal that is sampled irregularly
        method: scan, or step, one after the other: the same numbers
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        check_input(u, 3, self.d, state, (self.d, self.n), rate)
        check(method in ("scan", "step"), f"{method=}: choose scan or step")
        if method == "step":
            return self.recurrence(u, state, rate)
        A, rate = self.discretize(rate)
        v = u.to(self.D.dtype).mT.contiguous()                  # (b, l, d)
        x = self.initial_state(u.shape[0]) if state is None else state
        dt, B, C = self.select(v, rate)
        y, x = selective_scan(v, dt, B, C, A.to(v.dtype), x.to(v.dtype))
        y = (y + self.D * v).mT                                 # (b, d, l)
        return y.to(u.dtype), None if state is None else x.double()

    def recurrence(self, u, state, rate):
        """(1), one step after the other: equal to the parallel form up to rounding."""
        x = self.initial_state(u.shape[0]) if state is None else state
        if isinstance(rate, torch.Tensor):
            options = [{"rate": rate_k} for rate_k in rate.unbind(-1)]
        else:
            options = u.shape[-1] * [{"discrete": self.discretize(rate)}]
        outputs = []
        for u_k, how in zip(u.unbind(-1), options, strict=True):
            y_k, x = self.step(u_k, x, **how)
            outputs.append(y_k)
        return torch.stack(outputs, -1), None if state is None else x


class Mamba(SelectiveSSM):
    """(b, h, l) -> (b, h, l): the block, without norm and residual connection (Figure 3).

        v, z = W_in u,    o = W_out (SSM(silu(conv(v))) * silu(z)),    d = expand h

    d_conv: length of the causal convolution over each feature; it counts samples, not time
    expand: d / h
    dt_rank: as in SelectiveSSM, but auto is h / 16, rounded up
    bias, conv_bias: of W_in and W_out, and of conv. The others as in SelectiveSSM

    A state is a pair: the last inputs of conv, (b, d, d_conv - 1), and x (b, d, n). It is
    a subclass, so that its parameters have the names of the official block.
    """

    def __init__(self, d_model, d_state=16, *, d_conv=4, expand=2, dt_rank="auto",
                 bias=False, conv_bias=True, dt_min=1e-3, dt_max=1e-1, lr=None):
        check(d_model > 0 and d_conv > 0 and expand > 0,
              f"{d_model=}, {d_conv=}, {expand=}: pass positive numbers")
        dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        super().__init__(expand * d_model, d_state, dt_rank=dt_rank, dt_min=dt_min,
                         dt_max=dt_max, lr=lr)
        self.h, self.d_conv = d_model, d_conv
        self.in_proj = nn.Linear(d_model, 2 * self.d, bias=bias)
        self.conv1d = nn.Conv1d(self.d, self.d, d_conv, groups=self.d, bias=conv_bias)
        self.out_proj = nn.Linear(self.d, d_model, bias=bias)

    def initial_state(self, batch_size):
        """No inputs yet, and x_{-1} = 0."""
        inputs = self.D.new_zeros(batch_size, self.d, self.d_conv - 1)
        return inputs, super().initial_state(batch_size)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """The block once: u (b, h), state -> o (b, h), next state."""
        inputs, x = (None, None) if state is None else state
        check_input(u, 2, self.h, inputs, (self.d, self.d_conv - 1), rate)
        if discrete is None:
            check_rate(rate, self)                              # before any map is called
        v, z = self.in_proj(u.to(self.D.dtype)).chunk(2, -1)    # (b, d) each
        v = torch.cat([inputs.to(v.dtype), v[..., None]], -1)   # (b, d, d_conv)
        inputs = v[..., 1:].to(self.D.dtype, copy=True)         # no view of v
        v = F.silu(self.conv1d(v))[..., 0]                      # (b, d)
        y, x = super().step(v, x, rate=rate, discrete=discrete)
        o = self.out_proj(y * F.silu(z))                        # (b, h)
        return o.to(u.dtype), (inputs, x)

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, h, l), state or None -> o (b, h, l), last state or None."""
        inputs, x = (None, None) if state is None else state
        check_input(u, 3, self.h, inputs, (self.d, self.d_conv - 1), rate)
        if state is None:
            inputs, x = self.initial_state(u.shape[0])
        check_rate(rate, self)                                  # before any map is called
        if method == "step":
            return self.recurrence(u, state, rate)
        v = u.to(self.D.dtype).mT.contiguous()                  # (b, l, h)
        v, z = self.in_proj(v).chunk(2, -1)                     # (b, l, d) each
        v = torch.cat([inputs.to(v.dtype), v.mT], -1)           # with what is still seen
        inputs = v[..., u.shape[-1]:].to(self.D.dtype, copy=True)       # no view of v
        v = F.silu(self.conv1d(v))                              # (b, d, l)
        y, x = super().forward(v, x, rate=rate, method=method)
        o = self.out_proj(y.mT * F.silu(z))                     # (b, l, h)
        return o.mT.to(u.dtype), None if state is None else (inputs, x)


# ---- (1) without D: one step, all steps, and many steps at once ----
# u, dt (.., l, d), B, C (.., l, n), A (.., d, n), x (.., d, n) -> y (.., l, d), last x

def one_step(u, dt, B, C, A, x):
    """(1): all as above, but without l."""
    x = torch.exp(dt[..., None] * A) * x + (dt * u)[..., None] * B[..., None, :]
    y = (C[..., None, :] * x).sum(-1)
    return y, x


def step_by_step(u, dt, B, C, A, x):
    """The definition."""
    outputs = []
    for part in zip(*(t.unbind(-2) for t in (u, dt, B, C))):
        y_k, x = one_step(*part, A, x)
        outputs.append(y_k)
    return torch.stack(outputs, -2), x


def selective_scan(u, dt, B, C, A, x, at_once=None, T=16):
    """The same. Time is cut into blocks of T steps, and J blocks make a group. An operation
    takes step i of all J blocks, which is at_once states: as many as fit the cache of a
    processor, or keep a GPU busy. Groups follow each other."""
    at_once = at_once or (2 ** 20 if u.is_cuda else 2 ** 17)
    l = u.shape[-2]
    steps = [F.pad(t, (0, 0, 0, -l % T)) for t in (dt * u, dt, B, C)]   # dt = 0 keeps x
    size = min(T * max(1, at_once // x.numel()), steps[0].shape[-2])    # T J
    A = A.mT[..., None, :, :].contiguous()              # features last, which is faster
    x = x.mT[..., None, :, :].contiguous()              # before the first block
    outputs = []
    with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):
        for part in zip(*(t.split(size, -2) for t in steps)):
            y, x = GroupScan.apply(*part, A, x, T)
            x = x[..., -1:, :, :]                       # after the last block
            outputs.append(y)
    return torch.cat(outputs, -2)[..., :l, :], x[..., 0, :, :].mT.clone()


class GroupScan(torch.autograd.Function):
    """J blocks of T steps, side by side: v = dt u and dt (.., l, d), B, C (.., l, n),
    A (.., 1, n, d), x (.., 1, n, d) before them -> y (.., l, d), and the states before,
    between and after the blocks (.., J + 1, n, d).

    Its gradient is written out. autograd calls forward, lets setup_context keep what is
    needed later, and hands backward the gradients of the loss for both results; backward
    returns one for each argument of forward, None for T. Write gq for the gradient for q.
    x_k acts on y_k = C_k x_k, and on x_{k+1} by a_{k+1} = exp(dt_{k+1} A). So

        gx_k = C_k gy_k + z_{k+1},    z_k = a_k gx_k = a_k z_{k+1} + a_k C_k gy_k,     (4)

    where a state that was returned adds the gradient that comes for it. z is a scan as in
    (3), from the end. From x_k = a_k x_{k-1} + B_k v_k follow, summed where q has no axis,

        gv_k = B_k gx_k,   gB_k = v_k gx_k,   gC_k = gy_k x_k,   g(dt_k A) = z_k x_{k-1}.

    Only one state in T is kept. The others are made again.
    """
    generate_vmap_rule = True                           # for torch.func

    @staticmethod
    def forward(v, dt, B, C, A, x, T):
        v, dt, B, C = (in_slices(t, T) for t in (v, dt, B, C))
        a = [torch.exp(dt_i * A) for dt_i in dt]                # (.., J, n, d) each
        Bv = [B_i.mT * v_i for B_i, v_i in zip(B, v)]
        x = F.pad(x, (0, 0, 0, 0, 0, a[0].shape[-3] - 1))       # nothing enters later
        x = starts = block_starts(zip(a, Bv), x)
        y = []
        for a_i, Bv_i, C_i in zip(a, Bv, C):
            x = torch.addcmul(Bv_i, a_i, x)                     # (1), in all blocks
            y.append(C_i @ x)
        return in_order(y), torch.cat([starts, x[..., -1:, :, :]], -3)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *steps, A, x, T = inputs
        ctx.save_for_backward(*steps, A, output[1])
        ctx.T = T

    @staticmethod
    def backward(ctx, gy, g_states):
        *steps, A, states = ctx.saved_tensors
        v, dt, B, C, gy = (in_slices(t, ctx.T) for t in (*steps, gy))
        a = [torch.exp(dt_i * A) for dt_i in dt]
        x = [states[..., :-1, :, :]]                            # before step 0, 1, ...
        for a_i, B_i, v_i in zip(a, B, v):
            x.append(torch.addcmul(B_i.mT * v_i, a_i, x[-1]))
        back = ((a_i, a_i * (C_i.mT * gy_i))                    # z in (4), last step first
                for a_i, C_i, gy_i in zip(a[::-1], C[::-1], gy[::-1]))
        z = block_starts(back, g_states[..., 1:, :, :], last_first=True)
        gv, gdt, gB, gC, gA = [], [], [], [], 0
        for i in reversed(range(ctx.T)):
            gx = torch.addcmul(z, C[i].mT, gy[i])               # (4), in all blocks
            gv.append(B[i] @ gx)
            gB.append(v[i] @ gx.mT)
            gC.append(gy[i] @ x[i + 1].mT)
            z = a[i] * gx
            gdtA = z * x[i]
            gdt.append((gdtA * A).sum(-2, keepdim=True))
            gA = gA + gdtA * dt[i]
        over_time = [in_order(t[::-1]) for t in (gv, gdt, gB, gC)]
        gA = gA.sum_to_size(A.shape)                            # over batch and blocks
        gx = (z + g_states[..., :-1, :, :])[..., :1, :, :]      # before the first block
        return *over_time, gA, gx, None


def in_slices(t, T):
    """Time is k = jT + i: (.., l, m) -> T slices (.., J, 1, m), step i of all blocks j."""
    t = t.unflatten(-2, (-1, T)).movedim(-2, 0)                 # (T, .., J, m)
    return t.unsqueeze(-2).contiguous().unbind(0)


def in_order(slices):
    """The inverse of in_slices."""
    return torch.stack(slices, -2).squeeze(-3).flatten(-3, -2)


def combine(first, second):
    """(3): two steps in a row as one step. A step is the pair (a, v) of x -> a x + v."""
    a, v = first
    a_next, v_next = second
    return a_next * a, torch.addcmul(v_next, a_next, v)


def block_starts(steps, x, last_first=False):
    """The state s_j before each of J blocks: s_j = a_{j-1} s_{j-1} + v_{j-1} + x_j, where
    block j is (a_j, v_j) as one step. steps: T pairs (a, v) of (3), step i of all blocks;
    x (.., J, n, d): what is added from outside. last_first: from the last block on."""
    if x.shape[-3] == 1:                                # no other block: needs no step
        return x
    a, v = reduce(combine, steps)                               # (.., J, n, d)
    if last_first:
        a, v, x = (t.flip(-3) for t in (a, v, x))
    a = shift(a, 1)
    v = shift(v, 1) + x
    m = 1
    while m < x.shape[-3]:                              # (a, v): the last m blocks as one
        a, v = combine((shift(a, m), shift(v, m)), (a, v))
        m = 2 * m
    return v.flip(-3) if last_first else v


def shift(t, m):
    """Later by m blocks: t (.., J, n, d), with zeros before."""
    return F.pad(t, (0, 0, 0, 0, m, -m))


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None,
                      delta_softplus=False, return_last_state=False, initial_state=None,
                      scan=selective_scan):
    """(1) for given dt, B, C: in place of the CUDA function of that name, for real A.

    u, delta, z (b, d, l), A (d, n), D, delta_bias (d), initial_state (b, d, n) or None
    B, C (b, n, l); or (b, g, n, l), for g groups of features; or (d, n), constant in time
    dt = delta + delta_bias, or its softplus; z: multiplies the output by silu(z)
    -> y (b, d, l) as u, and with return_last_state also the last state (b, d, n)
    Raises ValueError for other shapes or types.
    """
    check(u.dim() == 3, f"u is {tuple(u.shape)}: pass floats (b, d, l)")
    check(A.dim() == 2, f"A is {tuple(A.shape)}: pass floats (d, n)")
    b, d, l = u.shape
    n = A.shape[1]
    groups = max([1] + [t.shape[1] for t in (B, C) if t.dim() == 4])
    BC = ((b, n, l), (b, groups, n, l), (d, n))
    given = {"u": (u, (b, d, l)), "A": (A, (d, n)), "delta": (delta, (b, d, l)),
             "B": (B, *BC), "C": (C, *BC), "D": (D, (d,)), "z": (z, (b, d, l)),
             "delta_bias": (delta_bias, (d,)), "initial_state": (initial_state, (b, d, n))}
    for name, (t, *shapes) in given.items():
        if t is not None:
            check(t.shape in shapes and t.is_floating_point() and t.numel() > 0,
                  f"{name} is {t.dtype} {tuple(t.shape)}: pass floats, one of {shapes}")
    check(d % groups == 0, f"B, C have {groups} groups: pass a divisor of {d=}")
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    v = u.to(dtype)
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    x = v.new_zeros(b, d, n) if initial_state is None else initial_state
    B, C = (t[..., None].expand(b, d, n, l) if t.dim() == 2 else t.reshape(b, -1, n, l)
            for t in (B, C))
    groups = max(B.shape[1], C.shape[1])                    # d, if one is constant
    B, C = (t.to(dtype).repeat_interleave(groups // t.shape[1], 1) for t in (B, C))
    A, x, u_g, dt = (t.to(dtype).unflatten(-2, (groups, -1)) for t in (A, x, v, dt))
    y, x = scan(*(t.mT.contiguous() for t in (u_g, dt, B, C)), A, x)
    y = y.mT.flatten(1, 2)                                  # (b, d, l)
    if D is not None:
        y = torch.addcmul(y, D[:, None], v)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, x.flatten(1, 2)) if return_last_state else y


selective_scan_seq = partial(selective_scan_fn, scan=step_by_step)      # slow, the same


def check_input(u, dims, features, state, shape, rate):
    """dims 2: u (b, features), a state (b, *shape), rate a number or (b);
    dims 3: u (b, features, l), a state or None, rate a number or (b, l)."""
    wanted = f"(b, {features})" if dims == 2 else f"(b, {features}, l)"
    check(isinstance(u, torch.Tensor), f"u is a {type(u).__name__}: pass a tensor {wanted}")
    fits = u.dim() == dims and u.shape[1] == features and u.is_floating_point()
    check(fits, f"u is {u.dtype} {tuple(u.shape)}: pass floats {wanted}")
    check(u.numel() > 0, f"u is empty, {tuple(u.shape)}: pass {wanted} with b, l > 0")
    if dims == 2 or state is not None:
        wanted = (u.shape[0], *shape)
        is_tensor = isinstance(state, torch.Tensor)
        found = (state.dtype, *state.shape) if is_tensor else type(state).__name__
        check(is_tensor and state.shape == wanted and state.is_floating_point(),
              f"state: {found}, pass floats {wanted} like initial_state()")
    if isinstance(rate, torch.Tensor):
        wanted = (u.shape[0], *u.shape[2:])
        check(rate.shape == wanted, f"rate is {tuple(rate.shape)}: pass one or {wanted}")


def check_rate(rate, layer):
    """Positive, one or a tensor, and parameters precise enough to be discretized."""
    if isinstance(rate, torch.Tensor):
        if not torch.compiler.is_compiling():           # a graph cannot look at numbers
            check((rate > 0).all() and rate.isfinite().all(),
                  "rate is not positive or not finite somewhere: pass positive numbers")
    elif not isinstance(rate, numbers.Real) or not 0 < rate < math.inf:
        raise ValueError(f"{rate=}: pass one positive number or a tensor of them")
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
    l, layer = 1000, SelectiveSSM(d_model=4)
    u = torch.randn(2, 4, l)
    y, _ = layer(u)
    first, state = layer(u[..., :300], layer.initial_state(2))
    second, state = layer(u[..., 300:], state)
    smooth = torch.linspace(0, 6, l).sin().expand(2, 4, l)
    full, _ = layer(smooth)
    half, _ = layer(smooth[..., 1::2], rate=2.0)
    for what, a, b in (("scan, recurrence", y, layer(u, method="step")[0]),
                       ("whole, two pieces", y, torch.cat([first, second], -1)),
                       ("rate 1, rate 2 (about equal)", full[..., 1::2], half)):
        print(f"{what:<36} differ by {(a - b).abs().max() / b.abs().max():.1e}")
