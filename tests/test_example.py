"""example.py: its data, its network in every mode, and tiny runs of the command."""

import csv
import functools
import hashlib
import importlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from layers import ROOT
import example
from s4 import S4
from s4d import S4D
from s5 import S5
from selective_scan import SelectiveSSM

SMALL = ["--d-model", "8", "--d-state", "4", "--n-layers", "1"]
TINY = [*SMALL, "--data", "builtin", "--limit", "40", "--batch-size", "8",
        "--device", "cpu", "--eval-limit", "2"]
draw = example.builtin_images
example.builtin_images = functools.cache(draw)      # once for all runs in this process


def run(out, *flags):
    example.main([*TINY, "--out", str(out), *flags])


def prepare(*flags):
    argv = [str(flag) for flag in flags]
    return example.prepare(argv, example.parse(argv, None, {}).model)


def refusal(argv, capsys):
    """What the command says before it exits with a status that is not 0: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        example.main([str(arg) for arg in argv])
    assert error.value.code not in (0, None)
    message = error.value.code
    if message == 2:                                        # of argparse
        message = capsys.readouterr().err.splitlines()[-1]
    assert "\n" not in message
    return message


def process(out, *flags, command=("example.py",)):
    """The same in a process of its own. Returns what it printed."""
    argv = [sys.executable, *command, *TINY, "--out", str(out), *flags]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          timeout=120, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder, but=()):
    """The files of a folder and their content."""
    return {path: path.read_bytes() for path in folder.iterdir() if path.name not in but}


def table(printed):
    """The rows of accuracies, without their times and without lines about progress."""
    rows = [line for line in printed.splitlines() if "%" in line][-6:-1]
    return [row.rsplit(maxsplit=1)[0] for row in rows]


def same_weights(one, two):
    """Bit for bit."""
    a, b = load(one)["model"], load(two)["model"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load(path):
    return torch.load(path, weights_only=True)


def change_flags(path, **flags):
    saved = load(path)
    saved["args"] |= flags
    torch.save(saved, path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One finished run of three epochs: its folder and what it printed."""
    out = tmp_path_factory.mktemp("trained")
    return out / "s4d", process(out, "--epochs", "3")


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the folder of runs, to be changed."""
    shutil.copytree(trained[0], tmp_path / "s4d")
    return tmp_path


def network(**options):
    torch.manual_seed(0)
    options = {"d_model": 16, "n_layers": 2} | options
    return example.StackedSSM(lambda h: S4D(h, 8), 3, 10, **options).eval()


# ---- data ----

def test_builtin_images_come_from_the_seed():
    images, labels = draw(500, 0)
    assert images.shape == (500, 1024, 3) and images.dtype == np.uint8
    assert (np.bincount(labels) == 50).all() and np.array_equal(images, draw(500, 0)[0])
    assert not np.array_equal(images, draw(500, 1)[0])


def records(n, seed=0):
    """n random CIFAR-10 records (n, 3073) uint8."""
    r = np.random.default_rng(seed).integers(0, 256, (n, 3073), np.uint8)
    r[:, 0] %= 10
    return r


def write_cifar(folder, n=6):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(example.FILES):
        records(n, i).tofile(folder / name)
    return folder


def load_data(data_dir, data="cifar10", **options):
    defaults = {"limit": None, "seed": 0, "device": "cpu"}
    args = SimpleNamespace(data=data, data_dir=data_dir, **defaults | options)
    tensors = example.load_data(args)
    builtin = (tensors[0][0].numpy() == example.builtin_images(2000, 0)[0][0]).all()
    assert args.data == ("builtin" if builtin else "cifar10")
    return tensors


def test_cifar_is_read_from_the_folder(tmp_path, capsys):
    folder = write_cifar(tmp_path / example.FOLDER)
    images, labels, test_images, _ = load_data(tmp_path, "auto")
    assert len(test_images) == 6
    assert images.shape == (30, 1024, 3)
    record = records(6, 1)[2]                               # record 2 of file 2 is image 8
    assert labels[8] == record[0]
    assert images[8, 33].tolist() == record[[1 + 33, 1 + 1024 + 33, 1 + 2048 + 33]].tolist()
    assert [len(tensor) for tensor in load_data(tmp_path, limit=4)] == 4 * [4]
    records(2).tofile(folder / "data_batch_4.bin")
    capsys.readouterr()
    assert len(load_data(tmp_path)[0]) == 26
    assert f"{folder}: 26 images in 5 files, not 10,000 in one\n" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [None, lambda raw: raw[:-1], lambda raw: b"x" + raw[1:]])
def test_damaged_files_are_named(tmp_path, damage):
    """One is missing, is cut, or has a label above 9."""
    path = write_cifar(tmp_path / example.FOLDER) / "data_batch_3.bin"
    raw = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(raw))
    message = f"{path} is missing, or not records .* delete {path.parent}, and"
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive of 1,000 images for training and 200 for the test, to be downloaded."""
    path = tmp_path / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(write_cifar(tmp_path / "source", 200), example.FOLDER)
    monkeypatch.setattr(example, "URL", path.as_uri())
    monkeypatch.setattr(example, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_download(archive, tmp_path):
    data_dir = tmp_path / "a" / "data"
    images, *_ = load_data(data_dir, "auto")
    assert len(images) == 1000
    assert [p.name for p in data_dir.iterdir()] == [example.FOLDER]
    assert {p.name for p in (data_dir / example.FOLDER).iterdir()} == {*example.FILES}
    archive.unlink()                                        # the second time it is there
    assert len(load_data(data_dir)[0]) == 1000


def test_a_download_that_was_interrupted_leaves_nothing(archive, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    data_dir = tmp_path / "data"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        load_data(data_dir)
    assert not list(data_dir.iterdir())
    (data_dir / "download.part").mkdir()                    # of one that was killed
    (data_dir / "download.part" / "archive.1.partial").write_bytes(b"x")
    assert len(load_data(data_dir)[0]) == 1000
    assert [path.name for path in data_dir.iterdir()] == [example.FOLDER]


def test_failed_download(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "SHA256", 64 * "0")
    with pytest.raises(ValueError, match="no .*bin. Without it: --data builtin"):
        load_data(tmp_path / "data")
    assert "data, and the download failed: invalid hash" in capsys.readouterr().out
    assert len(load_data(tmp_path / "data", "auto", limit=20)[0]) == 20
    assert not list((tmp_path / "data").iterdir())


# ---- network ----

@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"norm": "batch"}, {"prenorm": True}, {"norm": "batch", "prenorm": True},
    {"activation": "gelu"}, {"activation": "half_glu1"}, {"activation": "half_glu2"},
    {"activation": "none"}], ids=str)
