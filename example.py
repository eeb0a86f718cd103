"""Train a network of state space layers on images that it reads pixel by pixel.

    python example.py --model s4d                           # one model
    python example.py --model s4d --resume                  # after Ctrl-C or a crash
    python example.py --model s4d --eval runs/s4d/best.pt   # in every mode
    python example.py --model all                           # one after the other, compared
    torchrun --nproc_per_node=2 example.py --model s4d      # several processes or GPUs

Sequential CIFAR-10: the network reads an image as 1024 pixels, row by row, and names its
class at the end. The data is downloaded once (170 MB); offline, built-in images replace it.

Each epoch leaves in runs/<model>/ last.pt, which holds all it takes to go on bit for bit,
best.pt (by validation accuracy), metrics.csv and curves.png; the test, result.json.
"""

import argparse
import csv
import ctypes
import importlib
import io
import json
import math
import os
import socket
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

# The class of a layer, its options, and defaults of flags, for about 200,000 parameters.
# Activation "none": the layer mixes the features itself.
MODELS = {
    "s4": {"layer": "s4.S4", "flags": {"d_state": 32}},
    "s4d": {"layer": "s4d.S4D"},
    "lssl": {"layer": "lssl.LSSL"},
    "dss": {"layer": "dss.DSS"},
    "gss": {"layer": "gss.GSS", "options": {"expand": 1}, "flags": {"activation": "none"}},
    "s5": {"layer": "s5.S5"},
    "lru": {"layer": "lru.LRU", "flags": {"d_state": 32},
            "options": {"r_min": 0.99, "r_max": 0.9999, "max_phase": 0.314}},
    "selective_scan": {"layer": "selective_scan.SelectiveSSM", "options": {"lr": 1e-3},
                       "flags": {"d_state": 16}},
    "mamba": {"layer": "selective_scan.Mamba", "options": {"lr": 1e-3},
              "flags": {"d_state": 16, "n_layers": 2, "activation": "none"}},
}
ACTIVATIONS = ["glu", "half_glu1", "half_glu2", "gelu", "none"]
NOT_STORED = ["data_dir", "out", "eval_limit", "device", "resume", "eval"]      # in last.pt

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]

RANK = int(os.environ.get("RANK", 0))               # of this process, set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))        # number of processes
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write(path, content):
    """Replace a file: there is the old one or the new one, never half of it."""
    part = path.with_name(f"{path.name}.part{RANK}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        if part.exists():
            part.unlink()
        sys.exit(f"{path} could not be written: {error.strerror}")


def track(items, what, rest=0):
    """Yield the items. Print the time left for them and rest more: on a terminal in place
    every second, otherwise a line a minute."""
    in_place = sys.stdout.isatty()
    pause = 1 if in_place else 60
    end = "\033[K\r" if in_place else "\n"              # clears the rest of the line
    if in_place:
        print(what, end=end, flush=True)
    start = time.monotonic()
    due = start + pause
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now >= due:
            due = now + pause
            left = (now - start) / done * (len(items) + rest - done) / 60
            print(f"{what} {done}/{len(items)}, {left:.1f} min left", end=end, flush=True)


# ---- data: images (n, 1024, channels) uint8, labels (n) ----
def find_cifar(args):
    """The folder of CIFAR-10, downloaded if need be, or None for the built-in images."""
    folder = args.data_dir / FOLDER
    archive = args.data_dir / "cifar-10.tar.gz"
    if (folder / FILES[-1]).exists():                   # written last: all are there
        return folder
    socket.setdefaulttimeout(20)
    for attempt in (1, 2, 3):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, archive, hash_prefix=SHA256)
            with tarfile.open(archive) as tar:
                for name in FILES:
                    write(folder / name, tar.extractfile(f"{FOLDER}/{name}").read())
            archive.unlink(missing_ok=True)             # another process may have been here
            return folder
        except Exception as error:                      # no network, another checksum, ...
            print(f"download failed, attempt {attempt} of 3: {error}", flush=True)
    if args.data == "cifar10" or WORLD > 1:     # processes must not choose differently
        sys.exit(f"no CIFAR-10 in {args.data_dir}, and the download failed")
    print("No CIFAR-10: training on the built-in images", flush=True)


