"""What is particular to lssl.py: HiPPO, what the state remembers, discretization, dense
kernel, training."""

import copy

import numpy as np
import pytest
import torch

from layers import DOUBLE, error, golden, signal
from lssl import LSSL, hippo_legendre, reconstruct

MEASURES = ("legs", "legt")


@pytest.mark.parametrize("key, measure, factor, tolerance", [
    ("legs", "legs", 1, 1e-12), ("legt", "legt", 2, 1e-12), ("hazy_legt", "legt", 1, 1e-7)])
def test_hippo_matrices_are_the_official_ones(key, measure, factor, tolerance):
    g = golden("lssl")
    A, B = hippo_legendre(measure, g[f"{key}_B"].shape[-1])
    assert error(A, factor * g[f"{key}_A"]) <= tolerance
    assert error(B, factor * g[f"{key}_B"]) <= tolerance


def legendre(measure, n, s):
    """The basis functions and the weight of the inner product, by numpy: (n, k)."""
    z = 1 - 2 * s if measure == "legt" else 2 * np.exp(-s) - 1
    basis = [np.sqrt(2 * i + 1) * np.polynomial.Legendre.basis(i)(z) for i in range(n)]
    return np.stack(basis), np.where(s <= 1, 1.0, 0.0) if measure == "legt" else np.exp(-s)


@pytest.mark.parametrize("measure", MEASURES)
def test_reconstruct_is_the_sum_of_orthonormal_polynomials(measure):
    n, s = 12, np.linspace(0, 1 if measure == "legt" else 4, 50)
    x = signal(2, 3, n, **DOUBLE)
    basis, _ = legendre(measure, n, s)
    found = reconstruct(measure, x, torch.from_numpy(s))
    assert error(found, x.numpy() @ basis) <= 1e-12
    fine = (np.arange(200_000) + 0.5) * (1 if measure == "legt" else 40) / 200_000
    basis, weight = legendre(measure, n, fine)
    assert error(basis * weight @ basis.T * (fine[1] - fine[0]), np.eye(n)) <= 1e-4


def smooth(t):
    """A smooth input signal."""
    return np.sin(2 * t) + 0.5 * np.cos(5 * t + 1) + 0.3


def remember(measure, n, duration, dt):
    """The state after the smooth signal from 0 to duration, by the layer."""
    layer = LSSL(1, n, measure=measure, dt_min=dt, dt_max=dt).double()
    u = torch.from_numpy(smooth((np.arange(round(duration / dt)) + 0.5) * dt))
    with torch.no_grad():
        return layer(u[None, None], layer.initial_state(1))[1][0, 0]


@pytest.mark.parametrize("measure, tolerance", [("legs", 1e-3), ("legt", 1e-5)])
def test_state_is_the_integral_of_the_past_against_the_basis(measure, tolerance):
    n, duration, dt = 16, 3.0, 1e-3
    s = (np.arange(60_000) + 0.5) * duration / 60_000
    basis, weight = legendre(measure, n, s)
    expected = basis * weight @ smooth(duration - s) * (s[1] - s[0])
    assert error(remember(measure, n, duration, dt), expected) <= tolerance


@pytest.mark.parametrize("measure, window, bounds", [
    ("legt", 1.0, {2: 0.6, 4: 0.1, 8: 2e-4, 16: 5e-6}),
    ("legs", 6.0, {4: 0.5, 8: 0.3, 16: 0.15, 32: 0.07})])
def test_reconstruction_improves_with_the_number_of_states(measure, window, bounds):
    s, previous = (np.arange(2000) + 0.5) / 2000 * window, np.inf
    _, weight = legendre(measure, 1, s)
    for n, bound in bounds.items():
        state = remember(measure, n, 6.0, 1e-3)
        past = reconstruct(measure, state, torch.from_numpy(s)).numpy()
        found = np.sqrt((weight * (past - smooth(6.0 - s)) ** 2).sum() / weight.sum())
        assert found <= min(bound, 0.75 * previous)
        previous = found


@pytest.mark.parametrize("options", [{}, {"measure": "legt"}, {"alpha": 1.0},
                                     {"channels": 2}, {"dt_min": 1e-5, "dt_max": 1e-5}],
                         ids=str)
def test_single_precision_kernel(options):
    torch.manual_seed(0)
    layer, u = LSSL(4, 64, **options).requires_grad_(False), signal(1, 4, 1024)
    exact = copy.deepcopy(layer).double()
    assert error(layer.kernel(2 ** 14), exact.kernel(2 ** 14)) <= 1e-5
    assert error(layer(u)[0], exact(u.double())[0]) <= 1e-5


def test_one_matrix_each_can_differ():
    layer = LSSL(2, 4, train_A="each", dt_min=0.1).double()
    u = signal(1, 2, 20, **DOUBLE)
    before, _ = layer(u)
    for matrix in (layer.A, layer.B):
        matrix.data[1] *= 2
        after, _ = layer(u)
        assert error(after[:, 0], before[:, 0]) <= 1e-12
        assert error(after[:, 1], before[:, 1]) > 1e-3


@pytest.mark.parametrize("measure", MEASURES)
def test_unstable_euler_steps_are_refused(measure):
    """An eigenvalue of legs is -n: forward Euler needs dt <= 2/n."""
    with pytest.raises(ValueError, match="^alpha=0.0, dt_max=0.7: .*unit circle"):
        LSSL(8, 4, measure=measure, alpha=0.0, dt_min=0.6, dt_max=0.7)
    layer = LSSL(8, 4, measure=measure, alpha=0.0, dt_max=0.01)
    y, _ = layer(signal(1, 8, 2000))
    assert y.isfinite().all()
    with torch.device("meta"):                          # without numbers nothing is checked
        LSSL(8, 4, measure=measure, alpha=0.0, dt_min=0.6, dt_max=0.7)


def test_state_of_another_device():
    """Products with a tensor on meta are zero without an error."""
    layer, u = LSSL(2, 4), signal(1, 2, 5)
    state = layer.initial_state(1).to("meta")
    for call in (lambda: layer(u, state), lambda: layer.step(u[..., 0], state)):
        with pytest.raises(ValueError, match="^state: on meta, u is on cpu"):
            call()
