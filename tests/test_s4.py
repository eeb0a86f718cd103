"""What is particular to s4.py: HiPPO and its NPLR form, the kernel, the options."""

import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from layers import DOUBLE, error, golden, parameters, random_state, signal
from s4 import S4, cauchy_kernel, initial_eigenvalues, nplr
from s4d import initial_A
from test_modes import gradients

NPLR = ["legs", "legt", "fout"]


def build(measure, n, h=2):
    """A layer of that measure in the mode that has it."""
    torch.manual_seed(0)
    return S4(h, n, mode="diag" if "diag" in measure else "nplr", measure=measure)


@pytest.mark.parametrize("measure", NPLR)
def test_hippo_matrices_are_the_official_ones(measure):
    g = golden(f"s4_nplr_{measure}")
    A, B, _ = oracle.hippo(measure, len(g["hippo_B"]))
    assert error(A, g["hippo_A"]) <= 1e-12 and error(B, g["hippo_B"]) <= 1e-12


@pytest.mark.parametrize("n", [2, 4, 16, 64])
@pytest.mark.parametrize("measure", NPLR)
def test_nplr_is_hippo_in_another_basis(measure, n):
    """An orthogonal change of basis changes none of the products x^T (z - A)^{-1} x."""
    A, B, P = oracle.hippo(measure, n)
    Lambda, P_half, B_half = (part.numpy() for part in nplr(measure, n))
    assert len(P_half) == len(P) == (2 if measure == "legt" else 1)
    assert (Lambda.imag >= -1e-12).all() and (Lambda.real <= 0).all()
    x = np.stack([B, *P])
    ours = np.stack([oracle.conjugate_pairs(row) for row in (B_half, *P_half)])
    dense, one = oracle.nplr_matrix(Lambda, P_half), np.eye(n)
    for z in (0.1, 1 + 3j, 10j):
        found = ours.conj() @ np.linalg.solve(z * one - dense, ours.T)
        assert error(found, x @ np.linalg.solve(z * one - A, x.T)) <= 1e-11


@pytest.mark.parametrize("measure", NPLR)
def test_nplr_is_the_official_one(measure):
    """They keep the other half of a pair, P_1 before P_0, any phase: it cancels in P B*."""
    g = golden(f"s4_nplr_{measure}")
    Lambda, P, B = nplr(measure, 16)
    order, theirs = Lambda.imag.argsort(descending=True), np.argsort(g["hippo_w"].imag)
    assert error(Lambda[order], g["hippo_w"][theirs].conj()) <= 1e-10
    expected = (g["hippo_P"] * g["hippo_B_nplr_noclip"].conj())[::-1, theirs].conj()
    assert error((P * B.conj())[:, order], expected) <= 1e-10


def test_long_kernels_stay_accurate():
    """Against the dense recurrence: 1 - z would cancel at 65536 nodes."""
    l, dt = 65536, torch.tensor([[1e-4], [1e-3]], **DOUBLE)
    Lambda, P, B = nplr("legs", 8)
    C = torch.ones(1, 2, 4, dtype=B.dtype)
    K = cauchy_kernel(Lambda.repeat(2, 1), P[:, None].repeat(1, 2, 1), B.repeat(2, 1), C,
                      dt, l)
    A = oracle.nplr_matrix(Lambda.numpy(), P.numpy())
    for i in range(2):
        A_bar, x = oracle.bilinear(A, oracle.conjugate_pairs(B.numpy()), dt[i].item())
        expected = np.zeros(l)
        for k in range(l):
            expected[k] = x.sum().real
            x = A_bar @ x
        assert error(K[0, i], expected) <= 1e-7


@pytest.mark.parametrize("measure", NPLR)
def test_gradients_of_the_cauchy_kernel_are_those_of_dense_powers(measure):
    layer, weights = build(measure, 64).double(), signal(1, 2, 100, **DOUBLE)
    trained = [layer.log_dt, layer.log_A_real, layer.A_imag, layer.P, layer.B, layer.C]
    kernels = cauchy_kernel(*layer.continuous(1.7), 100), layer.kernel(100, rate=1.7)
    found, expected = [torch.autograd.grad((K * weights).sum(), trained) for K in kernels]
    for gradient, right in zip(found, expected):
        assert error(gradient, right) <= 1e-6