def read_batches(folder, names):
    """Images (n, 1024, 3) and labels (n) from records of label, red, green and blue."""
    batches = []
    for name in names:
        path = folder / name
        raw = np.fromfile(path, np.uint8) if path.is_file() else np.zeros(0, np.uint8)
        if raw.size == 0 or raw.size % 3073 or raw[::3073].max() > 9:
            sys.exit(f"{path} is missing, or no records of 3073 bytes with labels 0 to 9")
        print(f"{path}: {len(raw) // 3073} images", flush=True)
        batches.append(raw.reshape(-1, 3073))
    records = np.concatenate(batches)
    images = records[:, 1:].reshape(-1, 3, 1024).swapaxes(1, 2)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


def builtin_images(n, seed):
    """Images (n, 1024, 3) of five bands, two warm and three cold: WHICH two is the class.
    Random brightness, noise and stripes hide it from the mean and from neighbours."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    pairs = np.stack(np.triu_indices(5, 1), axis=1)                         # (10, 2)
    warm = (pairs[labels, :, None] == np.arange(5)).any(1)                  # (n, 5)
    tint = np.where(warm, 1, -1) * rng.uniform(20, 40, (n, 5))
    tint = tint.repeat(6, axis=1)                                           # (n, 30)
    images = rng.normal(128, 10, (n, 1, 1, 3)).astype("f4")
    images = images + 15 * rng.standard_normal((n, 32, 32, 3), "f4")
    images[:, 1:31] += tint[:, :, None, None] * np.array([1, 0, -1])        # red, blue
    width = rng.uniform(4, 12, (n, 1, 1))
    slant = rng.uniform(-1, 1, (n, 1, 1))
    phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    y, x = np.mgrid[:32, :32]
    stripes = np.cos(2 * np.pi * x / width + slant * y + phase)             # (n, 32, 32)
    images += 40 * stripes[..., None]
    return images.clip(0, 255).astype(np.uint8).reshape(n, 1024, 3), labels


def load_data(args):
    """Images and labels to train on, then for the test. Sets what depends on the data."""
    folder = None if args.data == "builtin" else find_cifar(args)
    args.data = "cifar10" if folder else "builtin"
    args.epochs = args.epochs or (100 if folder else 4)
    args.batch_size = args.batch_size or (64 if folder else 16)
    if folder:
        parts = [read_batches(folder, FILES[:-1]), read_batches(folder, FILES[-1:])]
    else:
        parts = [builtin_images(2000, args.seed), builtin_images(1000, args.seed + 10**6)]
    tensors = []
    for images, labels in parts:
        if args.grayscale:
            images = (images @ np.float32([[0.299], [0.587], [0.114]])).astype(np.uint8)
        tensors.append(torch.from_numpy(images[:args.limit]).to(args.device))
        tensors.append(torch.from_numpy(labels[:args.limit]).to(args.device))
    return tensors


# ---- network: the residual stream is (b, l, h), the layers read (b, h, l) ----
def check(ok, message):
    if not ok:
        raise ValueError(message)


class SequenceLayer(nn.Module):
    """Residual block norm(x + f(x)), or x + f(norm(x)) with prenorm; f = dropout(mix(ssm)).

    ssm: a state space layer of d_model features; norm: layer or batch
    activation: mix(y) is, with g = dropout(gelu(y)), one of
        glu: (V g) * sigmoid(W g), half_glu1: g * sigmoid(W g), half_glu2: y * sigmoid(W g),
        gelu: gelu(y), none: y
    dropout: probability; a feature is dropped at all steps of a sequence or at none
    """
    def __init__(self, ssm, d_model, *, norm="layer", prenorm=False, activation="glu",
                 dropout=0.1):
        super().__init__()
        check(norm in ("layer", "batch"), f"{norm=}: choose layer or batch")
        check(activation in ACTIVATIONS, f"{activation=}: choose from {ACTIVATIONS}")
        self.ssm = ssm
        self.d_model = d_model
        self.prenorm = prenorm
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(d_model) if norm == "layer" else nn.BatchNorm1d(d_model)
        if "glu" in activation:
            self.out = nn.Linear(d_model, 2 * d_model if activation == "glu" else d_model)

    def normalize(self, x):
        return self.norm(x.flatten(0, 1)).view_as(x)        # every step is a sample

    def mask(self, y):
        """What dropout multiplies y (b, l, h) with: (b, 1, h)."""
        return self.dropout(y.new_ones(len(y), 1, self.d_model))

    def mix(self, y):
        if self.activation == "none":
            return y
        g = F.gelu(y)
        if self.activation == "gelu":
            return g
        g = g * self.mask(g)
        z = self.out(g)                                     # (b, l, h), glu: (b, l, 2h)
        if self.activation == "glu":
            return F.glu(z, dim=-1)
        return (g if self.activation == "half_glu1" else y) * z.sigmoid()

    def forward(self, x, state=None, *, rate=1.0, discrete=None):
        """x (b, l, h), state or None -> (b, l, h), next state or None.
        discrete: what ssm.discretize(rate) returned, for one step, l = 1."""
        check(x.dim() == 3 and x.shape[2] == self.d_model,
              f"x is {tuple(x.shape)}: pass (b, l, {self.d_model})")
        u = self.normalize(x) if self.prenorm else x
        if discrete is None:
            y, state = self.ssm(u.mT.contiguous(), state, rate=rate)        # (b, h, l)
        else:
            y, state = self.ssm.step(u.squeeze(1), state, discrete=discrete)
            y = y[..., None]                                                # (b, h, 1)
        y = self.mix(y.mT.contiguous())                                     # (b, l, h)
        x = torch.addcmul(x, y, self.mask(y))               # x + y * mask, in one pass
        return (x if self.prenorm else self.normalize(x)), state


class StackedSSM(nn.Module):
    """Encoder, blocks and head, with the interface of the layers.

    ssm: function d_model -> state space layer; options: those of SequenceLayer
    d_input, d_output: features of a step, a number or several, as (height, width, channels)
    pool: True: classify by the mean of all steps so far; False: an output for every step
    A state is (states of the layers, sum of the steps (b, h), their number).
    """
    def __init__(self, ssm, d_input, d_output, *, d_model=128, n_layers=4, pool=True,
                 **options):
        super().__init__()
        self.d_input = torch.Size(np.atleast_1d(d_input).tolist())
        self.d_output = torch.Size(np.atleast_1d(d_output).tolist())
        check(min(*self.d_input, *self.d_output, d_model, n_layers) > 0,
              f"{d_input=}, {d_output=}, {d_model=}, {n_layers=}: pass positive numbers")
        self.d_model = d_model
        self.pool = pool
        self.register_buffer("mean", torch.zeros(self.d_input))
        self.register_buffer("std", torch.ones(self.d_input))
        self.encoder = nn.Linear(self.d_input.numel(), d_model)
        self.layers = nn.ModuleList(
            SequenceLayer(ssm(d_model), d_model, **options) for _ in range(n_layers))
        self.head = nn.Linear(d_model, self.d_output.numel())

    def initial_state(self, batch_size):
        states = [layer.ssm.initial_state(batch_size) for layer in self.layers]
        return states, self.mean.new_zeros(batch_size, self.d_model), 0

    def discretize(self, rate=1.0):
        return [layer.ssm.discretize(rate) for layer in self.layers]

    def step(self, x, state, *, rate=1.0, discrete=None):
        """One step: x (b, *d_input), state -> (b, *d_output), next state."""
        y, state = self(x[:, None], state, discrete=discrete or self.discretize(rate))
        return (y if self.pool else y[:, 0]), state

    def forward(self, x, state=None, *, rate=1.0, discrete=None):
        """x (b, l, *d_input) -> (b, *d_output) or, without pool, (b, l, *d_output)."""
        check(x.dim() > 1 and x.shape[2:] == self.d_input and x.shape[1] > 0,
              f"x is {tuple(x.shape)}: pass (b, l, *{tuple(self.d_input)})")
        nothing = [None] * len(self.layers)
        states, total, count = state or (nothing, 0, 0)
        x = self.encoder(((x - self.mean) / self.std).flatten(2))           # (b, l, h)
        after = []
        for layer, before, matrices in zip(self.layers, states, discrete or nothing):
            x, now = layer(x, before, rate=rate, discrete=matrices)
            after.append(now)
        total = total + x.sum(1, dtype=self.mean.dtype)                     # (b, h)
        count = count + x.shape[1]
        y = self.head(total / count if self.pool else x).unflatten(-1, self.d_output)
        return y, (None if state is None else (after, total, count))


def build_network(args):
    """The network that the flags ask for. Only the file of its model is imported."""
    model = MODELS[args.model]
    file, name = model["layer"].split(".")
    torch.manual_seed(args.seed)
    try:
        layer = getattr(importlib.import_module(file), name)
        return StackedSSM(
            lambda d_model: layer(d_model, args.d_state, **model.get("options", {})),
            1 if args.grayscale else 3, 10, d_model=args.d_model, n_layers=args.n_layers,
            norm=args.norm, prenorm=args.prenorm, activation=args.activation,
            dropout=args.dropout)
    except (ImportError, ValueError, RuntimeError) as error:    # or out of memory
        sys.exit(f"--model {args.model} cannot be built: {error}")


# ---- recipe: AdamW, slow and without decay where a layer says so, and a cosine ----
def param_groups(model, lr, weight_decay):
    """Groups for AdamW. What a layer lists in ssm_lr (A, B, dt) gets the rate given
    there and no weight decay; nor do vectors (biases, norms, D) decay."""
    ssm_lr = {}
    for module in model.modules():
        for name, rate in getattr(module, "ssm_lr", {}).items():
            ssm_lr[module.get_parameter(name)] = rate
    groups = {}
    for name, parameter in model.named_parameters():
        rate = ssm_lr.get(parameter, lr)
        vector = parameter.ndim == 1 or name.split(".")[-1] == "D"      # (m, h) in s4, lssl
        decay = 0.0 if vector or parameter in ssm_lr else weight_decay
        if parameter.requires_grad:
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()]


def set_learning_rates(optimizer, progress):
    """A cosine: the full rates where training begins, at progress 0, and 0 at 1."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (1 + math.cos(math.pi * progress)) / 2


