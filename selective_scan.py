"""Selective scan: the layer of Mamba, whose step size, B and C depend on the input.

    Gu, Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023),
    arXiv 2312.00752.                                 Try it: python selective_scan.py

Each of the d features u drives n real numbers x of its own (section 3.2, Algorithm 2):

    x_k = exp(dt_k A) x_{k-1} + dt_k B_k u_k,    y_k = C_k x_k + D u_k,            (1)
    dt_k = rate softplus(W u_k + bias),    B_k = W_B u_k,    C_k = W_C u_k.        (2)

What was wrong before. All layers from LSSL to LRU treat every sample alike: they cannot
decide by its content what to keep. Here dt_k -> 0 skips a sample and leaves the state as it
is, a large dt_k forgets the past and takes the sample in, and B_k, C_k decide what goes
where. A stays constant: in dt_k A, a selective dt makes it selective too (section 3.5.2).

Why no convolution? The response to u_i at time k, C_k exp((dt_{i+1} + ... + dt_k) A) dt_i
B_i, depends on all samples between. There is no one kernel. But two steps in a row,
x -> a x + v and x -> a' x + v', are one, x -> a'a x + (a'v + v'). So blocks of steps can
run side by side: scan_blocks.

Why dt_k B_k, and not zero-order hold? That is (exp(dt A) - 1) / A B, or dt B (1 + dt A / 2
+ ...). They agree where dt |A| is small; elsewhere a trained B_k makes up for it, at one
rate, so that another rate is approximate.

Why does memory matter? The states (b, d, l, n) are n times as large as the input.
"Hardware-aware" (section 3.3.2) means: compute them where they are used, and once more in
the backward pass, rather than store them. selective_scan does that if they are many.

Symbols: b batch, d features, n states (d_state), l length. u, dt, y, z (b, d, l);
B, C (b, n, l); A (d, n); x (b, d, n); D (d). Inside the scans time comes first, d last.
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
    """

    def __init__(self, d_model, d_state=16, *, dt_rank="auto", dt_min=1e-3, dt_max=1e-1,
                 lr=None):
        super().__init__()
        dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        check(d_state > 0, f"{d_state=}: pass a positive number")
        check(dt_rank > 0, f"{dt_rank=}: pass auto, or a positive number")
        check(0 < dt_min <= dt_max < math.inf, f"{dt_min=}, {dt_max=}: pass 0 < min <= max")
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
        """What of (1) and (2) does not depend on the input: A (d, n) float64, and rate."""
        if not 0 < rate < math.inf:
            raise ValueError(f"{rate=}: pass a positive number")
        check(self.D.dtype.itemsize > 2, f"parameters are {self.D.dtype}: use autocast")
        return -self.A_log.double().exp(), rate

    def initial_state(self, batch_size):
        """x_{-1} = 0: (b, d, n) float64, for rounding adds up over the steps."""
        return self.D.new_zeros(batch_size, self.d, self.n, dtype=torch.float64)

    def select(self, u, rate):
        """(2): u (b, d, l) or (b, d) -> dt, B, C, with or without l."""
        low, B, C = channel_map(self.x_proj, u).split([self.dt_rank, self.n, self.n], 1)
        return rate * F.softplus(channel_map(self.dt_proj, low)), B, C

    def step(self, u, state, *, rate=1.0, discrete=None):
        """(1) once: u (b, d), state (b, d, n) -> y (b, d), next state.
        discrete: what discretize() returned, to use it for many steps."""
        check_input(u, 2, self.d, state, (self.d, self.n))
        A, rate = discrete or self.discretize(rate)
        with full_precision(u):
            dt, B, C = self.select(u, rate)
        x = torch.exp(dt[..., None] * A) * state + (dt * u)[..., None] * B[:, None]
        y = (C[:, None] * x).sum(-1) + self.D * u       # (b, d)
        return y.to(u.dtype), x

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, d, l), state (b, d, n) or None -> y (b, d, l), last state or None.

        rate: factor on every dt_k: 2.0 for the same signal sampled half as often
        method: scan, or step, which is (1) as it stands: the same numbers
        Raises ValueError for a u, state, rate or method that does not fit.
        """
        check_input(u, 3, self.d, state, (self.d, self.n))
        check(method in ("scan", "step"), f"{method=}: choose scan or step")
        A, rate = self.discretize(rate)
        scan = step_by_step                             # in double precision, as A is
        if method == "scan":
            scan = selective_scan
            A = A.to(self.D.dtype)
        with full_precision(u):
            dt, B, C = self.select(u, rate)
            y, last = selective_scan_fn(u, dt, A, B, C, self.D, initial_state=state,
                                        return_last_state=True, scan=scan)
        return y, None if state is None else last.double()


class Mamba(SelectiveSSM):
    """(b, h, l) -> (b, h, l): the block, without norm and residual connection (Figure 3).

        v, z = W_in u,    o = W_out (SSM(silu(conv(v))) * silu(z)),    d = expand h

    d_conv: length of the causal convolution over each feature; it counts samples, not time
    expand, dt_rank: d / h; auto is h / 16, rounded up. The others as in SelectiveSSM

    A state is a pair: the last inputs of the convolution, (b, d, d_conv - 1), and x
    (b, d, n). Parameters are named as in the official block.
    """

    def __init__(self, d_model, d_state=16, *, d_conv=4, expand=2, dt_rank="auto",
                 dt_min=1e-3, dt_max=1e-1, lr=None):
        check(d_conv > 0, f"{d_conv=}: pass a positive number")
        check(expand > 0, f"{expand=}: pass a positive number")
        dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        super().__init__(expand * d_model, d_state, dt_rank=dt_rank, dt_min=dt_min,
                         dt_max=dt_max, lr=lr)
        self.h, self.d_conv = d_model, d_conv
        self.in_proj = nn.Linear(d_model, 2 * self.d, bias=False)
        self.conv1d = nn.Conv1d(self.d, self.d, d_conv, groups=self.d)
        self.out_proj = nn.Linear(self.d, d_model, bias=False)

    def initial_state(self, batch_size):
        """No inputs yet, and x_{-1} = 0."""
        inputs = self.D.new_zeros(batch_size, self.d, self.d_conv - 1)
        return inputs, super().initial_state(batch_size)

    def step(self, u, state, *, rate=1.0, discrete=None):
        """The block once: u (b, h), state -> o (b, h), next state."""
        inputs, x = state
        check_input(u, 2, self.h, inputs, (self.d, self.d_conv - 1))
        v, z = channel_map(self.in_proj, u).chunk(2, 1)         # (b, d) each
        v = torch.cat([inputs.to(v.dtype), v[..., None]], -1)   # (b, d, d_conv)
        inputs = v[..., 1:].to(self.D.dtype)
        v = F.silu(self.conv1d(v))[..., 0]                      # (b, d)
        y, x = super().step(v, x, rate=rate, discrete=discrete)
        o = channel_map(self.out_proj, y * F.silu(z))
        return o.to(u.dtype), (inputs, x)

    def forward(self, u, state=None, *, rate=1.0, method="scan"):
        """u (b, h, l), state or None -> o (b, h, l), last state or None."""
        inputs, x = self.initial_state(len(u)) if state is None else state
        check_input(u, 3, self.h, inputs, (self.d, self.d_conv - 1))
        v, z = channel_map(self.in_proj, u).chunk(2, 1)         # (b, d, l) each
        v = torch.cat([inputs.to(v.dtype), v], -1)              # with what is still seen
        inputs = v[..., u.shape[-1]:].to(self.D.dtype)          # (b, d, d_conv - 1)
        v = F.silu(self.conv1d(v))                              # (b, d, l)
        y, x = super().forward(v, x, rate=rate, method=method)
        o = channel_map(self.out_proj, y * F.silu(z))
        return o.to(u.dtype), None if state is None else (inputs, x)


# ---- the scan: by the definition, in blocks, and in groups of blocks ----
# dt, u (l, b, d), B, C (l, b, n), A (n, d), x (b, n, d) -> y (l, b, d) without D, last x

def step_by_step(dt, u, B, C, A, x):
    """The definition (1)."""
    outputs = []
    for dt_k, u_k, B_k, C_k in zip(dt, u, B, C):
        x = torch.exp(dt_k[:, None] * A) * x + B_k[..., None] * (dt_k * u_k)[:, None]
        outputs.append((C_k[:, None] @ x)[:, 0])        # (b, d)
    return torch.stack(outputs), x


def scan_blocks(dt, u, B, C, A, x, T=16):
    """The same in J blocks of T steps: all blocks at once, each from 0; then where each
    block really starts, one after the other; then all blocks at once again, from there.

    Time is k = jT + i. Slices made one at a time are faster than one large tensor. With P
    the cumulative product of decays, cumsum(dtBu / P) P would be shorter, but P underflows.
    """
    l = len(u)
    T = min(T, l)
    padding = (0, 0, 0, 0, 0, -l % T)                   # dt = 0 keeps the state
    dt, u, B, C = (F.pad(t, padding).unflatten(0, (-1, T)) for t in (dt, u, B, C))
    decays = [torch.exp(dt_i[:, :, None] * A) for dt_i in dt.unbind(1)]     # (J, b, n, d)
    inputs = []
    for B_i, dtu_i in zip(B.unbind(1), (dt * u).unbind(1)):
        inputs.append(B_i[..., None] * dtu_i[:, :, None])
    end = inputs[0]                                     # from x = 0
    for decay, dtBu in zip(decays[1:], inputs[1:]):
        end = torch.addcmul(dtBu, decay, end)           # (J, b, n, d)
    starts = []
    block_decay = torch.exp(dt.sum(1)[:, :, None] * A)
    for decay_j, end_j in zip(block_decay.unbind(), end.unbind()):
        starts.append(x)
        x = torch.addcmul(end_j, decay_j, x)            # (b, n, d)
    state = torch.stack(starts)
    outputs = []
    for decay, dtBu, C_i in zip(decays, inputs, C.unbind(1)):
        state = torch.addcmul(dtBu, decay, state)       # (J, b, n, d)
        outputs.append((C_i[:, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, 1).flatten(0, 1)[:l], x


def selective_scan(dt, u, B, C, A, x, largest=2 ** 22):
    """The same in groups of steps with about `largest` states, one after the other. The
    last two groups are kept for the backward pass, which begins there, and those before
    are computed once more: less memory for more time."""
    l, b, d = u.shape
    group = max(16, largest // (b * d * len(A)) // 16 * 16)     # steps
    parts = [t.split(group) for t in (dt, u, B, C)]
    recomputed = len(parts[0]) - 2
    outputs = []
    for i, part in enumerate(zip(*parts)):
        if i < recomputed and torch.is_grad_enabled():
            y, x = checkpoint(scan_blocks, *part, A, x, use_reentrant=False)
        else:
            y, x = scan_blocks(*part, A, x)
        outputs.append(y)
    return torch.cat(outputs), x


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None,
                      delta_softplus=False, return_last_state=False, initial_state=None,
                      scan=selective_scan):
    """(1) for given dt, B, C: in place of the CUDA function of that name, on any device,
    for real A, and B and C that vary in time.

    u, delta, z (b, d, l), A (d, n), B, C (b, n, l), D, delta_bias (d)
    initial_state (b, d, n), or None for zeros
    dt = delta + delta_bias, or its softplus; z: multiplies the output by silu(z)
    -> y (b, d, l) as u, and with return_last_state also the last state (b, d, n)
    Raises ValueError for other shapes or types.
    """
    check(u.dim() == 3, f"u is {tuple(u.shape)}: pass floats (b, d, l)")
    check(A.dim() == 2, f"A is {tuple(A.shape)}: pass floats (d, n)")
    b, d, l = u.shape
    n = A.shape[1]
    given = {"u": (u, (b, d, l)), "A": (A, (d, n)), "delta": (delta, (b, d, l)),
             "B": (B, (b, n, l)), "C": (C, (b, n, l)), "D": (D, (d,)), "z": (z, (b, d, l)),
             "delta_bias": (delta_bias, (d,)), "initial_state": (initial_state, (b, d, n))}
    for name, (t, shape) in given.items():
        if t is not None:
            check(t.shape == shape and t.is_floating_point() and t.numel() > 0,
                  f"{name} is {t.dtype} {tuple(t.shape)}: pass floats {shape}")
    dtype = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    with full_precision(u):
        dt = delta.to(dtype)
        if delta_bias is not None:
            dt = dt + delta_bias[:, None]
        if delta_softplus:
            dt = F.softplus(dt)
        x = u.new_zeros(b, d, n) if initial_state is None else initial_state
        # (b, c, l) -> (l, b, c) as one transpose of a matrix: torch copies that one fast
        sequences = [t.to(dtype).flatten(0, 1).t().contiguous().unflatten(1, t.shape[:2])
                     for t in (dt, u, B, C)]
        y, x = scan(*sequences, A.to(dtype).mT.contiguous(), x.to(dtype).mT)
        y = y.flatten(1).t().contiguous().view(b, d, l)
        if D is not None:
            y = torch.addcmul(y, D[:, None], u.to(dtype))
        if z is not None:
            y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, x.mT) if return_last_state else y


# the same by the definition, one step after the other
selective_scan_seq = partial(selective_scan_fn, scan=step_by_step)


def channel_map(linear, u):
    """A linear layer over the features of u (b, h), or of u (b, h, l) as a convolution of
    length 1: twice as fast as a matrix product, for which torch copies u."""
    u = u.to(linear.weight.dtype)
    if u.dim() == 2:
        return linear(u)
    return F.conv1d(u, linear.weight[..., None], linear.bias)


def full_precision(u):
    """Switch autocast off: half precision is too coarse for a long recurrence."""
    return torch.autocast("cuda" if u.is_cuda else "cpu", enabled=False)


def check_input(u, dims, features, state, shape):
    """dims 2: u (b, features); dims 3: u (b, features, l); state (b, *shape) or None."""
    fits = u.dim() == dims and u.shape[1] == features and u.numel() > 0
    check(fits and u.is_floating_point(),
          f"u is {u.dtype} {tuple(u.shape)}: pass floats, {features} features, {dims}-d")
    if state is not None:
        check(state.shape == (len(u), *shape) and state.is_floating_point(),
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
    stepped, _ = layer(u, method="step")
    first, state = layer(u[..., :300], layer.initial_state(2))
    second, state = layer(u[..., 300:], state)
    smooth = torch.linspace(0, 6, l).sin().expand(2, 4, l)
    full, _ = layer(smooth)
    half, _ = layer(smooth[..., 1::2], rate=2.0)
    for what, a, b in (("scan, recurrence", y, stepped),
                       ("whole, two pieces", y, torch.cat([first, second], -1)),
                       ("rate 1, every second at rate 2: about", full[..., 1::2], half)):
        print(f"{what:<36} differ by {(a - b).abs().max() / b.abs().max():.1e}")
