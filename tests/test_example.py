"""example.py: its data, its network in every mode, and tiny runs of the command as a student starts it."""

import csv
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
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

TINY = ["--data", "builtin", "--limit", "40", "--d-model", "8", "--d-state", "4", "--n-layers", "2",
        "--batch-size", "8", "--eval-limit", "4", "--device", "cpu"]


def start(out, *flags, command=(sys.executable, "example.py"), **environment):
    """Start example.py with a tiny network in a process of its own, which heeds Ctrl-C even if ours does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # a background job inherits "ignore"
    try:
        return subprocess.Popen([*command, *TINY, "--out", str(out), *flags], cwd=ROOT, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process):
    """Wait for it, and return what it printed."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def load(path):
    return torch.load(path, weights_only=True)


def weights(path):
    return load(path)["model"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One finished run of three epochs: its folder and what it printed."""
    out = tmp_path_factory.mktemp("trained")
    return out / "s4d", finish(start(out, "--epochs", "3"))


def network(**options):
    torch.manual_seed(0)
    return example.StackedSSM(lambda h: S4D(h, 8), 3, 10, d_model=16, n_layers=2, **options).eval()


# ---------------------------------------------------------------- data

def test_builtin_images_come_from_the_seed_within_two_seconds():
    begin = time.process_time()
    images, labels = example.builtin_images(2500, 0)
    assert time.process_time() - begin < 2
    again, _ = example.builtin_images(2500, 0)
    other, _ = example.builtin_images(2500, 1)
    assert images.shape == (2500, 1024, 3) and images.dtype == np.uint8
    assert np.array_equal(images, again) and not np.array_equal(images, other)
    assert (np.bincount(labels) == 250).all()


def accuracy_of(model, x, y, x_test, y_test, epochs, lr):
    """Test accuracy of a model trained with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(125):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return (model(x_test).argmax(1) == y_test).float().mean().item()


def test_builtin_images_need_more_than_neighbouring_pixels():
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = (example.builtin_images(n, seed) for n, seed in ((1500, 0), (1000, 1)))
    x, x_test = (torch.from_numpy(v).mT.float().sub(128).div(64) for v in (x, x_test))     # (n, 3, 1024)
    y, y_test = torch.from_numpy(y), torch.from_numpy(y_test)
    pool = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
    assert accuracy_of(nn.Sequential(pool, nn.Linear(3, 10)), x, y, x_test, y_test, 20, 0.03) < 0.5
    convolution = nn.Sequential(nn.Conv1d(3, 16, 9, padding=4), nn.ReLU(), pool, nn.Linear(16, 10))
    assert accuracy_of(convolution, x, y, x_test, y_test, 8, 0.01) < 0.5


def records(n, seed=0):
    """n random CIFAR-10 records (n, 3073) uint8."""
    r = np.random.default_rng(seed).integers(0, 256, (n, 3073), np.uint8)
    r[:, 0] %= 10
    return r


def write_cifar(folder, n=6):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([*example.TRAIN_FILES, "test_batch.bin"]):
        records(n, i).tofile(folder / name)
    return folder


def arguments(data_dir, data="cifar10", **options):
    return SimpleNamespace(**{"data": data, "data_dir": Path(data_dir), "limit": None, "grayscale": False,
                              "seed": 0, **options})


def test_cifar_is_read_from_the_folder_or_its_parent(tmp_path):
    folder = write_cifar(tmp_path / example.FOLDER)
    for data_dir in (folder, tmp_path):
        args = arguments(data_dir, "auto")
        images, labels, test_images, _ = example.load_data(args, "cpu")
        assert args.data == "cifar10" and images.shape == (30, 1024, 3) and len(test_images) == 6
        record = records(6, 1)[2]                       # record 2 of file 2 is image 8
        assert labels[8] == record[0]
        assert images[8, 33].tolist() == [record[1 + 33], record[1 + 1024 + 33], record[1 + 2048 + 33]]
    images, labels, test_images, test_labels = example.load_data(
        arguments(tmp_path, limit=4, grayscale=True), "cpu")
    assert images.shape == (4, 1024, 1) and len(labels) == len(test_images) == len(test_labels) == 4


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.unlink(), "missing"),
    (lambda path: path.write_bytes(b""), "damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "3073"),
    (lambda path: path.write_bytes(b"\x0a" + path.read_bytes()[1:]), "labels"),
])
def test_damaged_files_are_named(tmp_path, damage, message):
    path = write_cifar(tmp_path / example.FOLDER) / "data_batch_3.bin"
    damage(path)
    with pytest.raises(SystemExit) as error:
        example.load_data(arguments(tmp_path), "cpu")
    assert message in str(error.value) and "data_batch_3.bin" in str(error.value)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive like CIFAR-10's, and in it a file that points out of the folder; served from a file."""
    write_cifar(tmp_path / "source" / example.FOLDER)
    (tmp_path / "evil.txt").write_text("evil")
    path = tmp_path / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "source" / example.FOLDER, example.FOLDER)
        tar.add(tmp_path / "evil.txt", "../../evil.txt")
    monkeypatch.setenv("CIFAR10_URL", path.as_uri())
    monkeypatch.setenv("CIFAR10_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_download(archive, tmp_path):
    images, *_ = example.load_data(arguments(tmp_path / "a" / "data"), "cpu")
    assert len(images) == 30
    assert sorted(p.name for p in (tmp_path / "a").rglob("*") if p.is_file()) == sorted(
        [*example.TRAIN_FILES, "test_batch.bin"])
    assert [p.name for p in (tmp_path / "a" / "data").iterdir()] == [example.FOLDER]
    archive.unlink()                                    # the second time it is there already
    assert len(example.load_data(arguments(tmp_path / "a" / "data"), "cpu")[0]) == 30


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-100]), Path.unlink])
def test_failed_download(archive, tmp_path, damage, capsys):
    damage(archive)
    with pytest.raises(SystemExit, match="download failed"):
        example.load_data(arguments(tmp_path / "data"), "cpu")
    args = arguments(tmp_path / "data", "auto", limit=20)
    assert len(example.load_data(args, "cpu")[0]) == 20 and args.data == "builtin"
    assert "built-in images instead" in capsys.readouterr().out
    assert not list((tmp_path / "data").glob("*"))