def test_every_mode_of_the_network_gives_the_same_numbers(options, pool):
    net = network(pool=pool, **options).double()
    x = torch.randn(2, 40, 3, dtype=torch.double)
    whole, nothing = net(x)
    assert nothing is None and whole.shape == ((2, 10) if pool else (2, 40, 10))
    discrete = net.discretize()
    state, state_of_steps, end = net.initial_state(2), net.initial_state(2), 0
    for piece in x.split([7, 1, 32], dim=1):
        y, state = net(piece, state)
        for x_k in piece.unbind(1):
            y_k, state_of_steps = net.step(x_k, state_of_steps, discrete=discrete)
            end += 1
            assert torch.allclose(y_k, net(x[:, :end])[0] if pool else whole[:, end - 1])
        expected = net(x[:, :end])[0] if pool else whole[:, end - piece.shape[1]:end]
        assert torch.allclose(y, expected)
    for rate in (1.0, 2.0):
        first, _ = net.step(x[:, 0], net.initial_state(2), rate=rate)
        assert torch.allclose(first, net(x[:, :1], rate=rate)[0].reshape(first.shape))
    normal, _ = net.step(x[:, 0], net.initial_state(2))
    assert not torch.allclose(first, normal)


@pytest.mark.parametrize("activation", ["glu", "half_glu1", "half_glu2", "gelu", "none"])
def test_activations_as_defined(activation):
    options = {"activation": activation, "prenorm": True}
    layer = example.SequenceLayer(S4D(16, 8), 16, **options).eval()
    x = torch.randn(2, 16, 9)
    y, _ = layer.ssm(layer.norm(x.mT).mT)
    g = F.gelu(y)
    expected = g if activation == "gelu" else y
    if "glu" in activation:
        z = layer.out(g)
        sigmoid = z[:, -16:].sigmoid()
        values = {"glu": z[:, :16], "half_glu1": g, "half_glu2": y}
        expected = values[activation] * sigmoid
    assert torch.allclose(layer(x)[0], x + expected, atol=1e-6)


def test_dropout_is_tied_over_the_length_and_absent_in_evaluation():
    torch.manual_seed(0)
    layer = example.SequenceLayer(S4D(64, 8), 64, activation="none", prenorm=True,
                                  dropout=0.5)
    x = torch.randn(2, 64, 9)
    dropped = layer(x)[0] == x
    assert 0 < dropped.float().mean() < 1 and (dropped == dropped[..., :1]).all()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_video_in_and_out():
    net = example.StackedSSM(lambda h: S4D(h, 8), [4, 5, 3], (4, 5, 2), d_model=16,
                             n_layers=1, pool=False)
    video = torch.randn(2, 7, 4, 5, 3)
    y, _ = net.eval()(video)
    frame, _ = net.step(video[:, 0], net.initial_state(2))
    assert y.shape == (2, 7, 4, 5, 2) and torch.allclose(frame, y[:, 0], atol=1e-5)
    net.mean.copy_(torch.randn(4, 5, 3))                    # of each feature
    net.std.copy_(torch.rand(4, 5, 3) + 1)
    assert torch.allclose(net(video * net.std + net.mean)[0], y, atol=1e-5)


