"""What is particular to lru.py: the ring, the normalization, stability, and rate without a step size."""

import math

import numpy as np
import pytest
import torch

from layers import error, random_state, signal
from lru import LRU, fft_scan, linear_scan, ring, loop_scan
from s5 import S5
from test_golden import load

DOUBLE = dict(dtype=torch.float64)


def test_initialization_is_the_official_one(monkeypatch):
    g = load("lru")
    u = torch.from_numpy(np.stack([g["init_u1"], g["init_u2"]]))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: (u - 1e-6) / (1 - 2e-6))     # ring() avoids 0 and 1
    found = ring(13, float(g["init_r_min"]), float(g["init_r_max"]), float(g["init_max_phase"]))
    for got, name in zip(found, ("nu_log", "theta_log", "gamma_log")):
        assert error(got, g[f"init_{name}"]) <= 1e-9


def test_ring_is_uniform_in_area_and_phase():
    torch.manual_seed(0)
    n, r_min, r_max, max_phase = 20000, 0.4, 0.9, 1.5
    layer = LRU(1, n, r_min=r_min, r_max=r_max, max_phase=max_phase)
    A_bar = layer.discretize()[0].detach()
    radius, phase = A_bar.abs(), A_bar.angle()
    assert radius.min() >= r_min and radius.max() <= r_max and phase.min() > 0 and phase.max() < max_phase
    uniform = torch.linspace(0, 1, n)
    area = (radius.square() - r_min ** 2) / (r_max ** 2 - r_min ** 2)
    for sample in (area, phase / max_phase):
        assert (sample.sort().values - uniform).abs().max() < 2 / math.sqrt(n)     # Kolmogorov-Smirnov
    assert abs(np.corrcoef(area, phase)[0, 1]) < 0.03
    assert error(layer.gamma_log.exp(), torch.sqrt(1 - radius.square())) <= 1e-5


@pytest.mark.parametrize("options", [{"r_min": 0.5}, {"r_max": 0.5}, {"max_phase": 0.1}], ids=str)
def test_every_option_changes_the_output(options):
    outputs = []
    for extra in ({}, options):
        torch.manual_seed(0)
        outputs.append(LRU(3, 8, **extra)(signal(2, 3, 50))[0])
    assert error(outputs[1], outputs[0]) > 1e-3


def test_what_is_trained():
    assert LRU(2, 4, lr=0.01).ssm_lr == dict.fromkeys(["nu_log", "theta_log", "gamma_log", "B"], 0.01)


def test_states_have_unit_variance_for_white_noise():
    torch.manual_seed(0)
    layer = LRU(64, 20, r_max=0.95).requires_grad_(False)
    layer.B.div_(layer.B.square().sum((1, 2), keepdim=True).sqrt())          # its rows have norm 1 on average
    _, x = layer(torch.randn(2000, 64, 100), layer.initial_state(2000))
    assert (x.abs().square().mean(0) - 1).abs().max() < 0.15
    assert abs(LRU(64, 2000).B.square().sum((1, 2)).mean() - 1) < 0.01
    assert abs(20 * LRU(64, 20).C.square().mean() - 1) < 0.1


def test_stable_whatever_the_parameters():
    layer = LRU(2, 4).double()
    for nu_log in (-15.0, 0.0, 15.0):
        for theta_log in (-15.0, 0.0, math.log(math.pi), math.log(2 * math.pi), 15.0):
            layer.nu_log.data.fill_(nu_log), layer.theta_log.data.fill_(theta_log)
            for rate in (0.5, 2.0):
                assert (layer.discretize(rate)[0].abs() < 1).all()
                y, _ = layer(signal(1, 2, 40, **DOUBLE), rate=rate)
                y.sum().backward()
                assert all(torch.isfinite(t).all() for t in (y, *(p.grad for p in layer.parameters())))


def test_lambda_is_the_exponential_parameterization():
    layer = LRU(2, 6).double()
    lam = torch.exp(torch.complex(-layer.nu_log.exp(), layer.theta_log.exp()))
    A_bar, B_bar, C = layer.discretize()
    assert error(A_bar, lam) <= 1e-14 and torch.equal(C, torch.view_as_complex(layer.C))
    assert error(B_bar, layer.gamma_log.exp()[:, None] * torch.view_as_complex(layer.B)) <= 1e-14
    A_bar2, B_bar2, _ = layer.discretize(2.0)                 # two steps with the same input are one at rate 2
    assert error(A_bar2, lam ** 2) <= 1e-12 and error(B_bar2, (lam + 1)[:, None] * B_bar) <= 1e-12


def test_zero_order_hold_is_exact_for_held_inputs():
    layer, u = LRU(3, 8).double(), signal(2, 3, 40, **DOUBLE)
    held = u.repeat_interleave(2, -1)
    assert error(layer(held, rate=0.5)[0][..., 1::2], layer(u)[0]) <= 1e-10
    assert error(layer(u, rate=2.0)[0], layer(held)[0][..., 1::2]) <= 1e-10


