"""What is particular to s4d.py: initializations, discretizations, stability, and that each option does something."""

import math

import numpy as np
import pytest
import torch

from layers import error, signal
from s4d import REAL_TYPES, S4D, discretize_bilinear, discretize_zoh, fft_conv, initial_A, legs_eigenvalues, phi
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
    assert np.allclose(np.sort(eigenvalues.imag[eigenvalues.imag > 0])[::-1], legs_eigenvalues(n).numpy())


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


def test_training_options():
    assert "B" not in dict(S4D(2, 4).named_parameters())
    assert S4D(2, 4, train_B=True).B.shape == (2, 2, 2)
    layer = S4D(2, 4, train_B=True, lr={"dt": 0.0, "B": 0.0})
    assert layer.ssm_lr == {"log_dt": 0.0, "log_A_real": 1e-3, "A_imag": 1e-3, "B": 0.0}
    assert not layer.log_dt.requires_grad and not layer.B.requires_grad and layer.A_imag.requires_grad
    assert S4D(2, 4, lr=None).ssm_lr == {}
    assert S4D(2, 4, lr=0.01).ssm_lr == {"log_dt": 0.01, "log_A_real": 0.01, "A_imag": 0.01}
    assert S4D(2, 4, lr=0.0).C.requires_grad


@pytest.mark.parametrize("real_type", REAL_TYPES)
def test_real_types(real_type):
    forward, inverse = REAL_TYPES[real_type]
    value = torch.tensor([1e-3, 0.5, 7.0], dtype=torch.float64)
    assert error(forward(inverse(value)), value) <= 1e-12
    layer = S4D(2, 8, real_type=real_type).double()
    assert error(layer.discretize().A_bar, S4D(2, 8).double().discretize().A_bar.shape and
                 torch.exp(layer.log_dt.exp()[:, None] * torch.complex(-0.5 + 0 * layer.A_imag, layer.A_imag))) <= 1e-6
    if real_type != "none":                        # stable wherever training moves the parameter
        for value in (-50.0, -3.0, 0.0, 3.0, 50.0):
            layer.log_A_real.data.fill_(value)
            assert (layer.discretize().A_bar.abs() <= 1).all() and torch.isfinite(layer(signal(1, 2, 99).double())[0]).all()


def test_discretizations_solve_the_differential_equation():
    A, B = torch.tensor([[-0.3 + 2j]], dtype=torch.complex128), torch.tensor([[1.5 - 1j]], dtype=torch.complex128)
    dt = torch.tensor([[0.1]], dtype=torch.float64)
    x, steps = torch.zeros_like(A), 20000
    for _ in range(steps):                         # x' = A x + B from 0 for 0.1 seconds, by midpoint steps
        x = x + 0.1 / steps * (A * (x + 0.05 / steps * (A * x + B)) + B)
    A_bar, B_bar = discretize_zoh(A, B, dt)
    assert error(B_bar, x) <= 1e-9 and error(A_bar, torch.exp(0.1 * A)) <= 1e-14
    half, _ = discretize_bilinear(A, B, dt / 1000)
    assert error(half ** 1000, A_bar) <= 1e-8      # the bilinear transform is of second order


def test_phi_and_its_gradient_near_zero():
    z = torch.tensor([0, 1e-30, 1e-12, 1e-8j, 9.99e-4, 1.01e-3, -1e-3 + 1e-3j, 2 - 3j], dtype=torch.complex128)
    z.requires_grad_()
    value = phi(z)
    reference = sum(z.detach() ** k / float(math.factorial(k + 1)) for k in range(30))
    slope = sum(k * z.detach() ** (k - 1) / float(math.factorial(k + 1)) for k in range(1, 30))
    assert error(value, reference) <= 1e-12
    value.real.sum().backward()
    assert error(z.grad.conj(), slope) <= 1e-9


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
    d, l = exact.discretize(), 2 ** 16
    k = torch.arange(l, dtype=torch.float64)
    expected = torch.einsum("hn,hnl->hl", d.C * d.B_bar, torch.exp(d.A_bar.log()[..., None] * k)).real
    assert error(layer.kernel(l), expected) <= 1e-6


def test_zero_order_hold_is_exact_for_held_inputs():
    layer = S4D(3, 16).double()
    u = signal(2, 3, 40, dtype=torch.float64)
    held, _ = layer(u.repeat_interleave(2, -1))
    assert error(layer(u, rate=2.0)[0], held[..., 1::2]) <= 1e-9
