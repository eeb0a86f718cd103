"""What is particular to s5.py: HiPPO in blocks, the scan and its gradient, stability, options."""

import math

import numpy as np
import pytest
import torch

from layers import error, random_state, signal
from s5 import S5, initial_C, make_DPLR_HiPPO, make_HiPPO, make_NPLR_HiPPO
from test_golden import load

DOUBLE = dict(dtype=torch.float64)


def test_HiPPO_matrices_are_the_official_ones():
    g = load("s5_zoh")
    n = int(g["init_N"])
    assert error(make_HiPPO(n), g["init_hippo"]) <= 1e-14
    A, P = make_NPLR_HiPPO(n)
    normal = A + torch.outer(P, P)
    assert torch.equal(A, make_HiPPO(n)) and error(normal @ normal.T, normal.T @ normal) <= 1e-14
    Lambda, V = make_DPLR_HiPPO(n)
    assert error(Lambda, g["init_Lambda"]) <= 1e-13
    # the phase of an eigenvector is arbitrary: compare up to it
    assert error(np.abs(g["init_V"].conj().T @ V.numpy()), np.eye(n)) <= 1e-12
    assert error((V.mH @ P.to(V.dtype)).abs(), np.abs(g["init_P"])) <= 1e-12
    assert error(V @ torch.diag(Lambda) @ V.mH, normal) <= 1e-13


def test_blocks_are_the_official_ones(monkeypatch):
    g = load("s5_zoh")

    def identity(*size, **options):                # for B and C before their rotation
        return torch.eye(*size[-2:], **options).expand(size) if len(size) > 1 else torch.ones(size)

    monkeypatch.setattr(torch, "randn", identity)
    layer = S5(16, 16, blocks=int(g["init_blocks"])).double()
    assert error(torch.complex(layer.Lambda_re, layer.Lambda_im), g["init_blk_Lambda"]) <= 1e-6
    B, C = (4 * torch.view_as_complex(p).detach().numpy() for p in (layer.B, layer.C))
    assert error(np.abs(B @ g["init_blk_V"]), np.eye(8)) <= 1e-6
    assert error(C @ B, (1 + 1j) * g["init_blk_V"] @ g["init_blk_Vinv"]) <= 1e-6


def test_initial_B_and_C_have_their_variances():
    torch.manual_seed(0)
    n, h = 8, 2000
    _, V = make_DPLR_HiPPO(n)
    C = {C_init: initial_C(C_init, h, V) @ V.mH for C_init in
         ("lecun_normal", "trunc_standard_normal", "complex_normal")}       # back in the original basis
    assert abs(n * C["lecun_normal"].real.var() - 1) < 0.05
    cut = C["trunc_standard_normal"].real
    assert 1.9 < cut.abs().max() <= 2 and abs(cut.var() - 0.774) < 0.02       # a normal cut at two deviations
    assert abs(C["complex_normal"].abs().square().mean() - 1) < 0.05
    assert abs(h * S5(h, n).B.square().sum(-1).mean() - 1) < 0.05
    dt = S5(2, 2000, blocks=1000, dt_min=0.01).log_step.exp()
    assert dt.min() >= 0.0099 and dt.max() <= 0.1001 and abs(dt.log().mean() - math.log(1e-3) / 2) < 0.1


@pytest.mark.parametrize("options", [{"blocks": 2}, {"C_init": "trunc_standard_normal"},
                                     {"C_init": "complex_normal"}, {"disc": "bilinear"}, {"conj_sym": False},
                                     {"clip_eigs": True},
                                     {"bidirectional": True}, {"step_rescale": 0.5}, {"dt_min": 0.05},
                                     {"dt_max": 0.01}], ids=str)
def test_every_option_changes_the_output(options):
    outputs = []
    for extra in ({}, options):
        torch.manual_seed(0)
        layer = S5(3, 8, **extra)
        if "clip_eigs" in options:
            layer.Lambda_re.data.add_(0.6)         # unstable without clipping
        outputs.append(layer(signal(2, 3, 50), rate=10.0)[0])
    assert error(outputs[1], outputs[0]) > 1e-3


def test_what_is_trained():
    assert S5(2, 4, lr=0.01).ssm_lr == dict.fromkeys(["log_step", "Lambda_re", "Lambda_im", "B"], 0.01)
    assert len(S5(2, 6).B) == 3 and len(S5(2, 7, conj_sym=False).B) == 7


def test_step_rescale_is_a_rate():
    layer, u = S5(3, 8, step_rescale=2.0).double(), signal(2, 3, 30, **DOUBLE)
    plain = S5(3, 8).double()
    plain.load_state_dict(layer.state_dict())
    assert error(layer(u, rate=1.5)[0], plain(u, rate=3.0)[0]) <= 1e-12
    assert error(layer.discretize()[0], plain.discretize(2.0)[0]) <= 1e-14


