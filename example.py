"""Train a network of state space layers on images that it reads pixel by pixel.

    python example.py --model s4d                           # one model
    python example.py --model s4d --resume                  # after Ctrl-C or a crash
    python example.py --model s4d --eval runs/s4d/best.pt   # in every mode
    python example.py --model all                           # one after the other, compared
    torchrun --nproc_per_node=2 example.py --model s4d      # several processes or GPUs

Sequential CIFAR-10: an image is a sequence of 1024 pixels, row by row, and the network
names its class at the end. Pixels one above the other are 32 steps apart, so it has to
remember. The binary edition is downloaded once (170 MB; to unpickle the Python edition
would run code from the file). Without a network, built-in images take its place.

In runs/<model>/, after every epoch: last.pt and best.pt (by validation accuracy), all it
takes to go on, bit for bit as if never interrupted; metrics.csv and curves.png. At the end:
result.json, best.pt on the test images in every mode. No run overwrites another.
"""

import argparse
import csv
import ctypes
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import distributed
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
NETWORK = {"d_model": 128, "d_state": 64, "n_layers": 4, "norm": "layer", "prenorm": False,
           "activation": "glu", "dropout": 0.1, "grayscale": False}
RECIPE = {"lr": 0.01, "weight_decay": 0.01, "amp": False, "seed": 0}
LENGTH = {"cifar10": {"epochs": 100, "batch_size": 64},
          "builtin": {"epochs": 4, "batch_size": 16}}
STORED = ["model", "data", "limit", "epochs", "batch_size", *NETWORK, *RECIPE]

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)]
TEST_FILES = ["test_batch.bin"]
ATTEMPTS = 3                        # at the download
WAIT = 2                            # seconds between them

RANK = int(os.environ.get("RANK", 0))                   # of this process, set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))       # the same on its machine
WORLD = int(os.environ.get("WORLD_SIZE", 1))            # number of processes


def fail(message):
    """End the program with a line on stderr and exit status 1."""
    sys.exit(f"example.py: {message}")


