"""Train a network of state space layers on images that it reads pixel by pixel.

    python example.py --data builtin                        # some minutes, no download
    python example.py --model s4d                           # CIFAR-10: a day or two on a CPU
    python example.py --model s4d --resume                  # after Ctrl-C or a crash
    python example.py --model s4d --eval runs/s4d/best.pt   # in every mode
    python example.py --model all                           # one after the other, compared
    torchrun --nproc_per_node=2 example.py --model s4d      # several processes or GPUs

Sequential CIFAR-10: the network reads an image as 1024 pixels, row by row, and names its
class at the end; the images are not augmented. The data is downloaded once (170 MB); if
that fails, images made here replace it. After ten steps a line says what the run will cost.

Each epoch leaves in runs/<model>/ last.pt, which holds all it takes to go on bit for bit,
best.pt (by validation accuracy), metrics.csv and curves.png; the test, result.json.
The order of this file: models, network, recipe, evaluation, data, command line, files.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import importlib
import io
import json
import math
import os
import socket
import sys
import tarfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

try:
    import fcntl
except ImportError:         # Windows: two runs in one folder are not told apart there
    fcntl = None

# The class of a layer, its options, and defaults of flags, for about 200,000 parameters.
# cost: the time for an epoch, s4d being 1. Activation "none": the layer mixes the features.
MODELS = {
    "s4": {"layer": "s4.S4", "flags": {"d_state": 32}, "cost": 1.3},
    "s4d": {"layer": "s4d.S4D", "cost": 1},
    "lssl": {"layer": "lssl.LSSL", "cost": 1.3},
    "dss": {"layer": "dss.DSS", "cost": 1.1},
    "gss": {"layer": "gss.GSS", "options": {"expand": 1}, "flags": {"activation": "none"},
            "cost": 1.1},
    "s5": {"layer": "s5.S5", "cost": 0.9},
    "lru": {"layer": "lru.LRU", "flags": {"d_state": 32}, "cost": 0.9,
            "options": {"r_min": 0.99, "r_max": 0.9999, "max_phase": 0.314}},
    "selective_scan": {"layer": "selective_scan.SelectiveSSM", "options": {"lr": 1e-3},
                       "flags": {"d_state": 16}, "cost": 4.6},
    "mamba": {"layer": "selective_scan.Mamba", "options": {"lr": 1e-3}, "cost": 5.2,
              "flags": {"d_state": 16, "n_layers": 2, "activation": "none"}},
}
ACTIVATIONS = ["glu", "half_glu1", "half_glu2", "gelu", "none"]


# ---- the network: copy these two classes and check(), they need torch alone ----
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
        self.norm = nn.LayerNorm(d_model) if norm == "layer" else nn.BatchNorm1d(d_model)
        self.dropout = nn.Dropout1d(dropout)
        if activation == "glu":
            self.out = nn.Conv1d(d_model, 2 * d_model, 1)
            self.gate = nn.GLU(dim=1)
        elif activation in ("half_glu1", "half_glu2"):
            self.out = nn.Conv1d(d_model, d_model, 1)

    def normalize(self, x):
        """Over the h features of each step; x (b, h, l)."""
        if isinstance(self.norm, nn.LayerNorm):
            return self.norm(x.mT).mT.contiguous()
        return self.norm(x)

    def mix(self, y):
        """Activation and mixing of the features of each step, (b, h, l) -> (b, h, l)."""
        if self.activation == "none":
            return y
        g = F.gelu(y)
        if self.activation == "gelu":
            return g
        g = self.dropout(g)
        z = self.out(g)                                     # (b, h, l), glu: (b, 2h, l)
        if self.activation == "glu":
            return self.gate(z)
        if self.activation == "half_glu1":
            return g * z.sigmoid()
        return y * z.sigmoid()

    def forward(self, x, state=None, *, rate=1.0):
        """x (b, h, l), state or None -> (b, h, l), next state or None."""
        check(x.dim() == 3 and x.shape[1] == self.d_model,
              f"x is {tuple(x.shape)}: pass (b, {self.d_model}, l)")
        u = self.normalize(x) if self.prenorm else x
        y, state = self.ssm(u, state, rate=rate)
        x = x + self.dropout(self.mix(y))
        return (x if self.prenorm else self.normalize(x)), state

    def step(self, x, state, *, rate=1.0, discrete=None):
        """One step: x (b, h), state -> (b, h), next state. discrete: of ssm.discretize."""
        check(x.dim() == 2 and x.shape[1] == self.d_model,
              f"x is {tuple(x.shape)}: pass (b, {self.d_model})")
        u = self.norm(x) if self.prenorm else x
        y, state = self.ssm.step(u, state, rate=rate, discrete=discrete)
        x = x + self.dropout(self.mix(y[..., None]))[..., 0]        # a sequence of one step
        return (x if self.prenorm else self.norm(x)), state


class StackedSSM(nn.Module):
    """Encoder, blocks and head, with the interface of the layers.

    ssm: function d_model -> state space layer, or a list of them, one for each block
    d_input, d_output: features of a step: a number, or several as (height, width, channels)
        for video, whose frames are flattened into features
    pool: True: classify by the mean of all steps so far; False: an output for every step
    options: those of SequenceLayer
    A state is (states of the layers, sum of the steps (b, h), their number). To generate
    n steps from an initial value, pass that value followed by n - 1 zeros, with pool=False.
    """
    def __init__(self, ssm, d_input, d_output, *, d_model=128, n_layers=4, pool=True,
                 **options):
        super().__init__()
        self.d_input = torch.Size([d_input] if isinstance(d_input, int) else d_input)
        self.d_output = torch.Size([d_output] if isinstance(d_output, int) else d_output)
        check(min(*self.d_input, *self.d_output, d_model, n_layers) > 0,
              f"{d_input=}, {d_output=}, {d_model=}, {n_layers=}: pass positive numbers")
        functions = ssm if isinstance(ssm, list) else [ssm] * n_layers
        check(len(functions) == n_layers,
              f"ssm has {len(functions)} functions, {n_layers=}: pass one for each block")
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
        """x (b, l, *d_input), state or None -> (b, *d_output) or, without pool,
        (b, l, *d_output), and the next state or None."""
        check(x.dim() > 1 and x.shape[2:] == self.d_input and x.shape[1] > 0,
              f"x is {tuple(x.shape)}: pass (b, l, *{tuple(self.d_input)})")
        if state is not None:
            self.check_state(state)
        states, total, count = state or ([None] * len(self.layers), 0, 0)
        x = self.encoder(((x - self.mean) / self.std).flatten(2))           # (b, l, h)
        x = x.mT.contiguous()                                               # (b, h, l)
        after = []
        for layer, before in zip(self.layers, states):
            x, now = layer(x, before, rate=rate)
            after.append(now)
        total = total + x.sum(-1, dtype=self.mean.dtype)                    # (b, h)
        count = count + x.shape[-1]
        y = self.head(total / count if self.pool else x.mT).unflatten(-1, self.d_output)
        return y, (None if state is None else (after, total, count))

    def step(self, x, state, *, rate=1.0, discrete=None):
        """One step: x (b, *d_input), state -> (b, *d_output), next state.
        discrete: what discretize(rate) returned, for many steps."""
        check(x.dim() > 0 and x.shape[1:] == self.d_input,
              f"x is {tuple(x.shape)}: pass (b, *{tuple(self.d_input)})")
        self.check_state(state)
        states, total, count = state
        discrete = discrete or [None] * len(self.layers)
        x = self.encoder(((x - self.mean) / self.std).flatten(1))           # (b, h)
        after = []
        for layer, before, matrices in zip(self.layers, states, discrete, strict=True):
            x, now = layer.step(x, before, rate=rate, discrete=matrices)
            after.append(now)
        total = total + x
        count = count + 1
        y = self.head(total / count if self.pool else x).unflatten(-1, self.d_output)
        return y, (after, total, count)

    def check_state(self, state):
        check(state is not None and len(state[0]) == len(self.layers),
              "state: pass one of initial_state(), with one state for each layer")


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
        lambda d_model: layer(d_model, args.d_state, **model.get("options", {})),
        1 if args.grayscale else 3, 10, d_model=args.d_model, n_layers=args.n_layers,
        norm=args.norm, prenorm=args.prenorm, activation=args.activation,
        dropout=args.dropout)


def load_network(path):
    """The network of a checkpoint, ready for use:
        net = load_network("runs/s4d/best.pt")
        scores, _ = net(images)         # images (b, 1024, 3) of 0 to 255 -> (b, 10)
    """
    saved = load(Path(path))
    net = build_network(Namespace(**saved["args"]))
    net.load_state_dict(saved["model"])
    return net.eval()


# ---- the recipe of the official S4 example; from here on it is ordinary PyTorch ----
def param_groups(model, lr, weight_decay):
    """Groups for AdamW. What a layer lists in ssm_lr (A, B, dt) gets the rate given there,
    at most lr, and no weight decay. Differs from the official example: vectors (biases,
    norms, D) and parameters marked _no_weight_decay do not decay either."""
    ssm_lr = {}
    for module in model.modules():
        for name, rate in getattr(module, "ssm_lr", {}).items():
            ssm_lr[module.get_parameter(name)] = min(rate, lr)
    groups = {}
    for name, parameter in model.named_parameters():
        rate = ssm_lr.get(parameter, lr)
        vector = parameter.ndim == 1 or name.split(".")[-1] == "D"      # (m, h) in s4, lssl
        spared = vector or getattr(parameter, "_no_weight_decay", False)
        decay = 0.0 if spared or parameter in ssm_lr else weight_decay
        if parameter.requires_grad:
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()]


def set_learning_rates(optimizer, progress):
    """A cosine: the full rates where training begins, at progress 0, and 0 at 1."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * (1 + math.cos(math.pi * progress)) / 2


