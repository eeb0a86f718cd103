"""Draw the pictures of README.md, and look inside a network that example.py has trained.

    python figures/draw.py                           one picture for each model file
    python figures/draw.py --only s4d --out figures  one of them, as README shows it
    python figures/draw.py --run runs/s4d            a run: its curves, and the network
                                                     before and after training
    python figures/draw.py --curves runs             the accuracies of all runs in a folder

The pictures are written to runs/figures, which git does not track: their bytes differ from
one machine to another.
"""

import argparse
import csv
import math
import sys
from argparse import Namespace
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure                    # without pyplot: needs no display
from matplotlib.ticker import MaxNLocator
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))                    # the model files

import example
from dss import DSS
from gss import GSS
from lru import LRU
from lssl import LSSL, hippo_legendre, reconstruct
from s4 import S4
from s4d import S4D
from s5 import linear_scan, loop_scan
from selective_scan import selective_scan_fn

NAMES = ("s4d", "s4", "lssl", "dss", "gss", "s5", "lru", "selective_scan")
STEP = "step k (samples)"
STYLE = {"font.size": 10, "lines.solid_capstyle": "butt", "axes.titlesize": 11,
         "legend.fontsize": 9, "legend.frameon": False, "axes.spines.top": False,
         "axes.spines.right": False}


# ---- parts of several figures ----

