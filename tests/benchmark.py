"""How fast the layers are and how much memory they take, as ratios to plain code.

    python tests/benchmark.py                                all, in about four minutes
    python tests/benchmark.py s4d s5 --quick                 these, with fewer repetitions
    python tests/benchmark.py --markdown                     writes the last section of docs/measured.md
    python tests/benchmark.py --plot figures/benchmark.png   time against length, too
    python tests/benchmark.py --operators                    only the launches on a GPU

Why ratios? Times differ between machines, and on a busy machine from minute to minute. So
each row calls two things in turn, ours, reference, ours, reference, ..., and compares the
median times: drift hits both. The reference is written out here, from the definition, reads
the same parameters and computes in single precision; a row first checks that both give the
same numbers. A step is in double precision on both sides. "f+b" is forward and backward,
with the gradients of |y|^2 / 2 for the input and the parameters; everything else is the
forward pass alone.

Memory is what a call allocates: the largest sum of all blocks alive at one time that came into being in the
call, its result and the temporaries inside of operations included. It is the running sum of the allocations
and releases in the record of PyTorch's profiler (profile_memory=True). Parameters and inputs existed before.

Sizes, unless a row says otherwise: h = 128 features, n = 64 states, length l = 1024, batch 16, float32.
"""

import argparse
import datetime
import functools
import gc
import importlib
import math
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.profiler import profile

from fake_gpu import count_operators

ROOT = Path(__file__).resolve().parent.parent
MARKDOWN = ROOT / "docs" / "measured.md"
HEADING = "## All rows of the benchmark\n"
H, N, L, BATCH = 128, 64, 1024, 16


# ---- measuring ----

def sample(run, count=1):
    """Seconds per call, over count calls."""
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def race(ours, theirs, seconds):
    """Median times of both in ms, called in turn for so many seconds and at least three times.

    A sample lasts 5 ms or more: that long, the clock and a passing interrupt do not matter.
    """
    runs = [(run, math.ceil(5e-3 / sample(run)), []) for run in (ours, theirs)]
    end = time.perf_counter() + seconds
    while len(runs[0][2]) < 3 or time.perf_counter() < end:
        for run, count, times in runs:
            times.append(sample(run, count))
    return [1e3 * statistics.median(times) for _, _, times in runs]


def peak_memory(run):
    """Largest number of MB alive at one time that run() allocated."""
    run()                                                    # whatever is made only once is made now
    gc.collect()
    with profile(profile_memory=True) as record:
        result = run()                                       # noqa: F841, alive until the record ends
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()                              # negative for a release
        peak = max(peak, alive)
    return peak / 2 ** 20


def output(result):
    """y of y or (y, state)."""
    return result[0] if isinstance(result, tuple) else result


def both_ways(run, inputs):
    """A function that computes y = run() and the gradients of |y|^2 / 2 for those inputs that want one."""
    inputs = [x for x in inputs if x.requires_grad]

    def forward_backward():
        y = output(run())
        torch.autograd.grad(y, inputs, y.detach(), allow_unused=True)        # a kernel does not depend on D
        return y.detach()
    return forward_backward


def forward(run):
    """A function that computes run() without a record for gradients."""
    return torch.no_grad()(run)