def test_long_kernels_have_no_array_of_nodes(monkeypatch):
    layer = S4(2, 4)
    monkeypatch.setattr("s4.cauchy_kernel", lambda *_: pytest.fail("Cauchy sums"))
    layer.kernel(16 * 4)
    layer(signal(1, 2, 16 * 4))
    with pytest.raises(pytest.fail.Exception, match="Cauchy sums"):
        layer.kernel(16 * 4 - 1)


def test_growing_states_are_exact():
    """real_type none: by dense powers. 1e-8 of a later state would drown the first ones."""
    torch.manual_seed(0)
    layer = S4(1, 8, real_type="none", dt_min=0.1, dt_max=0.1)
    layer.log_A_real.data.fill_(-3.0)
    u = signal(1, 1, 100)
    assert layer.kernel(100).abs().max() > 1e10
    assert error(layer(u)[0], layer(u, method="step")[0]) <= 1e-5


@pytest.mark.parametrize("measure", ["diag-lin", "diag-inv", "diag-quad", "diag-real",
                                     "diag-legs"])
def test_diagonal_initializations_are_those_of_s4d(measure):
    layer, expected = build(measure, 16), initial_A(measure, 2, 16)
    assert error(initial_eigenvalues(measure, 2, 16), expected) <= 1e-12
    assert error(torch.complex(-layer.log_A_real.exp(), layer.A_imag), expected) <= 1e-6
    assert error(layer.B, torch.tensor([1.0, 0.0]).expand(2, 8, 2)) == 0


def test_mixed_measures_alternate_over_the_features():
    layer = S4(4, 16, measure="hippo")
    for i, measure in enumerate(["legs", "fout", "legs", "fout"]):
        Lambda, P, B = nplr(measure, 16)
        assert error(layer.A_imag[i], Lambda.imag) <= 1e-6
        assert error(layer.P[0, i].norm(), P.norm()) <= 1e-6
        assert error(layer.B[i].norm(), B.norm()) <= 1e-6
    layer = S4(4, 16, mode="diag", measure="diag")
    for i, measure in enumerate(["diag-inv", "diag-lin", "diag-inv", "diag-lin"]):
        assert error(layer.A_imag[i], initial_A(measure, 1, 16)[0].imag) <= 1e-6


# ---- a step in O(n) ----