# ---------------------------------------------------------------- network

OPTIONS = [{}, {"norm": "batch"}, {"prenorm": True}, {"norm": "batch", "prenorm": True},
           {"activation": "gelu"}, {"activation": "half_glu1"}, {"activation": "half_glu2"},
           {"activation": "none"}]


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


def test_options_change_the_result():
    x, results = torch.randn(2, 40, 3), []
    for options in OPTIONS:
        net = network(**options).train()
        for layer in net.layers:
            layer.dropout = 0.0
        results.append(net(x)[0])
    for i, a in enumerate(results):
        assert not any(torch.allclose(a, b) for b in results[:i]), OPTIONS[i]


@pytest.mark.parametrize("activation", ["glu", "half_glu1", "half_glu2", "gelu", "none"])
def test_activations_as_defined(activation):
    layer = example.SequenceLayer(S4D(16, 8), 16, activation=activation, prenorm=True).eval()
    x = torch.randn(2, 9, 16)
    y = layer.ssm(layer.norm(x).mT.contiguous())[0].mT
    g = nn.functional.gelu(y)
    z = layer.out(g) if layer.out else None
    expected = {"glu": lambda: z[..., :16] * z[..., 16:].sigmoid(), "half_glu1": lambda: g * z.sigmoid(),
                "half_glu2": lambda: y * z.sigmoid(), "gelu": lambda: g, "none": lambda: y}[activation]()
    assert torch.allclose(layer(x)[0], x + expected, atol=1e-6)


