"""What is particular to gss.py: the block around the SSM, its toggles, what is frozen, the random start."""

import math

import pytest
import torch

import oracle
from gss import GSS, initial_eigenvalues
from layers import error, parameters, projections, random_state, signal

TOGGLES = [{}, {"gate": False}, {"expand": 2}, {"bottleneck": 1}, {"bottleneck": 8}, {"measure": "diag-lin"},
           {"train_B": True}, {"train_dt": True}, {"dt_min": 0.1}, {"dt_max": 3.0},
           {"gate": False, "bottleneck": 2, "measure": "diag-lin", "train_B": True, "train_dt": True}]
CHANGES = [options for options in TOGGLES if options and options != {"train_dt": True}]


def build(options, n=6):
    """A layer of 8 features in float64, its B random where it has one."""
    torch.manual_seed(0)
    layer = GSS(8, n, **options).double()
    if layer.B is not None:
        layer.B.data.normal_()
    return layer


@pytest.mark.parametrize("options", TOGGLES, ids=str)
def test_every_toggle_against_the_oracle(options):
    layer, u = build(options), signal(2, 8, 30, dtype=torch.float64)
    p, x = parameters(layer), random_state(layer, 2)
    assert layer.initial_state(2).shape == (2, 8 // options.get("bottleneck", 4), 6)

    def ssm(v):     # independent states are pairs whose C counts half
        return oracle.s4d(p | {"C": p["C"] / 2}, v, x.numpy(), 1.7)

    expected, expected_last = oracle.gss(u.numpy(), ssm, *projections(p))
    for method in ("conv", "step"):
        y, last = layer(u, x, rate=1.7, method=method)
        assert error(y, expected) <= 1e-9 and error(last, expected_last) <= 1e-9


@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_every_toggle_changes_the_output(options):
    u = signal(2, 8, 30, dtype=torch.float64)
    assert error(build(options)(u)[0], build({})(u)[0]) > 1e-3


@pytest.mark.parametrize("options", TOGGLES, ids=str)
def test_number_of_parameters(options):
    layer, h, n = build(options), 8, 6
    c, e = h // options.get("bottleneck", 4), h * options.get("expand", 4)
    ssm = 2 * c + 4 * c * n + 2 * c * n * options.get("train_B", False)      # dt, D; A, C; B
    gate = (h + 1) * e + (c + 1) * e + (e + 1) * h                           # W_v, W_y, W_o
    linear = (h + 1) * c + (gate if options.get("gate", True) else (c + 1) * h)
    assert sum(p.numel() for p in layer.parameters()) == ssm + linear


def test_step_size_and_B_are_frozen_at_one():
    layer = GSS(8, 6)
    assert (layer.log_dt == 0).all() and layer.B is None
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"log_dt"}
    assert layer.ssm_lr == {"log_A_real": 1e-3, "A_imag": 1e-3}
    layer(signal(1, 8, 9))[0].sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == ["log_dt"]


def test_what_can_be_trained():
    layer = GSS(8, 6, train_B=True, train_dt=True, lr=0.02)
    assert layer.ssm_lr == dict.fromkeys(["log_dt", "log_A_real", "A_imag", "B"], 0.02)
    layer(signal(1, 8, 9))[0].sum().backward()
    assert all((p.grad != 0).any() for p in layer.parameters())
    assert torch.equal(layer.B, torch.tensor([1.0, 0.0]).expand(2, 6, 2))


def test_initializations():
    torch.manual_seed(0)
    A = initial_eigenvalues("diag-rand", 100, 64)
    assert 1e-3 <= (-A.real).min() and (-A.real).max() <= 1 and abs((-A.real).log10().mean() + 1.5) < 0.05
    assert 0 <= A.imag.min() and A.imag.max() <= math.pi and abs(A.imag.mean() - math.pi / 2) < 0.05
    assert abs(torch.corrcoef(torch.stack([A.real.flatten(), A.imag.flatten()]))[0, 1]) < 0.05
    A = initial_eigenvalues("diag-lin", 2, 5)
    assert error(A, -0.5 + 1j * math.pi * torch.arange(5).double().expand(2, 5)) <= 1e-12
    layer = GSS(8, 5, measure="diag-lin")
    assert error(torch.complex(-layer.log_A_real.exp(), layer.A_imag), A) <= 1e-6
    dt = GSS(500, 1, bottleneck=1, gate=False, dt_min=0.01, dt_max=0.1).log_dt.exp()
    assert dt.min() >= 0.0099 and dt.max() <= 0.1001 and abs(dt.log10().mean() + 1.5) < 0.05


def test_kernel_is_the_impulse_response_of_the_ssm_alone():
    layer = build({"train_B": True})
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
    z = 1.7 * layer.log_dt.exp()[:, None] * A
    powers = torch.exp(z[..., None] * torch.arange(50))
    expected = torch.einsum("cn,cnk->ck", C * B * (torch.exp(z) - 1) / A, powers).real
    assert error(layer.kernel(50, rate=1.7), expected) <= 1e-10


def test_kernel_ignores_autocast():
    layer = GSS(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer.kernel(50)
    assert inside.dtype == torch.float32 and error(inside, layer.kernel(50)) <= 1e-6


def test_stable_wherever_training_moves_the_parameters():
    layer, u = GSS(4, 8, bottleneck=1, train_B=True, train_dt=True), signal(1, 4, 50)
    for value in (-20.0, -3.0, 0.0, 3.0, 20.0):
        layer.log_A_real.data.fill_(value)
        layer.log_dt.data.uniform_(-20, 20)
        assert (layer.discretize()[0].abs() <= 1).all()
        assert all(torch.isfinite(layer(u, method=method)[0]).all() for method in ("conv", "step"))


def test_without_the_ssm_the_block_sees_one_time_step():
    layer, u = build({}), signal(1, 8, 20, dtype=torch.float64)
    layer.C.data.zero_()
    changed = u.clone()
    changed[..., 7] += 1
    difference = (layer(changed)[0] - layer(u)[0]).abs().amax((0, 1))
    assert difference[7] > 1e-3 and difference.sum() - difference[7] <= 1e-12