def legend_below(ax, columns):
    """A legend under the axis label, where it cannot cover a curve."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4, ncols=columns,
              handlelength=1.5, columnspacing=1.5)


def draw_unit_circle(ax):
    """The circle in which the eigenvalues of a stable A_bar lie."""
    angle = torch.linspace(0, 2 * math.pi, 1000)
    ax.plot(angle.cos(), angle.sin(), color="0.7")
    ax.set(xlabel="real part (no unit)", ylabel="imaginary part (no unit)", aspect=1)


def memory_of(A_bar):
    """The number of steps in which A_bar^k falls to 1/e, for each number of A_bar."""
    return -1 / A_bar.abs().log()


# ---- one figure for each model file ----

def draw_s4d(figure):
    """One output, computed in four ways."""
    ax = figure.subplots()
    layer = S4D(1, dt_min=0.01, dt_max=0.01)
    t = torch.arange(1024) / 1024
    u = torch.sin(2 * math.pi * 3 * (t + t ** 2))[None, None]           # (1, 1, 1024)
    y, _ = layer(u)
    steps, _ = layer(u, method="step")
    half, _ = layer(u[..., 1::2], rate=2.0)
    ax.plot(u[0, 0], color="0.75", label="input u")
    ax.plot(y[0, 0], lw=10, label="convolution of the whole sequence")
    ax.plot(steps[0, 0], lw=6, label="recurrence, step by step")
    lengths = [300, 150, 350, 224]
    state = layer.initial_state(1)
    pieces = []
    for piece in u.split(lengths, -1):
        y, state = layer(piece, state)
        pieces.append(y[0, 0])
    ends = [sum(lengths[:i]) - 1 for i in (1, 2, 3)]
    ax.plot(torch.cat(pieces), "o-", color="black", ms=10, mfc="white", lw=2,
            markevery=ends, label="convolution of four pieces, the state handed on at o")
    ax.plot(range(1, 1024, 32), half[0, 0, ::16], "D", color="gold", mec="black", ms=5,
            label="every second sample at rate 2 (one of 16 drawn)")
    ax.set(title="S4D: one output, computed in four ways", xlabel=STEP,
           ylabel="u, y (no unit)")
    legend_below(ax, 2)


def draw_s4(figure):
    """HiPPO is normal plus low rank, and why its kernel is computed on a small circle."""
    matrices, plots = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    A, _ = hippo_legendre("legs", 16)
    P = torch.sqrt(torch.arange(16) + 0.5)
    PP = torch.outer(P, P).double()
    parts = {"A of HiPPO-LegS": A, "=  a normal matrix": A + PP, "-  P P*, of rank 1": -PP}
    axes = matrices.subplots(1, 3)
    for ax, (title, part) in zip(axes, parts.items()):
        image = ax.imshow(part, cmap="RdBu_r", vmin=-32, vmax=32)
        ax.set(title=title, xlabel="column j", ylabel="row i")
    matrices.colorbar(image, ax=axes, label="entry (1 / time)")
    eigenvectors, kernel = plots.subplots(1, 2, width_ratios=(1, 2))
    draw_eigenvector_conditions(eigenvectors)
    draw_wrapped_kernel(kernel)


def draw_eigenvector_conditions(ax):
    """How much changing to the basis of eigenvectors amplifies an error, by n."""
    sizes = range(2, 23, 2)
    conditions = {"A": [], "normal part": []}
    for n in sizes:
        A, B = hippo_legendre("legs", n)
        normal = A + torch.outer(B, B) / 2                              # P P* = B B* / 2
        _, V = torch.linalg.eig(A)
        conditions["A"].append(torch.linalg.cond(V))
        _, V = torch.linalg.eig(normal)
        conditions["normal part"].append(torch.linalg.cond(V))
    for label, values in conditions.items():
        ax.semilogy(sizes, values, ".-", label=label)
    ax.axhline(2 ** 53, color="0.5", ls=":", label="double precision lost")
    ax.set(title="Rounding, amplified by eigenvectors", xlabel="number of states n",
           ylabel="condition number (no unit)")
    ax.legend()


def draw_wrapped_kernel(ax):
    """l points on a circle of radius q give K_k + q^l K_{k+l} + q^{2l} K_{k+2l} + ..."""
    l = 256
    layer = S4(1, 64, dt_min=2e-3, dt_max=2e-3)
    K = layer.kernel(16 * l)[0]
    unit_circle = K.view(16, l).sum(0)                                  # q = 1
    small_circle = layer.kernel(l)[0]                                   # q^l = 1e-8
    ax.plot(K[:2 * l], color="0.75", lw=5, label="K by powers of A_bar")
    ax.plot(unit_circle, "C1", label="l points, radius 1: the tail comes back")
    ax.plot(small_circle, "C0", label="l points, radius q, q^l = 1e-8")
    ax.axvline(l, color="0.5", ls=":")
    ax.set(title="The kernel from l = 256 points on a circle", xlabel=STEP,
           ylabel="K_k (no unit)")
    ax.legend()


def draw_lssl(figure):
    """What the last state remembers of a signal, in two bases."""
    axes = figure.subplots(2, 2, width_ratios=(3, 2))
    noise = torch.randn(1024, dtype=torch.float64)
    signal = torch.fft.irfft(torch.fft.rfft(noise)[:9], 1024)   # up to 8 oscillations
    signal = signal / signal.std()
    draw_reconstruction(axes[0], signal, "legt", scale=600, reach=600)
    draw_reconstruction(axes[1], signal, "legs", scale=300, reach=1024)
    axes[0, 0].set_title("LegT: the state remembers a window of 600 steps")
    axes[1, 0].set_title("LegS: all of the past, fading with 300 steps")
    axes[0, 1].set_title("Basis functions of LegT")
    axes[1, 1].set_title("Basis functions of LegS")
    axes[1, 0].set_xlabel(STEP)
    axes[1, 1].set_xlabel("time from the present (samples)")
    for ax in axes[1]:
        legend_below(ax, 4)


def draw_reconstruction(axes, signal, measure, scale, reach):
    """The last reach steps of signal from the last state, dt = 1 / scale; its basis."""
    past, basis = axes
    age = torch.arange(reach, dtype=torch.float64)      # steps before the present
    past.plot(signal, color="0.75", lw=5, label="signal u")
    for n in (8, 16, 32):
        layer = LSSL(1, n, measure=measure, dt_min=1 / scale, dt_max=1 / scale).double()
        _, state = layer(signal[None, None], layer.initial_state(1))
        remembered = reconstruct(measure, state[0, 0], age / scale)
        past.plot(len(signal) - 1 - age, remembered, label=f"n = {n} states")
    past.set(ylim=(-3, 3), ylabel="u (no unit)")
    for i in range(4):
        one = F.one_hot(torch.tensor(i), 4).double()
        basis.plot(-age, reconstruct(measure, one, age / scale), label=f"i = {i}")
    basis.set(ylabel="sqrt(2i+1) P_i (no unit)")


def draw_dss(figure):
    """What the softmax does to one exponential, and to a whole kernel."""
    axes = figure.subplot_mosaic("as;al")
    k = torch.arange(1024)
    for color, real in (("C0", 8.0), ("C1", 0.0), ("C2", -8.0)):
        growth = torch.exp(k * real / 1024)
        axes["a"].semilogy(growth, color, ls="--")
        axes["a"].semilogy(growth / growth.sum(), color)
        axes["a"].text(1034, growth[-1] / growth.sum(), f"{real:.0f}", color=color)
        axes["a"].text(1034, growth[-1], f"{real:.0f}", color=color)
    axes["a"].plot([], [], "k--", label="e^{kz}")
    axes["a"].plot([], [], "k", label="its softmax over l_max = 1024 steps")
    axes["a"].set(title="One exponential, for three values of l_max Re z", xlabel=STEP,
                  ylabel="size (no unit)")
    legend_below(axes["a"], 2)
    for ax, dt in ((axes["s"], 0.001), (axes["l"], 0.02)):
        softmax = DSS(1, 8, dt_min=dt, dt_max=dt)
        plain = DSS(1, 8, version="exp", dt_min=dt, dt_max=dt)
        plain.W.copy_(-softmax.W)           # for C is -W where e^{l_max z} is near 0
        ax.plot(plain.kernel(1024)[0], color="0.7", lw=5, label="without: C = -W")
        ax.plot(softmax.kernel(1024)[0], color="C3", label="with the softmax")
        decay = math.exp(-0.5 * dt * 1024)
        ax.set(title=f"A kernel, dt = {dt}: |e^{{l_max z}}| = {decay:.2g}",
               ylabel="K_k (no unit)")
    axes["l"].set_xlabel(STEP)
    legend_below(axes["l"], 2)


def draw_gss(figure):
    """What a random A with dt = 1 remembers, and what two other starts do."""
    disk, memory = figure.subplots(1, 2, width_ratios=(1, 1.4))
    ours = GSS(64, bottleneck=1)
    paper = GSS(64, bottleneck=1)
    paper.log_A_real.normal_()                          # exponentials of normal numbers
    paper.A_imag.log_normal_()
    s4d = GSS(64, bottleneck=1, measure="diag-lin", dt_min=1e-3, dt_max=0.1)
    draw_unit_circle(disk)
    for layer, label in ((ours, "diag-rand, dt = 1"), (paper, "as in the paper, dt = 1"),
                         (s4d, "diag-lin, dt from 0.001 to 0.1, as S4D")):
        A_bar = layer.discretize()[0][:4].flatten()
        if layer is not s4d:
            disk.plot(A_bar.real, A_bar.imag, ".", ms=4)
        size = layer.kernel(4096).square().mean(0).sqrt()       # over 64 features
        memory.loglog(range(1, 4097), size / size[0], label=label)
    disk.set_title("Eigenvalues of A_bar = exp(A)")
    memory.set(title="How far back the kernels reach", ylim=(1e-4, 3),
               xlabel="step k + 1 (samples)", ylabel="root mean square of K_k (K_0: 1)")
    legend_below(memory, 2)


def draw_s5(figure):
    """The scan in chunks: all chunks from zero, a scan of their ends, all chunks again."""
    first, second = figure.subplots(1, 2, sharey=True)
    T = 8
    l = 5 * T
    a = torch.tensor([0.93 + 0j]) * torch.tensor([0.25j]).exp()         # (1)
    v = torch.randn(l, 1, dtype=a.dtype)
    zero = torch.zeros_like(a)
    x = loop_scan(a, v, zero)                                           # (l, 1)
    chunks = v.view(-1, T, 1)                                           # (J, T, 1)
    from_zero = loop_scan(a, chunks, torch.zeros(len(chunks), 1, dtype=a.dtype))
    ends = from_zero[:, -1]                                             # (J, 1)
    starts = linear_scan(a ** T, ends, zero)        # the states after each chunk
    from_start = loop_scan(a, chunks, torch.cat([zero[None], starts[:-1]]))
    for ax, states in ((first, from_zero), (second, from_start)):
        ax.plot(x.real, color="0.75", lw=6, label="the loop, step by step")
        for j, chunk in enumerate(states):
            ax.plot(range(j * T, j * T + T), chunk.real, ".-", color=f"C{j}")
            ax.axvline(j * T - 0.5, color="0.8", lw=0.8)
        ax.set(xlabel=STEP)
    k = range(T - 1, l, T)
    first.plot(k, ends.real, "o", color="black", label="the end of a chunk")
    second.plot(k, starts.real, "s", color="black", label="a scan of the ends alone")
    first.set(title="Each chunk of 8 steps from 0", ylabel="Re x_k (no unit)")
    second.set(title="Each chunk again, from where it really starts")
    for ax in (first, second):
        legend_below(ax, 2)


def draw_lru(figure):
    """Where lambda starts, and for how many steps its states remember."""
    disk, memory = figure.subplots(1, 2, width_ratios=(1, 1.4))
    draw_unit_circle(disk)
    for r_min, r_max in ((0.0, 1.0), (0.9, 0.999), (0.99, 0.9999)):
        A_bar, _, _ = LRU(1, 5000, r_min=r_min, r_max=r_max).discretize()
        disk.plot(A_bar[:400].real, A_bar[:400].imag, ".", ms=3)
        share = torch.arange(5000, 0, -1) / 5000
        memory.loglog(memory_of(A_bar).sort().values, share,
                      label=f"r_min = {r_min:g}, r_max = {r_max:g}")
    disk.set_title("lambda, uniform on a ring")
    memory.set(title="For how many steps the states remember", xlim=(1, 2e4),
               xlabel="memory -1 / log |lambda| (steps)", ylim=(2e-3, 1.3),
               ylabel="share of states with more (no unit)")
    memory.legend()


def draw_selective_scan(figure):
    """A flag in the input opens dt, and the state keeps the flagged value."""
    signal, step_size, memory = figure.subplots(3, 1, sharex=True)
    flagged = [20, 60, 95, 150]
    flag = torch.zeros(1, 1, 200)                       # (b, d, l), and (b, n, l)
    flag[..., flagged] = 1.0
    u = 0.7 * torch.randn(1, 1, 200)
    u[..., flagged] = torch.tensor([-1.0, 1.5, 0.5, -0.5])      # to be told apart
    dt = F.softplus(18 * flag - 8)                      # 10 or 0.0003
    A = -torch.ones(1, 1)
    one = torch.ones(1, 1, 200)
    selective = selective_scan_fn(u, dt, A, 0.1 * flag, one)    # dt B = 1 at a flag
    even = selective_scan_fn(u, 0.1 * one, A, one, one)
    signal.plot(u[0, 0], ".-", color="0.7", label="value")
    signal.plot(flagged, u[0, 0, flagged], "o", color="C1", label="flagged, to be kept")
    signal.set(title="Selective copying: keep the flagged values, ignore the others",
               ylabel="input u (no unit)")
    step_size.semilogy(dt[0, 0], color="C2", drawstyle="steps-mid")
    step_size.set(title="The step size depends on the input: softplus(18 flag_k - 8)",
                  ylabel="dt_k (time)")
    memory.plot(selective[0, 0], color="C1", drawstyle="steps-mid", label="selective")
    memory.plot(flagged, u[0, 0, flagged], "o", color="C1")
    memory.plot(even[0, 0], color="C0", label="dt = 0.1 for every sample")
    memory.set(title="What is kept: exp(dt_k A) is 1 between flags and 0 at a flag",
               xlabel=STEP, ylabel="output y (no unit)")
    signal.legend(loc="upper right", ncols=2)
    memory.legend(loc="upper right", ncols=2)


def draw(name):
    """The figure of a model file, the same every time."""
    functions = {"s4d": draw_s4d, "s4": draw_s4, "lssl": draw_lssl, "dss": draw_dss,
                 "gss": draw_gss, "s5": draw_s5, "lru": draw_lru,
                 "selective_scan": draw_selective_scan}
    heights = {"s4": 6.0, "lssl": 5.6, "selective_scan": 6.0}
    torch.manual_seed(0)
    figure = Figure(figsize=(9, heights.get(name, 4.2)), layout="constrained")
    with torch.no_grad():
        functions[name](figure)
    return figure


# ---- a network of example.py, before and after training ----

def draw_run(folder, data_dir):
    """Memory, then eigenvalues of A_bar, step sizes and their course along an image, where
    the layers have them: of the best network of a run, and of the one it started from."""
    saved = example.load(folder / "best.pt")
    args = Namespace(**saved["args"])
    before = example.build_network(args).eval()         # draws what its seed drew
    after = example.load_network(folder / "best.pt")
    before.mean.copy_(after.mean)                       # pixels enter in the same units
    before.std.copy_(after.std)
    images = test_images(args, data_dir, 8)
    panels = [draw_memory]
    if eigenvalues(after) is not None:
        panels.append(draw_eigenvalues)
    if step_sizes(after, images) is not None:
        panels.append(draw_step_sizes)
    nets = {"before training": before, "after training": after}
    selective = len(selected(after, images[:1])) > 0
    figure = Figure(figsize=(10, 8.0 if selective else 3.8), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=(2, 3)) if selective else [figure]
    for ax, panel in zip(rows[0].subplots(1, len(panels), squeeze=False)[0], panels):
        panel(ax, nets, images)
    if selective:
        draw_selected(rows[1], nets, images[:1])
    accuracy = max(row["val_accuracy"] for row in saved["history"])
    figure.suptitle(f"{args.model} on {args.data}: validation accuracy {accuracy:.1%}")
    return figure, args.model


def test_images(args, data_dir, n):
    """n images (n, 1024, 3) of the data that the run was trained on, or built-in ones."""
    folder = data_dir / example.FOLDER
    if args.data == "cifar10" and not folder.is_dir():
        print(f"no {folder}, pass --data-dir: built-in images are read instead")
    flags = vars(args) | {"limit": n, "device": "cpu", "data_dir": data_dir}
    if not folder.is_dir():
        flags["data"] = "builtin"
    return example.load_data(Namespace(**flags))[2].float()


def memory(net, images):
    """The size of d y_L / d u_{L-k}, against the lag k: (l), averaged over the images.

    y_L: the class scores by the last step alone, not by the mean over all steps. u: the
    pixels, 0 to 255. The size is the root of the sum of squares over scores and colours.
    """
    u = images.clone().requires_grad_()                         # (b, l, c)
    pool = net.pool
    net.pool = False
    with torch.enable_grad():
        y, _ = net(u)                                           # (b, l, 10)
        square = 0
        for score in y[:, -1].sum(0):       # the sum over images, which are independent
            gradient, = torch.autograd.grad(score, u, retain_graph=True)
            square = square + gradient.square().sum(-1)         # (b, l)
    net.pool = pool
    return square.sqrt().mean(0).flip(0)


def eigenvalues(net):
    """Those of A_bar in all layers, in one row; None for a net without a complex A_bar.

    In s4.py discretize() begins with the diagonal a of A_bar = a - Q S: the eigenvalues of
    the normal part. Those of A_bar itself drown in rounding, as s4.png shows, and so do
    those of the dense A_bar of lssl.py.
    """
    found = []
    for layer in net.layers:
        A_bar = layer.ssm.discretize()[0].detach()
        if not A_bar.is_complex():                      # lssl; or A of a selective layer
            return None
        found.append(A_bar.flatten())
    return torch.cat(found)


def selected(net, images):
    """dt along the images, for each selective layer: a list of (b, l, d), 1e-6 or more."""
    found = []

    def keep(module, inputs, output):
        found.append(F.softplus(output.detach()).clamp(min=1e-6))

    layers = [layer.ssm for layer in net.layers if hasattr(layer.ssm, "select")]
    hooks = [layer.dt_proj.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    return found


def step_sizes(net, images):
    """All dt in one row: parameters, or selected along the images; None without any."""
    found = selected(net, images)
    for name, parameter in net.named_parameters():
        if name.endswith(("log_dt", "log_step")):
            found.append(parameter.detach().exp())
    return torch.cat([dt.flatten() for dt in found]) if found else None


def draw_memory(ax, nets, images):
    for color, (label, net) in zip(("0.6", "C3"), nets.items()):
        ax.semilogy(memory(net, images), color=color, lw=1, label=label)
    ax.set(title="Memory of the network", xlabel="lag k (pixels)",
           ylabel="|d y_L / d u_{L-k}| (1 / grey level)")
    legend_below(ax, 2)


def draw_eigenvalues(ax, nets, images):
    for (color, size), (label, net) in zip((("0.6", 7), ("C3", 3)), nets.items()):
        A_bar = eigenvalues(net)
        A_bar = A_bar[torch.linspace(0, len(A_bar) - 1, 500).long()]        # enough dots
        ax.plot(A_bar.angle().abs(), memory_of(A_bar), ".", color=color, ms=size,
                label=label)
    ax.set_xscale("symlog", linthresh=1e-3)             # linear around 0
    ax.set(title="Eigenvalues of A_bar", xlabel="frequency |angle| (rad per step)",
           ylabel="memory -1 / log |A_bar| (steps)", yscale="log")
    legend_below(ax, 2)


def draw_step_sizes(ax, nets, images):
    every = {label: step_sizes(net, images) for label, net in nets.items()}
    low = min(dt.min() for dt in every.values()).log10()
    high = max(dt.max() for dt in every.values()).log10()
    ax.set_xscale("log")
    bins = torch.logspace(low - 0.1, high + 0.1, 25)
    for color, (label, dt) in zip(("0.6", "C3"), every.items()):
        weights = torch.full_like(dt, 100 / len(dt))
        ax.hist(dt.numpy(), bins.numpy(), weights=weights.numpy(), histtype="step",
                color=color, label=label)
    ax.set(title="Step sizes", xlabel="dt (time per step)", ylabel="share (%)")
    legend_below(ax, 2)


def draw_selected(figure, nets, images):
    """An image (1, l, c), and over its pixels the dt of each layer: the mean of log dt."""
    side = math.isqrt(images.shape[1])
    means = []
    for net in nets.values():
        found = selected(net, images)
        means.append([dt[0].log10().mean(-1).view(side, side).numpy() for dt in found])
    axes = figure.subplots(2, 1 + len(means[0]), squeeze=False)
    axes[0, 0].imshow(images[0].view(side, side, -1).numpy() / 255, cmap="gray")
    axes[0, 0].set(title="The image", xlabel="column", ylabel="row")
    axes[1, 0].axis("off")
    for i, (before, after) in enumerate(zip(*means), 1):
        low = min(before.min(), after.min())
        high = max(before.max(), after.max())
        for ax, mean in zip(axes[:, i], (before, after)):
            picture = ax.imshow(mean, vmin=low, vmax=high)
            ax.set(xticks=[], yticks=[])
        axes[0, i].set_title(f"log10 dt, layer {i}")
        bar = figure.colorbar(picture, ax=axes[:, i], location="bottom")
        bar.locator = MaxNLocator(3)
    for ax, label in zip(axes[:, 1], nets):
        ax.set_ylabel(label)


# ---- the training curves of one run, and of several ----

def read_metrics(path):
    """The columns of a metrics.csv: a dict of lists of numbers."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def draw_training(folder):
    """Loss and accuracy of one run, in training and in validation, against the epoch."""
    table = read_metrics(folder / "metrics.csv")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for part, label in (("train", "training"), ("val", "validation")):
        loss.semilogy(table["epoch"], table[f"{part}_loss"], ".-", label=label)
        percent = [100 * share for share in table[f"{part}_accuracy"]]
        accuracy.plot(table["epoch"], percent, ".-", label=label)
    loss.set(title="Loss", xlabel="epoch", ylabel="cross entropy (nats)")
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="accuracy (%)")
    for ax in (loss, accuracy):
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    return figure