class Diverged(Exception):
    """The loss is no longer a number."""


def train(args, net, optimizer, history, images, labels, after, folder):
    """Train from the epoch after the history, which is returned with an entry for each
    epoch. after: what the test costs, in images trained on, for the time left."""
    indices = torch.arange(len(images), device=images.device)
    validation = indices[::10]
    training = indices[indices % 10 > 0]
    sample = images[training[:5000]].float()
    net.mean.copy_(sample.mean((0, 1)))
    net.std.copy_(sample.std((0, 1)).clamp(min=1))          # constant images stay finite
    model = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.monotonic()
        row = {"epoch": epoch}
        set_learning_rates(optimizer, (epoch - 1) / args.epochs)    # one rate an epoch
        results = train_epoch(args, epoch, model, optimizer, images, labels, training, after)
        row["train_loss"], row["train_accuracy"] = results.mean(1).tolist()
        row["seconds"] = round(time.monotonic() - start, 2)
        scores = evaluate(args, net, images[validation], "validation")
        row["val_loss"] = F.cross_entropy(scores, labels[validation]).item()
        right = scores.argmax(1) == labels[validation]
        row["val_accuracy"] = right.float().mean().item()
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            step = results[0].isfinite().sum()
            raise Diverged(
                f"{args.model} diverged: the loss of epoch {epoch} is not finite after step "
                f"{step}. Start again with --lr below {args.lr:g} or --weight-decay below "
                f"{args.weight_decay:g}. What is saved is kept.")
        history.append(row)
        if RANK == 0:
            save(args, net, optimizer, history, folder)
        print("epoch {epoch}: loss {train_loss:.4g}, {train_accuracy:.2%}; validation "
              "{val_loss:.4g}, {val_accuracy:.2%}; {seconds} s".format(**row), flush=True)
    return history


