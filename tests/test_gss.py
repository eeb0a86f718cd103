"""What is particular to gss.py: the block around the SSM, its toggles, the random start."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gss import GSS, initial_A
from layers import DOUBLE, error, gss_case, random_state, signal
from s4 import initial_eigenvalues


@pytest.mark.parametrize("options", [
    {}, {"gate": False}, {"expand": 2}, {"bottleneck": 1}, {"bottleneck": 8},
    {"measure": "diag-lin"}, {"train_B": True}, {"train_dt": True}, {"dt_min": 0.1},
    {"gate": False, "bottleneck": 2, "measure": "diag-lin", "train_B": True}], ids=str)
def test_every_toggle_against_the_oracle(options):
    case = replace(gss_case("gss", **options), h=8, d_state=6)
    layer, u = case.build().double(), signal(2, 8, 30, **DOUBLE)
    assert layer.initial_state(2).shape == (2, 8 // options.get("bottleneck", 4), 6)
    if layer.B is not None:
        assert torch.equal(layer.B, torch.tensor([1.0, 0.0]).expand(layer.B.shape).double())
        layer.B.data.normal_()
    assert (layer.log_dt == 0).all() or "dt_min" in options
    x = random_state(layer, 2)
    expected = case.oracle(layer, u, x, 1.7)
    for method in ("conv", "step"):
        assert error(layer(u, x, rate=1.7, method=method), expected) <= 1e-9


def test_the_block_without_the_ssm():
    """With C = 0 and D = 1 the SSM passes its input on, and (1) is a formula in u."""
    layer, u = GSS(8, 6).double(), signal(2, 8, 20, **DOUBLE)
    layer.C.data.zero_()
    layer.D.data.fill_(1)
    v = F.gelu(layer.input_linear(u.mT))
    gated = layer.output_gate(v) * F.gelu(layer.input_gate(u.mT))
    assert gated.shape == (2, 20, 32)
    assert error(layer(u)[0], layer.output_linear(gated).mT) <= 1e-12


@pytest.mark.parametrize("start", [initial_A, initial_eigenvalues])
def test_random_initialization(start):
    torch.manual_seed(0)
    A = start("diag-rand", 100, 128)
    real, imag = -A.real.flatten(), A.imag.flatten()
    assert 1e-3 <= real.min() and real.max() <= 1 and abs(real.log10().mean() + 1.5) < 0.05
    assert 0 <= imag.min() and imag.max() <= math.pi
    assert abs(imag.mean() - math.pi / 2) < 0.05
    assert abs(torch.corrcoef(torch.stack([real, imag]))[0, 1]) < 0.05


def test_initialization_of_s4d():
    A = initial_A("diag-lin", 2, 5)
    assert error(A, -0.5 + 1j * math.pi * torch.arange(5).double().expand(2, 5)) <= 1e-12
    layer = GSS(8, 5, measure="diag-lin")
    assert error(torch.complex(-layer.log_A_real.exp(), layer.A_imag), A) <= 1e-6


def test_kernel_is_the_impulse_response_of_the_ssm_alone():
    layer = GSS(8, 6, train_B=True).double()
    layer.B.data.normal_()
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    B, C = torch.view_as_complex(layer.B), torch.view_as_complex(layer.C)
    z = 1.7 * layer.log_dt.exp()[:, None] * A
    powers = torch.exp(z[..., None] * torch.arange(50))
    expected = torch.einsum("cn,cnk->ck", C * B * (torch.exp(z) - 1) / A, powers).real
    assert error(layer.kernel(50, rate=1.7), expected) <= 1e-10