class Table:
    """Rows of COLUMNS, printed as they come. seconds: how long to measure for one row.

    at_least: the requirement on reference / ours; at_most: on ours / reference; 0 and inf require nothing.
    """
    COLUMNS = "measured", "ours", "reference", "ratio", "required", "ok"

    def __init__(self, seconds):
        self.seconds, self.rows = seconds, []
        self.show(self.COLUMNS)

    @staticmethod
    def show(row):
        """Print a row."""
        print("{:<58}{:>11}{:>11}{:>15}{:>10}{:>5}".format(*row), flush=True)

    def add(self, what, ours, theirs, unit, at_least=None, at_most=None):
        """Add a row with what was measured."""
        if at_least is None:
            ratio, meaning = ours / theirs, "as long" if unit == "ms" else "as much"
            required, ok, free = f"<= {at_most:.3g}x", ratio <= at_most, at_most == math.inf
        else:
            ratio, meaning = theirs / ours, "as fast"
            required, ok, free = f">= {at_least:.3g}x", ratio >= at_least, at_least == 0
        values = (f"{x:.0f} {unit}" if x >= 100 else f"{x:.3g} {unit}" for x in (ours, theirs))
        self.rows.append((what, *values, f"{ratio:.2f}x {meaning}", "-" if free else required,
                          "-" if free else "ok" if ok else "no"))
        self.show(self.rows[-1])

    def time(self, what, ours, theirs, at_least=None, at_most=None, same=True):
        """A row of times. same: both sides must give the same numbers, up to 1%."""
        if same:
            y, expected = output(ours()), output(theirs())
            difference = ((y - expected).abs().max() / expected.abs().max()).item()
            if not difference < 0.01:
                print(f"{what}: the two sides differ by {difference:.1%}, so that the next row means nothing")
        self.add(what, *race(ours, theirs, self.seconds), "ms", at_least, at_most)

    def memory(self, what, ours, theirs, at_most):
        """A row of memory."""
        self.add(what, peak_memory(ours), peak_memory(theirs), "MB", at_most=at_most)

    def markdown(self):
        """The section HEADING of docs/measured.md."""
        rows = [self.COLUMNS, ("---", *["---:"] * 4, "---"), *self.rows]
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        return f"{HEADING}\ntests/benchmark.py on {machine()}.\n\n{table}\n"


# ---- plain code for the same numbers ----

def fft_conv(u, K):
    """The bare convolution of u (b, h, l) with K (h, l)."""
    l = u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, 2 * l) * torch.fft.rfft(K, 2 * l), 2 * l)[..., :l]


def vandermonde(A, C, dt, l):
    """Re sum_n C_n B_bar_n exp(k dt A_n) by zero-order hold with B = 1: A, C (h, n), dt (h, 1) -> (h, l)."""
    dtA = dt * A
    powers = torch.exp(dtA[..., None] * torch.arange(l))                     # (h, n, l)
    return torch.einsum("hn,hnl->hl", C * (torch.exp(dtA) - 1) / A, powers).real


def softmax_kernel(Lambda, W, dt, l):
    """DSS: Re sum_n W_n / Lambda_n exp(k dt Lambda_n), each exponential divided by its sum over time."""
    powers = torch.exp((dt * Lambda)[..., None] * torch.arange(l))           # (h, n, l)
    return torch.einsum("hn,hnl->hl", W / Lambda, powers / powers.sum(-1, keepdim=True)).real


def cauchy_kernel(Lambda, P, B, C, dt, l):
    """S4 as in its paper: the generating function at the l-th roots of unity, from four Cauchy products.

    Lambda, P, B (h, n) with both of each conjugate pair, dt (h, 1); C (h, n) holds C (1 - A_bar^l) -> (h, l).
    """
    roots = torch.exp(-2j * math.pi / l * torch.arange(l // 2 + 1))
    s = 2 * (1 - roots) / (1 + roots)
    v = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P])
    cauchy = v[..., None] / (s - (dt * Lambda)[..., None])                   # (4, h, n, l / 2 + 1)
    k00, k01, k10, k11 = cauchy.sum(2) * dt
    return torch.fft.irfft(2 / (1 + roots) * (k00 - k01 * k10 / (1 + k11)), l)


def krylov_loop(discrete, l):
    """LSSL: C A_bar^k B_bar, one k after the other, with A_bar (h, n, n) -> (h, l)."""
    A_bar, B_bar, C = (x.float() for x in discrete)
    x, K = B_bar[..., None], []
    for _ in range(l):
        K.append((C.transpose(0, 1) @ x)[:, 0, 0])
        x = A_bar @ x
    return torch.stack(K, -1)


def doubling_scan(a, v):
    """All x_k = a_k x_{k-1} + v_k in log2(l) passes: v (.., l, n), a alike or constant (n)."""
    i, constant = 1, a.ndim == 1
    while i < v.shape[-2]:
        late = a if constant else a[..., i:, :]
        v = torch.cat([v[..., :i, :], v[..., i:, :] + late * v[..., :-i, :]], -2)
        a = a * a if constant else torch.cat([a[..., :i, :], late * a[..., :-i, :]], -2)
        i *= 2
    return v


