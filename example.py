"""Train a network of state space layers on images that it reads pixel by pixel.

    python example.py --data builtin                        # some minutes, no download
    python example.py --model s4d                           # CIFAR-10: days on a CPU
    python example.py --model s4d --resume                  # after Ctrl-C or a crash
    python example.py --model s4d --eval runs/s4d/best.pt   # in every mode
    python example.py --model all                           # one after the other, compared
    torchrun --nproc_per_node=2 example.py --model s4d      # several processes or GPUs

Sequential CIFAR-10: the network reads an image as 1024 pixels, row by row, and names its
class at the end; the images are not augmented. The data is downloaded once (170 MB); if
that fails, images made here replace it, unless --data cifar10 asks for the real ones. After
ten steps of the first epoch a line says what a run on CIFAR-10 will cost. Each epoch leaves
in runs/<model>/ last.pt, from which --resume goes on, on the same machine bit for bit,
best.pt (by validation accuracy), metrics.csv and curves.png; the test, result.json.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import importlib
import io
import json
import math
import os
import socket
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

# The class, its options, and the defaults of flags: 170,000 to 235,000 parameters each.
# Activation "none" is for layers with a gate of their own.
MODELS = {
    "s4": {"layer": "s4.S4", "flags": {"d_state": 32}},
    "s4d": {"layer": "s4d.S4D"},
    "lssl": {"layer": "lssl.LSSL"},
    "dss": {"layer": "dss.DSS"},
    "gss": {"layer": "gss.GSS", "flags": {"activation": "none"},
            "options": {"expand": 1, "measure": "diag-lin", "dt_min": 1e-3, "dt_max": 0.1,
                        "train_dt": True}},             # the start of S4D
    "s5": {"layer": "s5.S5"},
    "lru": {"layer": "lru.LRU", "flags": {"d_state": 32},
            "options": {"r_min": 0.99, "r_max": 0.9999, "max_phase": 0.314}},
    "selective_scan": {"layer": "selective_scan.SelectiveSSM", "options": {"lr": 1e-3},
                       "flags": {"d_state": 16}},
    "mamba": {"layer": "selective_scan.Mamba", "options": {"lr": 1e-3},
              "flags": {"d_state": 16, "n_layers": 2, "activation": "none"}},
}
ALL = 22                        # nine models take about so many times as long as s4


# ---- the network, from here to check(), needs torch alone: copy it ----
ACTIVATIONS = ["glu", "half_glu1", "half_glu2", "gelu", "none"]


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
        self.prenorm = prenorm
        self.activation = activation
        self.norm = nn.LayerNorm(d_model) if norm == "layer" else nn.BatchNorm1d(d_model)
        self.dropout = nn.Dropout1d(dropout)
        if activation == "glu":
            self.out = nn.Conv1d(d_model, 2 * d_model, 1)       # V and W
        elif "half" in activation:
            self.out = nn.Conv1d(d_model, d_model, 1)           # W

    def normalize(self, x):
        """The norm at each step of x (b, h, l)."""
        return self.norm(x.mT).mT if isinstance(self.norm, nn.LayerNorm) else self.norm(x)

    def mix(self, y):
        """Activation and mixing of the features at each step, (b, h, l) -> (b, h, l)."""
        if self.activation == "none":
            return y
        g = F.gelu(y)
        if self.activation == "gelu":
            return g
        g = self.dropout(g)
        if self.activation == "glu":
            return F.glu(self.out(g), dim=1)
        gate = self.out(g).sigmoid()
        return gate * (g if self.activation == "half_glu1" else y)

    def forward(self, x, state=None, *, rate=1.0):
        """x (b, h, l), state or None -> (b, h, l), next state or None."""
        u = self.normalize(x) if self.prenorm else x
        y, state = self.ssm(u, state, rate=rate)
        x = x + self.dropout(self.mix(y))
        return (x if self.prenorm else self.normalize(x)), state

    def step(self, x, state, *, rate=1.0, discrete=None):
        """One step: x (b, h), state -> (b, h), next state."""
        u = self.norm(x) if self.prenorm else x
        y, state = self.ssm.step(u, state, rate=rate, discrete=discrete)
        x = x + self.dropout(self.mix(y[..., None]))[..., 0]        # (b, h, 1), here l = 1
        return (x if self.prenorm else self.norm(x)), state


class StackedSSM(nn.Module):
    """Encoder, blocks and head, with the interface of the layers.

    ssm: function d_model -> state space layer, or a list of functions, one for each block
    d_input, d_output: features of a step: a number, or several as (height, width, channels)
        for video, whose frames are flattened into features
    pool: True: classify by the mean of all steps so far; False: an output for every step
    A state is (states of the layers, sum of the steps (b, h), their number). To see n steps
    of what follows an initial value, pass that value and n - 1 zeros, with pool=False; no
    output is fed back.
    """
    def __init__(self, ssm, d_input, d_output, *, d_model=128, n_layers=4, pool=True,
                 **options):
        super().__init__()
        self.d_input = torch.Size([d_input] if isinstance(d_input, int) else d_input)
        self.d_output = torch.Size([d_output] if isinstance(d_output, int) else d_output)
        sizes = [d_model, n_layers, *self.d_input, *self.d_output]
        check(min(sizes) > 0 and self.d_input and self.d_output,
              f"{d_input=}, {d_output=}, {d_model=}, {n_layers=}: pass positive numbers")
        functions = ssm if isinstance(ssm, list) else n_layers * [ssm]
        check(len(functions) == n_layers,
              f"ssm is a list of {len(functions)}, {n_layers=}: pass one for each block")
        self.d_model = d_model
        self.pool = pool
        self.register_buffer("mean", torch.zeros(self.d_input))
        self.register_buffer("std", torch.ones(self.d_input))
        self.encoder = nn.Linear(self.d_input.numel(), d_model)
        self.layers = nn.ModuleList(
            SequenceLayer(function(d_model), d_model, **options) for function in functions)
        self.head = nn.Linear(d_model, self.d_output.numel())

    def initial_state(self, batch_size):
        states = [layer.ssm.initial_state(batch_size) for layer in self.layers]
        return states, self.mean.new_zeros(batch_size, self.d_model), 0

    def discretize(self, rate=1.0):
        return [layer.ssm.discretize(rate) for layer in self.layers]

    def forward(self, x, state=None, *, rate=1.0):
        """x (b, l, *d_input), state or None -> y, next state or None; y is (b, *d_output)
        or, without pool, (b, l, *d_output)."""
        check(x.dim() > 1 and x.shape[2:] == self.d_input and x.shape[1] > 0,
              f"x is {tuple(x.shape)}: pass (b, l, *{tuple(self.d_input)})")
        states, total, count = state or (len(self.layers) * [None], 0, 0)
        check(len(states) == len(self.layers),
              f"state: of {len(states)} layers, not {len(self.layers)}")
        x = self.encoder(((x - self.mean) / self.std).flatten(2)).mT        # (b, h, l)
        after = []
        for layer, before in zip(self.layers, states):
            x, now = layer(x, before, rate=rate)
            after.append(now)
        total = total + x.sum(-1, dtype=self.mean.dtype)                    # (b, h)
        count = count + x.shape[-1]
        y = self.head(total / count if self.pool else x.mT).unflatten(-1, self.d_output)
        return y, (None if state is None else (after, total, count))

    def step(self, x, state, *, rate=1.0, discrete=None):
        """One step: x (b, *d_input), state -> (b, *d_output), next state."""
        check(x.dim() > 0 and x.shape[1:] == self.d_input,
              f"x is {tuple(x.shape)}: pass (b, *{tuple(self.d_input)})")
        states, total, count = state or ([], 0, 0)
        check(len(states) == len(self.layers),
              f"state: of {len(states)} layers, not {len(self.layers)}")
        x = self.encoder(((x - self.mean) / self.std).flatten(1))           # (b, h)
        discrete = discrete or len(self.layers) * [None]
        after = []
        for layer, before, matrices in zip(self.layers, states, discrete, strict=True):
            x, now = layer.step(x, before, rate=rate, discrete=matrices)
            after.append(now)
        total = total + x
        count = count + 1
        y = self.head(total / count if self.pool else x).unflatten(-1, self.d_output)
        return y, (after, total, count)


def check(ok, message):
    """Raise a ValueError unless ok."""
    if not ok:
        raise ValueError(message)


def build_network(args):
    """The network that the flags ask for. Only the file of its model is imported."""
    model = MODELS[args.model]
    file, name = model["layer"].split(".")
    layer = getattr(importlib.import_module(file), name)
    torch.manual_seed(args.seed)
    return StackedSSM(
        lambda d_model: layer(d_model, args.d_state, **model.get("options", {})), 3, 10,
        d_model=args.d_model, n_layers=args.n_layers, norm=args.norm, prenorm=args.prenorm,
        activation=args.activation, dropout=args.dropout)


def load_network(path):
    """The network of a checkpoint, for use in Python:
    scores, _ = load_network("runs/s4d/best.pt")(images)    # (b, 1024, 3), 0 to 255"""
    saved = load(Path(path))
    with torch.random.fork_rng(devices=[]):             # the seed stays in here
        net = build_network(Namespace(**saved["args"]))
    net.load_state_dict(saved["model"])
    return net.eval()


