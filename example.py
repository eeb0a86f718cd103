"""Train a network of state space layers on images that it reads pixel by pixel.

    python example.py --data builtin                        # no download
    python example.py --model s4d                           # CIFAR-10: days on a CPU
    python example.py --model s4d --resume                  # after Ctrl-C or a crash
    python example.py --eval runs/s4d/best.pt               # in every mode
    python example.py --model all                           # one after the other, compared
    torchrun --nproc_per_node=2 example.py --model s4d      # several processes or GPUs

Sequential CIFAR-10: the network reads an image as 1024 pixels, row by row, and names its
class at the end. The data is downloaded once (170 MB); if that fails, images made here
replace it, unless --data cifar10 asks for the real ones. After ten seconds a line says how
long the whole run will take. Each epoch leaves in runs/<model>/ last.pt, from which
--resume goes on, on the same machine bit for bit, best.pt (by validation accuracy) and
metrics.csv; the test leaves result.json.
"""

import argparse
import ctypes
import importlib
import io
import json
import math
import os
import shutil
import socket
import sys
import tarfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

RANK = int(os.environ.get("RANK", 0))               # number of this process, from torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))        # how many there are


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
        if "glu" in activation:
            n_out = 2 * d_model if activation == "glu" else d_model     # V and W, or W
            self.out = nn.Conv1d(d_model, n_out, 1)

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
    d_input, d_output: features of a step: a number or, for video, (height, width, channels)
    pool: classify by the mean of all steps so far; without, an output for every step
    A state is (states of the layers, sum of the steps (b, h) in float64, their number). To
    see n steps of what follows an initial value, pass it and n - 1 zeros, with pool=False.
    """
    def __init__(self, ssm, d_input, d_output, *, d_model=128, n_layers=4, pool=True,
                 **options):
        super().__init__()
        self.d_input = torch.Size([d_input] if isinstance(d_input, int) else d_input)
        self.d_output = torch.Size([d_output] if isinstance(d_output, int) else d_output)
        sizes = [d_model, n_layers, *self.d_input, *self.d_output]
        makers = ssm if isinstance(ssm, list) else n_layers * [ssm]
        check(min(sizes) > 0 and self.d_input and self.d_output and len(makers) == n_layers,
              f"{d_input=}, {d_output=}, {d_model=}, {n_layers=}: pass positive numbers; "
              f"ssm is one function or {n_layers}, not {len(makers)}")
        self.d_model = d_model
        self.pool = pool
        self.register_buffer("mean", torch.zeros(self.d_input))
        self.register_buffer("std", torch.ones(self.d_input))
        self.encoder = nn.Linear(self.d_input.numel(), d_model)
        self.layers = nn.ModuleList(
            SequenceLayer(maker(d_model), d_model, **options) for maker in makers)
        self.head = nn.Linear(d_model, self.d_output.numel())

    def initial_state(self, batch_size):
        states = [layer.ssm.initial_state(batch_size) for layer in self.layers]
        return states, self.mean.new_zeros(batch_size, self.d_model, dtype=torch.float64), 0

    def discretize(self, rate=1.0):
        return [layer.ssm.discretize(rate) for layer in self.layers]

    def check_state(self, state, b):
        """Refuse a state that is not one of a batch of b."""
        check(state and len(state[0]) == len(self.layers) and None not in state[0]
              and state[1].shape == (b, self.d_model),
              f"state: pass initial_state({b}), or what the call before returned")

    def forward(self, x, state=None, *, rate=1.0):
        """x (b, l, *d_input), state -> y (b, *d_output), next state. Without pool, y is
        (b, l, *d_output); without a state, the next one is None."""
        check(x.shape[2:] == self.d_input and x.numel() > 0,
              f"x is {tuple(x.shape)}: pass (b, l) + {tuple(self.d_input)}, not empty")
        x = (x.to(self.mean.dtype) - self.mean) / self.std
        x = self.encoder(x.flatten(2)).mT                                   # (b, h, l)
        states, total, count = len(self.layers) * [None], 0, 0
        if state is not None:
            self.check_state(state, len(x))
            states, total, count = state
        after = []
        for layer, before in zip(self.layers, states):
            x, now = layer(x, before, rate=rate)
            after.append(now)
        total = total + x.sum(-1, dtype=self.mean.dtype).double()           # (b, h)
        count = count + x.shape[-1]
        mean = (total / count).to(self.mean.dtype)
        y = self.head(mean if self.pool else x.mT).unflatten(-1, self.d_output)
        return y, (None if state is None else (after, total, count))

    def step(self, x, state, *, rate=1.0, discrete=None):
        """One step: x (b, *d_input), state -> (b, *d_output), next state."""
        check(x.shape[1:] == self.d_input and x.numel() > 0,
              f"x is {tuple(x.shape)}: pass (b,) + {tuple(self.d_input)}, not empty")
        x = (x.to(self.mean.dtype) - self.mean) / self.std
        x = self.encoder(x.flatten(1))                                      # (b, h)
        self.check_state(state, len(x))
        states, total, count = state
        discrete = discrete or len(self.layers) * [None]
        after = []
        for layer, before, matrices in zip(self.layers, states, discrete, strict=True):
            x, now = layer.step(x, before, rate=rate, discrete=matrices)
            after.append(now)
        total = total + x
        count = count + 1
        mean = (total / count).to(self.mean.dtype)
        y = self.head(mean if self.pool else x).unflatten(-1, self.d_output)
        return y, (after, total, count)


def check(ok, message):
    """Raise a ValueError unless ok."""
    if not ok:
        raise ValueError(message)


# ---- the nine models ----
# The class of the layer, flags that are not as usual, options of the layer: 169,000 to
# 235,000 parameters each. Activation none is for layers with a gate of their own.
MODELS = {
    "s4": ("s4.S4", {"d_state": 32}, {}),
    "s4d": ("s4d.S4D", {}, {}),
    "lssl": ("lssl.LSSL", {}, {}),
    "dss": ("dss.DSS", {}, {}),
    "gss": ("gss.GSS", {"activation": "none"}, {"expand": 1, "measure": "diag-lin",
            "dt_min": 1e-3, "dt_max": 0.1, "train_dt": True}),      # the start of S4D
    "s5": ("s5.S5", {}, {}),
    "lru": ("lru.LRU", {"d_state": 32, "norm": "batch", "prenorm": True},
            {"r_min": 0.99, "r_max": 0.9999, "max_phase": 0.314}),
    "selective_scan": ("selective_scan.SelectiveSSM", {"d_state": 16}, {"lr": 1e-3}),
    "mamba": ("selective_scan.Mamba", {"d_state": 16, "n_layers": 2, "activation": "none"},
              {"lr": 1e-3}),
}


def build_network(args):
    """The network that the flags ask for. Only the file of its model is imported."""
    path, _, options = MODELS[args.model]
    file, name = path.split(".")
    layer = getattr(importlib.import_module(file), name)
    torch.manual_seed(args.seed)
    return StackedSSM(
        lambda d_model: layer(d_model, args.d_state, **options), 3, 10,
        d_model=args.d_model, n_layers=args.n_layers, norm=args.norm, prenorm=args.prenorm,
        activation=args.activation, dropout=args.dropout)


# ---- data: images (n, 1024, 3) uint8, labels (n) ----
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"
FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def load_data(args):
    """Images and labels to train on, and for the test. What data "auto" is, is then set."""
    folder = args.data_dir / FOLDER
    if args.data != "builtin" and RANK == 0 and not folder.exists():
        download(args.data_dir)
    if WORLD > 1:
        torch.distributed.barrier()                     # the others wait for process 0
    if args.data == "auto":
        args.data = "cifar10" if folder.exists() else "builtin"
    if args.data == "builtin":
        data = [*builtin_images(2000, args.seed), *builtin_images(1000, args.seed + 10**6)]
    else:
        check(folder.exists(), f"no {folder}. Without it: --data builtin")
        data = [*read_batches(folder, FILES[:-1]), *read_batches(folder, FILES[-1:])]
    return [torch.from_numpy(array[:args.limit]).to(args.device) for array in data]


def download(data_dir):
    """Put data_dir / FOLDER there when all of it is there, or else say why not."""
    part = data_dir / "download.part"                   # also one that was killed
    try:
        part.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(20)                    # seconds without an answer
        torch.hub.download_url_to_file(URL, part / "archive", hash_prefix=SHA256)
        with tarfile.open(part / "archive") as tar:
            tar.extractall(part, filter="data")
        os.replace(part / FOLDER, data_dir / FOLDER)
    except Exception as error:                          # no network, another checksum, ...
        print(f"no CIFAR-10 in {data_dir}, and the download failed: {error}", flush=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_batches(folder, names):
    """Images (n, 1024, 3) and labels (n) from records of label, red, green and blue."""
    batches = []
    for name in names:
        path = folder / name
        raw = np.fromfile(path, np.uint8) if path.exists() else np.zeros(0, np.uint8)
        check(raw.size > 0 and raw.size % 3073 == 0 and raw[::3073].max() < 10,
              f"{path} is missing, or not records of 3073 bytes with labels 0 to 9: delete "
              f"{folder}, and it is downloaded again")
        batches.append(raw.reshape(-1, 3073))
    records = np.concatenate(batches)
    if len(records) < 10000 * len(names):
        print(f"{folder}: {len(records):,} images in {len(names)} files, not 10,000 in one")
    images = records[:, 1:].reshape(-1, 3, 1024).swapaxes(1, 2)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)


def builtin_images(n, seed):
    """Images (n, 1024, 3) of five bands, two warm and three cold: WHICH two is the class.
    Neither the mean nor a few neighbouring pixels show it."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 10)
    pairs = np.stack(np.triu_indices(5, 1), axis=1)                         # (10, 2)
    warm = (pairs[labels, :, None] == np.arange(5)).any(1)                  # (n, 5)
    tint = np.where(warm, 1, -1) * rng.uniform(20, 40, (n, 5))              # (n, 5)
    tint = tint.repeat(6, axis=1)                                           # (n, 30)
    images = rng.normal(128, 10, (n, 1, 1, 3)).astype("f4")
    images = images + 15 * rng.standard_normal((n, 32, 32, 3), "f4")
    images[:, 1:31] += tint[:, :, None, None] * np.array([1, 0, -1])        # red, blue
    return images.clip(0, 255).astype(np.uint8).reshape(n, 1024, 3), labels


