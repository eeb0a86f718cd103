"""Selective scan: the layer of Mamba, whose step size, B and C depend on the input.

    Gu, Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023),
    arXiv 2312.00752.                                 Try it: python selective_scan.py

Each of the d features has n real numbers x of its own, from which y is read:

    x_k = exp(dt_k A) x_{k-1} + dt_k B_k u_k,    y_k = C_k x_k + D u_k.            (1)

Here u_k is the number of that feature, as are dt_k and D, and A has n numbers. B_k and C_k,
n numbers each, are the same for all features. They depend on all, the vector u_k:

    dt_k = rate softplus(W u_k + bias),    B_k = W_B u_k,    C_k = W_C u_k.        (2)

What was wrong before. All layers from LSSL to LRU treat every sample alike: they cannot
decide by its content what to keep. Here dt_k -> 0 skips a sample and leaves the state as it
is, a large dt_k forgets the past and takes the sample in, and B_k, C_k decide what goes
where. A stays constant: in dt_k A, a selective dt makes it selective too (section 3.5.2).

Why no convolution? The response to u_i at time k, C_k exp((dt_{i+1} + ... + dt_k) A) dt_i
B_i, depends on all samples between. There is no one kernel. But two steps in a row,
x -> a x + v and x -> a' x + v', are one, x -> a'a x + (a'v + v'). So blocks of steps can
run side by side: linear_scan.

Why does memory matter? The states (b, d, l, n) are n times as large as the input. The
paper's "hardware-aware" algorithm (section 3.3.2) keeps them in the fast on-chip memory of
a GPU, and computes them again in the backward pass. Here selective_scan does the second.

Differs from the paper: (1) is the form of the official code. The paper's (4) is zero-order
hold for B too: (exp(dt A) - 1) / A B instead of dt B. They agree where dt |A| is small.

Symbols: b batch, d features, l length; the paper's x, h are our u, x. u, y (b, d, l),
x (b, d, n), A (d, n), D (d). Inside time comes first: u, dt (b, l, d), B, C (b, l, n).
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


# ---- the layers ----

class SelectiveSSM(nn.Module):
    """(b, d, l) -> (b, d, l): (1) and (2), with D, without activation.

    d_model, d_state: d, and n
    dt_rank: W in (2) is a product with this inner size; auto is d / 16, rounded up
    dt_min, dt_max: step sizes start log-uniform in between, for u = 0
    lr: learning rate of dt_proj, A and x_proj, stored in ssm_lr for the optimizer, or None

    As in the official code, A_log and D have the attribute _no_weight_decay, by which
    example.py spares them, and dt_proj.bias has _no_reinit: do not initialize it again.
    """

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
        self.mark_parameters()
        names = ("dt_proj.weight", "dt_proj.bias", "A_log", "x_proj.weight")
        self.ssm_lr = {} if lr is None else dict.fromkeys(names, lr)

    def mark_parameters(self):
        for name, parameter in self.named_parameters():
            if name in ("A_log", "D"):
                parameter._no_weight_decay = True
            if name == "dt_proj.bias":
                parameter._no_reinit = True

    def __setstate__(self, state):      # of a copy: copy.deepcopy drops the marks
        super().__setstate__(state)
        self.mark_parameters()

    def discretize(self, rate=1.0):
        """A (d, n) float64, and rate. No exp(dt_k A) yet: dt_k depends on the input."""
        if isinstance(rate, (torch.Tensor, list)) or not 0 < rate < math.inf:
            raise ValueError(f"{rate=}: pass one positive number; for irregular sampling, "
                             "call step with a rate of its own for each sample")
        check(self.D.dtype.itemsize > 2, f"parameters are {self.D.dtype}: use autocast")
        return -self.A_log.double().exp(), rate

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, d, n) float64, so that rounding stays small."""
        return self.D.new_zeros(batch_size, self.d, self.n, dtype=torch.float64)

    def select(self, u, rate):
        """(2): u (.., d) -> dt (.., d), B (.., n), C (.., n). In single precision under
        autocast, too, for a recurrence adds up rounding."""
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):
            low, B, C = self.x_proj(u).split([self.dt_rank, self.n, self.n], -1)
            dt = rate * F.softplus(self.dt_proj(low))
        return dt, B, C

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(1) once: u (b, d), state (b, d, n) -> y (b, d), next state.
        discrete: what discretize(rate) returned, to use it for many steps."""
        check_input(u, 2, self.d, state, (self.d, self.n))
        check(discrete is None or rate == 1.0, "rate is in discrete: pass it to discretize")
        A, rate = discrete or self.discretize(rate)
        v = u.to(self.D.dtype)
        dt, B, C = self.select(v, rate)
        y, x = one_step(v, dt, B, C, A, state)
        return (y + self.D * v).to(u.dtype), x

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, d, l), state (b, d, n) or None -> y (b, d, l), last state or None.

        rate: factor on every dt_k: 2.0 for about the same signal sampled half as often
        method: scan, or step, one after the other: the same numbers
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        check_input(u, 3, self.d, state, (self.d, self.n))
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
        discrete = self.discretize(rate)
        outputs = []
        for u_k in u.unbind(-1):
            y_k, x = self.step(u_k, x, discrete=discrete)
            outputs.append(y_k)
        return torch.stack(outputs, -1), None if state is None else x


class Mamba(SelectiveSSM):
    """(b, h, l) -> (b, h, l): the block, without norm and residual connection (Figure 3).

        v, z = W_in u,    o = W_out (SSM(silu(conv(v))) * silu(z)),    d = expand h

    d_conv: length of the causal convolution over each feature; it counts samples, not time
    expand, dt_rank: d / h; auto is h / 16, rounded up
    bias, conv_bias: of W_in and W_out, and of conv. The others as in SelectiveSSM

    A state is a pair: the last inputs of conv, (b, d, d_conv - 1), and x (b, d, n). The
    official block holds the parameters of the SSM itself: for its names, a subclass.
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
        check_input(u, 2, self.h, inputs, (self.d, self.d_conv - 1))
        v, z = self.in_proj(u.to(self.D.dtype)).chunk(2, -1)    # (b, d) each
        v = torch.cat([inputs.to(v.dtype), v[..., None]], -1)   # (b, d, d_conv)
        inputs = v[..., 1:].to(self.D.dtype)
        v = F.silu(self.conv1d(v))[..., 0]                      # (b, d)
        y, x = super().step(v, x, rate=rate, discrete=discrete)
        o = self.out_proj(y * F.silu(z))                        # (b, h)
        return o.to(u.dtype), (inputs, x)

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, h, l), state or None -> o (b, h, l), last state or None."""
        inputs, x = self.initial_state(u.shape[0]) if state is None else state
        check_input(u, 3, self.h, inputs, (self.d, self.d_conv - 1))
        if method == "step":
            return self.recurrence(u, state, rate)
        v = u.to(self.D.dtype).mT.contiguous()                  # (b, l, h)
        v, z = self.in_proj(v).chunk(2, -1)                     # (b, l, d) each
        v = torch.cat([inputs.to(v.dtype), v.mT], -1)           # with what is still seen
        inputs = v[..., u.shape[-1]:].to(self.D.dtype)          # (b, d, d_conv - 1)
        v = F.silu(self.conv1d(v))                              # (b, d, l)
        y, x = super().forward(v, x, rate=rate, method=method)
        o = self.out_proj(y.mT * F.silu(z))                     # (b, l, h)
        return o.mT.to(u.dtype), None if state is None else (inputs, x)


# ---- (1) once, step by step, in blocks, and in groups of blocks ----
# u, dt (.., l, d), B, C (.., l, n), A (.., d, n), x (.., d, n) -> y (.., l, d), last x

def one_step(u, dt, B, C, A, x):
    """(1) without D: all as above, but without l."""
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


def scan_blocks(u, dt, B, C, A, x):
    """The same by linear_scan, with features last, which is faster: A, x (.., n, d)."""
    dtu, dt_i, B_i, C_i = (in_slices(t, -2) for t in (dt * u, dt, B, C))
    v_i = [B_k[..., None] * w[..., None, :] for w, B_k in zip(dtu, B_i)]    # (.., J, n, d)
    outputs = []
    for x, C_k in zip(linear_scan(dt_i, v_i, A[..., None, :, :], x), C_i):
        with torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False):
            outputs.append((C_k[..., None, :] @ x)[..., 0, :])              # (.., J, d)
    y = torch.stack(outputs, -2).flatten(-3, -2)
    return y[..., :u.shape[-2], :], x[..., -1, :, :]


def in_slices(t, dim, T=16):
    """Time, which is dimension dim of t, is k = jT + i: J blocks of T steps, the last one
    filled up with zeros (dt = 0 keeps x). For each i, a slice with the J times jT + i."""
    padding = [0, 0] * (-1 - dim) + [0, -t.shape[dim] % T]
    return F.pad(t, padding).unflatten(dim, (-1, T)).unbind(dim)


def linear_scan(dt, v, A, x):
    """All x_k = exp(dt_k A) x_{k-1} + v_k from x_{-1} = x: dt (.., J, d), v (.., J, n, d)
    and the x_k are T slices each, which is faster than one large tensor.

    All J blocks at once, each from 0, for their ends; by these, in the same way, where each
    block really starts; then all at once again, from there. Why not cumsum(v / P) P, with P
    the cumulative product of decays? P underflows.
    """
    decays = [torch.exp(dt_i[..., None, :] * A) for dt_i in dt]
    J = dt[0].shape[-2]
    state = x[..., None, :, :]
    if J > 1:
        end = v[0]
        for a_i, v_i in zip(decays[1:], v[1:]):
            end = torch.addcmul(v_i, a_i, end)                          # (.., J, n, d)
        dt_j = torch.stack(dt).sum(0)                                   # (.., J, d)
        ends = linear_scan(in_slices(dt_j, -2, 4), in_slices(end, -3, 4), A, x)
        ends = torch.stack(list(ends), -3).flatten(-4, -3)
        state = torch.cat([state, ends[..., :J - 1, :, :]], -3)         # (.., J, n, d)
    for a_i, v_i in zip(decays, v):
        state = torch.addcmul(v_i, a_i, state)
        yield state


def selective_scan(u, dt, B, C, A, x, largest=2 ** 22):
    """The same in groups of steps with about `largest` states. The last two or so are kept
    for the backward pass, which begins there; those before are computed once more. Each
    group is a block shorter than the one before, so that its tensors fit into what that one
    has freed: the malloc of glibc looks for a few bytes more than a tensor has.
    """
    J = max(1, largest // x.numel() // 16)                              # blocks, on average
    A, x = A.mT.contiguous(), x.mT
    outputs, start, l = [], 0, u.shape[-2]
    while start < l:
        stop = start + 16 * (J + J // 2 - len(outputs) % J)
        part = [t[..., start:stop, :] for t in (u, dt, B, C)]
        if l - stop > 2 * 16 * J and torch.is_grad_enabled():
            y, x = checkpoint(scan_blocks, *part, A, x, use_reentrant=False)
        else:
            y, x = scan_blocks(*part, A, x)
        outputs.append(y)
        start = stop
    return torch.cat(outputs, -2), x.mT


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
    g = max([1] + [t.shape[1] for t in (B, C) if t.dim() == 4])
    BC = ((b, n, l), (b, g, n, l), (d, n))
    given = {"u": (u, (b, d, l)), "A": (A, (d, n)), "delta": (delta, (b, d, l)),
             "B": (B, *BC), "C": (C, *BC), "D": (D, (d,)), "z": (z, (b, d, l)),
             "delta_bias": (delta_bias, (d,)), "initial_state": (initial_state, (b, d, n))}
    for name, (t, *shapes) in given.items():
        if t is not None:
            check(t.shape in shapes and t.is_floating_point() and t.numel() > 0,
                  f"{name} is {t.dtype} {tuple(t.shape)}: pass floats, one of {shapes}")
    check(d % g == 0, f"B, C have {g} groups: pass a divisor of {d=}")
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
    g = max(B.shape[1], C.shape[1])                         # d, if one is constant
    B, C = (t.to(dtype).repeat_interleave(g // t.shape[1], 1) for t in (B, C))
    A, x, u_g, dt = (t.to(dtype).unflatten(-2, (g, -1)) for t in (A, x, v, dt))
    y, x = scan(*(t.mT.contiguous() for t in (u_g, dt, B, C)), A, x)
    y = y.mT.flatten(1, 2)                                  # (b, d, l)
    if D is not None:
        y = torch.addcmul(y, D[:, None], v)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, x.flatten(1, 2)) if return_last_state else y


selective_scan_seq = partial(selective_scan_fn, scan=step_by_step)      # slow, the same


def check_input(u, dims, features, state, shape):
    """dims 2: u (b, features) and a state (b, *shape);
    dims 3: u (b, features, l), and a state or None."""
    wanted = f"(b, {features})" if dims == 2 else f"(b, {features}, l)"
    fits = u.dim() == dims and u.shape[1] == features and u.numel() > 0
    check(fits and u.is_floating_point(),
          f"u is {u.dtype} {tuple(u.shape)}: pass floats {wanted}")
    if dims == 2 or state is not None:
        fits = state is not None and state.shape == (u.shape[0], *shape)
        check(fits and state.is_floating_point(),
              "state: pass one of the shape and type of initial_state()")


def check(ok, message):
    """Raise a ValueError unless ok. Not for rate or l: torch.compile can't print them."""
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