def test_sums_and_inputs_in_any_precision():
    """In float32 a sum does not grow any more after 2^24 steps."""
    net = network()
    x = torch.randint(256, (2, 100, 3))
    states, total, _ = net.initial_state(2)
    start = (states, total + 2**25, 2**24)
    whole, (_, after, count) = net(x, start)
    for dtype in (torch.uint8, torch.float64, torch.bfloat16):
        assert torch.equal(net(x.to(dtype), start)[0], whole)
    state, pieces = start, start
    for x_k in x.unbind(1):
        y, state = net.step(x_k.double(), state)
    for piece in x.split(30, 1):
        z, pieces = net(piece, pieces)
    for scores, one in ((y, state), (z, pieces)):
        assert torch.allclose(one[1] - 2**25, after - 2**25, atol=1e-4)
        assert torch.allclose(scores, whole, atol=1e-6) and one[2] == count == 2**24 + 100


def test_a_list_of_layers():
    net = example.StackedSSM([lambda h: S5(h, 8), lambda h: S4D(h, 4)], 3, 10, d_model=8,
                             n_layers=2)
    assert [type(layer.ssm) for layer in net.layers] == [S5, S4D]
    assert net.eval()(torch.randn(2, 5, 3))[0].shape == (2, 10)
    with pytest.raises(ValueError, match="ssm is one function or 2, not 1"):
        example.StackedSSM([lambda h: S5(h, 8)], 3, 10, d_model=8, n_layers=2)


@pytest.mark.parametrize("piece", [None, 7, 1])
def test_evaluation_at_a_rate(piece):
    net = network().double()
    x = torch.randn(70, 20, 3, dtype=torch.double)      # more than one batch
    args = SimpleNamespace(amp=False)
    scores = example.evaluate(args, net, x, "", piece, rate=2.0)
    assert torch.allclose(scores.double(), net(x, rate=2.0)[0], atol=1e-5)
    assert not torch.allclose(scores.double(), net(x)[0], atol=1e-3)


class Reader(nn.Module):
    """Reads off the first pixel of an image what its class is."""
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))

    def forward(self, images):
        return self.scale * F.one_hot(images[:, 0, 0].long(), 10), None


def test_an_epoch_trains_on_every_image_with_its_label():
    labels = torch.arange(40) % 10
    images = labels[:, None, None].repeat(1, 4, 3)
    args = SimpleNamespace(seed=0, batch_size=8, epochs=1, amp=False)
    seen = []
    model = Reader()
    model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0][:, 0, 0]))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    indices = torch.arange(4, 40)
    results = example.train_epoch(args, 2, model, optimizer, images, labels, indices, 10)
    assert results.shape == (2, 4)                      # the rest is less than a batch
    assert results[0].max() < 1e-6 and (results[1] == 1).all()
    assert not torch.equal(torch.cat(seen), labels[4:36])       # in another order
    seen.clear()
    wrong = torch.where(labels < 5, labels, labels - 1)         # of half of the images
    results = example.train_epoch(args, 2, model, optimizer, images, wrong, indices, 10)
    right = torch.stack([(batch < 5).float().mean() for batch in seen])
    assert len(set(right.tolist())) > 1 and torch.equal(results[1], right)