def train_epoch(args, epoch, model, optimizer, images, labels, indices, after=0):
    """Train on the images indices. Returns loss and accuracy of each step: (2, steps)."""
    seed = args.seed * 10**6 + epoch                    # a resumed run draws the same
    torch.manual_seed(seed)                             # one order for all processes
    share = min(args.batch_size, len(indices)) // WORLD
    steps = len(indices) // (share * WORLD)
    order = indices[torch.randperm(len(indices))[:steps * WORLD * share].to(indices.device)]
    batches = order.view(steps, WORLD, share)[:, RANK]      # (steps, share)
    torch.manual_seed(seed * WORLD + RANK)              # dropout of its own in each
    results = torch.zeros(2, steps, device=images.device)
    rest = (work(args.epochs - epoch, len(images)) + after) / args.batch_size
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
        if i == 9 and epoch == 1:
            seconds = (time.monotonic() - start) / (10 * share * WORLD)
            print(cost(args, seconds, len(images), after), flush=True)
    if WORLD > 1:
        torch.distributed.all_reduce(results)
    return results / WORLD


def work(epochs, n):
    """The cost of epochs of n images, in images trained on: nine in ten are, and the tenth
    is for validation, where an image costs a third."""
    return epochs * n * (0.9 + 0.1 / 3)


def cost(args, seconds, n, after):
    """A line about what the run will take, at so many seconds for an image trained on."""
    def about(images):
        minutes = images * seconds / 60
        return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"

    line = (f"{args.data} on {args.device}: about {about(work(1, n))} an epoch, "
            f"{about(work(args.epochs, n) + after)} for {args.epochs} epochs")
    if args.data != "builtin":
        line += (f"; --data builtin takes about {about(work(4, 2000) + after_training(1000))}"
                 f", --epochs 10 about {about(work(10, n) + after)}")
    return line