# ---- the recipe of the official S4 example; it knows no layer by name ----
def param_groups(model, lr, weight_decay):
    """Groups for AdamW. What a layer lists in ssm_lr (A, B, dt) gets the rate given there,
    at most lr, and no weight decay, if it is there under its name and not wrapped.
    Differs from the official example: vectors (biases, norms, D) and what a layer lists in
    no_weight_decay do not decay either."""
    rates = {}                                          # of what does not decay
    for module in model.modules():
        own = dict(module.named_parameters(remove_duplicate=False))
        spared = dict.fromkeys(getattr(module, "no_weight_decay", ()), lr)
        for name, rate in (spared | getattr(module, "ssm_lr", {})).items():
            if name in own:
                rates[own[name]] = min(rate, rates.get(own[name], lr))
    groups = {}
    for name, parameter in model.named_parameters():
        vector = parameter.ndim == 1 or name.split(".")[-1] == "D"      # (m, h) in s4, lssl
        decay = 0.0 if vector or parameter in rates else weight_decay
        if parameter.requires_grad:
            rate = rates.get(parameter, lr)
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
    if RANK == 0 and not history:
        save(args, net, optimizer, history)                 # the flags, for --resume
    model = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.monotonic()
        for group in optimizer.param_groups:                # a cosine, one step an epoch
            cosine = (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2
            group["lr"] = group["initial_lr"] * cosine
        rest = 1.04 * (args.epochs - epoch) + (n_test + args.eval_limit) / len(training)
        results = train_epoch(args, epoch, model, optimizer, images, labels, training, rest)
        row = {"epoch": epoch}
        row["train_loss"], row["train_accuracy"] = results.mean(1).tolist()
        row["seconds"] = round(time.monotonic() - start, 2)
        scores = evaluate(args, net, images[validation], "validation")
        row["val_loss"] = F.cross_entropy(scores, labels[validation]).item()
        row["val_accuracy"] = (scores.argmax(1) == labels[validation]).float().mean().item()
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            raise FloatingPointError(
                f"the loss of epoch {epoch} is not finite after step "
                f"{results[0].isfinite().sum()}: start again with a lower --lr and --out")
        history.append(row)
        if RANK == 0:
            save(args, net, optimizer, history)
        print("epoch {epoch}: loss {train_loss:.4g}, {train_accuracy:.2%}; validation "
              "{val_loss:.4g}, {val_accuracy:.2%}; {seconds} s".format(**row), flush=True)


def train_epoch(args, epoch, model, optimizer, images, labels, indices, rest):
    """Train on images[indices] in random order, but for what is left over, less than a
    batch. rest: the epochs to come. Returns loss and accuracy of each step: (2, steps)."""
    seed = args.seed * 10**6 + epoch                    # a resumed run draws the same
    torch.manual_seed(seed)                             # one order for all processes
    share = min(args.batch_size, len(indices)) // WORLD
    steps = len(indices) // (share * WORLD)
    order = torch.randperm(len(indices)).to(indices.device)[:steps * WORLD * share]
    batches = indices[order].view(steps, WORLD, share)[:, RANK]     # (steps, share)
    torch.manual_seed(seed * WORLD + RANK)              # dropout of its own in each
    results = torch.zeros(2, steps, device=images.device)
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
    if WORLD > 1:
        torch.distributed.all_reduce(results)
    return results / WORLD


def track(items, what, rest=0):
    """Yield the items; after ten seconds and then every minute, print the time left for
    them and for what comes after them: rest times as many."""
    start = time.monotonic()
    due = start + 10
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now >= due:
            due = now + 60
            left = round((now - start) * ((1 + rest) * len(items) / done - 1))
            print(f"{what} {done}/{len(items)}, {timedelta(seconds=left)} left", flush=True)


# ---- evaluation, in every mode ----
def evaluate(args, net, images, what, piece=None, rate=1.0):
    """Class scores (n, 10) of images (n, l, 3), read whole or in pieces of piece pixels."""
    net.eval()
    found = []
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, args.amp):
        discrete = net.discretize(rate) if piece == 1 else None
        for batch in track(images.split(64), f"{what}, batch"):
            state = net.initial_state(len(batch)) if piece else None
            for pixels in batch.split(piece or batch.shape[1], dim=1):
                if piece == 1:
                    scores, state = net.step(pixels[:, 0], state, discrete=discrete)
                else:
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
        ms = 1000 * (time.monotonic() - start) / len(x)
        whole = found if mode == "whole" else whole
        unlike = (found != whole[:len(x)]).sum().item()
        results[mode] = {"accuracy": accuracy, "images": len(x), "unlike whole": unlike,
                         "ms per image": ms}
        print(f"{mode:<28}{accuracy:>9.2%}{len(x):>8}{unlike:>14}{ms:>14.1f}", flush=True)
    return results