def write(path, content):
    """Replace a file: there is the old one or the new one, never half of it."""
    part = path.with_name(f"{path.name}.part{RANK}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        fail(f"{path} could not be written: {error.strerror}")


def track(items, what, note=lambda: "", rest=0):
    """Yield the items, and print how far it is, note() and the time left.

    On a terminal every second in place, otherwise a line a minute. rest: how many items
    follow after these.
    """
    in_place = sys.stdout.isatty()
    start = time.monotonic()
    due = start + (1 if in_place else 5)
    if in_place:
        print(f"{what} 0 of {len(items)}", end="\r", flush=True)
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now >= due:
            due = now + (1 if in_place else 60)
            minutes = (now - start) / done * (len(items) + rest - done) / 60
            line = f"{what} {done} of {len(items)}{note()}, {minutes:.1f} min left"
            if in_place:
                print(f"{line:<79}", end="\r", flush=True)
            else:
                print(line, flush=True)
    if in_place:
        print(" " * 79, end="\r", flush=True)


# ---- data: images (n, 1024, channels) uint8, labels (n) ----

def download(folder):
    """Write CIFAR-10's files to a folder, test_batch.bin last.

    Raises OSError, EOFError, HTTPException or TarError.
    """
    with urllib.request.urlopen(URL, timeout=20) as response:
        size = int(response.headers.get("Content-Length", 0))
        content = bytearray()
        for _ in track(range(0, size, 10**6), "downloading CIFAR-10:", lambda: " MB"):
            content += response.read(10**6)
        content += response.read()                      # all, if the server gives no size
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise OSError(f"{URL} gave {len(content)} bytes with another sha256")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {member.name: member for member in archive if member.isfile()}
        missing = {f"{FOLDER}/{name}" for name in TRAIN_FILES + TEST_FILES} - files.keys()
        if missing:
            raise OSError(f"the archive has no file {min(missing)}")
        for name in TRAIN_FILES + TEST_FILES:           # only these, whatever else it holds
            write(folder / name, archive.extractfile(files[f"{FOLDER}/{name}"]).read())


def find_cifar(args):
    """The folder of CIFAR-10, downloaded if need be, or None for the built-in images."""
    folder = args.data_dir / FOLDER
    for place in (args.data_dir, folder):
        if (place / TEST_FILES[0]).exists():            # written last: all are there
            return place
    for attempt in range(1, ATTEMPTS + 1):
        try:
            download(folder)
            return folder
        except (OSError, EOFError, HTTPException, tarfile.TarError) as error:
            print(f"download failed, attempt {attempt} of {ATTEMPTS}: {error}", flush=True)
        if attempt < ATTEMPTS:
            time.sleep(WAIT)
    message = f"no CIFAR-10 in {args.data_dir}, and the download failed"
    if args.data == "cifar10" or WORLD > 1:     # processes must not choose differently
        fail(message)
    print(f"There is {message}. Training on the built-in images.", flush=True)
    return None


def read_batches(folder, names):
    """Images (n, 1024, 3) and labels (n) from records of label, red, green and blue."""
    batches = []
    for name in names:
        path = folder / name
        raw = np.fromfile(path, np.uint8) if path.is_file() else np.zeros(0, np.uint8)
        if raw.size == 0 or raw.size % 3073 or raw[::3073].max() > 9:
            fail(f"{path} is missing or damaged: no records of 3073 bytes with labels 0-9")
        print(f"{path}: {len(raw) // 3073} images", flush=True)
        batches.append(raw.reshape(-1, 3073))
    records = np.concatenate(batches)
    images = records[:, 1:].reshape(-1, 3, 1024).swapaxes(1, 2)
    return np.ascontiguousarray(images), records[:, 0]


def builtin_images(n, seed):
    """The built-in task: images (n, 1024, 3) and labels (n).

    An image has five bands of six rows, two tinted warm and three cold. WHICH two is the
    class (10 in all). The rest is random: brightness, noise, stripes. So neither the mean
    colour nor a few neighbouring pixels tell the class.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    pairs = np.array(list(itertools.combinations(range(5), 2)))             # (10, 2)
    warm = (pairs[labels, :, None] == np.arange(5)).any(1)                  # (n, 5)
    tint = np.where(warm, 1, -1) * rng.uniform(20, 40, (n, 5))
    tint = np.repeat(tint, 6, axis=1)                                       # (n, 30)
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


def load_data(args, device):
    """Training images and labels, test images and labels, on the device.

    Sets args.data to what they are, cifar10 or builtin.
    """
    folder = None if args.data == "builtin" else find_cifar(args)
    if folder:
        args.data = "cifar10"
        train = read_batches(folder, TRAIN_FILES)
        test = read_batches(folder, TEST_FILES)
    else:
        args.data = "builtin"
        train = builtin_images(2000, args.seed)
        test = builtin_images(1000, args.seed + 10**6)
    tensors = []
    for array in (*train, *test):
        array = array[:args.limit]
        if array.ndim == 1:
            array = array.astype(np.int64)
        elif args.grayscale:
            array = (array @ np.float32([[0.299], [0.587], [0.114]])).astype(np.uint8)
        tensors.append(torch.from_numpy(array).to(device))
    return tensors


# ---- network: the residual stream is (b, l, h), the layers read (b, h, l) ----

def check(ok, message):
    """Raise ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


class SequenceLayer(nn.Module):
    """Residual block norm(x + f(x)), or x + f(norm(x)) with prenorm; f = dropout(mix(ssm)).

    ssm: state space layer of h = d_model features
    norm: layer or batch (under torchrun, of the images of the process)
    activation: mix(y) is, with g = dropout(gelu(y)), one of
        glu: (V g) * sigmoid(W g), half_glu1: g * sigmoid(W g), half_glu2: y * sigmoid(W g),
        gelu: gelu(y), none: y
    dropout: probability; a feature is dropped at all steps of a sequence or at none
    Raises ValueError for what is not listed here, and for an x of another rank or width.
    """

    ACTIVATIONS = ("glu", "half_glu1", "half_glu2", "gelu", "none")

    def __init__(self, ssm, d_model, *, norm="layer", prenorm=False, activation="glu",
                 dropout=0.1):
        super().__init__()
        check(norm in ("layer", "batch"), f"{norm=}: choose layer or batch")
        check(activation in self.ACTIVATIONS,
              f"{activation=}: choose from {', '.join(self.ACTIVATIONS)}")
        check(0 <= dropout <= 1, f"{dropout=}: pass a probability, 0 to 1")
        self.ssm = ssm
        self.d_model = d_model
        self.prenorm = prenorm
        self.activation = activation
        self.dropout = dropout
        self.norm = nn.LayerNorm(d_model) if norm == "layer" else nn.BatchNorm1d(d_model)
        if "glu" in activation:
            self.out = nn.Linear(d_model, 2 * d_model if activation == "glu" else d_model)

    def normalize(self, x):
        """(b, l, h) -> (b, l, h), where every step counts as a sample."""
        return self.norm(x.flatten(0, 1)).view_as(x)

    def mask(self, y):
        """What dropout multiplies y (b, l, h) with: (b, 1, h)."""
        ones = y.new_ones(len(y), 1, self.d_model)
        return F.dropout(ones, self.dropout, self.training)

    def mix(self, y):
        """(b, l, h) -> (b, l, h), see activation."""
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

        rate: factor on the step size; discrete: ssm.discretize(rate), for one step, l = 1
        """
        check(x.dim() == 3 and x.shape[2] == self.d_model,
              f"x is {tuple(x.shape)}: pass (b, l, {self.d_model})")
        check(discrete is None or x.shape[1] == 1,
              f"x is {tuple(x.shape)}: with discrete pass one step, l = 1")
        u = self.normalize(x) if self.prenorm else x
        if discrete is None:
            y, state = self.ssm(u.mT.contiguous(), state, rate=rate)        # (b, h, l)
            y = y.mT.contiguous()                                           # (b, l, h)
        else:
            y, state = self.ssm.step(u[:, 0], state, discrete=discrete)     # (b, h)
            y = y[:, None]                                                  # (b, 1, h)
        y = self.mix(y)
        x = torch.addcmul(x, y, self.mask(y))               # x + y * mask, in one pass
        return (x if self.prenorm else self.normalize(x)), state


class StackedSSM(nn.Module):
    """Encoder, blocks and head, with the interface of the layers.

    ssm: function d_model -> state space layer; options: those of SequenceLayer
    d_input, d_output: features of a step, a number or several, as (height, width, channels)
    pool: True: classify by the mean of all steps so far; False: an output for every step
    A state is (states of the layers, sum of the steps (b, h), their number). The buffers
    mean and std normalize the input.
    Raises ValueError for sizes below 1, and for an x of another rank or size.
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
        """The state before the first step."""
        states = [layer.ssm.initial_state(batch_size) for layer in self.layers]
        return states, self.mean.new_zeros(batch_size, self.d_model), 0

    def discretize(self, rate=1.0):
        """The discrete-time matrices of every layer, once for many steps."""
        return [layer.ssm.discretize(rate) for layer in self.layers]

    def step(self, x, state, *, rate=1.0, discrete=None):
        """One step: x (b, *d_input), state -> (b, *d_output), next state."""
        y, state = self(x[:, None], state, discrete=discrete or self.discretize(rate))
        return (y if self.pool else y[:, 0]), state

    def forward(self, x, state=None, *, rate=1.0, discrete=None):
        """A sequence or its next piece: x (b, l, *d_input), state or None -> y, next state.

        y is (b, *d_output) with pool, otherwise (b, l, *d_output)
        rate, discrete: as in SequenceLayer, discrete for each of the layers
        """
        check(x.dim() > 1 and x.shape[2:] == self.d_input and x.shape[1] > 0,
              f"x is {tuple(x.shape)}: pass (b, l, *{tuple(self.d_input)})")
        states, total, count = state or ([None] * len(self.layers), 0, 0)
        x = self.encoder(((x - self.mean) / self.std).flatten(2))           # (b, l, h)
        after = []
        for i, layer in enumerate(self.layers):
            matrices = discrete[i] if discrete else None
            x, next_state = layer(x, states[i], rate=rate, discrete=matrices)
            after.append(next_state)
        total = total + x.sum(1, dtype=self.mean.dtype)                     # (b, h)
        count = count + x.shape[1]
        y = self.head(total / count if self.pool else x).unflatten(-1, self.d_output)
        return y, (None if state is None else (after, total, count))


def build_network(args):
    """The network that the arguments ask for. Only the file of its model is imported."""
    model = MODELS[args.model]
    file, name = model["layer"].split(".")
    if not Path(__file__).with_name(f"{file}.py").exists():
        fail(f"--model {args.model} needs {file}.py, which is not here")
    layer = getattr(importlib.import_module(file), name)
    options = model.get("options", {})
    torch.manual_seed(args.seed)
    try:
        return StackedSSM(
            lambda d_model: layer(d_model, args.d_state, **options),
            1 if args.grayscale else 3, 10, d_model=args.d_model, n_layers=args.n_layers,
            norm=args.norm, prenorm=args.prenorm, activation=args.activation,
            dropout=args.dropout)
    except (ValueError, RuntimeError) as error:             # RuntimeError: out of memory
        fail(f"--model {args.model} cannot be built: {error}")


# ---- recipe: AdamW, slow and without decay where a layer says so, and a cosine ----

def param_groups(model, lr, weight_decay):
    """Groups for AdamW, with every trainable parameter exactly once.

    What a layer lists in ssm_lr (A, B, dt) gets the learning rate given there, and is not
    decayed. Of the rest, matrices are decayed, and vectors (biases, norms, D) are not.
    """
    ssm_lr = {}
    for module in model.modules():
        for name, rate in getattr(module, "ssm_lr", {}).items():
            ssm_lr[module.get_parameter(name)] = rate
    groups = {}
    for name, parameter in model.named_parameters():
        key = (lr, weight_decay)
        if parameter in ssm_lr:
            key = (ssm_lr[parameter], 0.0)
        elif parameter.ndim == 1 or name.split(".")[-1] == "D":     # (m, h) in s4 and lssl
            key = (lr, 0.0)
        if parameter.requires_grad:
            groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()]