def train_epoch(args, epoch, model, optimizer, images, labels, indices):
    """Train on the images indices. Returns loss and accuracy of each step: (2, steps)."""
    seed = args.seed * 10**6 + epoch                    # a resumed run draws the same
    torch.manual_seed(seed)                             # one order for all processes
    share = min(args.batch_size, len(indices)) // WORLD
    steps = len(indices) // (share * WORLD)
    order = indices[torch.randperm(len(indices))[:steps * WORLD * share].to(indices.device)]
    batches = order.view(steps, WORLD, share)[:, RANK]      # (steps, share)
    torch.manual_seed(seed * WORLD + RANK)              # dropout of its own in each
    results = torch.zeros(2, steps, device=images.device)
    what = f"epoch {epoch}/{args.epochs}, step"
    model.train()
    for i, batch in enumerate(track(batches, what, (args.epochs - epoch) * steps)):
        set_learning_rates(optimizer, (epoch - 1 + i / steps) / args.epochs)
        with torch.autocast(images.device.type, torch.bfloat16, args.amp):
            scores, _ = model(images[batch])
        loss = F.cross_entropy(scores.float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results[0, i] = loss.detach()
        results[1, i] = (scores.argmax(1) == labels[batch]).float().mean()
    if WORLD > 1:
        torch.distributed.all_reduce(results)
    return results / WORLD


def evaluate(args, net, images, what, piece=None, rate=1.0):
    """Class scores (n, 10) of images (n, l, c), read whole or in pieces of piece pixels."""
    net.eval()
    found = []
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, args.amp):
        discrete = net.discretize(rate) if piece == 1 else None
        for batch in track(images.split(64), f"{what}, batch"):
            state = net.initial_state(len(batch)) if piece else None
            for pixels in batch.split(piece or images.shape[1], dim=1):
                scores, state = net(pixels, state, rate=rate, discrete=discrete)
            found.append(scores.float())
    return torch.cat(found)