# ---- the recipe of the official S4 example; the rest knows no layer by name ----
def param_groups(model, lr, weight_decay):
    """Groups for AdamW. What a layer lists in ssm_lr (A, B, dt) gets the rate given there,
    at most lr, and no weight decay. Differs from the official example: vectors (biases,
    norms, D) and what a layer marks with _no_weight_decay do not decay either."""
    ssm_lr = {}
    for module in model.modules():
        for name, rate in getattr(module, "ssm_lr", {}).items():
            ssm_lr[module.get_parameter(name)] = min(rate, lr)
    groups = {}
    for name, parameter in model.named_parameters():
        vector = parameter.ndim == 1 or name.split(".")[-1] == "D"      # (m, h) in s4, lssl
        marked = getattr(parameter, "_no_weight_decay", False)
        decay = 0.0 if vector or marked or parameter in ssm_lr else weight_decay
        if parameter.requires_grad:
            rate = ssm_lr.get(parameter, lr)
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()]


def train(args, net, optimizer, history, images, labels, n_test):
    """Train after the epochs in history, which gets a row for each epoch."""
    indices = torch.arange(len(images), device=images.device)
    validation = indices[::10]
    training = indices[indices % 10 > 0]
    sample = images[training[:5000]].float()
    net.mean.copy_(sample.mean((0, 1)))
    net.std.copy_(sample.std((0, 1)).clamp(min=1))          # not 0 for constant images
    model = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.monotonic()
        for group in optimizer.param_groups:                # a cosine, one step an epoch
            cosine = (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2
            group["lr"] = group["initial_lr"] * cosine
        results = train_epoch(args, epoch, model, optimizer, images, labels, training,
                              n_test)
        row = {"epoch": epoch}
        row["train_loss"], row["train_accuracy"] = results.mean(1).tolist()
        row["seconds"] = round(time.monotonic() - start, 2)
        scores = evaluate(args, net, images[validation], "validation")
        right = scores.argmax(1) == labels[validation]
        row["val_loss"] = F.cross_entropy(scores, labels[validation]).item()
        row["val_accuracy"] = right.float().mean().item()
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            raise FloatingPointError(
                f"the loss of epoch {epoch} is not finite after step "
                f"{results[0].isfinite().sum()}. Start again with --lr below {args.lr:g} "
                f"or --weight-decay below {args.weight_decay:g}, in another --out. What is "
                "saved is kept.")
        history.append(row)
        if RANK == 0:
            save(args, net, optimizer, history)
        print("epoch {epoch}: loss {train_loss:.4g}, {train_accuracy:.2%}; validation "
              "{val_loss:.4g}, {val_accuracy:.2%}; {seconds} s".format(**row), flush=True)


def train_epoch(args, epoch, model, optimizer, images, labels, indices, n_test):
    """Train on the images indices, without what is left over at the end, less than a batch.
    Returns loss and accuracy of each step: (2, steps)."""
    seed = args.seed * 10**6 + epoch                    # a resumed run draws the same
    torch.manual_seed(seed)                             # one order for all processes
    share = min(args.batch_size, len(indices)) // WORLD
    steps = len(indices) // (share * WORLD)
    order = torch.randperm(len(indices)).to(indices.device)[:steps * WORLD * share]
    batches = indices[order].view(steps, WORLD, share)[:, RANK]     # (steps, share)
    torch.manual_seed(seed * WORLD + RANK)              # dropout of its own in each
    results = torch.zeros(2, steps, device=images.device)
    rest = 1.04 * steps * (args.epochs - epoch)         # 0.04 for the validation
    rest += (n_test + args.eval_limit) / (share * WORLD)    # the test: about so many steps
    start = time.monotonic()
    model.train()
    for i, batch in enumerate(track(batches, f"epoch {epoch}/{args.epochs}, step", rest)):
        with torch.autocast(images.device.type, torch.bfloat16, args.amp):
            scores, _ = model(images[batch])
        loss = F.cross_entropy(scores.float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results[0, i] = loss.detach()
        results[1, i] = (scores.argmax(1) == labels[batch]).float().mean()
        if epoch == 1 and i == 9 and args.data == "cifar10":
            loss.item()                                 # waits for a GPU
            seconds = (time.monotonic() - start) / 10
            print(cost(args, seconds, steps, rest), flush=True)
    if WORLD > 1:
        torch.distributed.all_reduce(results)
    return results / WORLD


def cost(args, seconds, steps, rest):
    """What the run takes, if each step of an epoch, and of the rest, takes seconds."""
    epoch = seconds * steps / 60
    images = 4 * 1800 + 1256                            # --data builtin: 4 epochs, the test
    builtin = seconds / 60 * images / args.batch_size
    return (f"{args.data} on {args.device}: about {epoch:.1f} min an epoch, "
            f"{seconds * (steps + rest) / 3600:.1f} h for {args.epochs} epochs; "
            f"--epochs 10 takes {epoch / 6:.1f} h, --data builtin {builtin:.0f} min")


# ---- evaluation, in every mode ----
def evaluate(args, net, images, what, piece=None, rate=1.0):
    """Class scores (n, 10) of images (n, l, 3), read whole or in pieces of piece pixels."""
    net.eval()
    found = []
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, args.amp):
        discrete = net.discretize(rate) if piece == 1 else None
        for batch in track(images.split(64), f"{what}, batch"):
            state = net.initial_state(len(batch)) if piece else None
            if piece == 1:
                for pixel in batch.unbind(1):
                    scores, state = net.step(pixel, state, discrete=discrete)
            else:
                for pixels in batch.split(piece or batch.shape[1], dim=1):
                    scores, state = net(pixels, state, rate=rate)
            found.append(scores.float())
    return torch.cat(found)


def compare_modes(args, net, images, labels):
    """Print and return the accuracy in every mode. Half rate reads pixels 1, 3, 5, ...: a
    step ends at its pixel, so one of 2 dt ends at every second; rate 1 is the control."""
    modes = [("whole", images, None, 1.0),
             ("in pieces of 300 pixels", images, 300, 1.0),
             ("pixel by pixel", images[:args.eval_limit], 1, 1.0),
             ("every second pixel, rate 2", images[:, 1::2], None, 2.0),
             ("every second pixel, rate 1", images[:, 1::2], None, 1.0)]
    print("test images read             accuracy  images  unlike whole  ms per image")
    results = {}
    for mode, x, piece, rate in modes:
        start = time.monotonic()
        found = evaluate(args, net, x, mode, piece, rate).argmax(1)
        accuracy = (found == labels[:len(x)]).float().mean().item()
        time_of_one = 1000 * (time.monotonic() - start) / len(x)
        if mode == "whole":
            whole = found
        unlike = (found != whole[:len(x)]).sum().item()
        results[mode] = {"accuracy": accuracy, "images": len(x), "unlike whole": unlike,
                         "ms per image": time_of_one}
        print(f"{mode:<28}{accuracy:>9.2%}{len(x):>8}{unlike:>14}{time_of_one:>14.1f}",
              flush=True)
    return results


# ---- data: images (n, 1024, 3) uint8, labels (n) ----
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@functools.cache                                        # what fails is not tried again
def download(data_dir):
    """Put data_dir / FOLDER there when all of it is there, or else say why not."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(20)                    # seconds without an answer
        with tempfile.TemporaryDirectory(dir=data_dir) as part:
            archive = Path(part) / "archive"
            torch.hub.download_url_to_file(URL, archive, hash_prefix=SHA256)
            with tarfile.open(archive) as tar:
                tar.extractall(part, filter="data")
            os.replace(Path(part) / FOLDER, data_dir / FOLDER)
    except Exception as error:                          # no network, another checksum, ...
        print(f"download failed: {error}", flush=True)


def load_data(args):
    """"cifar10" or "builtin", then images and labels to train on and for the test."""
    folder = args.data_dir / FOLDER
    if args.data != "builtin" and RANK == 0 and not folder.exists():
        download(args.data_dir)
    if WORLD > 1:
        torch.distributed.barrier()                     # the others wait for process 0
    if args.data != "builtin" and folder.exists():
        name = "cifar10"
        arrays = [*read_batches(folder, FILES[:-1]), *read_batches(folder, FILES[-1:])]
    elif args.data == "cifar10":
        raise ValueError(f"no CIFAR-10 in {args.data_dir}, and the download failed")
    else:
        name = "builtin"
        arrays = [*builtin_images(2000, args.seed),
                  *builtin_images(1000, args.seed + 10**6)]
    tensors = [torch.from_numpy(array[:args.limit]).to(args.device) for array in arrays]
    print(f"{name}: {len(tensors[0])} images, {len(tensors[2])} for the test", flush=True)
    return name, *tensors


def read_batches(folder, names):
    """Images (n, 1024, 3) and labels (n) from records of label, red, green and blue."""
    batches = []
    for name in names:
        raw = np.fromfile(folder / name, np.uint8)
        check(raw.size > 0 and raw.size % 3073 == 0 and raw[::3073].max() < 10,
              f"{folder / name}: not records of 3073 bytes with labels 0 to 9")
        batches.append(raw.reshape(-1, 3073))
    records = np.concatenate(batches)
    images = records[:, 1:].reshape(-1, 3, 1024).swapaxes(1, 2)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


def builtin_images(n, seed):
    """Images (n, 1024, 3) of five bands, two warm and three cold: WHICH two is the class.
    Neither the mean nor a few neighbouring pixels show it."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    pairs = np.stack(np.triu_indices(5, 1), axis=1)                         # (10, 2)
    warm = (pairs[labels, :, None] == np.arange(5)).any(1)                  # (n, 5)
    tint = np.where(warm, 1, -1) * rng.uniform(20, 40, (n, 5))
    tint = tint.repeat(6, axis=1)                                           # (n, 30)
    images = rng.normal(128, 10, (n, 1, 1, 3)).astype("f4")
    images = images + 15 * rng.standard_normal((n, 32, 32, 3), "f4")
    images[:, 1:31] += tint[:, :, None, None] * np.array([1, 0, -1])        # red, blue
    return images.clip(0, 255).astype(np.uint8).reshape(n, 1024, 3), labels


# ---- the command line ----
RANK = int(os.environ.get("RANK", 0))               # of this process, set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))        # number of processes
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# epochs and batch_size: as the data wants it; limit: none; data: CIFAR-10 if it is there
DEFAULTS = {
    "model": "s4d", "d_model": 128, "d_state": 64, "n_layers": 4, "norm": "layer",
    "prenorm": False, "activation": "glu", "dropout": 0.1, "data": "auto", "limit": None,
    "epochs": None, "batch_size": None, "lr": 0.01, "weight_decay": 0.01, "amp": False,
    "seed": 0}
NOT_STORED = {"data_dir": Path("data"), "device": DEVICE, "out": Path("runs"),
              "eval_limit": 256, "resume": False, "eval": None}


def number(kind, low, high=10**6):
    """A type for argparse, with limits; its own type of error has the message printed."""
    def number(text):
        if not low <= kind(text) <= high:
            message = f"{text}: pass a number from {low} to {high:g}"
            raise argparse.ArgumentTypeError(message)
        return kind(text)
    return number


def parse(argv):
    """The flags that were given, without defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", choices=[*MODELS, "all"], help="default s4d")
    add("--d-model", type=number(int, 1), help="features, default 128")
    add("--d-state", type=number(int, 1), help="even; default 64, some models 32 or 16")
    add("--n-layers", type=number(int, 1), help="blocks, default 4, mamba 2")
    add("--norm", choices=["layer", "batch"], help="default layer")
    add("--prenorm", action="store_true", help="normalize before the layer, not after")
    add("--activation", choices=ACTIVATIONS, help="default glu, some models none")
    add("--dropout", type=number(float, 0, 1), help="probability, default 0.1")
    add("--data", choices=["cifar10", "builtin"], help="default: see above")
    add("--data-dir", type=Path, help="of CIFAR-10, default data")
    add("--limit", type=number(int, 10 * WORLD),
        help="images to train on, and as many for the test; default all")
    add("--epochs", type=number(int, 1), help="default 100, for built-in images 4")
    add("--batch-size", type=number(int, WORLD), help="default 64, for built-in images 16")
    add("--lr", type=number(float, 0, 1e9), help="learning rate, default 0.01")
    add("--weight-decay", type=number(float, 0, 1e9), help="default 0.01")
    add("--amp", action="store_true", help="bfloat16 for the linear maps")
    add("--seed", type=number(int, 0, 10**9), help="default 0")
    add("--device", choices=["cpu", "cuda"], help="default cuda, if any")
    add("--out", type=Path, help="folder of the runs, default runs")
    add("--eval-limit", type=number(int, 1), help="images read pixel by pixel, default 256")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on after the last whole epoch")
    add("--eval", type=Path, metavar="FILE", help="a checkpoint to evaluate in every mode")
    return vars(parser.parse_args(argv)) | {"processes": WORLD}


def prepare(given):
    """Flags, network, optimizer and history as they are before the next epoch."""
    of_model = MODELS[given.get("model", "s4d")].get("flags", {})
    args = Namespace(**(DEFAULTS | NOT_STORED | of_model | given))      # the last one wins
    path = args.eval or args.out / args.model / "last.pt"
    saved = None
    if args.eval or args.resume and path.exists():
        saved = load(path)
        compare_flags(given, saved["args"], path)
        args = Namespace(**(NOT_STORED | saved["args"] | given))
        if args.resume:
            load(path.with_name("best.pt"))             # which the test will need
    elif args.resume:
        print(f"--resume: no {path}, so it starts from the beginning", flush=True)
    else:
        check(not path.exists(), f"{path} is of an earlier run: go on with --resume, or "
              "take another --out")
    try:
        net = build_network(args).to(args.device)
        optimizer = torch.optim.AdamW(param_groups(net, args.lr, args.weight_decay))
        if saved is None:
            return args, net, optimizer, []
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return args, net, optimizer, saved["history"]
    except (ImportError, KeyError, RuntimeError, ValueError) as error:
        where = f"--model {args.model}" if saved is None else path
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None


def compare_flags(given, stored, path):
    """Refuse flags that do not go with the checkpoint, and say what others change."""
    may_change = {"processes"} | ({"epochs"} if "resume" in given else {"data", "limit"})
    for name in sorted(given.keys() & stored.keys()):
        now = given[name]
        before = stored[name]
        if name not in may_change:
            check(now == before, f"--{name.replace('_', '-')} is {now} here, but {before} "
                  f"in {path}. Another --out?")
        elif now != before and "resume" in given:
            print(f"{name}: {before} before, {now} from here on, so the run becomes "
                  "another than without interruption", flush=True)


def run(args, net, optimizer, history):
    """Train and test one model, or only test it. Returns a line with the result."""
    folder = args.out / args.model
    result = folder / "result.json"
    if args.resume and len(history) >= (args.epochs or 1) and result.exists():
        return (f"{args.model}: already finished, {len(history)} epochs: "
                f"{result.read_text()}")
    size = sum(parameter.numel() for parameter in net.parameters())
    print(f"{args.model}: {size:,} parameters on {args.device}", flush=True)
    for group in optimizer.param_groups:
        n = sum(parameter.numel() for parameter in group["params"])
        print(f"{n:>9,} at the rate {group['initial_lr']:g}, "
              f"weight decay {group['weight_decay']:g}")
    args.data, images, labels, test_images, test_labels = load_data(args)
    args.epochs = args.epochs or (4 if args.data == "builtin" else 100)
    args.batch_size = args.batch_size or (16 if args.data == "builtin" else 64)
    if not args.eval:
        result.unlink(missing_ok=True)
        train(args, net, optimizer, history, images, labels, len(test_images))
        if RANK > 0:
            return None
        net.load_state_dict(load(folder / "best.pt")["model"])
    seconds = float(np.median([row["seconds"] for row in history]))
    modes = compare_modes(args, net, test_images, test_labels)
    results = {"parameters": size, "seconds per epoch": seconds, "modes": modes}
    if not args.eval:
        write(result, json.dumps(results, indent=1).encode())
    return (f"{args.model}: {size:,} parameters, {modes['whole']['accuracy']:.2%} of the "
            f"test images, {seconds:.1f} s per epoch (median)")


def run_all(plans):
    """Run one after the other. Returns a line for each one whose loss was not finite."""
    with contextlib.ExitStack() as held:
        for given in plans:
            if RANK == 0 and "eval" not in given:
                held.enter_context(lock(given))
        jobs = [prepare(given) for given in plans]      # all, before the first one starts
        data = {args.data for args, *_ in jobs} - {"auto"}
        summaries = []
        failures = []
        for args, *job in jobs:
            if len(data) == 1:                          # one run had it, the others take it
                args.data = min(data)
            try:
                summaries.append(run(args, *job))
            except FloatingPointError as error:         # the other models go on
                failures.append(f"{args.model}: {error}")
    print(*summaries, sep="\n")
    return failures


def main(argv):
    given = parse(argv)
    plans = [given]
    if given.get("model") == "all":
        plans = [given | {"model": name} for name in MODELS]
        if "eval" in given:
            sys.exit("--eval FILE: leave out --model, or name one")
    if given.get("device", DEVICE) == "cuda":
        if not torch.cuda.is_available():
            sys.exit("--device cuda: there is no GPU, try --device cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        wait = datetime.timedelta(days=1)               # for a download or a test
        torch.distributed.init_process_group(timeout=wait)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if len(plans) > 1:
        print(f"all nine take about {ALL} times as long as s4, the first one", flush=True)
    keep_freed_memory()
    try:
        failures = run_all(plans)
    except KeyboardInterrupt:
        sys.exit("\nStopped. --resume goes on after the last whole epoch, if any.")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    if failures:
        sys.exit("\n".join(failures))


# ---- files and progress ----
def lock(given):
    """A file in the folder of the run that no other run can lock while it is open (not on
    Windows); the system closes it when the process ends, in whatever way."""
    flags = DEFAULTS | NOT_STORED | given
    folder = flags["out"] / flags["model"]
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    if os.name == "posix":
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {folder}: wait for it, or take "
                             "another --out") from None
    return file


def save(args, net, optimizer, history):
    """last.pt, best.pt if this epoch is the first with the best accuracy, and the rest."""
    folder = args.out / args.model
    stored = {name: value for name, value in vars(args).items() if name not in NOT_STORED}
    content = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(),
                "history": history, "args": stored}, content)
    if history[-1] is max(history, key=lambda row: row["val_accuracy"]):
        write(folder / "best.pt", content.getvalue())
    rows = [history[0].keys(), *(row.values() for row in history)]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write(folder / "metrics.csv", table.encode())
    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for ax, what in zip(figure.subplots(1, 2), ["loss", "accuracy"]):
        ax.plot(epochs, [row[f"train_{what}"] for row in history], ".-", label="training")
        ax.plot(epochs, [row[f"val_{what}"] for row in history], ".-", label="validation")
        ax.set(xlabel="epoch", ylabel=what, yscale="log" if what == "loss" else "linear")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    picture = io.BytesIO()
    figure.savefig(picture)
    write(folder / "curves.png", picture.getvalue())
    write(folder / "last.pt", content.getvalue())           # last: then all is there


def load(path):
    """What save wrote, or a ValueError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check(saved.keys() >= {"model", "optimizer", "history", "args"}
              and saved["args"].keys() >= DEFAULTS.keys(), "parts are missing")
        return saved
    except Exception as error:          # of many kinds, for a file that save did not write
        raise ValueError(f"{path} not found, damaged or no checkpoint: "
                         f"{type(error).__name__}") from None


def write(path, content):
    """Replace a file: there is the old one or the new one, never half of it."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def track(items, what, rest=0):
    """Yield the items; after ten seconds and then every minute, print the time left for
    them and for rest more, each as long as one of them."""
    start = time.monotonic()
    due = start + 10
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now >= due:
            due = now + 60
            left = (now - start) / done * (len(items) + rest - done) / 60
            print(f"{what} {done}/{len(items)}, {left:.1f} min left", flush=True)


def keep_freed_memory():
    """Have Linux keep freed memory, not clear it anew: 2 to 3 times as fast on a CPU."""
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4        # of malloc.h
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)                     # one heap for all sizes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)       # that does not shrink
        libc.mallopt(M_TOP_PAD, 2**28)                  # and grows by 256 MB


if __name__ == "__main__":
    main(sys.argv[1:])
