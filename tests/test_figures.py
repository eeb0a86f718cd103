"""figures/draw.py: what it finds in a trained network, and its command line."""

import functools
import sys

import pytest
import torch

from layers import ROOT
import example

sys.path.append(str(ROOT / "figures"))
import draw  # noqa: E402

example.builtin_images = functools.cache(example.builtin_images)

TINY = ["--d-model", "8", "--d-state", "4", "--n-layers", "1", "--data", "builtin",
        "--limit", "40", "--batch-size", "8", "--epochs", "1", "--device", "cpu",
        "--eval-limit", "2"]


def network(model, **flags):
    small = {"d_model": 8, "d_state": 4, "n_layers": 2}
    return example.build_network(example.parse([], model, small | flags)).eval()


@pytest.mark.parametrize("model", ["s4", "lru", "mamba"])
def test_memory_is_the_derivative_of_the_last_scores(model):
    """Against differences, in double precision, at three lags."""
    net = network(model).double()
    images = 255 * torch.rand(2, 30, 3, dtype=torch.float64)
    found = draw.memory(net, images)
    assert found.shape == (30,) and net.pool
    net.pool = False
    for lag in (0, 1, 29):
        square = torch.zeros(2)
        for color in range(3):
            change = torch.zeros_like(images)
            change[:, 29 - lag, color] = 1e-3
            with torch.no_grad():
                later, _ = net(images + change)
                earlier, _ = net(images - change)
            derivative = (later - earlier)[:, -1] / 2e-3                # (b, 10)
            square = square + derivative.square().sum(-1)
        torch.testing.assert_close(found[lag], square.sqrt().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("model", example.MODELS)
def test_eigenvalues_and_step_sizes_of_every_model(model):
    net = network(model)
    images = 255 * torch.rand(1, 16, 3)
    A_bar = draw.eigenvalues(net)
    dt = draw.step_sizes(net, images)
    assert (A_bar is None) == (model in ("lssl", "selective_scan", "mamba"))
    if model in ("selective_scan", "mamba"):
        d = net.layers[0].ssm.d
        assert [tuple(x.shape) for x in draw.selected(net, images)] == 2 * [(1, 16, d)]
        assert dt.numel() == 2 * 16 * d and dt.min() > 0
    elif model == "lru":
        assert dt is None
    else:
        assert 0.0009 < dt.min() <= dt.max() < 0.11
    if A_bar is not None:
        assert A_bar.dim() == 1 and A_bar.abs().max() < 1


def test_selected_dt_is_that_of_select():
    """The dt that the hooks see, against select() on the input of the layer."""
    net = network("selective_scan", n_layers=1)
    images = 255 * torch.rand(1, 16, 3)
    u = net.encoder((images - net.mean) / net.std)                      # (b, l, h)
    dt, _, _ = net.layers[0].ssm.select(u, 1.0)
    torch.testing.assert_close(draw.selected(net, images)[0], dt)


@pytest.mark.parametrize("model", ["s4d", "mamba"])
def test_run_and_curves(model, tmp_path):
    runs = tmp_path / "runs"
    example.main([*TINY, "--model", model, "--out", str(runs)])
    draw.main(["--run", str(runs / model), "--out", str(tmp_path)])
    draw.main(["--curves", str(runs), "--out", str(tmp_path)])
    for name in (f"run_{model}", f"curves_{model}", "cifar"):
        picture = (tmp_path / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and 10_000 < len(picture) < 200_000


def test_curves_name_every_run(tmp_path):
    for model, accuracies in (("s4d", (0.2, 0.4999)), ("lru", (0.3, 0.5))):
        (tmp_path / model).mkdir()
        rows = [f"{i},{accuracy}\n" for i, accuracy in enumerate(accuracies, 1)]
        table = "epoch,val_accuracy\n" + "".join(rows)
        (tmp_path / model / "metrics.csv").write_text(table)
    figure = draw.draw_curves(tmp_path)
    names, = ([text.get_text() for text in legend.texts] for legend in figure.legends)
    assert names == ["lru 50.0", "s4d 50.0"]                    # the best comes first
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines == {"s4d 50.0": [20, 49.99], "lru 50.0": [30, 50]}


def test_the_training_of_a_run(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,train_loss,train_accuracy,seconds,val_loss,val_accuracy\n"
        "1,2.3,0.1,9,2.2,0.2\n2,1.1,0.5,9,1.2,0.4\n")
    loss, accuracy = draw.draw_training(tmp_path).axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[2.3, 1.1], [2.2, 1.2]]
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[10, 50], [20, 40]]
    assert [list(line.get_xdata()) for line in loss.lines] == 2 * [[1, 2]]


def test_pictures_that_git_tracks_are_not_overwritten(tmp_path, monkeypatch):
    """Unless --out figures is given; and a picture has the same bytes every time."""
    monkeypatch.chdir(tmp_path)
    draw.main(["--only", "dss"])
    draw.main(["--only", "dss", "--out", "again"])
    first, again = (tmp_path / out / "dss.png" for out in ("runs/figures", "again"))
    assert first.read_bytes() == again.read_bytes()
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("flag", ["--run", "--curves"])
def test_an_empty_folder_is_refused_in_one_line(flag, tmp_path):
    with pytest.raises(SystemExit) as error:
        draw.main([flag, str(tmp_path)])
    assert str(tmp_path) in error.value.code and "\n" not in error.value.code