# ---- evaluation, in every mode ----
def evaluate(args, net, images, what, piece=None, rate=1.0):
    """Class scores (n, 10) of images (n, l, c), read whole or in pieces of piece pixels."""
    net.eval()
    found = []
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, args.amp):
        for batch in track(images.split(64), f"{what}, batch"):
            found.append(read(net, batch, piece, rate).float())
    return torch.cat(found)


def read(net, images, piece, rate):
    """Class scores (b, 10) after the last pixel; piece=1: by the recurrence."""
    if piece is None:
        return net(images, rate=rate)[0]
    state = net.initial_state(len(images))
    if piece == 1:
        discrete = net.discretize(rate)
        for pixel in images.unbind(1):
            scores, state = net.step(pixel, state, discrete=discrete)
    else:
        for pixels in images.split(piece, dim=1):
            scores, state = net(pixels, state, rate=rate)
    return scores


def milliseconds_per_step(net, image):
    """The median for one pixel through the whole network, at batch 1."""
    times = []
    with torch.no_grad():
        state = net.initial_state(1)
        discrete = net.discretize()
        for pixel in image[:200]:
            start = time.perf_counter()
            scores, state = net.step(pixel[None], state, discrete=discrete)
            scores.sum().item()                             # waits for a GPU
            times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def compare_modes(args, net, images, labels):
    """Print and return the accuracy in every mode. Half rate: u_k ends at sample k, so
    pixels 1, 3, 5 ... are read; rate 2 takes twice the step size, rate 1 is the control."""
    modes = [("whole", images, None, 1.0),
             ("in pieces of 300 pixels", images, 300, 1.0),
             ("pixel by pixel", images[:args.eval_limit], 1, 1.0),
             ("every second pixel, rate 2", images[:, 1::2], None, 2.0),
             ("every second pixel, rate 1", images[:, 1::2], None, 1.0)]
    print("test images read             accuracy  images  unlike whole")
    results = {}
    for mode, x, piece, rate in modes:
        found = evaluate(args, net, x, mode, piece, rate).argmax(1)
        if mode == "whole":
            whole = found
        accuracy = (found == labels[:len(x)]).float().mean().item()
        unlike = (found != whole[:len(x)]).sum().item()
        results[mode] = {"accuracy": accuracy, "images": len(x), "unlike whole": unlike}
        print(f"{mode:<28}{accuracy:>9.2%}{len(x):>8}{unlike:>14}", flush=True)
    return results


def after_training(n_test):
    """The cost of compare_modes, in images trained on: it reads the test images three
    times, at a third each, and 256 pixel by pixel, at about the whole."""
    return n_test + 256


def compare_models(out):
    print("           model  parameters  test accuracy  s per epoch  ms per step")
    for name in MODELS:
        path = out / name / "result.json"
        if path.exists():
            result = json.loads(path.read_text())
            print(f"{name:>16}{result['parameters']:>12}"
                  f"{result['modes']['whole']['accuracy']:>15.2%}"
                  f"{result['seconds per epoch']:>13.1f}{result['ms per step']:>13.2f}")


# ---- data: images (n, 1024, channels) uint8, labels (n) ----
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@functools.cache                                        # a failed download is tried once
def find_cifar(data_dir):
    """The folder of CIFAR-10, downloaded if need be, or None if that fails."""
    folder = data_dir / FOLDER
    archive = data_dir / "cifar-10.tar.gz"
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
    return None


def find_data(args):
    """The folder of CIFAR-10, or None for the built-in images."""
    if args.data == "builtin":
        return None
    found = [None]
    if RANK == 0:
        found = [find_cifar(args.data_dir)]
        if found == [None] and args.data == "cifar10":
            sys.exit(f"no CIFAR-10 in {args.data_dir}, and the download failed")
    if WORLD > 1:
        torch.distributed.broadcast_object_list(found)      # the others wait here
    if found == [None]:
        print("No CIFAR-10: training on the built-in images", flush=True)
    return found[0]


