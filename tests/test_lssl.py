"""What is particular to lssl.py: HiPPO, what the state remembers, discretization, dense kernel, training."""

import numpy as np
import pytest
import torch

import oracle
from layers import error, signal
from lssl import LSSL, advance, hippo_legendre, krylov, reconstruct, response, squares, state_of_input
from test_golden import load

MEASURES = ("legs", "legt")


def test_hippo_matrices_are_the_official_ones():
    g = load("lssl")
    for key, measure, factor, tolerance in (
            ("legs", "legs", 1, 1e-12), ("legt", "legt", 2, 1e-12), ("hazy_legt", "legt", 1, 1e-7)):
        A, B = hippo_legendre(measure, g[f"{key}_B"].shape[-1])
        assert error(A, factor * g[f"{key}_A"]) <= tolerance and error(B, factor * g[f"{key}_B"]) <= tolerance
    assert error(hippo_legendre("legs", 64)[0], oracle.hippo_legs(64)[0]) <= 1e-14


def legendre(measure, n, s):
    """The basis functions and the weight of the inner product, by numpy: (n, k)."""
    z = 1 - 2 * s if measure == "legt" else 2 * np.exp(-s) - 1
    basis = np.stack([np.sqrt(2 * i + 1) * np.polynomial.Legendre.basis(i)(z) for i in range(n)])
    return basis, np.where(s <= 1, 1.0, 0.0) if measure == "legt" else np.exp(-s)


@pytest.mark.parametrize("measure", MEASURES)
def test_reconstruct_is_the_sum_of_orthonormal_polynomials(measure):
    n, s = 12, np.linspace(0, 1 if measure == "legt" else 4, 50)
    x = signal(2, 3, n, dtype=torch.float64)
    basis, _ = legendre(measure, n, s)
    assert error(reconstruct(measure, x, torch.from_numpy(s)), x.numpy() @ basis) <= 1e-12
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


def test_legs_answers_an_impulse_with_basis_times_weight():
    A, B = hippo_legendre("legs", 16)
    s = np.linspace(0, 3, 10)
    basis, weight = legendre("legs", 16, s)
    response = torch.linalg.matrix_exp(torch.from_numpy(s)[:, None, None] * A) @ B
    assert error(response.mT, basis * weight) <= 1e-11


@pytest.mark.parametrize("measure, tolerance", [("legs", 1e-3), ("legt", 1e-5)])
def test_state_is_the_integral_of_the_past_against_the_basis(measure, tolerance):
    n, duration, dt = 16, 3.0, 1e-3
    s = (np.arange(60_000) + 0.5) * duration / 60_000
    basis, weight = legendre(measure, n, s)
    expected = basis * weight @ smooth(duration - s) * (s[1] - s[0])
    assert error(remember(measure, n, duration, dt), expected) <= tolerance


@pytest.mark.parametrize("measure, window, bounds", [
    ("legt", 1.0, {2: 0.6, 4: 0.1, 8: 2e-4, 16: 5e-6}), ("legs", 6.0, {4: 0.5, 8: 0.3, 16: 0.15, 32: 0.07})])
def test_reconstruction_improves_with_the_number_of_states(measure, window, bounds):
    s, previous = (np.arange(2000) + 0.5) / 2000 * window, np.inf
    _, weight = legendre(measure, 1, s)
    for n, bound in bounds.items():
        past = reconstruct(measure, remember(measure, n, 6.0, 1e-3), torch.from_numpy(s)).numpy()
        found = np.sqrt((weight * (past - smooth(6.0 - s)) ** 2).sum() / weight.sum())
        assert found <= min(bound, 0.75 * previous)
        previous = found


@pytest.mark.parametrize("alpha, order", [(0.0, 1), (0.3, 1), (0.5, 2), (1.0, 1)])
def test_order_of_accuracy(alpha, order):
    A, B = hippo_legendre("legs", 4)
    exact = torch.linalg.matrix_exp(A)
    layer = LSSL(1, 4, alpha=alpha).double()
    layer.A.data, layer.B.data = A, B
    errors = []
    for steps in (200, 400):
        layer.log_dt.data.fill_(-np.log(steps))
        A_bar, B_bar, _ = layer.discretize()
        x = sum(torch.linalg.matrix_power(A_bar[0], k) @ B_bar[0] for k in range(steps))     # u = 1
        errors.append((error(torch.linalg.matrix_power(A_bar[0], steps), exact),
                       error(x, torch.linalg.solve(A, (exact - torch.eye(4)) @ B))))
    for coarse, fine in zip(*errors):
        assert abs(np.log2(coarse / fine) - order) < 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("measure", MEASURES)