def doubling_layer(discrete, D, u):
    """S5 and LRU with this scan between their projections: u (b, h, l)."""
    A_bar, B_bar, C = (x.to(torch.complex64) for x in discrete)     # (p), (p, h), (h, p)
    B = torch.view_as_real(B_bar.mT).flatten(1)                     # (h, 2p): Re, Im, Re, ...
    C = torch.view_as_real(C.conj_physical()).flatten(1)            # the conjugate for Re(C x)
    v = torch.view_as_complex((u.mT @ B).unflatten(-1, (-1, 2)))    # (b, l, p)
    x = torch.view_as_real(doubling_scan(A_bar, v)).flatten(-2)
    return (x @ C.mT + D * u.mT).mT


def doubling_selective_scan(u, delta, A, B, C):
    """x_k = exp(delta_k A) x_{k-1} + delta_k B_k u_k, y_k = C_k x_k: u, delta (b, d, l), B, C (b, n, l)."""
    a = torch.exp(delta[..., None] * A[:, None])                             # (b, d, l, n)
    v = (delta * u)[..., None] * B.mT[:, None]
    return torch.einsum("bdln,bnl->bdl", doubling_scan(a, v), C)


def diagonal_step(discrete, D, u, x, pairs=1):
    """One step with n numbers A_bar for each feature: u (b, h), x (b, h, n). pairs: 2 for conjugate pairs."""
    A_bar, B_bar, C = discrete
    x = A_bar * x + B_bar * u[..., None]
    return pairs * (C * x).real.sum(-1) + D * u, x


def shared_step(discrete, D, u, x):
    """One step with one state for all features: u (b, h), x (b, p)."""
    A_bar, B_bar, C = discrete
    x = A_bar * x + u.to(x.dtype) @ B_bar.mT
    return (x @ C.mT).real + D * u, x


def loop_layer(discrete, D, u):
    """S5 and LRU by one step after the other: u (b, h, l) -> (b, h, l)."""
    discrete = [x.to(torch.complex64) for x in discrete]
    x, y = u.new_zeros(len(u), len(discrete[0]), dtype=torch.complex64), []
    for u_k in u.unbind(-1):
        y_k, x = shared_step(discrete, D, u_k, x)
        y.append(y_k)
    return torch.stack(y, -1)


def plain_block(layer, u):
    """GSS with matrix products for its linear maps: u (b, h, l) -> (b, h, l)."""
    def linear(map, x):
        return map.weight @ x + map.bias[:, None]
    K = layer.kernel(u.shape[-1]) + F.pad(layer.D[:, None], (0, u.shape[-1] - 1))
    y = fft_conv(F.gelu(linear(layer.input_linear, u)), K)
    gate = F.gelu(linear(layer.input_gate, u))
    return linear(layer.output_linear, linear(layer.output_gate, y) * gate)


# ---- the rows of each layer ----

def kernel_rows(table, name, layer, plain, against, at_least=0, at_most=math.inf, inputs=()):
    """Time and memory of the kernel against plain(). inputs: what plain() needs besides the parameters."""
    inputs = [*layer.parameters(), *inputs]
    sides = both_ways(lambda: layer.kernel(L), inputs), both_ways(plain, inputs)
    table.time(f"{name}: kernel f+b, against {against}", *sides, at_least=at_least)
    table.memory(f"{name}: memory of the same", *sides, at_most=at_most)


def convolution_row(table, name, layer, at_most=math.inf):
    """The layer against a bare FFT convolution with a kernel that is given."""
    with torch.no_grad():
        u, K = torch.randn(BATCH, H, L), layer.kernel(L)
        K[:, 0] += layer.D.flatten()
    bare = [u.requires_grad_(), K.requires_grad_()]
    sides = both_ways(lambda: layer(u), [u, *layer.parameters()]), both_ways(lambda: fft_conv(u, K), bare)
    table.time(f"{name}: layer f+b, against bare FFT convolution", *sides, at_most=at_most)


def state_rows(table, name, layer, step=None, with_state=math.inf, one_step=math.inf):
    """Forward with state against without; layer.step against step(discrete, D, u, x)."""
    u, zero = torch.randn(BATCH, H, L), layer.initial_state(BATCH)
    sides = (lambda: layer(u, zero)), (lambda: layer(u))
    table.time(f"{name}: forward with state, against without", *map(forward, sides), at_most=with_state)
    if step is not None:
        v, discrete = u[..., 0].contiguous(), layer.discretize()
        sides = (lambda: layer.step(v, zero, discrete=discrete),
                 lambda: step(discrete, layer.D, v, zero))
        table.time(f"{name}: step, against its bare arithmetic", *map(forward, sides), at_most=one_step)