def load_data(args, folder):
    """Images and labels to train on, then for the test; folder None: the built-in ones."""
    if folder is None:
        parts = [builtin_images(2000, args.seed), builtin_images(1000, args.seed + 10**6)]
    else:
        parts = [read_batches(folder, FILES[:-1]), read_batches(folder, FILES[-1:])]
    tensors = []
    for images, labels in parts:
        if args.grayscale:
            images = (images @ np.float32([[0.299], [0.587], [0.114]])).astype(np.uint8)
        tensors.append(torch.from_numpy(images[:args.limit]).to(args.device))
        tensors.append(torch.from_numpy(labels[:args.limit]).to(args.device))
    return tensors


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


# ---- the command line ----
RANK = int(os.environ.get("RANK", 0))               # of this process, set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))        # number of processes
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULTS = {
    "model": "s4d", "d_model": 128, "d_state": 64, "n_layers": 4, "norm": "layer",
    "prenorm": False, "activation": "glu", "dropout": 0.1, "grayscale": False,
    "data": "auto", "data_dir": Path("data"), "limit": None, "lr": 0.01,
    "weight_decay": 0.01, "amp": False, "seed": 0, "device": DEVICE, "out": Path("runs"),
    "eval_limit": 256, "resume": False, "eval": None}
OF_DATA = {"cifar10": {"epochs": 100, "batch_size": 64},
           "builtin": {"epochs": 4, "batch_size": 16}}
NOT_STORED = ["data_dir", "out", "eval_limit", "device", "resume", "eval"]      # in last.pt