@pytest.mark.parametrize("method", ["scan", "conv", "step"])
@pytest.mark.parametrize("conj_sym", [True, False])
def test_free_running_dynamics(conj_sym, method):
    layer, n_steps = S5(3, 8, conj_sym=conj_sym).double(), 20
    x = random_state(layer, 2)
    y, last = layer(torch.zeros(2, 3, n_steps, **DOUBLE), x, method=method)
    A_bar, C = layer.discretize()[0], torch.view_as_complex(layer.C) * (2 if conj_sym else 1)
    powers = A_bar ** torch.arange(1, n_steps + 1)[:, None]
    assert error(y, torch.einsum("hp,kp,bp->bhk", C, powers, x).real) <= 1e-12
    assert error(last, powers[-1] * x) <= 1e-12


def test_zero_order_hold_is_exact_for_held_inputs():
    layer, u = S5(3, 16).double(), signal(2, 3, 40, **DOUBLE)
    held, _ = layer(u.repeat_interleave(2, -1))
    assert error(layer(u, rate=2.0)[0], held[..., 1::2]) <= 1e-9


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_clipped_eigenvalues_are_stable_whatever_the_parameters(disc):
    layer = S5(2, 8, clip_eigs=True, disc=disc).double()
    for real in (-1e4, -1e-9, 3.0, 1e4):
        for imag in (-1e4, 0.0, 3.0):
            for log_step in (-7.0, 0.0, 7.0):
                layer.Lambda_re.data.fill_(real), layer.Lambda_im.data.fill_(imag)
                layer.log_step.data.fill_(log_step)
                assert (layer.discretize()[0].abs() < 1).all()
                assert torch.isfinite(layer(signal(1, 2, 40, **DOUBLE))[0]).all()


@pytest.mark.parametrize("clip_eigs", [False, True])
def test_a_very_long_sequence_in_chunks(clip_eigs):
    torch.manual_seed(0)
    layer = S5(2, 4, clip_eigs=clip_eigs).requires_grad_(False)
    if clip_eigs:
        layer.Lambda_re.fill_(5.0)                 # clipped to the least decay, exp(-1e-4 dt) per step
    u, state, pieces = signal(1, 2, 2 ** 17), layer.initial_state(1), []
    whole, last = layer(u, state)
    for piece in u.split([1, 2 ** 16 - 2, 1000, 2 ** 16 - 999], -1):
        y, state = layer(piece, state)
        pieces.append(y)
    assert error(torch.cat(pieces, -1), whole) <= 1e-4 and error(state, last) <= 1e-4
    assert whole[..., 2 ** 16:].abs().max() < 3 * whole[..., :2 ** 16].abs().max()


def test_bidirectional_is_forward_plus_backward():
    both, one = S5(3, 8, bidirectional=True).double(), S5(3, 8).double()
    u = signal(2, 3, 30, **DOUBLE)
    one.load_state_dict(both.state_dict() | {"C": both.C[:, :4]})
    forward, _ = one(u)
    one.C.data.copy_(both.C[:, 4:])
    backward = one(u.flip(-1))[0].flip(-1) - one.D[:, None] * u              # D u counts once
    for method in ("scan", "conv", "step"):
        assert error(both(u, method=method)[0], forward + backward) <= 1e-12


def test_bidirectional_refuses_a_state_and_steps():
    layer, u, x = S5(3, 8, bidirectional=True), signal(2, 3, 5), torch.zeros(2, 4, dtype=torch.complex64)
    for call in (lambda: layer(u, x), lambda: layer.step(u[..., 0], x), lambda: layer.initial_state(2)):
        with pytest.raises(ValueError, match="^bidirectional=True: "):
            call()


@pytest.mark.parametrize("method", ["scan", "conv", "step"])
def test_second_derivatives(method):
    layer = S5(2, 4).double()
    x = random_state(layer, 1)
    u = signal(1, 2, 35, **DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: layer(u, x, method=method)[0], u, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda u: layer(u, x, method=method)[0], u, fast_mode=True)


def test_a_zero_eigenvalue_integrates():
    layer = S5(1, 2, dt_min=0.1, dt_max=0.1).double()
    layer.Lambda_re.data.zero_(), layer.Lambda_im.data.zero_()
    _, B_bar, _ = layer.discretize()
    assert error(B_bar, layer.log_step.exp()[:, None] * torch.view_as_complex(layer.B)) <= 1e-12
    layer(signal(1, 1, 40, **DOUBLE))[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("method", ["scan", "conv", "step"])
def test_gradients_of_a_growing_system_are_finite(method):
    """The state goes on growing in the zeros after the end, beyond float32; that must not reach the gradient."""
    layer = S5(2, 4, dt_min=1.0, dt_max=1.0)
    layer.Lambda_re.data.fill_(4.0)
    y, _ = layer(signal(1, 2, 21), method=method)
    (y / y.detach().abs().max()).sum().backward()
    assert torch.isfinite(y).all() and y.abs().max() > 1e30
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