@pytest.mark.parametrize("rate", [0.5, 1.0, 1.7])
def test_LRU_is_a_diagonal_S5(rate):
    torch.manual_seed(0)
    s5, lru, u = S5(3, 8, conj_sym=False).double(), LRU(3, 8).double(), signal(2, 3, 60, **DOUBLE)
    Lambda, dt = torch.complex(s5.Lambda_re, s5.Lambda_im).detach(), s5.log_step.detach().exp()
    assert (Lambda.imag * dt).abs().max() < math.pi
    lru.nu_log.data = torch.log(-Lambda.real * dt)
    lru.theta_log.data = torch.log(torch.remainder(Lambda.imag * dt, 2 * math.pi))
    lru.gamma_log.data.zero_()
    lru.B.data = torch.view_as_real(s5.discretize()[1].detach())
    lru.C.data, lru.D.data = s5.C.data, s5.D.data
    x = random_state(s5, 2)
    (y, last), (expected, expected_last) = lru(u, x, rate=rate), s5(u, x, rate=rate)
    assert error(y, expected) <= 1e-11 and error(last, expected_last) <= 1e-11


@pytest.mark.parametrize("method", ["scan", "conv", "step"])
def test_free_running_dynamics(method):
    layer, n_steps = LRU(3, 8).double(), 20
    x = random_state(layer, 2)
    y, last = layer(torch.zeros(2, 3, n_steps, **DOUBLE), x, method=method)
    powers = layer.discretize()[0] ** torch.arange(1, n_steps + 1)[:, None]
    assert error(y, torch.einsum("hn,kn,bn->bhk", torch.view_as_complex(layer.C), powers, x).real) <= 1e-12
    assert error(last, powers[-1] * x) <= 1e-12


def test_a_very_long_sequence_in_chunks():
    torch.manual_seed(0)
    layer = LRU(2, 4, r_min=0.999, r_max=1.0).requires_grad_(False)
    u, state, pieces = signal(1, 2, 2 ** 17), layer.initial_state(1), []
    whole, last = layer(u, state)
    for piece in u.split([1, 2 ** 16 - 2, 1000, 2 ** 16 - 999], -1):
        y, state = layer(piece, state)
        pieces.append(y)
    assert error(torch.cat(pieces, -1), whole) <= 1e-5 and error(state, last) <= 1e-5
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("scan", [loop_scan, linear_scan, fft_scan])
@pytest.mark.parametrize("l", [1, 2, 31, 32, 33, 70])
def test_scans_and_their_derivatives(scan, l):
    """70 = 2 * 32 + 6: a block that is not full, and a scan over the blocks."""
    torch.manual_seed(0)
    a = torch.polar(torch.tensor([0.5, 0.9, 1.0], **DOUBLE), torch.tensor([3.0, 0.1, 0.0], **DOUBLE))
    v, x = torch.randn(2, l, 3, dtype=a.dtype), torch.randn(2, 3, dtype=a.dtype)
    k = torch.arange(l)
    lag = (k[:, None] - k).clamp(min=0)[..., None]
    direct = torch.einsum("kin,bin->bkn", (a ** lag).where((k[:, None] >= k)[..., None], 0), v)
    assert error(scan(a, v, x), direct + a ** (k[:, None] + 1) * x[:, None]) <= 1e-12
    if l in (2, 33):
        inputs = [t[:1].clone().requires_grad_() if t.ndim > 1 else t.clone().requires_grad_() for t in (a, v, x)]
        assert torch.autograd.gradcheck(scan, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(scan, inputs, fast_mode=True)


def test_the_operator_is_associative_and_does_a_block():
    """Equation (3): the steps of a block, combined in any order, take its start to its end."""
    torch.manual_seed(0)
    a, v = torch.randn(2, 8, dtype=torch.complex128)
    x = torch.randn(1, 1, dtype=a.dtype)

    def combine(first, second):
        return second[0] * first[0], second[0] * first[1] + second[1]

    steps = list(zip(a, v))
    left, right = steps[0], steps[-1]
    for step in steps[1:]:
        left = combine(left, step)
    for step in steps[-2::-1]:
        right = combine(step, right)
    assert error(torch.stack(left), torch.stack(right)) <= 1e-12
    ones = torch.full((1,), 1.5, dtype=a.dtype)
    block = linear_scan(ones, v[None, :, None], x)[0, -1]
    whole = (ones, v[0])
    for v_k in v[1:]:
        whole = combine(whole, (ones, v_k))
    assert error(block, whole[0] * x[0] + whole[1]) <= 1e-12


@pytest.mark.parametrize("layer", ["S5", "LRU"])
@pytest.mark.parametrize("constant", [True, False])
def test_accuracy_at_length(layer, constant):
    """2^17 steps in float32, slow states, against float64: the blocks keep a rounded A_bar from adding up."""
    torch.manual_seed(0)
    options = {"S5": {}, "LRU": {"r_min": 0.999, "r_max": 0.9999, "max_phase": 0.01}}[layer]
    layer, l = {"S5": S5, "LRU": LRU}[layer](2, 16, **options).requires_grad_(False), 2 ** 17
    u = torch.ones(1, 2, l) if constant else signal(1, 2, l)
    y, last = layer(u, layer.initial_state(1))
    expected, expected_last = layer.double()(u.double(), layer.initial_state(1), method="conv")
    assert error(y, expected) <= 5e-6 and error(last, expected_last) <= 5e-6