# ---- checkpoints ----
def save(args, net, optimizer, history):
    """best.pt if this epoch is the first with the best accuracy, metrics.csv, last.pt."""
    folder = args.out / args.model
    other = ["data_dir", "device", "out", "eval_limit", "resume", "eval"]
    flags = {name: value for name, value in vars(args).items() if name not in other}
    content = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(),
                "history": history, "args": flags}, content)
    if not history:
        folder.mkdir(parents=True, exist_ok=args.resume)    # two new runs cannot share it
    else:
        if history[-1] is max(history, key=lambda row: row["val_accuracy"]):
            write(folder / "best.pt", content.getvalue())
        rows = [history[0].keys(), *(row.values() for row in history)]
        table = "".join(",".join(map(str, row)) + "\n" for row in rows)
        write(folder / "metrics.csv", table.encode())
    (folder / "result.json").unlink(missing_ok=True)        # of fewer epochs
    write(folder / "last.pt", content.getvalue())           # last: then all is there


def write(path, content):
    """Replace a file: there is the old one or the new one, never half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written: {error}") from None


def load(path):
    """What save wrote, or a ValueError."""
    check(path.is_file(), f"{path}: there is no such file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check(saved.keys() >= {"model", "optimizer", "history", "args"}, "incomplete")
        return saved
    except Exception as error:          # of many kinds, for a file that save did not write
        raise ValueError(f"{path} is damaged, or no checkpoint: {type(error).__name__}")


def load_network(path):
    """The network of a checkpoint, for use in Python:
    scores, _ = load_network("runs/s4d/best.pt")(images)    # (b, 1024, 3), 0 to 255"""
    with torch.random.fork_rng(devices=[]):             # the seed stays in here
        return prepare(["--eval", str(path), "--device", "cpu"], "s4d")[1].eval()


