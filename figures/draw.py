"""Draw the pictures of README.md: one for each model file.

    python figures/draw.py                           all of them, into the folder figures
    python figures/draw.py --only s4d --out /tmp     one of them, into another folder
"""
import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure                    # without pyplot: needs no display

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))                    # the model files

from dss import DSS
from gss import GSS
from lru import LRU
from lssl import LSSL, reconstruct
from s4 import S4
from s4d import S4D
from s5 import S5
from selective_scan import selective_scan_fn

NAMES = ("s4d", "s4", "lssl", "dss", "gss", "s5", "lru", "selective_scan")
STEP = "step k (samples)"


# ------------------------------ panels
def legend_below(ax, columns, title=None):
    """A legend under the axis label, where it cannot cover a curve."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.5, fontsize=8,
              ncols=columns, title=title, title_fontsize=8, frameon=False)


def draw_eigenvalues(disk, memory, points):
    """Complex numbers in the unit disk, and for how long each of them remembers.

    points: {label: A_bar (any number)}
    """
    angle = torch.linspace(0, 2 * math.pi, 1000)
    disk.plot(angle.cos(), angle.sin(), color="0.7")
    for size, (label, A_bar) in zip((9, 6, 3, 1), points.items()):      # the largest below
        disk.plot(A_bar.real, A_bar.imag, "o", ms=size, label=label)
        memory.plot(A_bar.angle().abs(), -1 / A_bar.abs().log(), "o", ms=min(size, 3))
    disk.set(title="Eigenvalues of A_bar", xlabel="Re A_bar (no unit)",
             ylabel="Im A_bar (no unit)", aspect=1)
    memory.set_xscale("symlog", linthresh=1e-3)         # linear around 0
    memory.set(title="Their frequency and memory", xlabel="|angle A_bar| (rad per step)",
               ylabel="-1 / log |A_bar| (steps)", xlim=(-2e-4, 5), yscale="log")
    legend_below(disk, columns=1)


def chirps():
    """Three inputs whose frequency grows threefold: (1, 3, 1024)."""
    t = torch.arange(1024) / 1024
    frequency = torch.tensor([[2.0], [3.0], [5.0]])
    return torch.sin(2 * math.pi * frequency * (t + t ** 2))[None]


def difference(y, exact):
    """The largest |y - exact|, relative to the largest |exact|, as text."""
    return f"{float((y - exact).abs().max() / exact.abs().max()):.1g}"


def draw_outputs(modes, rates, layer, methods):
    """Feature 1 of the output, by all methods, and for every second sample.

    methods: {name: method}, the first is the one that the others are compared with
    """
    u = chirps()
    y = {}
    for name, method in methods.items():
        y[name] = layer(u, method=method)[0][0, 1]
    pieces = []
    state = layer.initial_state(1)
    for chunk in u.split([100, 1, 411, 512], dim=-1):
        piece, state = layer(chunk, state)
        pieces.append(piece[0, 1])
    y["four pieces, state handed on"] = torch.cat(pieces)
    first = next(iter(methods))
    whole = y[first]

    modes.plot(u[0, 1], color="0.7", label="input u")
    modes.plot(whole, lw=9, label=first)
    del y[first]
    for width, (name, line) in zip((6.5, 4, 1.5), y.items()):           # the widest below
        modes.plot(line, lw=width, label=f"{name}: {difference(line, whole)}")
    modes.set(title="One output, computed in different ways", xlabel=STEP,
              ylabel="u, y (no unit)")
    legend_below(modes, 2, f"largest difference from the {first}, relative to max |y|")

    rates.plot(whole, color="0.7", lw=6, label="all samples, rate 1")
    for rate, style in ((2.0, "-"), (1.0, ":")):
        half, _ = layer(u[..., 1::2], rate=rate)
        text = difference(half[0, 1], whole[1::2])
        rates.plot(range(1, 1024, 2), half[0, 1], style, lw=2,
                   label=f"every second sample, rate {rate:.0f}: {text}")
    rates.set(title="Half the sampling frequency, no retraining", xlabel=STEP,
              ylabel="y (no unit)")
    legend_below(rates, 2, "largest difference from all samples, relative to max |y|")


def draw_memory(past, basis, signal, measure, scale, reach):
    """The last reach steps of signal from the last state, dt = 1 / scale; its basis."""
    age = torch.arange(reach, dtype=torch.float64)      # steps before the present
    past.plot(signal, color="0.7", lw=4, label="signal u")
    for n in (8, 16, 32):
        layer = LSSL(1, n, measure=measure, dt_min=1 / scale, dt_max=1 / scale).double()
        _, state = layer(signal[None, None], layer.initial_state(1))
        remembered = reconstruct(measure, state[0, 0], age / scale)
        past.plot(len(signal) - 1 - age, remembered, label=f"from the last state, n = {n}")
    past.set(ylim=(-3, 3), xlabel=STEP, ylabel="u (no unit)")
    legend_below(past, columns=2)
    for i in range(4):
        one = F.one_hot(torch.tensor(i), 4).double()
        basis.plot(-age, reconstruct(measure, one, age / scale), label=f"i = {i}")
    basis.set(xlabel="time from the present (samples)", ylabel="sqrt(2i+1) P_i (no unit)")
    legend_below(basis, columns=4)


# ------------------------------ figures
def draw_convolution_layer(figure, layer, exact=None):
    """S4D, S4, DSS, GSS: eigenvalues and kernels for three step sizes, and the outputs.

    exact: the eigenvalues of A, where rounding spoils those of A_bar (bilinear)
    """
    axes = figure.subplot_mosaic("emkk;oorr")
    layer.log_dt.copy_(torch.tensor([1e-3, 1e-2, 1e-1]).log())
    dt = layer.log_dt.exp()
    labels = [f"dt = {x:.3f}" for x in dt]
    A_bar = layer.discretize(1.0)[0]                    # (h, n), S4: (h, n, n)
    if A_bar.ndim == 3:
        A_bar = torch.linalg.eigvals(A_bar)
    points = dict(zip(labels, A_bar))
    if exact is not None:
        half = dt[:, None] * exact / 2                  # (h, n)
        points["all three, without rounding"] = ((1 + half) / (1 - half)).flatten()
    draw_eigenvalues(axes["e"], axes["m"], points)
    for label, K in zip(labels, layer.kernel(1024)):
        axes["k"].plot(K / K.abs().max(), lw=1, label=label)
    axes["k"].set(title="Kernels, each scaled to 1", xlabel=STEP,
                  ylabel="K_k / max |K| (no unit)")
    legend_below(axes["k"], columns=3)
    methods = {"convolution": "conv", "step by step": "step"}
    draw_outputs(axes["o"], axes["r"], layer, methods)


def draw_scan_layer(figure, layer):
    """S5, LRU: eigenvalues for two rates, the output without an input, and the outputs."""
    axes = figure.subplot_mosaic("emff;oorr")
    points = {}
    for rate in (1.0, 4.0):
        points[f"rate {rate:.0f}"] = layer.discretize(rate)[0]
    draw_eigenvalues(axes["e"], axes["m"], points)
    state = torch.randn_like(layer.initial_state(1))
    y, _ = layer(torch.zeros(1, 3, 1024), state)
    for i in range(3):
        axes["f"].plot(y[0, i], lw=1, label=f"output {i}")
    axes["f"].set(title="Free-running from a random state, u = 0", xlabel=STEP,
                  ylabel="y (no unit)")
    legend_below(axes["f"], columns=3)
    methods = {"scan": "scan", "convolution": "conv", "step by step": "step"}
    draw_outputs(axes["o"], axes["r"], layer, methods)


def draw_lssl(figure):
    """What the last state remembers of a signal, in two bases."""
    axes = figure.subplot_mosaic("ab;cd")
    noise = torch.randn(1024, dtype=torch.float64)
    signal = torch.fft.irfft(torch.fft.rfft(noise)[:9], 1024)   # up to 8 oscillations
    signal = signal / signal.std()
    draw_memory(axes["a"], axes["b"], signal, "legt", scale=600, reach=600)
    draw_memory(axes["c"], axes["d"], signal, "legs", scale=300, reach=1024)
    axes["a"].set_title("What the state remembers: LegT, a window of 600 steps")
    axes["b"].set_title("The first basis functions of LegT")
    axes["c"].set_title("What the state remembers: LegS, fading with 300 steps")
    axes["d"].set_title("The first basis functions of LegS")


def draw_selective_scan(figure):
    """A flag in the input opens dt, and the state keeps the flagged value."""
    signal, step_size, memory = figure.subplots(3, 1)
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
    signal.plot(flagged, u[0, 0, flagged], "o", color="C1", label="flagged: to be kept")
    signal.set(title="Selective copying: keep the flagged values, ignore the others",
               xlabel=STEP, ylabel="input u (no unit)")
    step_size.semilogy(dt[0, 0], color="C2", drawstyle="steps-mid",
                       label="dt_k = softplus(18 flag_k - 8)")
    step_size.set(title="The step size depends on the input", xlabel=STEP,
                  ylabel="dt_k (time per sample)")
    memory.plot(selective[0, 0], color="C1", drawstyle="steps-mid",
                label="selective: exp(dt_k A) is 1 between flags and 0 at a flag")
    memory.plot(flagged, u[0, 0, flagged], "o", color="C1")
    memory.plot(even[0, 0], color="C0", label="time-invariant: dt = 0.1 for every sample")
    memory.set(title="The memory, A = -1", xlabel=STEP, ylabel="output y (no unit)")
    for ax in (signal, step_size, memory):
        legend_below(ax, columns=2)


def draw(name):
    """The figure of that name, the same every time."""
    torch.manual_seed(0)
    figure = Figure(figsize=(12, 9), layout="constrained")
    if name == "s4d":
        draw_convolution_layer(figure, S4D(3, 64))
    if name == "s4":
        hippo = -torch.arange(1, 65) + 0j               # the eigenvalues of HiPPO-LegS
        draw_convolution_layer(figure, S4(3, 64), exact=hippo)
    if name == "dss":
        draw_convolution_layer(figure, DSS(3, 64))
    if name == "gss":
        draw_convolution_layer(figure, GSS(3, 64, bottleneck=1))
    if name == "s5":
        draw_scan_layer(figure, S5(3, 64))
    if name == "lru":
        draw_scan_layer(figure, LRU(3, 64, r_min=0.9, max_phase=0.3))
    if name == "lssl":
        draw_lssl(figure)
    if name == "selective_scan":
        draw_selective_scan(figure)
    return figure


# ------------------------------ command line
def main():
    parser = argparse.ArgumentParser(description="Draw the pictures of README.md.")
    parser.add_argument("--only", choices=NAMES, help="draw this one, default: all")
    parser.add_argument("--out", type=Path, default=HERE, help="folder (%(default)s)")
    args = parser.parse_args()
    if args.out.is_file():
        parser.error(f"--out {args.out} is a file, pass a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    names = [args.only] if args.only else NAMES
    for name in names:
        path = args.out / f"{name}.png"
        with torch.no_grad():
            draw(name).savefig(path, dpi=100)
        print("wrote", path)


if __name__ == "__main__":
    main()
