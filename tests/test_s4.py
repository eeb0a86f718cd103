"""What is particular to s4.py: HiPPO and its NPLR form, the kernel, S4 as S4D, DSS and GSS, the options."""

import math

import numpy as np
import pytest
import torch

import oracle
from dss import DSS
from gss import GSS
from layers import error, parameters, random_state, signal
from s4 import S4, cauchy_kernel, hippo, initial_diagonal, nplr, real_form, response, squares, stack
from s4d import S4D, initial_A
from test_golden import load
from test_modes import gradients

NPLR = ["legs", "legt", "fout"]
DIAGONAL = ["diag-lin", "diag-inv", "diag-quad", "diag-real", "diag-legs", "diag-rand", "diag"]


def copy_parameters(layer, **values):
    """Overwrite parameters of the layer, shapes checked."""
    for name, value in values.items():
        parameter = layer.get_parameter(name)
        assert parameter.shape == value.shape, (name, parameter.shape, value.shape)
        parameter.data.copy_(value)
    return layer


@pytest.mark.parametrize("measure", NPLR)
def test_hippo_matrices_are_the_official_ones(measure):
    g = load(f"s4_nplr_{measure}")
    A, B, _ = hippo(measure, len(g["hippo_B"]))
    assert error(A, g["hippo_A"]) <= 1e-12 and error(B, g["hippo_B"]) <= 1e-12
    for n in (2, 10, 64):
        A, B, _ = hippo(measure, n)
        expected_A, expected_B = getattr(oracle, f"hippo_{measure}")(n)
        assert error(A, expected_A) <= 1e-14 and error(B, expected_B) <= 1e-14


@pytest.mark.parametrize("n", [2, 4, 16, 64])
@pytest.mark.parametrize("measure", NPLR)
def test_hippo_is_normal_plus_low_rank(measure, n):
    A, _, P = hippo(measure, n)
    normal = A + P.mT @ P
    assert len(P) == (2 if measure == "legt" else 1)
    square = normal @ normal.mT
    assert (square - normal.mT @ normal).abs().max() <= 1e-10 * square.abs().max()
    assert (normal + normal.mT - 2 * normal[0, 0] * torch.eye(n)).abs().max() <= 1e-10   # -c + skew-symmetric


def test_eigenvalues_of_legs_are_the_negative_integers():
    eigenvalues = torch.linalg.eigvals(hippo("legs", 12)[0])
    assert error(eigenvalues.real.sort().values, np.arange(-12.0, 0)) <= 1e-9
    assert eigenvalues.imag.abs().max() <= 1e-9