def dense_step(layer, u, x):
    """One step with the dense A_bar that discretize() stands for, by numpy."""
    a, B_bar, Q, S, C = (part.detach().numpy() for part in layer.discretize())
    pairs = oracle.conjugate_pairs
    A_bar = np.stack([np.diag(diagonal) for diagonal in pairs(a)])
    A_bar = A_bar - np.einsum("rhi,rhj->hij", pairs(Q), pairs(S))
    x = np.einsum("hij,bhj->bhi", A_bar, pairs(x.numpy())) + pairs(B_bar) * u[..., None]
    y = np.einsum("mhn,bhn->bmh", pairs(C), x).real + layer.D.detach().numpy() * u[:, None]
    return y.reshape(len(u), -1), x[..., :x.shape[-1] // 2]


@pytest.mark.parametrize("measure, rank", [("legs", 1), ("legs", 2), ("legs", 3),
                                           ("legt", 2), ("legt", 3), ("fout", 1)])
def test_step_is_that_of_the_dense_matrix(measure, rank):
    torch.manual_seed(0)
    layer = S4(3, 16, measure=measure, rank=rank, channels=2).double()
    layer.P.data.add_(0.1 * torch.randn_like(layer.P))
    u, x = signal(2, 3, 1, **DOUBLE)[..., 0], random_state(layer, 2)
    assert error(layer.step(u, x), dense_step(layer, u.numpy(), x)) <= 1e-12


class Sizes(TorchDispatchMode):
    """Records the largest number of elements of a tensor that an operation returns."""
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_a_step_makes_no_array_of_n_squared():
    layer, n = S4(2, 256, measure="legt"), 256
    u, x, discrete = signal(1, 2, 1)[..., 0], layer.initial_state(1), layer.discretize()
    with torch.no_grad(), Sizes() as sizes:
        layer.discretize()
        layer.step(u, x, discrete=discrete)
    assert sizes.largest <= 8 * n < 2 * n * n


@pytest.mark.parametrize("measure", NPLR)
def test_gradients_through_the_low_rank_form(measure):
    """Of a step, in P, Lambda, B, C, dt, against finite differences."""
    layer = S4(1, 8, measure=measure, dt_min=0.1).double()
    values = dict(layer.named_parameters())
    u, x = signal(1, 1, 1, **DOUBLE)[..., 0], random_state(layer, 1)

    def step(*parameters):
        def run():
            y, last = layer.step(u, x)
            return y, torch.view_as_real(last)
        swapped = dict(zip(values, parameters))
        with torch.nn.utils.stateless._reparametrize_module(layer, swapped):
            return run()

    assert torch.autograd.gradcheck(step, tuple(values.values()))


# ---- accuracy ----

@pytest.mark.parametrize("n, lengths", [(2, [1, 2, 3, 99]), (64, [1, 5, 1024, 4096]),
                                        (256, [1, 31, 1100])])
@pytest.mark.parametrize("measure", NPLR + ["diag-lin"])
def test_single_precision_at_any_length(measure, n, lengths):
    layer = build(measure, n).requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    for l in lengths:
        u = signal(1, 2, l)
        assert error(layer(u)[0], exact(u.double())[0]) <= 1e-5
        assert error(layer.kernel(l), exact.kernel(l)) <= 1e-5


@pytest.mark.parametrize("measure", NPLR)
def test_many_states_against_the_dense_recurrence(measure):
    layer, u = build(measure, 256, h=1), signal(1, 1, 20)
    x = random_state(layer, 1)
    expected = oracle.s4(parameters(layer), u.double().numpy(), x.numpy())
    assert error(layer(u, x), expected) <= 1e-5


@pytest.mark.parametrize("measure", NPLR + ["diag-legs"])
def test_gradients_of_the_convolution_are_those_of_the_recurrence(measure):
    layer, u = build(measure, 64).double(), signal(1, 2, 100, **DOUBLE)
    found = gradients(layer, u, None, "conv")
    for name, expected in gradients(layer, u, None, "step").items():
        assert error(found[name], expected) <= 1e-8, name


# ---- options ----

@pytest.mark.parametrize("measure", NPLR + ["diag-lin"])
@pytest.mark.parametrize("real_type", ["exp", "relu", "none"])
def test_real_types_start_at_the_same_system_and_can_be_trained(real_type, measure):
    layers, mode = [], "diag" if "diag" in measure else "nplr"
    for option in ("exp", real_type):
        torch.manual_seed(0)
        layers.append(S4(2, 16, mode=mode, measure=measure, real_type=option))
    exp, other = layers
    # relu keeps off 0 if Re Lambda = 0
    assert error(other.kernel(99), exp.kernel(99)) <= 1e-2
    assert torch.equal(other.log_A_real, exp.log_A_real) == (real_type == "exp")
    other(signal(1, 2, 99))[0].square().sum().backward()
    assert all((p.grad != 0).any() for p in other.parameters())


@pytest.mark.parametrize("name", ["log_A_real", "A_imag", "B", "P"])
def test_shared_copies_serve_alternate_features(name):
    layer = S4(4, 8, n_ssm=2).double()
    before = layer.kernel(20)
    parameter = layer.get_parameter(name)
    (parameter[:, 1] if name == "P" else parameter[1]).data.mul_(1.5)
    changed = (layer.kernel(20) - before).abs().amax(-1) > 1e-9
    assert changed.tolist() == [False, True, False, True]


def test_learning_rates_freeze():
    def frozen(layer):
        return {name for name, p in layer.named_parameters() if not p.requires_grad}

    layer = S4(2, 4, lr={"dt": 0.0, "B": 0.0, "A": 0.02})
    slow = {"log_A_real": 0.02, "A_imag": 0.02, "P": 0.02}
    assert layer.ssm_lr == slow | {"log_dt": 0.0, "B": 0.0}
    assert frozen(layer) == {"log_dt", "B"}
    assert set(S4(2, 4, mode="diag", lr=0.1).ssm_lr.values()) == {0.1}
    assert frozen(S4(2, 4, lr=0.0)) == {"log_dt", "log_A_real", "A_imag", "P", "B"}
    with pytest.raises(ValueError, match="^lr=.*: pass"):
        S4(2, 4, lr={"C": 0.1})


@pytest.mark.parametrize("argument, options", [
    ("measure", {"mode": "diag", "measure": "legt"}),
    ("measure", {"measure": "diag-lin"}),
    ("disc", {"disc": "zoh"}),
    ("l_max", {"mode": "diag", "disc": "dss"}),
    ("rank", {"mode": "diag", "rank": 1}),
    ("rank", {"measure": "legt", "rank": 1}),
    ("n_ssm", {"bottleneck": 2, "n_ssm": 4}),
    ("real_type", {"mode": "diag", "disc": "dss", "l_max": 9, "real_type": "none"})])
def test_options_that_exclude_each_other(argument, options):
    with pytest.raises(ValueError, match=f"{argument}=.*: "):
        S4(4, 8, **options)


def test_more_columns_of_P_start_as_noise_and_can_be_trained():
    """P enters as P P*: a column of zeros would have no gradient."""
    torch.manual_seed(0)
    noise = S4(8, 64, rank=3).P[1:]
    assert 0 < noise.abs().max() < 0.1 and abs(noise.std() - 0.5 ** 0.5 * 1e-2) < 1e-3


def test_the_gate_is_wide_as_the_input():
    """A bottleneck narrows the SSM, not the gate of the block."""
    block = S4(8, 4, gate=3, bottleneck=2, channels=2).block
    assert block.input_gate.weight.shape == (24, 8)
    assert block.output_gate.weight.shape == (24, 8)            # from 2 channels of 4
    assert block.output_linear.weight.shape == (16, 24)


def test_disc_dss_goes_on_beyond_l_max():
    layer = S4(2, 4, mode="diag", disc="dss", l_max=20).double()
    u = signal(1, 2, 70, **DOUBLE)
    for rate in (1.0, 1.7):
        assert error(layer(u, rate=rate)[0], layer(u, rate=rate, method="step")[0]) <= 1e-10


@pytest.mark.parametrize("options", [{}, {"mode": "diag", "disc": "bilinear"},
                                     {"measure": "legt"}], ids=str)
def test_bidirectional_layer_is_two_direct_sums(options):
    layer = S4(3, 8, bidirectional=True, channels=2, **options).double()
    layer.requires_grad_(False)
    u, l = signal(2, 3, 21, **DOUBLE), 21
    past, future = layer.kernel(l, rate=1.7).numpy().reshape(2, 2, 3, l)
    y, D, v = np.zeros((2, 2, 3, l)), layer.D.numpy(), u.numpy()[:, None]
    for k in range(l):
        y[..., k] = D * v[..., k] + sum(past[..., i] * v[..., k - i] for i in range(k + 1))
        y[..., k] += sum(future[..., j - 1] * v[..., k + j] for j in range(1, l - k))
    assert error(layer(u, rate=1.7)[0], y.reshape(2, 6, l)) <= 1e-10
    present = D + layer.kernel(1).numpy()[:6].reshape(2, 3)
    expected = (present[..., None] * v[..., :1]).reshape(2, 6, 1)
    assert error(layer(u[..., :1])[0], expected) <= 1e-10