def save(args, net, optimizer, history, folder):
    stored = {name: value for name, value in vars(args).items() if name not in NOT_STORED}
    content = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(),
                "history": history, "args": stored}, content)
    if history[-1] is max(history, key=lambda row: row["val_accuracy"]):    # the first best
        write(folder / "best.pt", content.getvalue())
    write(folder / "last.pt", content.getvalue())           # after best.pt: none gets lost
    table = io.StringIO()
    writer = csv.DictWriter(table, history[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write(folder / "metrics.csv", table.getvalue().encode())
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for ax, what in zip(figure.subplots(1, 2), ["loss", "accuracy"]):
        ax.plot(epochs, [row[f"train_{what}"] for row in history], ".-", label="training")
        ax.plot(epochs, [row[f"val_{what}"] for row in history], ".-", label="validation")
        ax.set(xlabel="epoch", ylabel=what)
        ax.legend()
    picture = io.BytesIO()
    figure.savefig(picture)
    write(folder / "curves.png", picture.getvalue())


def load(path):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("model", "optimizer", "history", "args")}
    except Exception as error:          # of many kinds, for a file that save did not write
        sys.exit(f"{path} not found, damaged or no checkpoint: {type(error).__name__}")


def train(args, net, images, labels, folder, saved):
    """Train from the checkpoint saved, or from the start. Returns the history."""
    indices = torch.arange(len(images), device=images.device)
    validation = indices[::10]
    training = indices[indices % 10 > 0]
    sample = images[training[:5000]].float()
    net.mean.copy_(sample.mean((0, 1)))
    net.std.copy_(sample.std((0, 1)))
    optimizer = torch.optim.AdamW(param_groups(net, args.lr, args.weight_decay))
    history = []
    if saved:
        history = saved["history"]
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    model = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.monotonic()
        row = {"epoch": epoch}
        results = train_epoch(args, epoch, model, optimizer, images, labels, training)
        row["train_loss"], row["train_accuracy"] = results.mean(1).tolist()
        row["seconds"] = round(time.monotonic() - start, 2)
        scores = evaluate(args, net, images[validation], "validation")
        row["val_loss"] = F.cross_entropy(scores, labels[validation]).item()
        right = scores.argmax(1) == labels[validation]
        row["val_accuracy"] = right.float().mean().item()
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            step = results[0].isfinite().sum()
            sys.exit(f"diverged: the loss of epoch {epoch} is not finite after step {step}."
                     f" Start again with --lr below {args.lr:g}. What is saved is kept.")
        history.append(row)
        if RANK == 0:
            save(args, net, optimizer, history, folder)
        print("epoch {epoch}: loss {train_loss:.4g}, {train_accuracy:.2%}; validation "
              "{val_loss:.4g}, {val_accuracy:.2%}; {seconds} s".format(**row), flush=True)
    return history


def compare_modes(args, net, images, labels):
    """Print and return the accuracy in every mode."""
    modes = [("in parallel", images, None, 1.0),
             ("in pieces of 300 pixels", images, 300, 1.0),
             ("every second pixel, rate 2", images[:, ::2], None, 2.0),
             ("every second pixel, rate 1", images[:, ::2], None, 1.0),
             ("pixel by pixel", images[:args.eval_limit], 1, 1.0)]
    print("test images read             accuracy  images  unlike the first")
    accuracies = {}
    for mode, x, piece, rate in modes:
        found = evaluate(args, net, x, mode, piece, rate).argmax(1)
        if not accuracies:
            first = found
        accuracies[mode] = (found == labels[:len(x)]).float().mean().item()
        unlike = (found != first[:len(x)]).sum()
        print(f"{mode:<28}{accuracies[mode]:>9.2%}{len(x):>8}{unlike:>18}", flush=True)
    return accuracies


def compare_models(out):
    print("           model  parameters  test accuracy  s per epoch")
    for name in MODELS:
        result = json.loads((out / name / "result.json").read_text())
        print(f"{name:>16}{result['parameters']:>12}{result['modes']['in parallel']:>15.2%}"
              f"{result['seconds per epoch']:>13.1f}")


def at_least(low, kind=int):
    """A type for argparse that says its limit."""
    def number(text):
        if not low <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: pass a number from {low}")
        return kind(text)
    return number


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=[*MODELS, "all"], default="s4d", help="default s4d")
    add("--d-model", type=int, default=128, help="features, from 1, default 128")
    add("--d-state", type=int, default=64, help="even; default 64, some models 32 or 16")
    add("--n-layers", type=int, default=4, help="blocks, from 1, default 4, mamba 2")
    add("--norm", choices=["layer", "batch"], default="layer", help="default layer")
    add("--prenorm", action="store_true", help="normalize before the layer, not after")
    add("--activation", choices=ACTIVATIONS, default="glu", help="default glu")
    add("--dropout", type=float, default=0.1, help="probability, 0 to 1, default 0.1")
    add("--grayscale", action="store_true", help="one channel, not three")
    add("--data", choices=["auto", "cifar10", "builtin"], default="auto", help="see above")
    add("--data-dir", type=Path, default="data", help="of CIFAR-10, default data")
    add("--limit", type=at_least(10 * WORLD), help="images to use, from 10, default all")
    add("--epochs", type=at_least(1), help="from 1; default 100, for built-in images 4")
    add("--batch-size", type=at_least(WORLD), help="default 64, for built-in images 16")
    add("--lr", type=at_least(0, float), default=0.01, help="from 0, default 0.01")
    add("--weight-decay", type=at_least(0, float), default=0.01, help="default 0.01")
    add("--amp", action="store_true", help="bfloat16 for the linear maps")
    add("--seed", type=at_least(0), default=0, help="from 0, default 0")
    add("--device", choices=["cpu", "cuda"], default=DEVICE, help="default cuda, if any")
    add("--out", type=Path, default="runs", help="folder of the runs, default runs")
    add("--eval-limit", type=at_least(1), default=256, help="images to read pixel by pixel")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on after the last whole epoch")
    add("--eval", type=Path, metavar="FILE", help="a checkpoint to evaluate in every mode")
    return parser