def draw_curves(folder):
    """The validation accuracy of every run in a folder, named from the best to the worst."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    ax = figure.subplots()
    curves = []
    for i, name in enumerate(example.MODELS):
        path = folder / name / "metrics.csv"
        if path.exists():
            table = read_metrics(path)
            accuracy = [100 * share for share in table["val_accuracy"]]
            label = f"{name} {accuracy[-1]:.1f}"
            curve, = ax.plot(table["epoch"], accuracy, ".-", color=f"C{i}", label=label)
            curves.append((accuracy[-1], i, curve))
    example.check(curves, f"no <model>/metrics.csv in {folder}: pass a folder of runs")
    ax.set(title="Validation accuracy in training", xlabel="epoch", ylabel="accuracy (%)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    best_first = [curve for *_, curve in sorted(curves, reverse=True)]
    figure.legend(handles=best_first, loc="outside right center", labelcolor="linecolor")
    return figure


# ---- the command line ----

def save(figure, folder, name):
    """Write a figure as folder/name.png, about 900 pixels wide."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=90, metadata={"Software": None})
    print("wrote", folder / f"{name}.png")


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", choices=NAMES, help="draw this one, default: all")
    what.add_argument("--run", type=Path, metavar="FOLDER", help="with best.pt of a run")
    what.add_argument("--curves", type=Path, metavar="FOLDER", help="of several runs")
    parser.add_argument("--data-dir", type=Path, default=Path("data"),
                        help="of CIFAR-10, for the images of --run (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/figures"),
                        help="folder (%(default)s)")
    args = parser.parse_args(argv)
    if args.out.is_file():
        parser.error(f"--out {args.out} is a file, pass a folder")
    try:
        with matplotlib.rc_context(STYLE):
            if args.run:
                figure, model = draw_run(args.run, args.data_dir)
                save(figure, args.out, f"run_{model}")
                save(draw_training(args.run), args.out, f"curves_{model}")
            elif args.curves:
                save(draw_curves(args.curves), args.out, "cifar")
            else:
                for name in [args.only] if args.only else NAMES:
                    save(draw(name), args.out, name)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
