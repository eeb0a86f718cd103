"""What is particular to s4d.py: initializations, discretizations, accuracy."""

import math

import numpy as np
import pytest
import torch

from layers import CASES, error, golden, in_steps, signal
from s4d import S4D, initial_A

FIVE = ("s4d.S4D", "dss.DSS", "gss.GSS", "lssl.LSSL", "s4.S4")      # the layers with kernels


@pytest.mark.parametrize("measure, key", [("diag-lin", "lin"), ("diag-inv", "inv"),
                                          ("diag-quad", "quad"), ("diag-real", "real"),
                                          ("diag-legs", "legs")])
def test_initial_A_is_the_official_one(measure, key):
    g = golden("s4d_zoh")
    expected = g.get(f"init_{key}_A_f64", g[f"init_{key}_A"])
    A = initial_A(measure, 2, 2 * len(expected)).numpy()
    assert error(A[1].real, expected.real) <= 1e-12
    assert error(A[1].imag, np.abs(expected.imag)) <= (1e-12 if key == "legs" else 1e-6)
    layer = S4D(2, 2 * len(expected), measure=measure).double()
    assert error(-layer.log_A_real.exp(), np.tile(expected.real, (2, 1))) <= 1e-6


def test_random_initializations():
    torch.manual_seed(0)
    A = initial_A("diag-lin", 50, 64, real_random=True, imag_random=True)
    assert A.real.min() >= -1 and A.real.max() < 0 and A.real.std() > 0.2
    assert A.imag.min() >= 0 and A.imag.max() <= math.pi * 32 and A.imag.std() > 20
    assert initial_A("diag-real", 5, 64, real_random=True).real.min() > -33


@pytest.mark.parametrize("case", [case for case in CASES if case.layer in FIVE],
                         ids=lambda case: case.name)
def test_forward_calls_kernel(case, monkeypatch):
    """With a state and without: who edits kernel() sees it. D is no part of it."""
    layer, u = case.build(), signal(2, case.h, 20)
    kernel, states = layer.kernel, [None, layer.initial_state(2)]
    before = [layer(u, x)[0] for x in states]
    monkeypatch.setattr(layer, "kernel", lambda l, rate=1.0: 0 * kernel(l, rate))
    for x, y in zip(states, before):
        assert error(layer(u, x)[0], y) > 1e-2
        if case.has_kernel:                             # no block around the SSM
            direct = layer.D.reshape(-1, case.h)[..., None] * u[:, None]
            assert error(layer(u, x)[0], direct.flatten(1, 2)) <= 1e-6


@pytest.mark.parametrize("case", [case for case in CASES if case.layer in FIVE],
                         ids=lambda case: case.name)
def test_discretization_is_in_double_precision(case):
    layer = case.build()
    found = layer.discretize(1.7)
    for matrix, expected in zip(found, layer.double().discretize(1.7), strict=True):
        assert error(matrix, expected) <= 1e-12


def test_B_bar_of_tiny_steps():
    layer = S4D(1, 2, dt_min=1e-12, dt_max=1e-12).double()
    dt = layer.log_dt.exp()
    assert error(layer.discretize()[1], dt[:, None] * (1 + 0.5 * dt * (-0.5 + 0j))) <= 1e-15


def test_steps_do_not_drift():
    """|A_bar| = 1 - 1e-6, three phases, float32 parameters and inputs, against the whole in
    float64: for a constant input and for noise."""
    layer, l = S4D(3, 2, dt_min=1.0, dt_max=1.0).requires_grad_(False), 100_000
    layer.log_A_real.fill_(math.log(1e-6))
    layer.A_imag.copy_(torch.tensor([[0.0], [0.01], [1.0]]))
    u = torch.cat([torch.ones(1, 3, l), signal(1, 3, l)])
    y, x = in_steps(layer, u, layer.initial_state(2))
    expected, last = layer.double()(u.double(), layer.initial_state(2))
    for i in range(3):
        for j in range(2):
            assert error(y[j, i], expected[j, i]) <= 1e-6
            assert error(x[j, i], last[j, i]) <= 1e-8


def test_long_kernels_stay_accurate():
    torch.manual_seed(0)
    layer, l = S4D(2, 64), 2 ** 16
    K = layer.kernel(l)
    A_bar, B_bar, C = layer.double().discretize()
    powers = torch.exp(A_bar.log()[..., None] * torch.arange(l, dtype=torch.float64))
    assert error(K, torch.einsum("hn,hnl->hl", 2 * C * B_bar, powers).real) <= 1e-6