def cosine(progress):
    """Factor on the learning rates: 1 where training begins, at progress 0, and 0 at 1."""
    return (1 + math.cos(math.pi * progress)) / 2


# ---- training ----

def plot(path, histories):
    """A picture of {model: history}: validation, and of a single model training as well."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    panels = [("epoch", "loss"), ("epoch", "accuracy"), ("seconds", "accuracy")]
    for ax, (x, y) in zip(figure.subplots(1, 3), panels):
        for name, history in histories.items():
            table = {key: [row[key] for row in history] for key in history[0]}
            table["seconds"] = np.cumsum(table["seconds"])
            ax.plot(table[x], table[f"val_{y}"], ".-", label=name)
            if len(histories) == 1:
                ax.plot(table[x], table[f"train_{y}"], ".:", label=f"{name}, training")
        ax.set(xlabel="epoch" if x == "epoch" else "seconds of training", ylabel=y)
        ax.locator_params("x", integer=True)                # no half epochs
        ax.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    write(path, picture.getvalue())


def save(args, net, optimizer, history, folder):
    """Write the checkpoints, metrics.csv and curves.png after an epoch."""
    stored = {name: getattr(args, name) for name in STORED}
    content = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(),
                "history": history, "args": stored}, content)
    if history[-1] is max(history, key=lambda row: row["val_accuracy"]):
        write(folder / "best.pt", content.getvalue())
    write(folder / "last.pt", content.getvalue())           # after best.pt: none gets lost
    table = io.StringIO()
    writer = csv.DictWriter(table, history[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write(folder / "metrics.csv", table.getvalue().encode())
    plot(folder / "curves.png", {args.model: history})


def load(path):
    """The checkpoint that save wrote, or the end of the program if the file is none."""
    if not path.exists():
        fail(f"{path}: not found")
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    try:
        saved = torch.load(content, map_location="cpu", weights_only=True)
    except Exception:               # of many kinds, for a file that torch did not write
        saved = None
    if not isinstance(saved, dict) or {*saved} != {"model", "optimizer", "history", "args"}:
        fail(f"{path} is damaged, or no checkpoint of this program")
    return saved


def read_images(args, net, images, what, piece=None, rate=1.0):
    """Class scores (n, 10) of images (n, l, c), read whole or in pieces of piece pixels."""
    net.eval()
    l = images.shape[1]
    step = piece or l
    pieces = list(itertools.product(images.split(64), range(0, l, step)))
    found = []
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, args.amp):
        discrete = net.discretize(rate) if piece == 1 else None
        for batch, first in track(pieces, f"{what}:"):
            if first == 0:
                state = net.initial_state(len(batch)) if piece else None
            pixels = batch[:, first:first + step]
            scores, state = net(pixels, state, rate=rate, discrete=discrete)
            if first + step >= l:
                found.append(scores.float())
    return torch.cat(found)


def evaluate(args, net, images, labels):
    """Mean loss and accuracy on images that are read whole."""
    scores = read_images(args, net, images, "validation")
    accuracy = (scores.argmax(1) == labels).float().mean()
    return F.cross_entropy(scores, labels).item(), accuracy.item()


def stop_if_diverged(args, epoch, losses):
    """End the program if one of an epoch's losses (steps) is not finite."""
    wrong = (~losses.isfinite()).nonzero().flatten().tolist()
    if wrong:
        fail(f"diverged: the loss of epoch {epoch}, step {wrong[0] + 1} is "
             f"{losses[wrong[0]]:g}. Start again with an --lr below {args.lr:g}. "
             "What the epochs before have saved is kept.")


