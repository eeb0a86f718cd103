"""What is particular to dss.py: softmax over the length, growing modes, l_max, exp."""

import numpy as np
import pytest
import torch

import oracle
from dss import DSS, legs_eigenvalues
from layers import DOUBLE, error, in_pieces, in_steps, signal

SCALE = 1e4     # Lambda times, dt by this: the same dt Lambda, |Lambda|^2 far above 1e-7


def softmax_kernel(layer, rate=1.0):
    """Equation (4) as it stands, by a softmax over time in numpy: (h, l_max), at rate 1."""
    Lambda = layer.Lambda_re.detach().numpy() + 1j * layer.Lambda_im.detach().numpy()
    W = torch.view_as_complex(layer.W).detach().numpy()
    dt = layer.log_dt.exp().detach().numpy()
    exponents = dt[:, None, None] * Lambda[:, None] * np.arange(layer.l_max)
    rows = np.exp(exponents - exponents.real.max(-1, keepdims=True))
    return ((W / Lambda)[..., None] * rows / rows.sum(-1, keepdims=True)).sum(1).real


def growing_layer(h, l_max, growth, scale=SCALE):
    """A layer without D; its modes grow by e^growth in l_max steps of the last feature."""
    torch.manual_seed(0)
    dt = 1e-3 / scale
    layer = DSS(h, len(growth), l_max=l_max, dt_min=dt, dt_max=dt).double()
    layer.log_dt.data += torch.arange(1 - h, 1) / h
    layer.Lambda_re.data = torch.tensor(growth, dtype=torch.float64) / l_max * 1e3 * scale
    layer.Lambda_im.data *= scale
    layer.D.data.zero_()
    return layer


def test_initialization_is_the_normal_part_of_legs():
    layer = DSS(3, 8)
    A, _, P = oracle.hippo("legs", 16)
    eigenvalues = torch.linalg.eigvals(torch.from_numpy(A + P.T @ P))
    upper = eigenvalues[eigenvalues.imag > 0]
    assert error(layer.Lambda_im, upper.imag.sort(descending=True).values) <= 1e-6
    assert error(layer.Lambda_re, upper.real) <= 1e-6
    assert error(-DSS(3, 8, version="exp").Lambda_re.exp(), upper.real) <= 1e-6
    assert error(legs_eigenvalues(16), upper.imag.sort(descending=True).values) <= 1e-12
    assert abs(DSS(1000, 8).W.std() - 1) < 0.05
    assert set(DSS(3, 8, lr=0.0).ssm_lr.values()) == {0.0}
    with pytest.raises(ValueError, match="^l_max=inf: "):
        DSS(3, 8, l_max=np.inf)


@pytest.mark.parametrize("l_max", [1, 2, 17, 256, 4096])
def test_kernel_is_a_softmax_over_the_length(l_max):
    layer = growing_layer(3, l_max, [-90.0, -3.0, -0.5, 1e-3, 0.5, 3.0, 20.0, 38.0])
    half, expected = (l_max + 1) // 2, softmax_kernel(layer)
    assert error(layer.kernel(l_max), expected) <= 1e-9
    assert error(layer.kernel(half), expected[:, :half]) <= 1e-9


def test_eigenvalue_zero_has_a_finite_kernel_and_the_right_gradient():
    layer = DSS(2, 4, l_max=50).double()
    layer.Lambda_re.data[:2] = torch.tensor([0.0, 1e-9])
    layer.Lambda_im.data[:2] = 0
    u, zero = signal(1, 2, 50, **DOUBLE), layer.initial_state(1)
    layer(u)[0].square().sum().backward()
    assert torch.isfinite(layer.kernel(50)).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    layer.zero_grad()
    layer(u, zero)[1].real[..., :2].sum((0, 1)).prod().backward()   # of the last state
    found = layer.Lambda_re.grad[:2]
    assert error(found[0], found[1]) <= 1e-5            # by the limit, and beside it


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5),
                                              (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("growth", [30.0, 39.0, 41.0, 5000.0])
def test_growing_modes_stay_finite_and_agree_between_modes(growth, dtype, tolerance):
    l = 4096
    layer = growing_layer(2, l, [-growth, -1.0, growth / 2, growth], scale=1).to(dtype)
    u, zero = signal(1, 2, l, dtype=dtype), layer.initial_state(1)
    y, last = layer(u, zero)
    assert error(layer(u)[0], y) <= tolerance
    with torch.no_grad():
        stepped, last_stepped = layer(u, zero, method="step")
        joined, last_joined = in_pieces(layer, u, zero, [1, 1000, 95, 3000])
    assert error(stepped, y) <= tolerance and error(joined, y) <= tolerance
    for x in (last, last_joined):       # every number by itself: they differ by e^growth
        assert error(x / last_stepped, torch.ones_like(x)) <= 10 * tolerance
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("l_max, l", [(1, 1), (3, 3), (5, 5), (12, 12), (1024, 10),
                                      (1024, 1)])
def test_growing_modes_stay_finite_in_single_precision(l_max, l):
    rate, growth = l_max / l, [1e5, 60.0, -1.0, 30.0]
    layer, exact = growing_layer(2, l_max, growth).float(), growing_layer(2, l_max, growth)
    u = signal(1, 2, l)
    y, last = layer(u, layer.initial_state(1), rate=rate)
    expected, _ = exact(u.double(), rate=rate, method="step")
    assert error(y, expected) <= 1e-5 and error(layer(u, rate=rate)[0], expected) <= 1e-5
    stepped, last_stepped = in_steps(layer, u, layer.initial_state(1), rate)
    assert error(stepped, expected) <= 1e-4 and last_stepped.abs().isfinite().all()
    assert last.abs().isfinite().all()
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_growth_over_the_window_is_capped():
    layer = growing_layer(1, 1000, [15.0, 1e4])
    A_bar, B_bar, C = layer.discretize()
    assert error(A_bar.abs() ** 1000, np.exp([[15.0, 40.0]])) <= 1e-9       # the cap
    assert ((C.abs().log() + torch.tensor([15.0, 40.0])).abs() < 30).all()
    assert (B_bar.abs().log().abs() < 30).all()
    A_bar, _, same = layer.discretize(2.0)      # of the layer, whatever the rate
    assert error(A_bar.abs() ** 500, np.exp([[15.0, 40.0]])) <= 1e-9
    assert error(same, C) <= 1e-12


@pytest.mark.parametrize("growth", [[-30.0, -1.0, -5.0], [3.0, -1.0, 20.0]])
@pytest.mark.parametrize("rate", [1.0, 1.7])
def test_a_sequence_longer_than_l_max_goes_on_as_the_recurrence(rate, growth):
    layer = growing_layer(2, 20, growth)
    u, zero = signal(1, 2, 70, **DOUBLE), layer.initial_state(1)
    y, _ = layer(u, rate=rate, method="step")
    assert error(layer(u, rate=rate)[0], y) <= 1e-10
    assert error(in_pieces(layer, u, zero, [1, 49, 20], rate=rate)[0], y) <= 1e-10