def test_dropout_is_tied_over_the_length_and_absent_in_evaluation():
    layer = example.SequenceLayer(S4D(64, 8), 64, activation="none", prenorm=True, dropout=0.5)
    x = torch.randn(2, 9, 64)
    branch = layer(x)[0] - x
    dropped = (branch.abs() < 1e-6)
    assert 0 < dropped.float().mean() < 1 and (dropped == dropped[:, :1]).all()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_video_in_and_out():
    net = example.StackedSSM(lambda h: S4D(h, 8), (4, 5, 3), (4, 5, 2), d_model=16, n_layers=1, pool=False)
    video = torch.randn(2, 7, 4, 5, 3)
    y, _ = net(video)
    assert y.shape == (2, 7, 4, 5, 2)
    frame, _ = net.eval().step(video[:, 0], net.initial_state(2))
    assert torch.allclose(frame, net(video)[0][:, 0], atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_tensor_on_the_wrong_device(options):
    net = network(**options).train().to("meta")
    net(torch.zeros(2, 40, 3, device="meta"))[0].sum().backward()
    net.eval()
    y, state = net(torch.zeros(2, 40, 3, device="meta"), net.initial_state(2))
    y, state = net.step(torch.zeros(2, 3, device="meta"), state)
    assert y.is_meta


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
    of = {p: group["weight_decay"] for group in example.param_groups(nn.Sequential(s4), 0.01, 0.02)
          for p in group["params"]}
    assert of[s4.D] == 0.0 and of[s4.C] == 0.02


# ---------------------------------------------------------------- the command

def test_training_writes_everything(trained):
    out, output = trained
    assert {path.name for path in out.iterdir()} == {
        "metrics.csv", "curves.png", "last.pt", "best.pt", "result.json"}
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    result, checkpoint = json.loads((out / "result.json").read_text()), load(out / "last.pt")
    assert result["history"] == checkpoint["history"] and checkpoint["args"]["model"] == "s4d"
    assert "min/epoch" in output and "pixel by pixel" in output
    best = max(checkpoint["history"], key=lambda row: row["val_accuracy"])
    assert load(out / "best.pt")["history"][-1] == best


def test_best_checkpoint_is_the_first_of_the_highest_accuracy(tmp_path, monkeypatch):
    """The network answers class 1 at epoch 1, class 2 at epoch 2, ...: at first no image is of it."""
    epochs = iter(range(1, 100))
    monkeypatch.setattr(example, "read_all", lambda net, x, *_, **__: torch.eye(10)[[next(epochs) % 10] * len(x)])
    monkeypatch.setattr(example, "compare_modes", lambda *_: {"in parallel": 0.5})
    example.main([*TINY, "--out", str(tmp_path), "--epochs", "10", "--n-layers", "1"])
    history = load(tmp_path / "s4d" / "last.pt")["history"]
    accuracies = [row["val_accuracy"] for row in history]
    assert len(set(accuracies)) > 1 and accuracies.index(max(accuracies)) > 0
    assert load(tmp_path / "s4d" / "best.pt")["history"] == history[:1 + accuracies.index(max(accuracies))]


def test_evaluation_of_a_checkpoint(trained):
    out, output = trained
    again = finish(start(out.parent, "--eval", str(out / "best.pt")))
    for mode in ("in parallel", "in pieces of 300 pixels", "pixel by pixel", "rate 2", "rate 1"):
        first, second = (next(line for line in text.splitlines() if mode in line) for text in (output, again))
        assert first.split("%")[0] == second.split("%")[0]
    for mode in ("in pieces of 300 pixels", "pixel by pixel"):
        assert next(line for line in again.splitlines() if mode in line).split()[-2] == "0"


def test_kill_and_resume_gives_the_same_weights(trained, tmp_path):
    out, _ = trained
    process = start(tmp_path, "--epochs", "3")
    while not (tmp_path / "s4d" / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 1 <= len(load(tmp_path / "s4d" / "last.pt")["history"]) <= 3
    finish(start(tmp_path, "--epochs", "3", "--resume"))
    for name in ("last.pt", "best.pt"):
        resumed, uninterrupted = weights(tmp_path / "s4d" / name), weights(out / name)
        assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)


def test_a_new_run_moves_the_checkpoint_of_an_older_one_away(tmp_path, trained):
    folder = tmp_path / "s4d"
    folder.mkdir()
    (folder / "last.pt").write_bytes((trained[0] / "last.pt").read_bytes())
    process = start(tmp_path, "--epochs", "1000", "--d-model", "4")
    end = time.time() + 60                                   # without previous.pt: fail, do not wait
    while not (folder / "previous.pt").exists() and process.poll() is None and time.time() < end:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert (folder / "previous.pt").read_bytes() == (trained[0] / "last.pt").read_bytes()
    finish(start(tmp_path, "--epochs", "1", "--d-model", "4", "--resume"))       # and does not go on with it
    assert load(folder / "last.pt")["args"]["d_model"] == 4


def test_two_processes_may_download_at_once(archive, tmp_path, monkeypatch):
    example.download(tmp_path)
    before = {path.name: path.stat().st_ino for path in (tmp_path / example.FOLDER).iterdir()}
    example.download(tmp_path)                               # comes second: leaves the first in place
    assert {path.name: path.stat().st_ino for path in (tmp_path / example.FOLDER).iterdir()} == before


def test_ctrl_c_ends_cleanly(tmp_path):
    process = start(tmp_path, "--epochs", "10000")
    while not (tmp_path / "s4d" / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "--resume goes on" in output and "Traceback" not in output
    assert load(tmp_path / "s4d" / "last.pt")["history"]


def test_two_processes_give_the_weights_of_one(trained, tmp_path):
    out, _ = trained
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
               "example.py")
    finish(start(tmp_path, "--epochs", "3", command=command))
    two, one = load(tmp_path / "s4d" / "last.pt"), load(out / "last.pt")
    for key, value in one["model"].items():
        assert torch.allclose(two["model"][key], value, atol=1e-4), key
    for a, b in zip(one["history"], two["history"]):
        assert abs(a["train_loss"] - b["train_loss"]) < 1e-4 and abs(a["val_loss"] - b["val_loss"]) < 1e-4


def test_amp_trains_and_resume_without_a_checkpoint_starts(tmp_path):
    finish(start(tmp_path, "--epochs", "1", "--resume", "--amp", "--norm", "batch", "--grayscale"))
    checkpoint = load(tmp_path / "s4d" / "last.pt")
    assert checkpoint["args"]["amp"] is True and len(checkpoint["history"]) == 1


def test_all_models_are_compared(tmp_path):
    for name in ("example.py", "s4d.py", "lru.py"):          # it takes those whose files are there
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    output = finish(start(tmp_path / "runs", "--epochs", "1", "--model", "all",
                          command=(sys.executable, str(tmp_path / "example.py"))))
    columns, *rows = [line.split() for line in (tmp_path / "runs" / "comparison.txt").read_text().splitlines()]
    assert [row[0] for row in rows] == ["s4d", "lru"] and "peak_memory_MB" in columns
    for row in (dict(zip(columns, row)) for row in rows):
        result = json.loads((tmp_path / "runs" / row["model"] / "result.json").read_text())
        assert int(row["parameters"]) == result["parameters"] > 0 and float(row["step_ms"]) > 0
        assert float(row["test_accuracy"]) == pytest.approx(result["test_accuracy"], rel=1e-3)
        assert 50 < float(row["peak_memory_MB"]) < 1e5 and row["model"] in output
    assert (tmp_path / "runs" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    several = start(tmp_path / "runs", "--model", "all", WORLD_SIZE="2", RANK="0")
    assert "invalid choice: 'all'" in several.communicate(timeout=60)[0] and several.returncode != 0


@pytest.mark.parametrize("flags, message", [
    (["--epochs", "2.5"], "--epochs"), (["--epochs", "0"], "--epochs"), (["--seed", "x"], "--seed"),
    (["--batch-size", "-1"], "--batch-size"), (["--limit", "2"], "--limit"), (["--lr", "-1"], "--lr"),
    (["--dropout", "1.5"], "--dropout"), (["--model", "transformer"], "--model"), (["--data", "x"], "--data"),
    (["--lr", "nan"], "--lr"), (["--norm", "none"], "--norm"), (["--d-state", "3"], "--d-state"),
    (["--eval", "nowhere.pt"], "nowhere"), (["--weight-decay", "-1"], "--weight"),
    (["--seed", "-1"], "--seed"), (["--model", "all", "--eval", __file__], "one checkpoint"),
    (["--out", __file__], "must be a folder"),
])
def test_bad_flags(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        example.main([*TINY, "--out", str(tmp_path), *flags])
    assert error.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(error.value.code)


def test_a_model_without_its_file_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(example.MODELS, "s4", ("nowhere", "S4", {}, 4, False))
    with pytest.raises(SystemExit, match="nowhere.py"):
        example.main([*TINY, "--out", str(tmp_path), "--model", "s4"])