def diagonal_parameters(layer):
    """A, C (.., h, n/2) and dt (h, 1) of s4d.py, s4.py and gss.py, in single precision."""
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    return A, torch.view_as_complex(layer.C), layer.log_dt.exp()[:, None]


def bench_s4d(table, module):
    layer = module.S4D(H, N)

    def direct():
        return 2 * vandermonde(*diagonal_parameters(layer), L)
    kernel_rows(table, "s4d", layer, direct, "(h, n/2, l) array", at_least=8, at_most=0.1)
    convolution_row(table, "s4d", layer, at_most=1.4)
    step = functools.partial(diagonal_step, pairs=2)
    state_rows(table, "s4d", layer, step, with_state=2, one_step=2)


def bench_s4(table, module):
    layer = module.S4(H, N)
    with torch.no_grad():                                    # the parameter of the paper: C (1 - A_bar^l)
        a, _, Q, S, C = (torch.cat([x, x.conj()], -1) for x in layer.discretize())
        A_bar = torch.diag_embed(a) - torch.einsum("rhi,rhj->hij", Q, S)
        C = C[0] - (C[0][:, None] @ torch.linalg.matrix_power(A_bar, L))[:, 0]
        C = torch.view_as_real(C[:, :N // 2]).float()
    C.requires_grad_()

    def textbook():
        Lambda, _, dt = diagonal_parameters(layer)
        halves = Lambda, *(torch.view_as_complex(x) for x in (layer.P[0], layer.B, C))
        return cauchy_kernel(*(torch.cat([x, x.conj()], -1) for x in halves), dt, L)
    kernel_rows(table, "s4", layer, textbook, "(4, h, n, l/2+1) array", at_least=3, at_most=0.5, inputs=[C])
    convolution_row(table, "s4", layer)
    state_rows(table, "s4", layer, with_state=2.5)


def bench_lssl(table, module):
    for name, options in ("lssl, all trained", {"train_A": "each", "train_dt": True}), ("lssl", {}):
        layer = module.LSSL(H, N, **options)                 # by default C and D are trained
        kernel_rows(table, name, layer, lambda: krylov_loop(layer.discretize(), L), "l-step loop", at_least=4)
    convolution_row(table, "lssl", layer)
    state_rows(table, "lssl", layer)


def bench_dss(table, module):
    layer = module.DSS(H, N, l_max=L)

    def direct():
        Lambda = torch.complex(layer.Lambda_re, layer.Lambda_im)
        return softmax_kernel(Lambda, torch.view_as_complex(layer.W), layer.log_dt.exp()[:, None], L)
    kernel_rows(table, "dss", layer, direct, "(h, n, l) array", at_least=8, at_most=0.1)
    convolution_row(table, "dss", layer)
    state_rows(table, "dss", layer, diagonal_step)


def bench_gss(table, module):
    wide = module.GSS(H, N, bottleneck=1)                    # with a kernel for each of h features
    direct = lambda: vandermonde(*diagonal_parameters(wide), L)             # noqa: E731
    kernel_rows(table, "gss", wide, direct, "(h, n, l) array", at_least=8, at_most=0.1)
    layer, u = module.GSS(H, N), torch.randn(BATCH, H, L, requires_grad=True)
    inputs = [u, *layer.parameters()]
    sides = both_ways(lambda: layer(u), inputs), both_ways(lambda: plain_block(layer, u), inputs)
    table.time("gss: block f+b, against plain linear maps", *sides, at_least=1.2)
    state_rows(table, "gss", layer)


def bench_shared(table, name, layer):
    """The two with one state for all features: p = h = 128 complex numbers."""
    def sides(plain, batch, wrap):
        u = torch.randn(batch, H, L, requires_grad=True)
        runs = (lambda: layer(u)), (lambda: plain(layer.discretize(), layer.D, u))
        return [wrap(run, [u, *layer.parameters()]) if wrap is both_ways else wrap(run) for run in runs]

    for wrap, what in (forward, "forward"), (both_ways, "f+b"):
        table.time(f"{name}: {what}, against log-depth scan", *sides(doubling_layer, BATCH, wrap), 1.3)
    for wrap, what in (forward, "forward"), (both_ways, "f+b"):
        table.time(f"{name}: {what} at batch 1, against step loop", *sides(loop_layer, 1, wrap), 5)
    table.memory(f"{name}: memory of f+b, against step loop",     # autograd keeps the states
                 *sides(loop_layer, BATCH, both_ways), at_most=2.5)
    state_rows(table, name, layer, shared_step, with_state=1.15)


def bench_selective_scan(table, module):
    def arguments(b, d, l, n=16):
        A, delta = -torch.arange(1.0, n + 1).repeat(d, 1), F.softplus(torch.randn(b, d, l) - 4)
        return [x.requires_grad_() for x in (torch.randn(b, d, l), delta, A, *torch.randn(2, b, n, l))]
    name, x = "selective_scan", arguments(8, H, L)
    runs = (lambda: module.selective_scan_fn(*x)), (lambda: doubling_selective_scan(*x))
    table.time(f"{name}: forward, against log-depth scan", *map(forward, runs), at_least=3)
    both = [both_ways(run, x) for run in runs]
    table.time(f"{name}: f+b, against log-depth scan", *both, at_least=2)
    table.memory(f"{name}: memory of f+b, against the same", *both, at_most=1 / 3)
    for b, d in (1, 64), (8, H), (64, 64):                   # where does it pay?
        y = arguments(b, d, L)
        sides = (lambda: module.selective_scan_fn(*y)), (lambda: module.selective_scan_seq(*y))
        table.time(f"{name}: f+b, b {b}, d {d}, against step loop", *[both_ways(run, y) for run in sides], at_least=0)
    extra = []                                               # sqrt(l) doubles when l grows fourfold
    for x in arguments(8, H, 4 * L), x:
        extra.append(peak_memory(forward(runs[0])) - x[0].nbytes / 2 ** 20)
    table.add(f"{name}: inference beyond y, l = 4096 against 1024", *extra, "MB", at_most=2.5)
    state_rows(table, name, module.SelectiveSSM(H))


def bench_example(table, module):
    module.keep_freed_memory()                               # as example.py does; the other rows come before
    b, h, n_layers = 64, 128, 4
    net = module.StackedSSM(importlib.import_module("s4d").S4D, 3, 10)
    net.mean.fill_(127.5)               # without them gates saturate, gradients are subnormal
    net.std.fill_(73.6)
    optimizer = torch.optim.AdamW(module.param_groups(net, 0.01, 0.01))
    images, labels = torch.randint(256, (b, L, 3), dtype=torch.uint8), torch.randint(10, (b,))

    def train_step():
        loss = F.cross_entropy(net(images)[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shapes = (b, h, L), (h, L), (b * L, h), (h, 2 * h), (3, h), (b, h), (h, 10)
    u, K, g, mix, encoder, pooled, head = (torch.randn(shape, requires_grad=True) for shape in shapes)
    pixels = torch.randn(b * L, 3)
    block = both_ways(lambda: fft_conv(u, K), [u, K]), both_ways(lambda: g @ mix, [g, mix])
    floor = [both_ways(lambda: pixels @ encoder, [encoder]), *n_layers * block,
             both_ways(lambda: pooled @ head, [pooled, head])]
    table.time("example, s4d at batch 64: training step, against its FFTs and products (keep_freed_memory)", train_step,
               lambda: [part() for part in floor], at_most=1.5, same=False)


BENCHMARKS = {
    "s4d": bench_s4d, "s4": bench_s4, "lssl": bench_lssl, "dss": bench_dss, "gss": bench_gss,
    "s5": lambda table, module: bench_shared(table, "s5", module.S5(H, 2 * H)),
    "lru": lambda table, module: bench_shared(table, "lru", module.LRU(H, H)),
    "selective_scan": bench_selective_scan, "example": bench_example}


# ---- launches on a GPU ----

OPERATORS = {"lssl": "LSSL", "s4": "S4", "dss": "DSS", "s4d": "S4D", "gss": "GSS", "s5": "S5", "lru": "LRU",
             "selective_scan": "SelectiveSSM", "mamba": "Mamba"}


def operators(h=16):
    """How many operators a forward pass and a training step launch, as lines of Markdown. Nothing is computed."""
    lines = [f"## Operators in one pass through one layer, h = {h}, batch 1", "",
             "On a GPU each is the launch of a kernel, about 5 microseconds, whatever its size. Forward is without",
             "gradients; f+b is forward and backward. Only those of the selective scan depend on h and batch: a group",
             "has 2^21 states (b h n l, in mamba 2 h) on a CPU, as here, and 2^24 on a GPU: then fewer launches.", "",
             f"| layer | forward, l = {L} | l = {16 * L} | f+b, l = {L} | l = {16 * L} |",
             "| --- | ---: | ---: | ---: | ---: |"]
    for name, cls in OPERATORS.items():
        counts = []
        for l in (L, 16 * L):
            module = importlib.import_module("selective_scan" if name == "mamba" else name)
            options = {"l_max": l} if name == "dss" else {}
            counts.append(count_operators(getattr(module, cls)(h, **options), h, l))
        (forward, both), (long_forward, long_both) = counts
        lines.append(f"| {name} | {forward} | {long_forward} | {both} | {long_both} |")
    return "\n".join(lines) + "\n"


# ---- the figure ----

def plot(path):
    """Save the shortest time of a forward pass against the length; a line ends where it is more than 2 s."""
    from matplotlib.figure import Figure
    figure, h = Figure(figsize=(9, 6), layout="constrained"), 16
    ax = figure.subplots()
    names = "s4", "s4d", "s4d, step by step", "lssl", "dss", "gss", "s5", "lru", "selective_scan"
    for marker, name in zip("osxvD^P<d", names):
        file, steps, times = name.split(",")[0], "step" in name, {}
        cls = {"selective_scan": "SelectiveSSM"}.get(file, file.upper())
        for l in (2 ** k for k in range(8, 13 if steps else 19)):
            layer = getattr(importlib.import_module(file), cls)(h, **{"l_max": l} if file == "dss" else {})
            u = torch.randn(1, h, l)
            run = forward(lambda: layer(u, **{"method": "step"} if steps else {}))
            seconds = [sample(run), sample(run)]
            while sum(seconds) < 0.3:
                seconds.append(sample(run))
            times[l] = 1e3 * min(seconds)                    # what else the machine does only adds time
            if times[l] > 2000:
                break
        ax.plot(*zip(*times.items()), "--" if steps else "-", marker=marker, ms=5, label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set(title=f"Forward pass of one layer, {h} features, batch 1\n{machine()}", xlabel="length l in steps",
           ylabel="time in ms")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", ncols=2)
    figure.savefig(path, dpi=100)
    print("wrote", path)


# ---- command line ----

def machine():
    """What this is measured on, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    threads = torch.get_num_threads()
    return (f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores, torch {torch.__version__} with "
            f"{threads} thread{'s' * (threads > 1)}, {datetime.date.today()}")


def main(argv=None):
    """Measure what the command line names."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--plot", metavar="PATH", help="save a figure of the time against the length, too")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--markdown", action="store_true", help="write the section of docs/measured.md")
    parser.add_argument("--operators", action="store_true", help="print how many operators are launched, no more")
    args = parser.parse_args(argv)
    for name in set(args.names) - set(BENCHMARKS):
        parser.error(f"name {name}: choose from {', '.join(BENCHMARKS)}")
    os.environ["KINETO_LOG_LEVEL"] = "99"                    # the profiler would report its stages
    sys.path.insert(0, str(ROOT))
    if args.operators:
        print(operators())
        return
    torch.manual_seed(0)
    print(machine())
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1:
        print("other programs are busy, so that threads wait for each other: wait, or set OMP_NUM_THREADS=1")
    start, table = time.time(), Table(0.3 if args.quick else 2)
    for name in args.names or BENCHMARKS:
        if (ROOT / f"{name}.py").exists():
            BENCHMARKS[name](table, importlib.import_module(name))
        else:
            print(f"{name}.py is not here, skipped")
    found = [row[-1] for row in table.rows]
    print(f"{found.count('ok')} requirements hold, {found.count('no')} do not; {time.time() - start:.0f} s")
    if args.markdown:
        page = MARKDOWN.read_text() if MARKDOWN.exists() else ""
        page = page.split(HEADING)[0]                        # the section is the last one
        MARKDOWN.write_text(f"{page}{table.markdown()}\n{operators()}")
        print("wrote", MARKDOWN)
    if args.plot:
        plot(args.plot)


if __name__ == "__main__":
    main()