def draw_batches(args, epoch, indices):
    """The images of each step in an epoch: (steps, share of this process).

    The random numbers of an epoch follow from the seed and its number, so that a resumed
    run draws the same. The order is the same in every process, dropout is not.
    """
    seed = args.seed * 10**6 + epoch
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed * WORLD + RANK)
    share = max(1, min(args.batch_size, len(indices)) // WORLD)
    steps = len(indices) // (share * WORLD)
    order = indices[order[:steps * WORLD * share].to(indices.device)]
    return order.view(steps, WORLD, share)[:, RANK]


def train_epoch(args, epoch, model, optimizer, images, labels, batches):
    """One step for each of the batches (steps, b). Returns mean loss and accuracy."""
    steps = len(batches)
    results = torch.zeros(2, steps, device=images.device)               # loss, accuracy

    def note():
        loss, accuracy = results[:, :i + 1].mean(1).tolist()
        return f": loss {loss:.4g}, accuracy {accuracy:.1%}"

    model.train()
    what = f"epoch {epoch}/{args.epochs}, step"
    for i, batch in enumerate(track(batches, what, note, (args.epochs - epoch) * steps)):
        progress = (epoch - 1 + i / steps) / args.epochs
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * cosine(progress)
        with torch.autocast(images.device.type, torch.bfloat16, args.amp):
            scores, _ = model(images[batch])
        loss = F.cross_entropy(scores.float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results[0, i] = loss.detach()
        results[1, i] = (scores.argmax(1) == labels[batch]).float().mean()
    if WORLD > 1:
        distributed.all_reduce(results)
        results /= WORLD
    stop_if_diverged(args, epoch, results[0])
    return results.mean(1).tolist()


def train(args, net, images, labels, folder, saved):
    """Train on images (n, l, c), labels (n), from the checkpoint saved or from the start.

    Every tenth image is for validation, whatever the seed and the limit. Returns the
    history, a dict for each epoch.
    """
    indices = torch.arange(len(images), device=images.device)
    training = indices[indices % 10 > 0]
    validation = indices[::10]
    sample = images[training[:5000]].float()
    net.mean.copy_(sample.mean((0, 1)))
    net.std.copy_(sample.std((0, 1)))
    optimizer = torch.optim.AdamW(param_groups(net, args.lr, args.weight_decay))
    history = []
    if saved:
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history = saved["history"]
    model = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.monotonic()
        batches = draw_batches(args, epoch, training)
        loss, accuracy = train_epoch(args, epoch, model, optimizer, images, labels, batches)
        seconds = round(time.monotonic() - start, 2)
        val_loss, val_accuracy = evaluate(args, net, images[validation], labels[validation])
        stop_if_diverged(args, epoch, torch.tensor([val_loss]))
        history.append({"epoch": epoch, "train_loss": loss, "train_accuracy": accuracy,
                        "val_loss": val_loss, "val_accuracy": val_accuracy,
                        "seconds": seconds})
        if RANK == 0:
            save(args, net, optimizer, history, folder)
        print(f"epoch {epoch}/{args.epochs}: train loss {loss:.4g} ({accuracy:.2%}), valid"
              f"ation {val_loss:.4g} ({val_accuracy:.2%}), {seconds:.0f} s", flush=True)
    return history


# ---- evaluation ----

def compare_modes(args, net, images, labels):
    """Print the accuracy in every mode. Returns {mode: accuracy}, and what was printed.

    differing: the number of predictions that are not those of the first mode
    """
    half = images[:, ::2]
    modes = [("in parallel", images, None, 1.0),
             ("in pieces of 300 pixels", images, 300, 1.0),
             ("every second pixel, rate 2", half, None, 2.0),
             ("every second pixel, rate 1", half, None, 1.0),
             ("pixel by pixel", images[:args.eval_limit], 1, 1.0)]
    table = ["test images read             accuracy  images  differing  images/s"]
    print(table[0], flush=True)
    accuracies = {}
    for mode, x, piece, rate in modes:
        start = time.monotonic()
        found = read_images(args, net, x, mode, piece, rate).argmax(1).cpu()
        speed = len(x) / (time.monotonic() - start)
        if not accuracies:
            reference = found
        accuracies[mode] = (found == labels[:len(x)].cpu()).float().mean().item()
        differing = (found != reference[:len(x)]).sum().item()
        table.append(f"{mode:<28}{accuracies[mode]:>9.2%}{len(x):>8}"
                     f"{differing:>11}{speed:>10.1f}")
        print(table[-1], flush=True)
    return accuracies, table


def score(args, net, images, labels, history, folder):
    """Read the test images with best.pt, and write result.json."""
    net.load_state_dict(load(folder / "best.pt")["model"])
    accuracies, table = compare_modes(args, net, images, labels)
    result = {"model": args.model, "data": args.data, "modes": accuracies, "table": table,
              "test_accuracy": accuracies["in parallel"],
              "parameters": sum(parameter.numel() for parameter in net.parameters()),
              "epoch_seconds": np.mean([row["seconds"] for row in history]),
              "history": history}
    write(folder / "result.json", json.dumps(result, allow_nan=False).encode())


def compare_models(args, argv):
    """--model all: train each model in a process of its own, then one table, one figure."""
    lines = ["           model  parameters  test accuracy  s per epoch"]
    histories = {}
    for name, model in MODELS.items():
        if not Path(__file__).with_name(model["layer"].split(".")[0] + ".py").exists():
            continue
        print(f"--- {name}", flush=True)
        if subprocess.run([sys.executable, __file__, *argv, "--model", name]).returncode:
            fail(f"{name} did not finish; the same command with --resume goes on with it")
        result = json.loads((args.out / name / "result.json").read_text())
        row = "{model:>16}{parameters:>12}{test_accuracy:>15.2%}{epoch_seconds:>13.1f}"
        lines.append(row.format(**result))
        histories[name] = result["history"]
    table = "\n".join(lines)
    print(table)
    write(args.out / "comparison.txt", f"{table}\n".encode())
    plot(args.out / "comparison.png", histories)


# ---- command line ----

def number(kind, low, high, even=False):
    """A type for argparse: an int or float from low to high, and a message that says so."""
    sort = "a number" if kind is float else "a whole number"
    if even:
        sort = "an even number"

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (even and value % 2):
            raise argparse.ArgumentTypeError(f"{text}: pass {sort} from {low} to {high}")
        return value
    return convert


def add_training_flags(parser):
    """Flags that a checkpoint stores. None: take what is stored, or the default."""
    add = parser.add_argument_group("network").add_argument
    add("--model", choices=[*MODELS, "all"], help="default s4d")
    add("--d-model", type=number(int, 1, 10**5), help="features, at least 1, default 128")
    add("--d-state", type=number(int, 2, 10**5, even=True),
        help="states, even; default 64, s4 and lru 32, selective_scan and mamba 16")
    add("--n-layers", type=number(int, 1, 1000), help="blocks, default 4, mamba 2")
    add("--norm", choices=["layer", "batch"], help="normalization, default layer")
    add("--prenorm", action="store_true", default=None, help="normalize before the layer")
    add("--activation", choices=SequenceLayer.ACTIVATIONS,
        help="see SequenceLayer; default glu, gss and mamba none")
    add("--dropout", type=number(float, 0, 1), help="probability, 0 to 1, default 0.1")
    add("--grayscale", action="store_true", default=None, help="one channel, not three")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1, 10**6), help="default 100, for built-in images 4")
    add("--batch-size", type=number(int, WORLD, 10**6),
        help="images of a step, of all processes; default 64, for built-in images 16")
    add("--lr", type=number(float, 0, 1e12), help="learning rate, at least 0, default 0.01")
    add("--weight-decay", type=number(float, 0, 1e12),
        help="of matrices, at least 0, default 0.01")
    add("--amp", action="store_true", default=None, help="bfloat16 for the linear maps")
    add("--seed", type=number(int, 0, 10**9), help="at least 0, default 0")


