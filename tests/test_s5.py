"""What is particular to s5.py: HiPPO in blocks, stability, limits."""

import numpy as np
import pytest
import torch

from layers import error, golden, signal
from s5 import S5, initial_C, make_DPLR_HiPPO, make_HiPPO, make_NPLR_HiPPO


def test_HiPPO_matrices_are_the_official_ones():
    g = golden("s5_zoh")
    n = int(g["init_N"])
    assert error(make_HiPPO(n), g["init_hippo"]) <= 1e-14
    A, P = make_NPLR_HiPPO(n)
    normal = A + torch.outer(P, P)
    assert torch.equal(A, make_HiPPO(n))
    assert error(normal @ normal.T, normal.T @ normal) <= 1e-14
    Lambda, V = make_DPLR_HiPPO(n)
    assert error(Lambda, g["init_Lambda"]) <= 1e-13
    # the phase of an eigenvector is arbitrary: compare up to it
    assert error(np.abs(g["init_V"].conj().T @ V.numpy()), np.eye(n)) <= 1e-12
    assert error((V.mH @ P.to(V.dtype)).abs(), np.abs(g["init_P"])) <= 1e-12
    assert error(V @ torch.diag(Lambda) @ V.mH, normal) <= 1e-13


def test_blocks_are_the_official_ones(monkeypatch):
    g = golden("s5_zoh")

    def identity(*size, **options):             # for B and C before their rotation
        if len(size) == 1:
            return torch.ones(size)
        return torch.eye(*size[-2:], **options).expand(size)

    monkeypatch.setattr(torch, "randn", identity)
    layer = S5(16, 16, blocks=int(g["init_blocks"])).double()
    Lambda = torch.complex(layer.Lambda_re, layer.Lambda_im)
    assert error(Lambda, g["init_blk_Lambda"]) <= 1e-6
    B, C = (4 * torch.view_as_complex(p).detach().numpy() for p in (layer.B, layer.C))
    assert error(np.abs(B @ g["init_blk_V"]), np.eye(8)) <= 1e-6
    assert error(C @ B, (1 + 1j) * g["init_blk_V"] @ g["init_blk_Vinv"]) <= 1e-6


def test_initial_B_and_C_have_their_variances():
    torch.manual_seed(0)
    n, h = 8, 2000
    _, V = make_DPLR_HiPPO(n)
    C = {C_init: initial_C(C_init, h, V) @ V.mH         # back in the original basis
         for C_init in ("lecun_normal", "trunc_standard_normal", "complex_normal")}
    assert abs(n * C["lecun_normal"].real.var() - 1) < 0.05
    cut = C["trunc_standard_normal"].real
    # a normal distribution, cut at two deviations
    assert 1.9 < cut.abs().max() <= 2 and abs(cut.var() - 0.774) < 0.02
    assert abs(C["complex_normal"].abs().square().mean() - 1) < 0.05
    assert abs(h * S5(h, n).B.square().sum(-1).mean() - 1) < 0.05


@pytest.mark.parametrize("method", ["scan", "conv", "step"])
def test_gradients_of_a_growing_system_are_finite(method):
    """The state goes on growing in the zeros after the end, beyond float32; that must not
    reach the gradient."""
    layer = S5(2, 4, dt_min=1.0, dt_max=1.0)
    layer.Lambda_re.data.fill_(4.0)
    y, _ = layer(signal(1, 2, 21), method=method)
    (y / y.detach().abs().max()).sum().backward()
    assert torch.isfinite(y).all() and y.abs().max() > 1e30
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