def number(kind, low, high=10**6):
    """A type for argparse that says its limits."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(
                f"{text}: pass a number from {low} to {high:g}")
        return kind(text)
    return number


def build_parser():
    """Only what is given on the command line is in the result: no defaults."""
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
    add("--activation", choices=ACTIVATIONS, help="default glu; gss and mamba none")
    add("--dropout", type=number(float, 0, 1), help="probability, default 0.1")
    add("--grayscale", action="store_true", help="one channel, not three")
    add("--data", choices=["auto", "cifar10", "builtin"], help="see above")
    add("--data-dir", type=Path, help="of CIFAR-10, default data")
    add("--limit", type=number(int, 10 * WORLD), help="images to use, default all")
    add("--epochs", type=number(int, 1), help="default 100, for built-in images 4")
    add("--batch-size", type=number(int, WORLD), help="default 64, built-in images 16")
    add("--lr", type=number(float, 0, 1e9), help="learning rate, default 0.01")
    add("--weight-decay", type=number(float, 0, 1e9), help="default 0.01")
    add("--amp", action="store_true", help="bfloat16 for the linear maps")
    add("--seed", type=number(int, 0, 10**9), help="default 0")
    add("--device", choices=["cpu", "cuda"], help="default cuda, if any")
    add("--out", type=Path, help="folder of the runs, default runs")
    add("--eval-limit", type=number(int, 1), help="images to read pixel by pixel: 256")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on after the last whole epoch")
    add("--eval", type=Path, metavar="FILE", help="a checkpoint to evaluate in every mode")
    return parser


def settle(given):
    """The flags (given, else of the checkpoint, else of MODELS, else DEFAULTS), and the
    checkpoint or None. given: a dict of what stands on the command line."""
    given = {name: value for name, value in given.items() if value != "auto"}
    flags = DEFAULTS | given
    path = flags["eval"] or flags["out"] / flags["model"] / "last.pt"
    saved = None
    stored = {}
    if flags["eval"] or path.exists():
        check(flags["eval"] or flags["resume"],
              f"{path} is of an earlier run: go on with --resume, or take another --out")
        saved = load(path)
        stored = saved["args"]
        compare_flags(given, stored, path)
    of_model = MODELS[stored.get("model", flags["model"])].get("flags", {})
    return Namespace(**DEFAULTS | of_model | stored | given), saved


def compare_flags(given, stored, path):
    """Whether the given flags go with those of the checkpoint."""
    for name, before in stored.items():
        now = given.get(name, before)
        if now == before or ("eval" in given and name in ("data", "limit")):
            continue
        longer = name == "epochs" and "resume" in given and now > before
        flag = "--" + name.replace("_", "-")
        check(longer, f"{flag} is {now} here, but {before} in {path}. Another --out?")


def prepare(given):
    """Flags, network, optimizer and history as they are before the next epoch."""
    try:
        args, saved = settle(given)
        net = build_network(args).to(args.device)
        optimizer = torch.optim.AdamW(param_groups(net, args.lr, args.weight_decay))
        history = []
        if saved:
            net.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            history = saved["history"]
    except (ImportError, KeyError, ValueError, RuntimeError) as error:
        name = given.get("model", DEFAULTS["model"])
        sys.exit(f"--model {name} cannot be built: {str(error).splitlines()[0]}")
    return args, net, optimizer, history


def run(given):
    """Train and test one model."""
    flags = DEFAULTS | given
    folder = flags["out"] / flags["model"]
    args, net, optimizer, history = prepare(given)
    result = folder / "result.json"
    if args.resume and history and len(history) == args.epochs and result.exists():
        print(f"already finished, {args.epochs} epochs: {result.read_text()}")
        return
    size = sum(parameter.numel() for parameter in net.parameters())
    print(f"{args.model}: {size:,} parameters on {args.device}", flush=True)
    for group in optimizer.param_groups:
        n = sum(parameter.numel() for parameter in group["params"])
        print("{:>9,} at the rate {initial_lr:g}, decay {weight_decay:g}".format(n, **group))
    data = find_data(args)
    args.data = "cifar10" if data else "builtin"
    args = Namespace(**OF_DATA[args.data] | vars(args))
    images, labels, test_images, test_labels = load_data(args, data)
    print(f"{args.data}: {len(images)} images, {len(test_images)} for the test", flush=True)
    if args.eval:
        compare_modes(args, net, test_images, test_labels)
        return
    write(result, b"")                              # now, if the folder cannot be written
    result.unlink(missing_ok=True)
    after = after_training(len(test_images))
    history = train(args, net, optimizer, history, images, labels, after, folder)
    if RANK == 0:
        net.load_state_dict(load(folder / "best.pt")["model"])
        modes = compare_modes(args, net, test_images, test_labels)
        content = {"parameters": size, "modes": modes,
                   "seconds per epoch": float(np.median([r["seconds"] for r in history])),
                   "ms per step": milliseconds_per_step(net, test_images[0])}
        print("{seconds per epoch:.1f} s per epoch; {ms per step:.2f} ms for a pixel through "
              "the network, at batch 1 (medians)".format(**content), flush=True)
        write(result, json.dumps(content, indent=1).encode())


def main(argv):
    given = vars(build_parser().parse_args(argv))
    device = given.get("device", DEVICE)
    if device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("--device cuda: there is no GPU, try --device cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        torch.distributed.init_process_group()
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    keep_freed_memory()
    plans = [given]
    if given.get("model") == "all":
        plans = [given | {"model": name} for name in MODELS]
    failures = []
    try:
        for plan in plans:
            prepare(plan)                           # all of them, before the first starts
        for plan in plans:
            try:
                run(plan)
            except Diverged as error:
                failures.append(str(error))
                print(error, flush=True)
    except KeyboardInterrupt:
        sys.exit("\nStopped. With --resume, training goes on after the last whole epoch,\n"
                 "or starts from the beginning if there is none.")
    if len(plans) > 1 and RANK == 0:
        compare_models(given.get("out", DEFAULTS["out"]))
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    if failures:
        sys.exit("\n".join(failures))


# ---- files and progress ----
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
    write(folder / "curves.png", draw_curves(history))


def draw_curves(history):
    """A picture of loss and accuracy against the epochs: the bytes of a PNG."""
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
    return picture.getvalue()


def load(path):
    """What save wrote, or a ValueError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("model", "optimizer", "history", "args")}
    except Exception as error:          # of many kinds, for a file that save did not write
        raise ValueError(f"{path} not found, damaged or no checkpoint: "
                         f"{type(error).__name__}") from None


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
    every second, otherwise a line after ten seconds and then every minute."""
    in_place = sys.stdout.isatty()
    pause = 1 if in_place else 60
    end = "\033[K\r" if in_place else "\n"              # clears the rest of the line
    if in_place:
        print(what, end=end, flush=True)
    start = time.monotonic()
    due = start + min(pause, 10)
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now >= due:
            due = now + pause
            left = (now - start) / done * (len(items) + rest - done) / 60
            print(f"{what} {done}/{len(items)}, {left:.1f} min left", end=end, flush=True)


def keep_freed_memory():
    """Have Linux keep freed memory, not clear it anew: 2 to 3 times as fast on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)             # M_MMAP_MAX: one heap for all sizes
        libc.mallopt(-1, 2**31 - 1)     # M_TRIM_THRESHOLD: that does not shrink
        libc.mallopt(-2, 2**28)         # M_TOP_PAD: and grows by 256 MB


if __name__ == "__main__":
    main(sys.argv[1:])
