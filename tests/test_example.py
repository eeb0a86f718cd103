"""example.py: its data, its network in every mode, and tiny runs of the command."""

import csv
import functools
import hashlib
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import example  # noqa: E402
from s4 import S4  # noqa: E402
from s4d import S4D  # noqa: E402

SMALL = ["--d-model", "8", "--d-state", "4", "--n-layers", "1"]
TINY = [*SMALL, "--data", "builtin", "--limit", "40", "--batch-size", "8", "--device", "cpu",
        "--eval-limit", "2"]
draw = example.builtin_images
example.builtin_images = functools.cache(draw)               # drawn once for all runs in this process


def run(out, *flags):
    example.main([*TINY, "--out", str(out), *flags])


def refusal(argv, capsys):
    """What the command says before it exits with a status that is not 0: one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        example.main([str(arg) for arg in argv])
    assert error.value.code not in (0, None)
    message = capsys.readouterr().err.splitlines()[-1] if error.value.code == 2 else error.value.code
    assert "\n" not in message
    return message


def process(out, *flags, command=("example.py",)):
    """The same in a process of its own. Returns what it printed."""
    argv = [sys.executable, *command, *TINY, "--out", str(out), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=environment, timeout=120, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(path):
    return torch.load(path, weights_only=True)


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
    return example.StackedSSM(lambda h: S4D(h, 8), 3, 10, d_model=16, n_layers=2, **options).eval()


# ---------------------------------------------------------------- data

def test_builtin_images_come_from_the_seed():
    images, labels = draw(500, 0)
    assert images.shape == (500, 1024, 3) and images.dtype == np.uint8 and (np.bincount(labels) == 50).all()
    assert np.array_equal(images, draw(500, 0)[0]) and not np.array_equal(images, draw(500, 1)[0])


def test_builtin_images_need_more_than_neighbouring_pixels():
    """A convolution of nine pixels and a mean do not find the class."""
    torch.manual_seed(0)
    x, y = map(torch.from_numpy, example.builtin_images(1500, 0))
    x = x.mT.float().sub(128).div(64)                       # (n, 3, 1024)
    model = nn.Sequential(nn.Conv1d(3, 16, 9, padding=4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
                          nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(8):
        for batch in torch.randperm(1000).split(125):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (model(x[1000:]).argmax(1) == y[1000:]).float().mean() < 0.5


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


def arguments(data_dir, data="cifar10", **options):
    return SimpleNamespace(**{"data": data, "data_dir": data_dir, "limit": None, "grayscale": False, "seed": 0,
                              "epochs": None, "batch_size": None, "device": "cpu", **options})


def test_cifar_is_read_from_the_folder(tmp_path):
    write_cifar(tmp_path / example.FOLDER)
    args = arguments(tmp_path, "auto")
    images, labels, test_images, _ = example.load_data(args)
    assert args.data == "cifar10" and images.shape == (30, 1024, 3) and len(test_images) == 6
    record = records(6, 1)[2]                               # record 2 of file 2 is image 8
    assert labels[8] == record[0]
    assert images[8, 33].tolist() == [record[1 + 33], record[1 + 1024 + 33], record[1 + 2048 + 33]]
    tensors = example.load_data(arguments(tmp_path, limit=4, grayscale=True))
    assert tensors[0].shape == (4, 1024, 1) and [len(tensor) for tensor in tensors] == 4 * [4]


def test_a_file_with_fewer_records_says_how_many(tmp_path, capsys):
    folder = write_cifar(tmp_path / example.FOLDER)
    records(2).tofile(folder / "data_batch_4.bin")
    assert len(example.load_data(arguments(tmp_path))[0]) == 26
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[-1] for line in lines][2:4] == ["data_batch_3.bin: 6 images", "data_batch_4.bin: 2 images"]


@pytest.mark.parametrize("damage", [
    Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(b"\x0a" + path.read_bytes()[1:]),
])
def test_damaged_files_are_named(tmp_path, damage):
    damage(write_cifar(tmp_path / example.FOLDER) / "data_batch_3.bin")
    with pytest.raises(SystemExit, match="data_batch_3.bin is missing, or no records of 3073 bytes with labels"):
        example.load_data(arguments(tmp_path))


def serve(monkeypatch, folder):
    """Have the example download an archive of the folder, and in it a file that points out of it."""
    path = folder.parent / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, example.FOLDER)
        tar.add(__file__, "../../evil.txt")
    monkeypatch.setattr(example.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(example, "URL", path.as_uri())
    monkeypatch.setattr(example, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def archive(tmp_path, monkeypatch):
    return serve(monkeypatch, write_cifar(tmp_path / "source" / example.FOLDER, 200))


def test_download(archive, tmp_path):
    data_dir = tmp_path / "a" / "data"
    (data_dir / example.FOLDER).mkdir(parents=True)          # an empty folder is no CIFAR-10
    images, *_ = example.load_data(arguments(data_dir, "auto"))
    assert len(images) == 1000
    assert {p.name for p in (tmp_path / "a").rglob("*") if p.is_file()} == {*example.FILES}
    assert [p.name for p in data_dir.iterdir()] == [example.FOLDER]
    archive.unlink()                                    # the second time it is there already
    assert len(example.load_data(arguments(data_dir))[0]) == 1000


def test_a_download_that_was_killed_is_repeated(archive, tmp_path, monkeypatch):
    def killed(path, content):
        if path.name == "data_batch_4.bin":
            raise KeyboardInterrupt
        write(path, content)
    write = example.write
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(example, "write", killed)
        example.load_data(arguments(tmp_path / "data"))
    assert len(example.load_data(arguments(tmp_path / "data"))[0]) == 1000


def test_failed_download(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "SHA256", 64 * "0")
    with pytest.raises(SystemExit, match="download failed"):
        example.load_data(arguments(tmp_path / "data"))
    assert "attempt 3 of 3: invalid hash" in capsys.readouterr().out
    args = arguments(tmp_path / "data", "auto", limit=20)
    assert len(example.load_data(args)[0]) == 20 and args.data == "builtin" and args.epochs == 4
    assert "training on the built-in images" in capsys.readouterr().out
    assert not list((tmp_path / "data").rglob("*.*"))


def test_the_third_attempt_may_succeed(archive, tmp_path, monkeypatch):
    attempts = itertools.count(1)
    urlopen = torch.hub.urlopen

    def flaky(request):
        if next(attempts) < 3:
            raise OSError("no route")
        return urlopen(request)
    monkeypatch.setattr(torch.hub, "urlopen", flaky)
    assert len(example.load_data(arguments(tmp_path / "data"))[0]) == 1000


@pytest.mark.parametrize("odd", [Path.mkdir, lambda path: path.symlink_to("/etc/hostname"), lambda path: None])
def test_odd_archive(tmp_path, monkeypatch, capsys, odd):
    folder = write_cifar(tmp_path / "source" / example.FOLDER)
    (folder / "data_batch_2.bin").unlink()
    odd(folder / "data_batch_2.bin")
    serve(monkeypatch, folder)
    with pytest.raises(SystemExit, match="download failed"):
        example.load_data(arguments(tmp_path / "data"))
    assert "attempt 3 of 3: " in capsys.readouterr().out


# ---------------------------------------------------------------- network

OPTIONS = [{}, {"norm": "batch"}, {"prenorm": True}, {"norm": "batch", "prenorm": True}, {"activation": "gelu"},
           {"activation": "half_glu1"}, {"activation": "half_glu2"}, {"activation": "none"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pool", [True, False])
def test_every_mode_of_the_network_gives_the_same_numbers(options, pool):
    net = network(pool=pool, **options).double()
    x = torch.randn(2, 40, 3, dtype=torch.double)
    whole, nothing = net(x)
    assert nothing is None and whole.shape == ((2, 10) if pool else (2, 40, 10))
    state, chunks = net.initial_state(2), []
    for piece in x.split([7, 1, 32], dim=1):
        y, state = net(piece, state)
        chunks.append(y)
    state, discrete, steps = net.initial_state(2), net.discretize(), []
    for t in range(40):
        y, state = net.step(x[:, t], state, discrete=discrete)
        assert torch.allclose(y, net(x[:, :t + 1])[0] if pool else whole[:, t])
        steps.append(y)
    if pool:
        assert torch.allclose(chunks[-1], whole) and torch.allclose(steps[-1], whole)
    else:
        assert torch.allclose(torch.cat(chunks, 1), whole) and torch.allclose(torch.stack(steps, 1), whole)
    slow, _ = net.step(x[:, 0], net.initial_state(2), rate=2.0)
    assert not torch.allclose(slow, steps[0])
    assert torch.allclose(slow, net(x[:, :1], rate=2.0)[0].reshape(slow.shape))


@pytest.mark.parametrize("activation", ["glu", "half_glu1", "half_glu2", "gelu", "none"])
def test_activations_as_defined(activation):
    layer = example.SequenceLayer(S4D(16, 8), 16, activation=activation, prenorm=True).eval()
    x = torch.randn(2, 9, 16)
    y = layer.ssm(layer.norm(x).mT.contiguous())[0].mT
    g = nn.functional.gelu(y)
    z = layer.out(g) if "glu" in activation else None
    expected = {"glu": lambda: z[..., :16] * z[..., 16:].sigmoid(), "half_glu1": lambda: g * z.sigmoid(),
                "half_glu2": lambda: y * z.sigmoid(), "gelu": lambda: g, "none": lambda: y}[activation]()
    assert torch.allclose(layer(x)[0], x + expected, atol=1e-6)


def test_dropout_is_tied_over_the_length_and_absent_in_evaluation():
    torch.manual_seed(0)
    layer = example.SequenceLayer(S4D(64, 8), 64, activation="none", prenorm=True, dropout=0.5)
    x = torch.randn(2, 9, 64)
    dropped = layer(x)[0] == x
    assert 0 < dropped.float().mean() < 1 and (dropped == dropped[:, :1]).all()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_video_in_and_out():
    net = example.StackedSSM(lambda h: S4D(h, 8), [4, 5, 3], (4, 5, 2), d_model=16, n_layers=1, pool=False)
    video = torch.randn(2, 7, 4, 5, 3)
    y, _ = net.eval()(video)
    frame, _ = net.step(video[:, 0], net.initial_state(2))
    assert y.shape == (2, 7, 4, 5, 2) and torch.allclose(frame, y[:, 0], atol=1e-5)


def test_param_groups():
    net = network()
    for parameter in net.layers[0].ssm.parameters():
        parameter.requires_grad_(False)
    groups = example.param_groups(net, 0.01, 0.02)
    listed = [p for group in groups for p in group["params"]]
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert len(listed) == len(trainable) and {*listed} == {*trainable}
    of = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    ssm = net.layers[1].ssm
    assert of[ssm.log_dt] == of[ssm.log_A_real] == of[ssm.A_imag] == (1e-3, 0.0)
    assert of[ssm.C] == of[net.encoder.weight] == (0.01, 0.02)
    assert of[net.encoder.bias] == of[ssm.D] == (0.01, 0.0)
    s4 = S4(4, 4)                                            # whose D is a matrix (m, h), one row a channel
    groups = example.param_groups(nn.Sequential(s4), 0.01, 0.02)
    of = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert of[s4.D] == 0.0 and of[s4.C] == 0.02


@pytest.mark.parametrize("options, message", [
    ({"norm": "nope"}, "norm='nope': choose layer or batch"),
    ({"activation": "relu"}, "activation='relu': choose from .*half_glu2"),
    ({"dropout": 1.5}, "between 0 and 1, but got 1.5"), ({"n_layers": 0}, "n_layers=0"), ({"d_model": 0}, "d_model=0"),
    ({"d_input": 0}, "d_input=0"), ({"d_output": (2, -1)}, "pass positive numbers"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        example.StackedSSM(lambda h: S4D(h, 8), **{"d_input": 3, "d_output": 10, "d_model": 16, **options})


def test_input_of_another_shape_is_refused():
    net = network()
    state = net.initial_state(2)
    for shape in ((2, 40, 1), (2, 40, 4), (2, 40), (2, 40, 3, 1), (2, 0, 3), (3,)):
        with pytest.raises(ValueError, match=r"pass \(b, l, \*\(3,\)\)"):
            net(torch.randn(shape))
        with pytest.raises(ValueError, match=r"pass \(b, l, "):
            net.step(torch.randn(shape), state)
        with pytest.raises(ValueError, match=r"pass \(b, l, 16\)"):
            net.layers[0](torch.randn(shape))
    with pytest.raises(ValueError):
        net(torch.randn(2, 2, 3), state, discrete=net.discretize())


@pytest.mark.parametrize("model", example.MODELS)
def test_every_model_in_every_mode(model, tmp_path):
    args, _ = example.settle(["--model", model, *SMALL, "--dropout", "0", "--out", str(tmp_path)])
    net = example.build_network(args)
    x = torch.rand(2, 30, 3)
    whole, _ = net(x)
    whole.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    for piece in (7, 1):
        assert torch.allclose(example.evaluate(args, net, x, "", piece), whole, atol=1e-4)


# ---------------------------------------------------------------- the command

def test_training_writes_everything(trained):
    out, output = trained
    assert {path.name for path in out.iterdir()} == {
        "metrics.csv", "curves.png", "last.pt", "best.pt", "result.json"}
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    result, checkpoint = json.loads((out / "result.json").read_text()), load(out / "last.pt")
    assert checkpoint["args"]["model"] == "s4d" and not {"out", "resume"} & checkpoint["args"].keys()
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in checkpoint["history"]]
    assert result.keys() == {"parameters", "seconds per epoch", "modes"} and len(result["modes"]) == 5
    assert "pixel by pixel" in output and max(map(len, output.splitlines())) <= 80
    best = max(checkpoint["history"], key=lambda row: row["val_accuracy"])
    assert load(out / "best.pt")["history"][-1] == best


def test_best_checkpoint_is_the_first_of_the_highest_accuracy(tmp_path, monkeypatch):
    """The network answers class 1 at epoch 1, class 2 at epoch 2, ...: at first no image is of it."""
    epochs = itertools.count(1)
    monkeypatch.setattr(example, "evaluate", lambda args, net, x, *_: torch.eye(10)[[next(epochs) % 10] * len(x)])
    run(tmp_path, "--epochs", "10")
    history = load(tmp_path / "s4d" / "last.pt")["history"]
    accuracies = [row["val_accuracy"] for row in history]
    assert len(set(accuracies)) > 1 and accuracies.index(max(accuracies)) > 0
    assert load(tmp_path / "s4d" / "best.pt")["history"] == history[:1 + accuracies.index(max(accuracies))]


def test_validation_images_do_not_depend_on_the_limit_and_are_not_trained_on(tmp_path, monkeypatch):
    trained_on, evaluated = [], []
    train_epoch, evaluate = example.train_epoch, example.evaluate

    def spy_train(*args):
        trained_on.append(set(args[-1].tolist()))
        return train_epoch(*args)

    def spy_evaluate(args, net, images, *more):
        evaluated.append(images)
        return evaluate(args, net, images, *more)
    monkeypatch.setattr(example, "train_epoch", spy_train)
    monkeypatch.setattr(example, "evaluate", spy_evaluate)
    run(tmp_path, "--epochs", "1", "--limit", "21", "--seed", "3")
    run(tmp_path, "--epochs", "2", "--limit", "40", "--resume")
    images = torch.from_numpy(example.builtin_images(2000, 3)[0])
    assert torch.equal(evaluated[0], images[[0, 10, 20]])
    assert torch.equal(evaluated[6], images[[0, 10, 20, 30]])         # after one evaluation in five modes
    assert trained_on == [{*range(21)} - {0, 10, 20}, {*range(40)} - {0, 10, 20, 30}]


def test_evaluation_of_a_checkpoint(trained, capsys):
    out, output = trained
    capsys.readouterr()
    example.main(["--eval", str(out / "best.pt"), "--device", "cpu", "--eval-limit", "2"])      # with its own settings
    rows = capsys.readouterr().out.splitlines()[-5:]
    assert rows == output.splitlines()[-5:]
    assert rows[1].split()[-1] == rows[4].split()[-1] == "0"                     # in pieces, pixel by pixel
    example.main(["--eval", str(out / "best.pt"), "--limit", "10", "--eval-limit", "1", "--device", "cpu"])
    table = capsys.readouterr().out
    assert [line.split("%")[1].split()[0] for line in table.splitlines() if "%" in line] == [*["10"] * 4, "1"]


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "result.json"])
def test_killed_while_writing_and_resumed(trained, tmp_path, monkeypatch, name):
    """Killed in the middle of a file, of the second epoch where there is one."""
    replace, count = os.replace, itertools.count()

    def die(part, path):
        if path.name == name and next(count) == (name == "last.pt"):
            raise GeneratorExit
        replace(part, path)
    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(GeneratorExit):
        run(tmp_path, "--epochs", "3")
    monkeypatch.setattr(os, "replace", replace)
    run(tmp_path, "--epochs", "3", "--resume")
    for file in ("last.pt", "best.pt"):                      # bit for bit
        torch.testing.assert_close(load(tmp_path / "s4d" / file)["model"], load(trained[0] / file)["model"],
                                   rtol=0, atol=0)
    rows = list(csv.DictReader((tmp_path / "s4d" / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert len(json.loads((tmp_path / "s4d" / "result.json").read_text())["modes"]) == 5


def test_going_on_longer_lays_the_schedule_anew(copy, capsys, monkeypatch):
    groups = load(copy / "s4d" / "last.pt")["optimizer"]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-3, 0.01}
    for group in groups:                                     # 12 steps, the last of which began at 11/12
        assert group["lr"] == pytest.approx(group["initial_lr"] * (1 + np.cos(np.pi * 11 / 12)) / 2)
    run(copy, "--epochs", "4", "--resume")
    assert "--epochs was 3: the cosine is laid anew over 4" in capsys.readouterr().out
    checkpoint = load(copy / "s4d" / "last.pt")
    assert len(checkpoint["history"]) == 4 and checkpoint["args"]["epochs"] == 4
    for group in checkpoint["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(group["initial_lr"] * (1 + np.cos(np.pi * 15 / 16)) / 2)


def test_a_finished_run_says_so_and_shows_its_result(trained, capsys, monkeypatch):
    capsys.readouterr()
    monkeypatch.setattr(example, "evaluate", None)
    run(trained[0].parent, "--epochs", "3", "--resume")
    printed = capsys.readouterr().out
    assert "already finished, 3 epochs" in printed
    assert (trained[0] / "result.json").read_text() in printed


@pytest.mark.parametrize("flags, values", [
    (["--d-model", "16"], "--d-model is 16 here, but 8"), (["--grayscale"], "--grayscale is True here, but False"),
    (["--lr", "0.1"], "--lr is 0.1 here, but 0.01"), (["--data", "cifar10"], "--data is cifar10 here, but builtin"),
    (["--epochs", "2"], "--epochs is 2 here, but 3"), (["--model", "s5"], "--model is s5 here, but s4d"),
])
def test_flags_that_contradict_the_checkpoint(trained, capsys, flags, values):
    out = trained[0]
    assert f"{values} in {out / 'best.pt'}" in refusal(["--eval", out / "best.pt", *flags], capsys)
    if "--model" not in flags:
        assert f"{values} in {out / 'last.pt'}" in refusal(["--resume", "--out", out.parent, *flags], capsys)


def test_resume_refuses_the_checkpoint_of_another_model(copy, capsys):
    (copy / "s4d").rename(copy / "lru")
    message = refusal(["--model", "lru", "--out", copy, "--resume"], capsys)
    assert f"--model is lru here, but s4d in {copy / 'lru' / 'last.pt'}" in message


def test_a_new_run_does_not_overwrite_an_older_one(copy, capsys):
    before = {path: path.read_bytes() for path in (copy / "s4d").iterdir()}
    message = refusal([*TINY, "--out", copy], capsys)
    assert "earlier run" in message and "--resume" in message and "--out" in message
    assert before == {path: path.read_bytes() for path in (copy / "s4d").iterdir()}


def test_interrupted_before_the_first_checkpoint(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(example, "train_epoch", interrupted)
        message = str(pytest.raises(SystemExit, run, tmp_path).value)
    assert "or starts from the beginning if there is none" in message
    capsys.readouterr()
    run(tmp_path, "--epochs", "1", "--resume")
    printed = capsys.readouterr().out
    assert "last.pt, so it starts from the beginning" in printed and "epoch 1: loss" in printed


def test_a_diverged_run_stops_and_writes_nothing(tmp_path, capsys):
    message = refusal([*TINY, "--out", tmp_path, "--lr", "1e9"], capsys)
    assert "the loss of epoch 1 is not finite after step 1. Start again with --lr below 1e+09" in message
    assert not list((tmp_path / "s4d").iterdir())


def test_a_run_that_diverges_later_keeps_its_checkpoint(copy, capsys, monkeypatch):
    monkeypatch.setattr(example, "evaluate", lambda args, net, x, *_: torch.full((len(x), 10), float("inf")))
    before = {path: path.read_bytes() for path in (copy / "s4d").glob("*.pt")}
    message = refusal(["--out", copy, "--resume", "--epochs", "9"], capsys)       # at the validation
    assert "epoch 4 is not finite after step 4" in message and "What is saved is kept" in message
    assert before == {path: path.read_bytes() for path in (copy / "s4d").glob("*.pt")}


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-2000]),
    lambda path: path.write_text("model,loss\n"), lambda path: torch.save([1, 2], path),
    lambda path: torch.save({"model": {}}, path), lambda path: (path.unlink(), path.mkdir()), Path.unlink,
])
def test_a_file_that_is_no_checkpoint(copy, capsys, damage):
    path = copy / "s4d" / "last.pt"
    damage(path)
    assert f"{path} not found, damaged or no checkpoint" in refusal(["--eval", path], capsys)
    if path.exists():
        assert f"{path} not found, damaged or no" in refusal(["--resume", "--out", copy], capsys)


def test_disk_full(copy, capsys):
    before = {path.name: path.read_bytes() for path in (copy / "s4d").iterdir() if path.name != "result.json"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        message = refusal(["--out", copy, "--resume", "--epochs", "4"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "last.pt could not be written" in message or "best.pt could not be written" in message
    assert before == {path.name: path.read_bytes() for path in (copy / "s4d").iterdir()}


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", Path("/proc")):
        assert f"{out / 's4d' / 'result.json'} could not be written: " in refusal([*TINY, "--out", out], capsys)


@pytest.mark.parametrize("flags, message", [
    (["--epochs", "0"], "--epochs: 0: pass a number from 1"), (["--epochs", "2.5"], "--epochs: invalid number"),
    (["--limit", "2"], "from 10"), (["--lr", "nan"], "--lr: nan: pass"), (["--model", "transformer"], "--model"),
    (["--dropout", "1.5"], "between 0 and 1, but got 1.5"), (["--d-state", "3"], "even"),
    (["--model", "gss", "--d-model", "6"], "--model gss cannot be built: "), (["--device", "cuda"], "there is no GPU"),
])
def test_bad_flags(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refusal(["--out", tmp_path, *flags], capsys)


@pytest.mark.parametrize("terminal, seconds, expected", [
    (False, 15, "step 4/12, 4.0 min left\nstep 8/12, 3.0 min left\nstep 12/12, 2.0 min left\n"),
    (True, 5, "step\033[K\r" + "".join(f"step {i}/12, {(20 - i) / 12:.1f} min left\033[K\r" for i in range(1, 13))),
])
def test_progress_and_the_time_left(monkeypatch, capsys, terminal, seconds, expected):
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    with monkeypatch.context() as patch:
        patch.setattr(example, "time", clock)
        patch.setattr(sys.stdout, "isatty", lambda: terminal)
        for _ in example.track(range(12), "step", rest=8):
            clock.now += seconds
    assert capsys.readouterr().out == expected


def test_evaluation_and_training_show_progress(tmp_path, monkeypatch):
    shown = []

    def track(items, what, rest=0):
        shown.append((what, len(items), rest))
        yield from items
    monkeypatch.setattr(example, "track", track)
    run(tmp_path, "--epochs", "2")
    assert shown[:4] == [("epoch 1/2, step", 4, 4), ("validation, batch", 1, 0), ("epoch 2/2, step", 4, 0),
                         ("validation, batch", 1, 0)] and ("pixel by pixel, batch", 1, 0) in shown


def test_two_processes_give_the_weights_of_one(tmp_path):
    flags = ["--epochs", "2", "--dropout", "0"]
    command = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "example.py")
    process(tmp_path / "two", *flags, command=command)
    run(tmp_path / "one", *flags)
    two, one = load(tmp_path / "two" / "s4d" / "last.pt"), load(tmp_path / "one" / "s4d" / "last.pt")
    for key, value in one["model"].items():
        assert torch.allclose(two["model"][key], value, atol=1e-4), key
    for a, b in zip(one["history"], two["history"]):
        assert abs(a["train_loss"] - b["train_loss"]) < 1e-4 and abs(a["val_loss"] - b["val_loss"]) < 1e-4


def test_amp_batch_norm_and_grayscale_train(tmp_path):
    run(tmp_path, "--epochs", "1", "--amp", "--norm", "batch", "--grayscale")
    checkpoint = load(tmp_path / "s4d" / "last.pt")
    assert checkpoint["args"]["amp"] is True and len(checkpoint["history"]) == 1
    assert checkpoint["model"]["mean"].shape == (1,)


def test_all_models_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(example, "MODELS", {name: example.MODELS[name] for name in ("s4d", "lru")})
    run(tmp_path, "--epochs", "2", "--model", "all")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["s4d", "lru"]
    for name, parameters, accuracy, seconds in rows:
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert int(parameters) == result["parameters"] > 0 and float(seconds) >= 0
        assert accuracy == f"{result['modes']['in parallel']:.2%}"