def prepare(argv, model):
    """Flags, network, optimizer and history as they are before the next epoch."""
    args = parse(argv, model, {})
    path = args.eval or args.out / model / "last.pt"
    check(args.eval or args.resume or not path.parent.exists(),
          f"{path.parent} is of an earlier run: go on with --resume, or take another --out")
    saved = {"history": []}
    if args.eval or path.exists():
        saved = load(path)
        args = parse(argv, None if args.eval else model, saved["args"])
        free = ["processes", "data", "limit"] if args.eval else ["processes", "epochs"]
        best = [path.with_name("best.pt")] if args.resume and saved["history"] else []
        for file in [path, *best]:                      # the test will need best.pt
            for name, before in load(file)["args"].items():
                now = getattr(args, name)
                check(now == before or name in free,
                      f"{name} is {now} here, but {before} in {file}: it must be the same")
    net = build_network(args).to(args.device)
    optimizer = torch.optim.AdamW(param_groups(net, args.lr, args.weight_decay))
    if "model" in saved:
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    return args, net, optimizer, saved["history"]


# ---- the command line ----
def parse(argv, model, stored):
    """All flags: as in argv, or else as stored, or else those of the model, or as usual."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=[*MODELS, "all"], default="s4d", help="default s4d")
    add("--d-model", type=int, default=128, help="features, default 128")
    add("--d-state", type=int, default=64, help="even; default 64, some models 32 or 16")
    add("--n-layers", type=int, default=4, help="blocks, default 4, mamba 2")
    add("--norm", choices=["layer", "batch"], default="layer", help="layer, in lru batch")
    add("--prenorm", action=argparse.BooleanOptionalAction, default=False,
        help="normalize before the layer, not after; default in lru")
    add("--activation", choices=ACTIVATIONS, default="glu", help="some models none")
    add("--dropout", type=float, default=0.1, help="probability, default 0.1")
    add("--data", choices=["cifar10", "builtin"], default="auto", help="see above")
    add("--data-dir", type=Path, default=Path("data"), help="of CIFAR-10, default data")
    add("--limit", type=int, help="images to train on, and as many for the test")
    add("--epochs", type=int, help="default 100, for built-in images 4")
    add("--batch-size", type=int, help="default 64, for built-in images 16")
    add("--lr", type=float, default=0.01, help="learning rate, default 0.01")
    add("--weight-decay", type=float, default=0.01, help="default 0.01")
    add("--amp", action="store_true", help="bfloat16 for the linear maps")
    add("--seed", type=int, default=0, help="default 0")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="default cuda, if any")
    add("--out", type=Path, default=Path("runs"), help="folder of the runs, default runs")
    add("--eval-limit", type=int, default=256, help="images read pixel by pixel")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on after the last whole epoch")
    add("--eval", type=Path, metavar="FILE", help="a checkpoint to evaluate in every mode")
    flags = MODELS[model][1] if model else {}
    parser.set_defaults(**flags | stored)
    args = parser.parse_args(argv)
    args.model = model or args.model                    # not all
    args.processes = WORLD
    lowest = {"limit": 10 * WORLD, "epochs": 1, "batch_size": WORLD, "eval_limit": 1,
              "lr": 0, "weight_decay": 0, "dropout": 0, "seed": 0}
    for name, low in lowest.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= 10**9:
            parser.error(f"--{name.replace('_', '-')} {value}: pass {low} to 10**9")
    return args


def run(args, net, optimizer, history):
    """Train and test one model, or only test it. Returns a line with the result."""
    result = args.out / args.model / "result.json"
    if args.resume and history and len(history) >= args.epochs and result.exists():
        return f"{args.model}: already finished, {result}: {result.read_text('latin-1')}"
    size = sum(parameter.numel() for parameter in net.parameters())
    images, labels, test_images, test_labels = load_data(args)
    print(f"{args.model}: {size:,} parameters on {args.device}; {args.data}: {len(images)} "
          f"images, {len(test_images)} for the test", flush=True)
    args.epochs = args.epochs or (4 if args.data == "builtin" else 100)
    args.batch_size = args.batch_size or (16 if args.data == "builtin" else 64)
    if not args.eval:
        train(args, net, optimizer, history, images, labels, len(test_images))
        if RANK > 0:
            return None
        net.load_state_dict(load(result.with_name("best.pt"))["model"])
    modes = compare_modes(args, net, test_images, test_labels)
    seconds = float(np.median([row["seconds"] for row in history] or [0]))
    results = {"parameters": size, "seconds per epoch": seconds, "modes": modes}
    if not args.eval:
        write(result, json.dumps(results, indent=1).encode())
    return (f"{args.model}: {size:,} parameters, {modes['whole']['accuracy']:.2%} of the "
            f"test images, {seconds:.1f} s per epoch (median)")


def main(argv):
    args = parse(argv, None, {})
    if WORLD > 1:                                       # a day: for a download or a test
        torch.distributed.init_process_group(timeout=timedelta(days=1))
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")              # one process prints
    keep_freed_memory()
    models = MODELS if args.model == "all" else [args.model]
    lines, failures = [], []
    try:
        jobs = [prepare(argv, model) for model in models]   # all, before the first starts
        known = [job[0].data for job in jobs if job[0].data != "auto"]
        for args, *job in jobs:
            if args.data == "auto" and known:           # all models read the same images
                args.data = known[0]
            try:
                lines.append(run(args, *job))
            except FloatingPointError as error:         # the other models go on
                failures.append(f"{args.model}: {error}")
            known.append(args.data)
    except KeyboardInterrupt:
        sys.exit("\nStopped. --resume goes on after the last whole epoch.")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(*lines, sep="\n")
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    if failures:
        sys.exit("\n".join(failures))


def keep_freed_memory():
    """Have Linux keep freed memory: on a CPU a step at batch 64 takes half the time."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)                        # the numbers are those of malloc.h
        libc.mallopt(-4, 0)                             # M_MMAP_MAX: one heap for all sizes
        libc.mallopt(-1, 2**31 - 1)                     # M_TRIM_THRESHOLD: never shrinks
        libc.mallopt(-2, 2**28)                         # M_TOP_PAD: grows by 256 MB


if __name__ == "__main__":
    main(sys.argv[1:])