def parse(argv):
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--model MODEL] [--resume | --eval FILE] [more, see --help]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_flags(parser)
    add = parser.add_argument_group("data, files and device").add_argument
    add("--data", choices=["auto", "cifar10", "builtin"],
        help="default auto: cifar10, or builtin if it cannot be downloaded")
    add("--data-dir", type=Path, default=Path("data"), help="of CIFAR-10, default data")
    add("--limit", type=number(int, 2 * WORLD + 1, 10**9),
        help="training images, and test images, to use; default all")
    add("--eval-limit", type=number(int, 1, 10**9), default=256,
        help="test images to read pixel by pixel, default 256")
    add("--out", type=Path, default=Path("runs"), help="folder of the runs, default runs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default auto")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on after the last whole epoch")
    add("--eval", type=Path, metavar="FILE", help="a checkpoint to evaluate in every mode")
    args = parser.parse_args(argv)
    if args.model == "all" and (args.eval or WORLD > 1):
        parser.error("--model all goes neither with --eval nor with torchrun")
    return args


def adopt(args, saved, path):
    """Take over the settings of a checkpoint. A flag that contradicts them is an error."""
    done = len(saved["history"])
    for name, stored in saved["args"].items():
        flag = "--" + name.replace("_", "-")
        given = getattr(args, name)
        if given in (None, "auto", stored):
            setattr(args, name, stored)
        elif name == "limit":
            print(f"{flag} is {given} from now on, and was {stored}", flush=True)
        elif name == "epochs" and args.resume and given >= done:
            print(f"{flag} is {given} from now on, and was {stored}: the cosine schedule\n"
                  f"is laid anew, it goes on at {cosine(done / given):.0%} of the learning "
                  f"rates, not at {cosine(done / stored):.0%}", flush=True)
        else:
            fail(f"{flag} is {given} here, but {stored} in {path}, a run of {done} epochs. "
                 "Leave the flag out, or start a new run with another --out.")