@pytest.mark.parametrize("n", [2, 4, 16, 64])
@pytest.mark.parametrize("measure", NPLR)
def test_nplr_reconstructs_hippo(measure, n):
    A, B, P = hippo(measure, n)
    Lambda, P_half, B_half, V = nplr(measure, n)
    assert (Lambda.imag >= -1e-12).all() and (Lambda.real <= 0).all()
    both = torch.cat([V, V.conj()], 1)                       # the other half has the conjugate eigenvectors
    identity = torch.eye(n, dtype=torch.complex128)
    assert error(both.mH @ both, identity) <= 1e-12 and error(both @ both.mH, identity) <= 1e-12
    Lambda, P_both = torch.cat([Lambda, Lambda.conj()]), torch.cat([P_half, P_half.conj()], 1).mT
    assert error(both @ (torch.diag(Lambda) - P_both @ P_both.mH) @ both.mH, A.to(both.dtype)) <= 1e-12
    assert error(2 * (V @ B_half).real, B) <= 1e-12 and error(2 * (V @ P_half.mT).real, P.mT) <= 1e-12
    real, split = real_form(Lambda[None, :n // 2], P_half[:, None])[0], torch.cat([V.real, -V.imag], 1)
    assert error(2 * split @ real @ split.mT, A) <= 1e-12    # the real form: A in the basis Re V, -Im V


@pytest.mark.parametrize("measure", NPLR)
def test_nplr_is_the_official_one(measure):
    g = load(f"s4_nplr_{measure}")
    Lambda, P, B, _ = nplr(measure, 16)
    order, theirs = Lambda.imag.argsort(descending=True), np.argsort(g["hippo_w"].imag)
    assert error(Lambda[order], g["hippo_w"][theirs].conj()) <= 1e-10    # they keep the other half of a pair,
    expected = (g["hippo_P"] * g["hippo_B_nplr_noclip"].conj())[::-1, theirs].conj()    # P_1 before P_0
    assert error((P * B.conj())[:, order], expected) <= 1e-10    # and any phase, which cancels in P B*


@pytest.mark.parametrize("measure", NPLR)
def test_kernel_is_that_of_the_original_dense_system(measure):
    n, l, dt = 32, 100, torch.tensor([0.01, 0.2], dtype=torch.float64)
    A, B, _ = hippo(measure, n)
    Lambda, P, B_half, V = nplr(measure, n)
    Lambda, B_half, P = Lambda.repeat(2, 1), B_half.repeat(2, 1), P[:, None].repeat(1, 2, 1)
    C = signal(3, 2, n, dtype=torch.float64)                 # (m, h, n), for the original coordinates
    K = cauchy_kernel(Lambda, P, B_half, C.to(V.dtype) @ V, dt, l, True)
    impulse = np.zeros((1, l))
    impulse[0, 0] = 1
    for i in range(2):
        A_bar, B_bar = oracle.bilinear(A.numpy(), B.numpy(), dt[i].item())
        D, x = np.zeros((3, 1)), np.zeros(n)
        expected, _ = oracle.simulate(A_bar, B_bar[:, None], C[:, i].numpy(), D, impulse, x)
        assert error(K[:, i], expected) <= 1e-9


@pytest.mark.parametrize("exact, tolerance", [(False, 2e-7), (True, 1e-9)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_kernel_function_at_any_rank(rank, exact, tolerance):
    torch.manual_seed(0)
    Lambda = torch.complex(-torch.rand(2, 8) - 0.1, 5 * torch.randn(2, 8)).to(torch.complex128)
    P, B, C = (torch.randn(k, 2, 8, dtype=torch.complex128) for k in (rank, 1, 2))
    dt = torch.tensor([0.05, 0.3], dtype=torch.float64)
    for l in (1, 2, 7, 64, 65, 200):
        K, identity = cauchy_kernel(Lambda, P, B[0], C, dt, l, exact), torch.eye(16).double()
        half = dt[:, None, None] / 2 * real_form(Lambda, P)
        dtB = dt[:, None] * torch.cat([B[0].real, B[0].imag], -1)
        x = torch.linalg.solve(identity - half, dtB[..., None])
        A_bar, expected = torch.linalg.solve(identity - half, identity + half), []
        for _ in range(l):
            expected.append(2 * torch.einsum("mhn,hnk->mh", torch.cat([C.real, -C.imag], -1), x))
            x = A_bar @ x
        assert error(K, torch.stack(expected, -1)) <= tolerance


@pytest.mark.parametrize("exact, tolerance", [(False, 1e-7), (True, 5e-10)])
def test_long_kernels_stay_accurate(exact, tolerance):
    """Against powers of the dense matrix: (1 - z) / (1 + z) would cancel at 65536 nodes."""
    l, dt = 65536, torch.tensor([1e-4, 1e-3], dtype=torch.float64)
    Lambda, P, B, _ = nplr("legs", 8)
    Lambda, B, P, C = Lambda.repeat(2, 1), B.repeat(2, 1), P[:, None].repeat(1, 2, 1), torch.ones(1, 2, 4)
    identity, half = torch.eye(8, dtype=torch.float64), dt[:, None, None] / 2 * real_form(Lambda, P)
    A_bar = torch.linalg.solve(identity - half, identity + half)
    B_bar = torch.linalg.solve(identity - half, (dt[:, None] * stack(B))[..., None])[..., 0]
    C_real = 2 * torch.cat([C, 0 * C], -1).double()
    expected = response(C_real, *squares(A_bar, l, A_bar.dtype), B_bar[None])[0]
    assert error(cauchy_kernel(Lambda, P, B, C.to(B.dtype), dt, l, exact), expected) <= tolerance


@pytest.mark.parametrize("measure", NPLR)
def test_both_kernels_agree_where_they_meet(measure):
    """At l = 32 n the layer goes over from Cauchy sums to dense powers, without a step in any number."""
    torch.manual_seed(0)
    layer, n = S4(2, 4, measure=measure).double(), 4
    before, after = layer.kernel(32 * n), layer.kernel(32 * n + 1)
    assert error(after[:, :-1], before) <= 1e-10
    single = layer.float()
    assert error(single.kernel(32 * n + 1)[:, :-1], single.kernel(32 * n)) <= 1e-6


def test_long_kernels_have_no_array_of_nodes(monkeypatch):
    layer = S4(2, 4)
    monkeypatch.setattr("s4.cauchy_kernel", lambda *_: pytest.fail("Cauchy sums"))
    layer.kernel(32 * 4 + 1)
    layer(signal(1, 2, 32 * 4 + 1))
    with pytest.raises(pytest.fail.Exception, match="Cauchy sums"):
        layer.kernel(32 * 4)


def test_growing_states_are_exact():
    """real_type none: by dense powers, where 1e-8 of a later state would drown the first numbers."""
    torch.manual_seed(0)
    layer = S4(1, 8, real_type="none", dt_min=0.1, dt_max=0.1)
    layer.log_A_real.data.fill_(-3.0)
    u = signal(1, 1, 100)
    assert layer.kernel(100).abs().max() > 1e10
    assert error(layer(u)[0], layer(u, method="step")[0]) <= 1e-5


@pytest.mark.parametrize("measure", [m for m in DIAGONAL if m not in ("diag", "diag-rand")])
def test_diagonal_initializations_are_those_of_s4d(measure):
    layer = S4(2, 16, mode="diag", measure=measure)
    assert error(initial_diagonal(measure, 2, 16), initial_A(measure, 2, 16)) <= 1e-12
    assert error(torch.complex(-layer.log_A_real.exp(), layer.A_imag), initial_A(measure, 2, 16)) <= 1e-6
    assert error(layer.B, torch.tensor([1.0, 0.0]).expand(2, 8, 2)) == 0


def test_random_initializations():
    torch.manual_seed(0)
    A = initial_diagonal("diag-rand", 100, 64)
    assert 1e-3 <= (-A.real).min() and (-A.real).max() <= 1 and abs((-A.real).log10().mean() + 1.5) < 0.05
    assert 0 <= A.imag.min() and A.imag.max() <= math.pi and abs(A.imag.mean() - math.pi / 2) < 0.05
    dt = S4(5000, 2, n_ssm=1, dt_min=0.01, dt_max=0.1).log_dt.exp()
    assert dt.min() >= 0.0099 and dt.max() <= 0.1001 and abs(dt.log10().mean() + 1.5) < 0.05


def test_mixed_measures_alternate_over_the_features():
    layer = S4(4, 16, measure="hippo")
    for i, measure in enumerate(["legs", "fout", "legs", "fout"]):
        Lambda, P, B, _ = nplr(measure, 16)
        assert error(layer.A_imag[i], Lambda.imag) <= 1e-6
        assert error(layer.P[0, i].norm(), P.norm()) <= 1e-6 and error(layer.B[i].norm(), B.norm()) <= 1e-6
    layer = S4(4, 16, mode="diag", measure="diag")
    for i, measure in enumerate(["diag-inv", "diag-lin", "diag-inv", "diag-lin"]):
        assert error(layer.A_imag[i], initial_diagonal(measure, 1, 16)[0].imag) <= 1e-6


# ---- what it becomes ----

@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_diagonal_s4_is_s4d(disc):
    u = signal(2, 3, 100, dtype=torch.float64)
    s4 = S4(3, 16, mode="diag", measure="diag-lin", disc=disc).double()
    s4d = copy_parameters(S4D(3, 16, disc=disc).double(), log_dt=s4.log_dt, log_A_real=s4.log_A_real,
                          A_imag=s4.A_imag, C=s4.C[0], D=s4.D[0])
    x = random_state(s4d, 2)
    for rate in (1.0, 1.7):
        (y, last), (y4, last4) = s4d(u, x, rate=rate), s4(u, x, rate=rate)
        assert error(y4, y) <= 1e-10 and error(last4, last) <= 1e-10
        assert error(s4.kernel(50, rate=rate), s4d.kernel(50, rate=rate)) <= 1e-10


def test_diagonal_s4_with_disc_dss_is_dss():
    u = signal(2, 3, 100, dtype=torch.float64)
    s4, dss = S4(3, 16, mode="diag", disc="dss", l_max=100, n_ssm=1).double(), DSS(3, 8, l_max=100).double()
    real = -s4.log_A_real[0].exp()
    assert error(dss.Lambda_re, real) <= 1e-6 and error(dss.Lambda_im, s4.A_imag[0]) <= 1e-6
    s4.B.data.normal_()
    W = torch.view_as_real(torch.view_as_complex(s4.B) * torch.view_as_complex(s4.C[0]))
    copy_parameters(dss, log_dt=s4.log_dt, Lambda_re=real, Lambda_im=s4.A_imag[0], W=W, D=s4.D[0])
    x = random_state(dss, 2)
    for rate in (0.5, 1.0):
        (y, last), (y4, last4) = dss(u, x, rate=rate), s4(u, x, rate=rate)
        assert error(y4, y) <= 1e-10 and error(last4, last) <= 1e-10


def test_gated_s4_is_gss():
    u = signal(2, 8, 100, dtype=torch.float64)
    s4 = S4(8, 16, gate=4, bottleneck=4, mode="diag", measure="diag-rand", dt_min=1.0, dt_max=1.0,
            lr={"dt": 0.0, "B": 0.0}).double()
    gss = GSS(8, 8).double()
    maps = {name: p for name, p in s4.named_parameters() if "linear" in name or "gate" in name}
    assert maps.keys() == {name for name, _ in gss.named_parameters() if "linear" in name or "gate" in name}
    copy_parameters(gss, log_dt=s4.log_dt, log_A_real=s4.log_A_real, A_imag=s4.A_imag, C=2 * s4.C[0],
                    D=s4.D[0], **maps)                       # 2 Re for pairs there, Re for single states here
    x = random_state(gss, 2)
    for rate in (1.0, 2.0):
        (y, last), (y4, last4) = gss(u, x, rate=rate), s4(u, x, rate=rate)
        assert error(y4, y) <= 1e-10 and error(last4, last) <= 1e-10
    frozen = [{name for name, p in layer.named_parameters() if not p.requires_grad} for layer in (s4, gss)]
    assert frozen == [{"log_dt", "B"}, {"log_dt"}] and (s4.log_dt == 0).all()


# ---- accuracy ----

@pytest.mark.parametrize("n, lengths", [(2, [1, 2, 3, 99]), (64, [1, 5, 1024, 4096]), (256, [1, 31, 1100])])
@pytest.mark.parametrize("measure", NPLR + ["diag-lin"])
def test_single_precision_at_any_length(measure, n, lengths):
    torch.manual_seed(0)
    layer, exact = (S4(2, n, mode="diag" if "diag" in measure else "nplr", measure=measure) for _ in range(2))
    exact.double().load_state_dict(layer.state_dict())
    for l in lengths:
        u = signal(1, 2, l)
        with torch.no_grad():
            assert error(layer(u)[0], exact(u.double())[0]) <= 1e-5
            assert error(layer.kernel(l), exact.kernel(l)) <= 1e-5


@pytest.mark.parametrize("measure", NPLR)
def test_many_states_against_the_dense_recurrence(measure):
    torch.manual_seed(0)
    layer, u = S4(1, 256, measure=measure), signal(1, 1, 20)
    y, last = layer(u, random_state(layer, 1))
    expected, expected_last = oracle.s4_nplr(parameters(layer), u.double().numpy(),
                                             random_state(layer, 1).double().numpy())
    assert error(y, expected) <= 1e-5 and error(last, expected_last) <= 1e-5


@pytest.mark.parametrize("measure", NPLR + ["diag-legs"])
def test_gradients_of_the_convolution_are_those_of_the_recurrence(measure):
    torch.manual_seed(0)
    layer = S4(2, 64, mode="diag" if "diag" in measure else "nplr", measure=measure).double()
    u = signal(1, 2, 100, dtype=torch.float64)
    expected, found = gradients(layer, u, None, "step"), gradients(layer, u, None, "conv")
    for name, gradient in expected.items():
        assert error(found[name], gradient) <= 1e-8, name


# ---- options ----

@pytest.mark.parametrize("base, options", [
    ({}, {"mode": "diag"}), ({}, {"measure": "legt"}), ({}, {"measure": "fout"}), ({}, {"measure": "hippo"}),
    ({}, {"rank": 2}), ({}, {"channels": 2}), ({}, {"bidirectional": True}), ({}, {"gate": 2}),
    ({}, {"bottleneck": 2}), ({"gate": 2}, {"gate": 3}), ({"bottleneck": 2}, {"bottleneck": 4}),
    ({}, {"dt_min": 0.05}), ({}, {"dt_max": 0.01}),
    *(({"mode": "diag"}, {"measure": measure}) for measure in DIAGONAL if measure != "diag-legs"),
    ({"mode": "diag"}, {"disc": "bilinear"}), ({"mode": "diag"}, {"disc": "dss", "l_max": 60}),
    ({"mode": "diag", "disc": "dss", "l_max": 60}, {"l_max": 90}),
], ids=str)
def test_every_option_changes_the_output(base, options):
    outputs = []
    for extra in (base, base | options):
        torch.manual_seed(0)
        layer = S4(4, 16, **extra)
        layer.C.data.fill_(0.1)
        outputs.append(layer(signal(2, 4, 50))[0])
    assert error(outputs[1], outputs[0]) > 1e-3


@pytest.mark.parametrize("measure", NPLR + ["diag-lin"])
@pytest.mark.parametrize("real_type", ["exp", "relu", "none"])
def test_real_types_start_at_the_same_system_and_can_be_trained(real_type, measure):
    layers, mode = [], "diag" if "diag" in measure else "nplr"
    for option in ("exp", real_type):
        torch.manual_seed(0)
        layers.append(S4(2, 16, mode=mode, measure=measure, real_type=option))
    assert error(layers[1].kernel(99), layers[0].kernel(99)) <= 1e-2    # relu keeps off 0 if Re Lambda = 0
    assert torch.equal(layers[1].log_A_real, layers[0].log_A_real) == (real_type == "exp")
    layers[1](signal(1, 2, 99))[0].square().sum().backward()
    assert all((p.grad != 0).any() for p in layers[1].parameters())


def test_layout_of_the_parameters():
    def shapes(*arguments, **options):
        return {name: tuple(p.shape) for name, p in S4(*arguments, **options).named_parameters()}

    plain = {"log_dt": (6,), "log_A_real": (6, 8), "A_imag": (6, 8), "B": (6, 8, 2), "P": (1, 6, 8, 2),
             "C": (1, 6, 8, 2), "D": (1, 6)}
    shared = {name: (2, 8, 2)[:len(plain[name])] for name in ("log_A_real", "A_imag", "B")}
    assert shapes(6, 16) == plain
    assert shapes(6, 16, measure="legt")["P"] == (2, 6, 8, 2) and shapes(6, 16, rank=3)["P"] == (3, 6, 8, 2)
    assert shapes(6, 16, n_ssm=2) == plain | shared | {"P": (1, 2, 8, 2)}
    assert shapes(6, 16, channels=3) == plain | {"C": (3, 6, 8, 2), "D": (3, 6)}
    assert shapes(6, 16, channels=3, bidirectional=True) == plain | {"C": (6, 6, 8, 2), "D": (3, 6)}
    assert shapes(6, 16, mode="diag") == {name: shape for name, shape in plain.items() if name != "P"}
    block = shapes(6, 16, gate=2, bottleneck=3, channels=5)
    assert {name: shape for name, shape in block.items() if "." in name} == {
        "input_linear.weight": (2, 6), "input_linear.bias": (2,), "input_gate.weight": (12, 6),
        "input_gate.bias": (12,), "output_gate.weight": (12, 10), "output_gate.bias": (12,),
        "output_linear.weight": (30, 12), "output_linear.bias": (30,)}


@pytest.mark.parametrize("name", ["log_A_real", "A_imag", "B", "P"])
def test_shared_copies_serve_alternate_features(name):
    layer = S4(4, 8, n_ssm=2).double()
    before = layer.kernel(20)
    parameter = layer.get_parameter(name)
    (parameter[:, 1] if name == "P" else parameter[1]).data.mul_(1.5)
    changed = (layer.kernel(20) - before).abs().amax(-1) > 1e-9
    assert changed.tolist() == [False, True, False, True]


def test_learning_rates_freeze():
    layer = S4(2, 4, lr={"dt": 0.0, "B": 0.0, "A": 0.02})
    assert layer.ssm_lr == {"log_dt": 0.0, "log_A_real": 0.02, "A_imag": 0.02, "P": 0.02, "B": 0.0}
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"log_dt", "B"}
    layer(signal(1, 2, 5))[0].sum().backward()
    assert layer.B.grad is None and layer.log_dt.grad is None and layer.P.grad is not None
    assert set(S4(2, 4, mode="diag", lr=0.1).ssm_lr.values()) == {0.1}
    with pytest.raises(ValueError, match="^lr=.*: pass"):
        S4(2, 4, lr={"C": 0.1})
    assert {name for name, p in S4(2, 4, lr=0.0).named_parameters() if p.requires_grad} == {"C", "D"}


def test_options_that_exclude_each_other():
    for argument, options in (
            ("measure", {"mode": "diag", "measure": "legt"}), ("measure", {"measure": "diag-lin"}),
            ("disc", {"disc": "zoh"}), ("l_max", {"mode": "diag", "disc": "dss"}),
            ("rank", {"mode": "diag", "rank": 1}), ("rank", {"measure": "legt", "rank": 1}),
            ("n_ssm", {"measure": "hippo", "n_ssm": 1}), ("n_ssm", {"bottleneck": 2, "n_ssm": 4}),
            ("measure", {"measure": "hippo", "bottleneck": 4}),
            ("real_type", {"mode": "diag", "disc": "dss", "l_max": 9, "real_type": "none"})):
        with pytest.raises(ValueError, match=f"^{argument}=.*: "):
            S4(4, 8, **options)


def test_disc_dss_goes_on_beyond_l_max():
    layer, u = S4(2, 4, mode="diag", disc="dss", l_max=20).double(), signal(1, 2, 70, dtype=torch.float64)
    for rate in (1.0, 1.7):
        assert error(layer(u, rate=rate)[0], layer(u, rate=rate, method="step")[0]) <= 1e-10


@pytest.mark.parametrize("options", [{}, {"mode": "diag", "disc": "bilinear"}, {"measure": "legt"}], ids=str)
def test_bidirectional_layer_is_two_direct_sums(options):
    layer = S4(3, 8, bidirectional=True, channels=2, **options).double()
    u, l = signal(2, 3, 21, dtype=torch.float64), 21
    past, future = layer.kernel(l, rate=1.7).detach().numpy().reshape(2, 2, 3, l)
    y, D, v = np.zeros((2, 2, 3, l)), layer.D.detach().numpy(), u.numpy()[:, None]
    for k in range(l):
        y[..., k] = D * v[..., k] + sum(past[..., i] * v[..., k - i] for i in range(k + 1))
        y[..., k] += sum(future[..., j - 1] * v[..., k + j] for j in range(1, l - k))
    assert error(layer(u, rate=1.7)[0], y.reshape(2, 6, l)) <= 1e-10
    present = D + layer.kernel(1).detach().numpy()[:6].reshape(2, 3)
    assert error(layer(u[..., :1])[0], (present[..., None] * v[..., :1]).reshape(2, 6, 1)) <= 1e-10


def test_bidirectional_layer_has_no_state():
    layer, u = S4(2, 4, bidirectional=True), signal(1, 2, 5)
    x = torch.zeros(1, 2, 4)
    for refused in (lambda: layer.initial_state(1), lambda: layer(u, x), lambda: layer(u, method="step"),
                    lambda: layer.step(u[..., 0], x)):
        with pytest.raises(ValueError, match="^bidirectional=True: .*False"):
            refused()


@pytest.mark.parametrize("real_type", ["exp", "relu"])
@pytest.mark.parametrize("mode, disc", [("nplr", None), ("diag", "zoh"), ("diag", "dss")])
def test_stable_wherever_training_moves_the_parameters(mode, disc, real_type):
    torch.manual_seed(0)
    u, options = signal(1, 12, 40), {"rank": 2} if mode == "nplr" else {"l_max": 40}
    layer = S4(12, 8, mode=mode, disc=disc, real_type=real_type, **options)
    for corners in (False, True):
        for p in layer.parameters():
            p.data.uniform_(-20, 20).copy_(20 * p.sign() if corners else p)
        A_bar = layer.double().discretize()[0]
        eigenvalues = torch.linalg.eigvals(A_bar) if mode == "nplr" else A_bar
        assert eigenvalues.abs().max() <= 1 + 1e-9
        for dtype in (torch.float64, torch.float32):
            x = layer.to(dtype).initial_state(1)
            for y, last in (layer(u), layer(u, x), layer(u, x, method="step")):
                assert torch.isfinite(y).all() and (last is None or torch.isfinite(last.abs()).all())