def test_stability_for_large_steps(measure, alpha):
    for dt in (1e-3, 1.0, 1e3):
        layer = LSSL(1, 16, measure=measure, alpha=alpha, dt_min=dt, dt_max=dt).double()
        A_bar, _, _ = layer.discretize()
        largest = torch.linalg.eigvals(A_bar).abs().max()
        assert largest <= 1 + 1e-9 if alpha >= 0.5 else dt < 1 or largest > 1


def test_powers_by_two_digits():
    A_bar, B_bar, C = (0.5 * signal(2, k, 4, seed=k, dtype=torch.float64) for k in (4, 1, 3))
    B_bar, C = B_bar[:, 0], C.transpose(0, 1)                        # (h, n), (m, h, n)
    for l in (1, 2, 3, 4, 5, 8, 9, 64, 65):
        low, high = squares(A_bar, l, torch.float64)
        assert len(low + high) == max(1, (l - 1).bit_length())
        x, expected, states = B_bar, [], []
        for _ in range(l):
            states.append(x)
            expected.append((C * x).sum(-1))
            x = (A_bar @ x[..., None])[..., 0]
        assert error(response(C, low, high, B_bar[None])[0, ..., :l], torch.stack(expected, -1)) <= 1e-12
        assert error(advance(low + high, B_bar[None], l - 1)[0], states[-1]) <= 1e-12
        u = signal(3, 2, l, dtype=torch.float64)
        expected = torch.einsum("bhk,khn->bhn", u, torch.stack(states[::-1]))
        assert error(state_of_input(u, B_bar, low, high), expected) <= 1e-12
    low, high = squares(A_bar, 4, torch.float64)
    assert error(krylov(low + high, B_bar)[3], (A_bar @ A_bar @ A_bar @ B_bar[..., None])[..., 0]) <= 1e-12


@pytest.mark.parametrize("options", [{}, {"measure": "legt"}, {"alpha": 1.0}, {"channels": 2}], ids=str)
def test_single_precision_kernel(options):
    torch.manual_seed(0)
    layer, exact = LSSL(4, 64, **options), LSSL(4, 64, **options).double()
    exact.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert error(layer.kernel(1024), exact.kernel(1024)) <= 1e-5
        u = signal(1, 4, 1024)
        assert error(layer(u)[0], exact(u.double())[0]) <= 1e-5


def test_trained_and_fixed_parameters():
    shapes = {"no": (8, 8), "shared": (8, 8), "each": (3, 8, 8)}
    for train_A, shape in shapes.items():
        for train_dt in (False, True):
            layer = LSSL(3, 8, channels=2, train_A=train_A, train_dt=train_dt, lr=0.02)
            assert layer.A.shape == shape and layer.B.shape == shape[:-1]
            assert layer.C.shape == (2, 3, 8) and layer.D.shape == (2, 3) and layer.log_dt.shape == (3,)
            layer(signal(1, 3, 9))[0].sum().backward()
            trained = {"log_dt"} if train_dt else set()
            if train_A != "no":
                trained |= {"A", "B"}
            assert layer.ssm_lr == dict.fromkeys(trained, 0.02)
            for name, p in layer.named_parameters():
                assert p.requires_grad == (p.grad is not None) == (name in trained | {"C", "D"})
    assert LSSL(2, 4).ssm_lr == {}
    assert LSSL(2, 4, train_A="each", train_dt=True).ssm_lr == {"log_dt": 1e-3, "A": 1e-3, "B": 1e-3}


def test_one_matrix_each_can_differ():
    layer, u = LSSL(2, 4, train_A="each").double(), signal(1, 2, 20, dtype=torch.float64)
    before, _ = layer(u)
    layer.A.data[1] *= 2
    after, _ = layer(u)
    assert error(after[:, 0], before[:, 0]) <= 1e-12 and error(after[:, 1], before[:, 1]) > 1e-3


@pytest.mark.parametrize("options", [{"measure": "legt"}, {"alpha": 0.0}, {"alpha": 1.0}, {"channels": 2},
                                     {"dt_min": 0.05}, {"dt_max": 0.01}], ids=str)
def test_every_option_changes_the_kernel(options):
    kernels = []
    for extra in ({}, options):
        torch.manual_seed(0)
        layer = LSSL(3, 8, **extra)
        layer.C.data.fill_(0.1)
        kernels.append(layer.kernel(30))
    assert error(kernels[1], kernels[0]) > 1e-3


def test_rate_multiplies_the_step_size():
    layer = LSSL(3, 8, alpha=0.7).double()
    K = layer.kernel(30, rate=2.0)
    layer.log_dt.data += np.log(2)
    assert error(K, layer.kernel(30)) <= 1e-12


def test_step_ignores_autocast():
    layer, u, x = LSSL(2, 8), signal(1, 2, 1)[..., 0], signal(1, 2, 8)
    y, last = layer.step(u, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, inside_last = layer.step(u, x)
    assert error(inside, y) <= 1e-6 and error(inside_last, last) <= 1e-6