def find_checkpoint(args):
    """The checkpoint to evaluate or to go on from, with its settings in args, or None."""
    path = args.eval
    if not args.eval:
        args.model = args.model or "s4d"
        path = args.out / args.model / "last.pt"
        check_folder(path.parent)
        if path.exists() and not args.resume:
            fail(f"{path} is of an earlier run. Add --resume to go on with it, or start a "
                 "new run with another --out.")
        if not path.exists():
            if args.resume:
                print(f"--resume: no {path}, so it starts from the beginning", flush=True)
            return None
    saved = load(path)
    adopt(args, saved, path)
    return saved


def check_folder(folder):
    """Make the folder, and end the program if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"--out: {folder} cannot be written: {error.strerror}")


def complete(args, defaults):
    """Set what is not set yet."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def start_device(args):
    """The device of this process, which joins the others that torchrun started."""
    use_gpu = args.device == "cuda" or args.device == "auto" and torch.cuda.is_available()
    if use_gpu and LOCAL_RANK >= torch.cuda.device_count():
        fail(f"--device cuda: there are {torch.cuda.device_count()} GPUs, and none for "
             f"process {LOCAL_RANK}. Try --device cpu.")
    device = torch.device(f"cuda:{LOCAL_RANK}" if use_gpu else "cpu")
    if WORLD > 1:
        distributed.init_process_group("nccl" if use_gpu else "gloo",
                                       device_id=device if use_gpu else None)
    return device