def settle(argv):
    """The flags (command line, else checkpoint, else MODELS) and the checkpoint or None."""
    parser = build_parser()
    args = parser.parse_args(argv)
    path = args.eval or args.out / args.model / "last.pt"
    if not args.eval and not path.exists():
        if args.resume:
            print(f"--resume: no {path}, so it starts from the beginning", flush=True)
        parser.set_defaults(**MODELS[args.model].get("flags", {}))
        return parser.parse_args(argv), None
    if not args.eval and not args.resume:
        sys.exit(f"{path} is of an earlier run: go on with --resume, or take another --out")
    saved = load(path)
    parser.set_defaults(**saved["args"])
    args = parser.parse_args(argv)
    for name, before in saved["args"].items():
        now = getattr(args, name)
        if now == "auto":
            args.data = before
        elif name == "epochs" and args.resume and now > before:
            print(f"--epochs was {before}: the cosine is laid anew over {now}", flush=True)
        elif name != "limit" and now != before:
            flag = "--" + name.replace("_", "-")
            sys.exit(f"{flag} is {now} here, but {before} in {path}. Another --out?")
    return args, saved


def keep_freed_memory():
    """Have Linux keep freed memory, not clear it anew: 2 to 3 times as fast on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)             # M_MMAP_MAX: one heap for all sizes
        libc.mallopt(-1, 2**31 - 1)     # M_TRIM_THRESHOLD: that does not shrink
        libc.mallopt(-2, 2**28)         # M_TOP_PAD: and grows by 256 MB


def run(argv):
    args, saved = settle(argv)
    folder = args.out / args.model
    result = folder / "result.json"
    if args.resume and saved and len(saved["history"]) == args.epochs and result.exists():
        print(f"already finished, {args.epochs} epochs: {result.read_text()}")
        return
    net = build_network(args).to(args.device)
    size = sum(parameter.numel() for parameter in net.parameters())
    print(f"{args.model}: {size:,} parameters on {args.device}", flush=True)
    images, labels, test_images, test_labels = load_data(args)
    print(f"{args.data}: {len(images)} images, {len(test_images)} for the test", flush=True)
    if args.eval:
        net.load_state_dict(saved["model"])
        compare_modes(args, net, test_images, test_labels)
        return
    write(result, b"")                              # now, if the folder cannot be written
    result.unlink(missing_ok=True)
    history = train(args, net, images, labels, folder, saved)
    if RANK == 0:
        net.load_state_dict(load(folder / "best.pt")["model"])
        seconds = sum(row["seconds"] for row in history) / len(history)
        modes = compare_modes(args, net, test_images, test_labels)
        content = {"parameters": size, "seconds per epoch": seconds, "modes": modes}
        write(result, json.dumps(content, indent=1).encode())


def main(argv):
    args = build_parser().parse_args(argv)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("--device cuda: there is no GPU, try --device cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        torch.distributed.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    keep_freed_memory()
    try:
        for name in MODELS if args.model == "all" else [args.model]:
            run([*argv, "--model", name])
    except KeyboardInterrupt:
        sys.exit("\nStopped. With --resume, training goes on after the last whole epoch,\n"
                 "or starts from the beginning if there is none.")
    if args.model == "all" and RANK == 0:
        compare_models(args.out)
    if WORLD > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