def test_param_groups():
    net = network()
    for parameter in net.layers[0].ssm.parameters():
        parameter.requires_grad_(False)
    groups = example.param_groups(net, 0.01, 0.02)
    listed = [p for group in groups for p in group["params"]]
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert len(listed) == len(trainable) and {*listed} == {*trainable}
    of = {p: (group["lr"], group["weight_decay"])
          for group in groups for p in group["params"]}
    ssm = net.layers[1].ssm
    assert of[ssm.log_dt] == of[ssm.log_A_real] == of[ssm.A_imag] == (1e-3, 0.0)
    assert of[ssm.C] == of[net.encoder.weight] == (0.01, 0.02)
    assert of[net.encoder.bias] == of[ssm.D] == (0.01, 0.0)
    slow = example.param_groups(net, 1e-4, 0.02)        # the SSM is never faster
    assert {group["lr"] for group in slow} == {1e-4}
    net.no_weight_decay = ("head.weight", "not there")
    groups = example.param_groups(net, 0.01, 0.02)
    spared = {p for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert net.head.weight in spared and net.encoder.weight not in spared
    s4 = S4(4, 4)                       # whose D is a matrix (m, h), one row a channel
    groups = example.param_groups(nn.Sequential(s4), 0.01, 0.02)
    of = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert of[s4.D] == 0.0 and of[s4.C] == 0.02


def test_param_groups_of_wrapped_parameters():
    """What is not there under its name is a parameter like all others."""
    s4d, ssm = S4D(4, 4), SelectiveSSM(4, 4, lr=1e-3)
    prune.random_unstructured(s4d, "A_imag", 1)
    parametrizations.weight_norm(ssm.x_proj)
    groups = example.param_groups(nn.ModuleList([s4d, ssm]), 0.01, 0.02)
    of = {p: (group["lr"], group["weight_decay"])
          for group in groups for p in group["params"]}
    assert of[s4d.A_imag_orig] == (0.01, 0.02) and of[s4d.log_A_real] == (1e-3, 0.0)
    assert of[ssm.x_proj.parametrizations.weight.original1] == (0.01, 0.02)
    assert of[ssm.A_log] == (1e-3, 0.0)


@pytest.mark.parametrize("options, message", [
    ({"norm": "nope"}, "norm='nope': choose layer or batch"),
    ({"activation": "relu"}, "activation='relu': choose from .*half_glu2"),
    ({"dropout": 1.5}, "between 0 and 1, but got 1.5"), ({"n_layers": 0}, "n_layers=0"),
    ({"d_model": 0}, "d_model=0"), ({"d_input": 0}, "d_input=0"), ({"d_input": ()}, "pass"),
    ({"d_output": (2, -1)}, "pass positive numbers")])
def test_bad_options_are_refused(options, message):
    given = {"d_input": 3, "d_output": 10, "d_model": 16} | options
    with pytest.raises(ValueError, match=message):
        example.StackedSSM(lambda h: S4D(h, 8), **given)


def test_input_of_another_shape_is_refused():
    net = network()
    state = net.initial_state(2)
    for shape in ((2, 40, 1), (2, 40, 4), (2, 40), (2, 40, 3, 1), (2, 0, 3), (0, 2, 3), (3,)):
        with pytest.raises(ValueError, match=r"pass \(b, l\) \+ \(3,\), not empty"):
            net(torch.randn(shape))
        with pytest.raises(ValueError, match=r"pass \(b,\) \+ \(3,\), not empty"):
            net.step(torch.randn(shape), state)
    with pytest.raises(ValueError):
        net.step(torch.randn(2, 3), state, discrete=net.discretize()[:1])


def test_state_of_another_kind_is_refused():
    """None is broadcast, and none is taken for no state."""
    net = network()
    states, total, count = net.initial_state(2)
    bad = [(some, total, count) for some in ([], states[:1], [*states, states[0]],
                                             [None, None])]
    bad += [(states, total[:1], count), (states, total[:, :1], count), total[0, 0] * 0, [],
            (), 0, {}]
    for state in bad:
        for call, x in ((net, torch.randn(2, 4, 3)), (net.step, torch.randn(2, 3))):
            with pytest.raises(ValueError, match=r"state: pass initial_state\(2\)"):
                call(x, state)
    with pytest.raises(ValueError, match=r"state: pass initial_state\(2\)"):
        net.step(torch.randn(2, 3), None)


@pytest.mark.parametrize("model", example.MODELS)
def test_every_model_in_every_mode(model, tmp_path):
    args, net, *_ = prepare("--model", model, *SMALL, "--dropout", "0", "--out", tmp_path)
    path, _, options = example.MODELS[model]
    file, name = path.split(".")
    torch.manual_seed(0)
    nn.Linear(3, 8)                                         # the encoder comes first
    layer = getattr(importlib.import_module(file), name)(8, 4, **options)
    assert layer.ssm_lr == net.layers[0].ssm.ssm_lr
    for key, value in layer.state_dict().items():
        assert torch.equal(value, net.layers[0].ssm.state_dict()[key])
    x = torch.rand(2, 30, 3)
    whole, _ = net.eval()(x)                                # batch norm as in a test
    whole.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    for piece in (7, 1):
        assert torch.allclose(example.evaluate(args, net, x, "", piece), whole, atol=1e-4)


def test_a_flag_of_a_model_can_be_taken_back(tmp_path):
    for flags, prenorm in (([], True), (["--no-prenorm"], False)):
        _, net, *_ = prepare("--model", "lru", *SMALL, *flags, "--out", tmp_path)
        assert net.layers[0].prenorm == prenorm


# ---- the command ----

def test_training_writes_everything(trained):
    out, output = trained
    names = ["best.pt", "last.pt", "metrics.csv", "result.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    result = json.loads((out / "result.json").read_text())
    checkpoint = load(out / "last.pt")
    history = checkpoint["history"]
    assert checkpoint["args"]["model"] == "s4d"
    assert not {"out", "resume"} & checkpoint["args"].keys()
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in history]
    assert result.keys() == {"parameters", "seconds per epoch", "modes"}
    assert len(result["modes"]) == 5 and "pixel by pixel" in output
    for mode in result["modes"].values():
        assert mode.keys() == {"accuracy", "images", "unlike whole", "ms per image"}
    assert result["seconds per epoch"] == np.median([float(row["seconds"]) for row in rows])
    assert max(map(len, output.splitlines())) <= 80


def test_best_checkpoint_is_the_first_of_the_highest_accuracy(tmp_path, monkeypatch):
    """The network answers class 1 at epoch 1, class 2 at epoch 2, ...: at first no image is
    of it."""
    epochs = itertools.count(1)

    def answer(args, net, x, *_):
        return torch.eye(10)[[next(epochs) % 10] * len(x)]

    monkeypatch.setattr(example, "evaluate", answer)
    run(tmp_path, "--epochs", "10")
    history = load(tmp_path / "s4d" / "last.pt")["history"]
    accuracies = [row["val_accuracy"] for row in history]
    labels = example.builtin_images(2000, 0)[1][:40:10]
    assert accuracies == [(labels == i % 10).mean() for i in range(1, 11)]
    best = accuracies.index(max(accuracies))
    assert len(set(accuracies)) > 1 and best > 0
    assert load(tmp_path / "s4d" / "best.pt")["history"] == history[:1 + best]


def test_validation_images_are_not_trained_on(tmp_path, monkeypatch):
    trained_on, evaluated = [], []
    train_epoch, evaluate = example.train_epoch, example.evaluate

    def spy_train(*args):
        trained_on.append(set(args[6].tolist()))
        return train_epoch(*args)

    def spy_evaluate(args, net, images, *more):
        evaluated.append(images)
        return evaluate(args, net, images, *more)

    monkeypatch.setattr(example, "train_epoch", spy_train)
    monkeypatch.setattr(example, "evaluate", spy_evaluate)
    run(tmp_path, "--epochs", "1", "--limit", "21", "--seed", "3")
    images = torch.from_numpy(example.builtin_images(2000, 3)[0])
    assert torch.equal(evaluated[0], images[[0, 10, 20]])
    assert trained_on == [{*range(21)} - {0, 10, 20}]


def test_mean_and_deviation_are_those_of_the_training_images(trained):
    images = torch.from_numpy(example.builtin_images(2000, 0)[0][:40]).float()
    model = load(trained[0] / "last.pt")["model"]
    sample = images[torch.arange(40) % 10 > 0].flatten(0, 1)
    assert torch.allclose(model["mean"], sample.mean(0))
    assert torch.allclose(model["std"], sample.std(0))


def test_constant_images_train(tmp_path, monkeypatch):
    def constant(n, seed):
        return np.full((n, 1024, 3), 128, np.uint8), np.arange(n) % 10

    monkeypatch.setattr(example, "builtin_images", constant)
    run(tmp_path, "--epochs", "1")
    assert load(tmp_path / "s4d" / "last.pt")["history"][0]["train_loss"] < 10


def test_a_trained_network_in_python(trained):
    random = torch.get_rng_state()
    net = example.load_network(str(trained[0] / "best.pt"))
    assert not net.training and torch.equal(torch.get_rng_state(), random)
    saved = load(trained[0] / "best.pt")
    assert all(torch.equal(saved["model"][name], value)
               for name, value in net.state_dict().items())
    images = torch.from_numpy(example.builtin_images(1000, 10**6)[0][:40])
    labels = example.builtin_images(1000, 10**6)[1][:40]
    right = (net(images)[0].argmax(1).numpy() == labels).mean()
    result = json.loads((trained[0] / "result.json").read_text())
    assert result["modes"]["whole"]["accuracy"] == pytest.approx(right)
    with pytest.raises(ValueError, match="nothing.pt: there is no such file"):
        example.load_network(trained[0] / "nothing.pt")


def test_evaluation_on_other_images_and_another_device(copy, capsys):
    """A network trained on CIFAR-10, where there is no CIFAR-10."""
    path = copy / "s4d" / "best.pt"
    change_flags(path, data="cifar10")
    flags = ["--eval", path, "--device", "cpu", "--eval-limit", "2", "--data", "builtin"]
    example.main([str(flag) for flag in flags])
    assert "builtin: 40 images" in capsys.readouterr().out
    change_flags(path, data="builtin", device="meta")
    args, net, *_ = prepare("--eval", path)
    tensors = [*net.state_dict().values(), *example.load_data(args)]
    assert all(tensor.is_meta for tensor in tensors)


def test_evaluation_of_a_checkpoint(trained, capsys):
    out, output = trained
    argv = ["--eval", str(out / "best.pt"), "--device", "cpu"]  # with its own settings
    example.main([*argv, "--eval-limit", "2"])
    rows = table(capsys.readouterr().out)
    assert rows == table(output)
    # in pieces and pixel by pixel as whole
    assert rows[1].split()[-1] == rows[2].split()[-1] == "0"
    example.main([*argv, "--eval-limit", "1", "--limit", "10"])
    rows = table(capsys.readouterr().out)
    images = [row.split("%")[1].split()[0] for row in rows]
    assert images == ["10", "10", "1", "10", "10"]


@pytest.mark.parametrize("name", ["best.pt", "metrics.csv", "last.pt", "result.json"])
def test_killed_while_writing_and_resumed(trained, tmp_path, monkeypatch, name):
    """Killed in the middle of a file. The first last.pt is that before the first epoch."""
    replace, count, out = os.replace, itertools.count(), tmp_path / "s4d"
    at = {"metrics.csv": 1, "last.pt": 2}.get(name, 0)

    def die(part, path):
        if path.name == name and next(count) == at:
            raise GeneratorExit
        replace(part, path)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(GeneratorExit):
        run(tmp_path, "--epochs", "3")
    monkeypatch.setattr(os, "replace", replace)
    run(tmp_path, "--epochs", "3", "--resume")
    for file in ("last.pt", "best.pt"):
        assert same_weights(out / file, trained[0] / file)
    assert len((out / "metrics.csv").read_text().splitlines()) == 4
    assert len(json.loads((out / "result.json").read_text())["modes"]) == 5


def test_going_on_longer_lays_the_schedule_anew(copy, monkeypatch):
    """The cosine falls with each epoch, of all that there will be."""
    train_epoch = example.train_epoch

    def spy(args, epoch, model, optimizer, *more):
        cosine = (1 + np.cos(np.pi * (epoch - 1) / args.epochs)) / 2
        rates = [group["lr"] / cosine for group in optimizer.param_groups]
        assert rates == pytest.approx([g["initial_lr"] for g in optimizer.param_groups])
        assert set(np.round(rates, 9)) == {1e-3, 0.01}
        seen.append((epoch, args.epochs))
        return train_epoch(args, epoch, model, optimizer, *more)

    monkeypatch.setattr(example, "train_epoch", spy)
    seen = []
    run(copy / "fresh", "--epochs", "2", "--amp", "--norm", "batch")
    assert load(copy / "fresh" / "s4d" / "last.pt")["args"]["amp"] is True
    run(copy, "--epochs", "5", "--resume")
    assert seen == [(1, 2), (2, 2), (4, 5), (5, 5)]


def test_a_finished_run_says_so_and_shows_its_result(copy, capsys, monkeypatch):
    monkeypatch.setattr(example, "evaluate", None)
    result = copy / "s4d" / "result.json"
    for content in (result.read_bytes(), b"\xff broken"):
        result.write_bytes(content)
        run(copy, "--epochs", "3", "--resume")
        printed = capsys.readouterr().out
        assert f"already finished, {result}: {content.decode('latin-1')}" in printed


@pytest.mark.parametrize("flags, values", [
    (["--d-model", "16"], "d_model is 16 here, but 8"),
    (["--prenorm"], "prenorm is True here, but False"),
    (["--lr", "0.1"], "lr is 0.1 here, but 0.01"),
    (["--limit", "20"], "limit is 20 here, but 40")])
def test_flags_that_contradict_the_checkpoint(trained, capsys, flags, values):
    out, _ = trained
    evaluate, resume = ["--eval", out / "best.pt"], ["--resume", "--out", out.parent]
    for argv, file in ((evaluate, "best.pt"), (resume, "last.pt")):
        if argv is evaluate and "--limit" in flags:         # on as many as one likes
            continue
        message = refusal([*argv, *flags], capsys)
        assert message == f"{values} in {out / file}: it must be the same"


def test_best_is_missing_or_of_another_run(copy, capsys, monkeypatch):
    monkeypatch.setattr(example, "train", None)         # it is said before
    best = copy / "s4d" / "best.pt"
    resume = ["--resume", "--out", copy, "--epochs", "4"]
    change_flags(best, seed=1)
    assert f"seed is 0 here, but 1 in {best}" in refusal(resume, capsys)
    change_flags(best, seed=0, model="lru")
    assert f"model is s4d here, but lru in {best}" in refusal(resume, capsys)
    best.write_bytes(b"x")
    assert f"{best} is damaged, or no checkpoint" in refusal(resume, capsys)
    best.unlink()
    assert f"{best}: there is no such file" in refusal(resume, capsys)


def test_two_runs_in_one_folder(tmp_path, capsys, monkeypatch):
    """A second one is refused as soon as the first one has written last.pt."""
    first, second = (prepare(*TINY, "--out", tmp_path) for _ in range(2))

    def train_epoch(*_):
        started.append(load(tmp_path / "s4d" / "last.pt")["history"])
        for flags in ([], ["--resume", "--seed", "1"]):
            messages.append(refusal([*TINY, "--out", tmp_path, *flags], capsys))
        with pytest.raises(FileExistsError, match="s4d"):
            example.run(*second)
        raise FloatingPointError

    started, messages = [], []
    monkeypatch.setattr(example, "train_epoch", train_epoch)
    with pytest.raises(FloatingPointError):
        example.run(*first)
    assert started == [[]]
    assert f"{tmp_path / 's4d'} is of an earlier run" in messages[0]
    assert "seed is 1 here, but 0 in" in messages[1]


def test_model_that_contradicts_the_checkpoint(copy, capsys):
    last = copy / "s4d" / "last.pt"
    change_flags(last, model="lru")
    message = refusal(["--resume", "--out", copy], capsys)
    assert f"model is s4d here, but lru in {last}" in message
    message = refusal(["--eval", last, "--model", "s5"], capsys)
    assert f"model is s5 here, but lru in {last}" in message


def test_interrupted_before_the_first_checkpoint(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(example, "train_epoch", interrupted)
        message = str(pytest.raises(SystemExit, run, tmp_path, "--epochs", "1").value)
    assert "--resume goes on after the last whole epoch" in message
    example.main(["--out", str(tmp_path), "--resume"])      # with the flags of the run
    assert "epoch 1: loss" in capsys.readouterr().out
    saved = load(tmp_path / "s4d" / "last.pt")
    assert saved["args"]["d_model"] == 8 and len(saved["history"]) == 1
    run(tmp_path / "new", "--epochs", "1", "--resume")      # where there is nothing yet
    assert same_weights(*(out / "s4d" / "last.pt" for out in (tmp_path, tmp_path / "new")))


def test_a_diverged_run_stops(tmp_path, capsys):
    message = refusal([*TINY, "--out", tmp_path, "--lr", "1e9"], capsys)
    assert "the loss of epoch 1 is not finite after step 1:" in message
    assert "start again with a lower --lr" in message
    assert [path.name for path in (tmp_path / "s4d").iterdir()] == ["last.pt"]
    assert load(tmp_path / "s4d" / "last.pt")["history"] == []


def test_a_run_that_diverges_later_keeps_its_checkpoint(copy, capsys, monkeypatch):
    def infinite(args, net, x, *_):             # at the validation
        return torch.full((len(x), 10), float("inf"))

    monkeypatch.setattr(example, "evaluate", infinite)
    before = files(copy / "s4d")
    message = refusal(["--out", copy, "--resume", "--epochs", "9"], capsys)
    assert "epoch 4 is not finite after step 4" in message
    assert before == files(copy / "s4d")


@pytest.mark.parametrize("content", [b"", b"model,loss\n", [1, 2], {"model": {}}, "cut"])
def test_a_file_that_is_no_checkpoint(copy, capsys, content):
    path = copy / "s4d" / "last.pt"
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    message = f"{path} is damaged, or no checkpoint"
    assert message in refusal(["--resume", "--out", copy], capsys)
    assert message in refusal(["--eval", path], capsys)
    for file in (copy / "nothing.pt", copy):                # a folder is none, too
        assert f"{file}: there is no such file" in refusal(["--eval", file], capsys)


def test_disk_full(copy, capsys):
    """The checkpoints do not fit."""
    before = files(copy / "s4d", but=["result.json", "metrics.csv"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        message = refusal(["--out", copy, "--resume", "--epochs", "4"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "pt cannot be written: " in message and "File too large" in message
    assert before == files(copy / "s4d", but=["metrics.csv"])


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", Path("/proc")):
        message = refusal([*TINY, "--out", out], capsys)
        assert f"'{out / 's4d'}'" in message            # and why


@pytest.mark.parametrize("flags, message", [
    (["--epochs", "0"], "--epochs 0: pass 1 to 10**9"),
    (["--epochs", "2.5"], "--epochs: invalid int"),
    (["--limit", "2"], "--limit 2: pass 10 to"),
    (["--lr", "1e38"], "--lr 1e+38: pass"), (["--lr", "-1"], "--lr -1.0: pass"),
    (["--seed", str(10**20)], "--seed 100000000000000000000: pass"),
    (["--dropout", "1.5"], "between 0 and 1, but got 1.5"),
    (["--lr", "nan"], "--lr nan: pass"), (["--dropout", "nan"], "--dropout nan: pass"),
    (["--model", "transformer"], "--model"),
    (["--model", "all", "--eval", "best.pt"], "best.pt: there is no such file"),
    (["--resume", "--eval", "best.pt"], "not allowed with argument"),
    (["--d-state", "3"], "even"),
    (["--model", "gss", "--d-model", "6"], "bottleneck=4: pass a divisor of d_model = 6"),
    (["--device", "cuda"], "'cuda' (choose from")])
def test_bad_flags(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refusal(["--out", tmp_path, *flags], capsys)


def test_progress_and_the_time_left(monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(example, "time", clock)
    for rest in (2, 1e5):
        for _ in example.track(range(6), "step", rest):
            clock.now += 12
    assert capsys.readouterr().out == (
        "step 1/6, 0:03:24 left\nstep 6/6, 0:02:24 left\n"
        "step 1/6, 83 days, 8:01:00 left\nstep 6/6, 83 days, 8:00:00 left\n")


def test_evaluation_and_training_show_progress(tmp_path, monkeypatch):
    shown = []

    def track(items, what, rest=0):
        shown.append((what, len(items), round(rest, 2)))
        yield from items

    monkeypatch.setattr(example, "track", track)
    run(tmp_path, "--epochs", "2")
    test = (40 + 2) / 36                    # images, and two of them pixel by pixel
    assert shown[:4] == [
        ("epoch 1/2, step", 4, round(1.04 + test, 2)), ("validation, batch", 1, 0),
        ("epoch 2/2, step", 4, round(test, 2)), ("validation, batch", 1, 0)]
    assert ("pixel by pixel, batch", 1, 0) in shown


def test_two_processes_give_the_weights_of_one(tmp_path):
    """They go on where one stopped, as one would have."""
    flags = ["--dropout", "0", "--epochs"]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    run(tmp_path / "one", *flags, "1")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    run(tmp_path / "one", *flags, "2", "--resume")
    process(tmp_path / "two", *flags, "2", "--resume", command=(*launcher, "example.py"))
    one, two = (load(tmp_path / name / "s4d" / "last.pt") for name in ("one", "two"))
    for key, value in one["model"].items():
        assert torch.allclose(two["model"][key], value, atol=1e-4), key
    for a, b in zip(one["history"], two["history"], strict=True):
        for loss in ("train_loss", "val_loss"):
            assert abs(a[loss] - b[loss]) < 1e-4
    assert two["args"]["processes"] == 2


def test_all_models_are_looked_at_before_the_first_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "run", None)
    flags = [*TINY, "--model", "all", "--out", tmp_path]
    assert "bottleneck=4" in refusal([*flags, "--d-model", "6"], capsys)
    (tmp_path / "lru").mkdir()
    assert "lru is of an earlier run" in refusal(flags, capsys)


def test_models_that_are_compared_read_the_same_images(copy, monkeypatch):
    """One began on the built-in images; in the meantime there may be a network."""
    models = {name: example.MODELS[name] for name in ("lru", "s4d")}
    monkeypatch.setattr(example, "MODELS", models)
    seen = []
    monkeypatch.setattr(example, "run", lambda args, *job: seen.append(args.data))
    flags = ["--model", "all", "--resume", "--out", str(copy), "--device", "cpu"]
    example.main(flags)
    assert seen == ["builtin", "builtin"]


def test_a_model_that_diverges_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    models = {name: example.MODELS[name] for name in ("s4d", "lru")}
    monkeypatch.setattr(example, "MODELS", models)
    evaluate = example.evaluate

    def infinite(args, net, x, *more):
        scores = evaluate(args, net, x, *more)
        return scores.fill_(float("inf")) if args.model == "s4d" else scores

    monkeypatch.setattr(example, "evaluate", infinite)
    flags = [*TINY, "--out", tmp_path, "--epochs", "1", "--model", "all"]
    with pytest.raises(SystemExit) as error:
        example.main([str(flag) for flag in flags])
    assert "s4d: the loss of epoch 1 is not finite" in error.value.code
    assert capsys.readouterr().out.splitlines()[-1].startswith("lru: ")     # the result


def test_all_models_are_compared(tmp_path, capsys, monkeypatch):
    """On the same images: a download that failed is not tried again."""
    models = {name: example.MODELS[name] for name in ("s4d", "lru")}
    monkeypatch.setattr(example, "MODELS", models)
    monkeypatch.setattr(example, "URL", (tmp_path / "nothing").as_uri())
    flags = [*SMALL, "--limit", "40", "--epochs", "1", "--device", "cpu", "--eval-limit", "2"]
    example.main([*flags, "--model", "all", "--out", str(tmp_path), "--data-dir",
                  str(tmp_path / "data")])
    printed = capsys.readouterr().out
    assert printed.count("download failed") == 1 and printed.count("builtin: 40 images") == 2
    for name, line in zip(models, printed.splitlines()[-2:], strict=True):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert line == (f"{name}: {result['parameters']:,} parameters, "
                        f"{result['modes']['whole']['accuracy']:.2%} of the test images, "
                        f"{result['seconds per epoch']:.1f} s per epoch (median)")