def keep_freed_memory():
    """Have Linux keep freed memory for the next step: 2 to 3 times as fast on a CPU.

    Otherwise every large tensor is fresh memory, which the system clears first.
    """
    m_trim_threshold = -1                                   # the names of malloc.h
    m_top_pad = -2
    m_mmap_max = -4
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):                            # not in every C library
        libc.mallopt(m_mmap_max, 0)                         # one heap for all sizes
        libc.mallopt(m_trim_threshold, 2**31 - 1)           # that does not shrink
        libc.mallopt(m_top_pad, 2**28)                      # and grows by 256 MB


def run(args):
    """Train, go on or evaluate."""
    saved = find_checkpoint(args)
    folder = args.out / args.model
    result = folder / "result.json"
    if args.resume and saved and len(saved["history"]) == args.epochs and result.exists():
        print(f"already finished, {args.epochs} epochs; from {result}:")
        print("\n".join(json.loads(result.read_text())["table"]))
        return
    complete(args, MODELS[args.model].get("flags", {}))
    complete(args, NETWORK | RECIPE)
    device = start_device(args)
    net = build_network(args).to(device)
    size = sum(parameter.numel() for parameter in net.parameters())
    print(f"{args.model}: {size:,} parameters on {device}", flush=True)
    images, labels, test_images, test_labels = load_data(args, device)
    complete(args, LENGTH[args.data])
    print(f"{args.data}: {len(images)} images, {len(test_images)} for the test", flush=True)
    if args.eval:
        net.load_state_dict(saved["model"])
        compare_modes(args, net, test_images, test_labels)
    else:
        result.unlink(missing_ok=True)                      # it is of fewer epochs
        history = train(args, net, images, labels, folder, saved)
        if RANK == 0:
            score(args, net, test_images, test_labels, history, folder)
    if WORLD > 1:
        distributed.destroy_process_group()


def main(argv=None):
    """Do what the command line says."""
    args = parse(argv)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    keep_freed_memory()
    try:
        if args.model == "all":
            compare_models(args, sys.argv[1:] if argv is None else argv)
        else:
            run(args)
    except KeyboardInterrupt:
        how = "Start it again."
        if args.model == "all" or (args.out / args.model / "last.pt").exists():
            how = "With --resume, the same command goes on after the last whole epoch."
        sys.exit(f"\nStopped. {'' if args.eval else how}")


if __name__ == "__main__":
    main()
