"""What is particular to s4d.py: initializations, discretizations, stability, and that each option does something."""

import copy
import math

import numpy as np
import pytest
import torch

from layers import error, signal
from s4d import S4D, fft_conv, initial_A
from test_golden import load


@pytest.mark.parametrize("measure, key", [("diag-lin", "lin"), ("diag-inv", "inv"), ("diag-quad", "quad"),
                                          ("diag-real", "real"), ("diag-legs", "legs")])
def test_initial_A_is_the_official_one(measure, key):
    g = load("s4d_zoh")
    expected = g.get(f"init_{key}_A_f64", g[f"init_{key}_A"])
    A = initial_A(measure, 2, 2 * len(expected)).numpy()
    assert error(A[1].real, expected.real) <= 1e-12
    assert error(A[1].imag, np.abs(expected.imag)) <= 1e-6 if key != "legs" else 1e-12
    layer = S4D(2, 2 * len(expected), measure=measure).double()
    assert error(-layer.log_A_real.exp(), np.tile(expected.real, (2, 1))) <= 1e-6


def test_legs_eigenvalues_are_those_of_the_normal_part():
    n = 12
    i = np.arange(n)
    A = -np.tril(np.sqrt(np.outer(2 * i + 1, 2 * i + 1)), -1) - np.diag(i + 1)    # HiPPO-LegS
    P = np.sqrt(i + 0.5)
    eigenvalues = np.linalg.eigvals(A + np.outer(P, P))
    assert np.allclose(eigenvalues.real, -0.5)
    assert np.allclose(np.sort(eigenvalues.imag[eigenvalues.imag > 0])[::-1], initial_A("diag-legs", 1, n)[0].imag.numpy())


def test_random_initializations():
    torch.manual_seed(0)
    A = initial_A("diag-lin", 50, 64, real_random=True, imag_random=True)
    assert A.real.min() >= -1 and A.real.max() < 0 and A.real.std() > 0.2
    assert A.imag.min() >= 0 and A.imag.max() <= math.pi * 32 and A.imag.std() > 20
    assert initial_A("diag-real", 5, 64, real_random=True).real.min() > -33
    dt = S4D(5000, 2, dt_min=0.01, dt_max=0.1).log_dt.exp()
    assert dt.min() >= 0.0099 and dt.max() <= 0.1001 and abs(dt.log().mean() - math.log(0.01 * 0.1) / 2) < 0.05


@pytest.mark.parametrize("options", [{"measure": "diag-inv"}, {"measure": "diag-quad"}, {"measure": "diag-real"},
                                     {"measure": "diag-legs"}, {"disc": "bilinear"}, {"real_random": True},
                                     {"imag_random": True}, {"dt_min": 0.05}, {"dt_max": 0.01}], ids=str)
def test_every_option_changes_the_kernel(options):
    kernels = []
    for extra in ({}, options):
        torch.manual_seed(0)
        layer = S4D(3, 16, **extra)
        layer.C.data.fill_(0.1)
        kernels.append(layer.kernel(50))
    assert error(kernels[1], kernels[0]) > 1e-3


def test_what_is_trained():
    layer = S4D(2, 4, lr=0.01)
    assert layer.ssm_lr == {"log_dt": 0.01, "log_A_real": 0.01, "A_imag": 0.01}
    assert set(dict(layer.named_parameters())) == {*layer.ssm_lr, "C", "D"}


def test_stable_wherever_training_moves_the_parameters():
    layer = S4D(2, 8).double()
    for value in (-50.0, -3.0, 0.0, 3.0, 50.0):
        layer.log_A_real.data.fill_(value)
        assert (layer.discretize()[0].abs() <= 1).all()
        assert torch.isfinite(layer(signal(1, 2, 99, dtype=torch.float64))[0]).all()


def test_discretizations_solve_the_differential_equation():
    layer = S4D(1, 2).double()
    layer.log_dt.data.fill_(math.log(0.1))
    layer.log_A_real.data.fill_(math.log(0.3))
    layer.A_imag.data.fill_(2.0)
    x, steps, A = torch.zeros(1, 1, dtype=torch.complex128), 20000, -0.3 + 2j
    for _ in range(steps):                         # x' = A x + 1 from 0 for 0.1 seconds, by midpoint steps
        x = x + 0.1 / steps * (A * (x + 0.05 / steps * (A * x + 1)) + 1)
    A_bar, B_bar, _ = layer.discretize()
    assert error(B_bar, x) <= 1e-9 and error(A_bar, np.exp([[0.1 * A]])) <= 1e-14
    layer.disc = "bilinear"
    half, _, _ = layer.discretize(1e-3)
    assert error(half ** 1000, A_bar) <= 1e-8      # the bilinear transform is of second order


def test_B_bar_of_tiny_steps():
    layer = S4D(1, 2, dt_min=1e-12, dt_max=1e-12).double()
    dt = layer.log_dt.exp()
    assert error(layer.discretize()[1], dt[:, None] * (1 + 0.5 * dt * (-0.5 + 0j))) <= 1e-15


@pytest.mark.parametrize("constant", [True, False])
def test_steps_do_not_drift(constant):
    """|A_bar| = 1 - 1e-6, three phases, float32 parameters and inputs, against the whole in float64."""
    layer, l = S4D(3, 2, dt_min=1.0, dt_max=1.0), 100_000
    layer.log_A_real.data.fill_(math.log(1e-6))
    layer.A_imag.data = torch.tensor([[0.0], [0.01], [1.0]])
    u = torch.ones(1, 3, l) if constant else signal(1, 3, l)
    discrete, x, y = layer.discretize(), layer.initial_state(1), []
    with torch.no_grad():
        for u_k in u.unbind(-1):
            y_k, x = layer.step(u_k, x, discrete=discrete)
            y.append(y_k)
        expected, last = copy.deepcopy(layer).double()(u.double(), layer.initial_state(1))
    y = torch.stack(y, -1)
    for i in range(3):
        assert error(y[:, i], expected[:, i]) <= 1e-6 and error(x[:, i], last[:, i]) <= 1e-8


@pytest.mark.parametrize("l", [1, 2, 3, 7, 64, 97, 128])
def test_fft_conv_is_causal_convolution(l):
    u, K = signal(2, 3, l, dtype=torch.float64), signal(1, 3, l, seed=9, dtype=torch.float64)[0]
    expected = np.stack([[np.convolve(u[i, j], K[j])[:l] for j in range(3)] for i in range(2)])
    assert error(fft_conv(u, K), expected) <= 1e-12


def test_long_kernels_stay_accurate():
    torch.manual_seed(0)
    layer = S4D(2, 64)
    exact = S4D(2, 64).double()
    exact.load_state_dict(layer.state_dict())
    (A_bar, B_bar, C), l = exact.discretize(), 2 ** 16
    k = torch.arange(l, dtype=torch.float64)
    expected = torch.einsum("hn,hnl->hl", C * B_bar, torch.exp(A_bar.log()[..., None] * k)).real
    assert error(layer.kernel(l), expected) <= 1e-6


def test_zero_order_hold_is_exact_for_held_inputs():
    layer = S4D(3, 16).double()
    u = signal(2, 3, 40, dtype=torch.float64)
    held, _ = layer(u.repeat_interleave(2, -1))
    assert error(layer(u, rate=2.0)[0], held[..., 1::2]) <= 1e-9
