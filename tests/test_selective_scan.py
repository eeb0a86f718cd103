"""What is particular to selective_scan.py: the scan and its gradient, selectivity, the Mamba block."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layers import error, random_state, signal
from s4d import S4D
from selective_scan import Mamba, SelectiveSSM, selective_scan, selective_scan_fn, selective_scan_seq

DOUBLE = dict(dtype=torch.float64)


def arguments(b=2, d=3, n=4, l=20, dtype=torch.float64, decay=1.0):
    """All arguments of selective_scan_fn, random, dt A down to about -decay; each requires a gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    A = -torch.rand(d, n, dtype=torch.float64, generator=generator)
    values = {"u": normal(b, d, l), "delta": normal(b, d, l), "A": decay * A, "B": normal(b, n, l),
              "C": normal(b, n, l), "D": normal(d), "z": normal(b, d, l), "delta_bias": normal(d),
              "initial_state": normal(b, d, n)}
    return {name: x.to(dtype).requires_grad_() for name, x in values.items()}


def gradients(scan, given, **options):
    """Output, last state and the gradients of a random linear function of both."""
    y, x = scan(**given, return_last_state=True, **options)
    loss = (y * signal(*y.shape, seed=5, **DOUBLE)).sum() + (x * signal(*x.shape, seed=6, **DOUBLE)).sum()
    return {"y": y, "last": x} | dict(zip(given, torch.autograd.grad(loss, given.values())))


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("delta_bias",), ("initial_state",),
                                     ("D", "z", "delta_bias", "initial_state")], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_gradients_of_everything(without, softplus):
    given = {name: x for name, x in arguments().items() if name not in without}
    if not softplus:
        given["delta"] = (given["delta"].abs() + 3).detach().requires_grad_()       # the step size: positive
    found, expected = (gradients(scan, given, delta_softplus=softplus)
                       for scan in (selective_scan_fn, selective_scan_seq))
    for name in expected:
        assert error(found[name], expected[name]) <= 1e-11, name
    alone = selective_scan_fn(**given, delta_softplus=softplus)
    assert torch.equal(alone, found["y"])


@pytest.mark.parametrize("l", [1, 2, 4, 5])
def test_gradients_are_those_of_finite_differences(l):
    names, values = zip(*arguments(b=1, d=2, n=2, l=l).items())
    assert torch.autograd.gradcheck(lambda *x: selective_scan_fn(
        **dict(zip(names, x)), delta_softplus=True, return_last_state=True), values)


@pytest.mark.parametrize("decay", [1.0, 200.0])
@pytest.mark.parametrize("l", [255, 256, 257, 4097])
def test_long_sequences_and_strong_decay(l, decay):
    given = arguments(b=1, d=2, n=2, l=l, decay=decay)
    expected = gradients(selective_scan_seq, given, delta_softplus=True)
    single = {name: x.detach().float().requires_grad_() for name, x in given.items()}
    for tolerance, values in ((1e-10, given), (1e-5, single)):
        found = gradients(selective_scan_fn, values, delta_softplus=True)
        for name in expected:                      # error() is infinite for nan
            assert error(found[name], expected[name]) <= tolerance, name


def test_decay_beyond_the_range_of_floats():
    given = arguments(l=50, dtype=torch.float32, decay=1e6)
    found = gradients(selective_scan_fn, given, delta_softplus=True)
    assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("largest", [1, 200, 2 ** 22])
@pytest.mark.parametrize("l", [1, 16, 33, 100])
def test_groups_of_blocks(l, largest):
    """One group or seven: those before the last two are computed once more for the backward pass."""
    given = arguments(b=1, d=2, n=3, l=l)
    expected = gradients(selective_scan_seq, given, delta_softplus=True)
    found = gradients(partial(selective_scan_fn, scan=partial(selective_scan, largest=largest)), given,
                      delta_softplus=True)
    for name in expected:
        assert error(found[name], expected[name]) <= 1e-11, name


@pytest.mark.parametrize("l", [3, 20])
def test_second_derivatives(l):
    names, values = zip(*arguments(b=1, d=2, n=2, l=l).items())
    for largest in (1, 2 ** 22):
        def scan(*x):
            return selective_scan_fn(**dict(zip(names, x)), delta_softplus=True,
                                     scan=partial(selective_scan, largest=largest))
        assert torch.autograd.gradgradcheck(scan, values, fast_mode=True)


@pytest.mark.parametrize("scan", [selective_scan_fn, selective_scan_seq])
def test_bad_arguments_of_the_function(scan):
    given = {name: x.detach() for name, x in arguments().items()}
    for name, x in given.items():
        wrong = [x[..., None], x.long(), x.to(torch.complex64), x[..., :0]]
        if name not in ("u", "A"):                 # u and A say what the sizes are; the others must follow
            wrong += [torch.cat([x, x], i) for i in range(x.ndim)]
        for value in wrong:
            with pytest.raises(ValueError, match=f"^{name} is .*: pass"):
                scan(**(given | {name: value}))
    with pytest.raises(ValueError, match="^A is "):
        scan(**(given | {"A": given["A"][:2]}))


def test_low_precision_inputs_and_autocast():
    given = {name: x.detach().float() for name, x in arguments(l=40).items()}
    expected = selective_scan_fn(**given, delta_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan_fn(**given, delta_softplus=True), expected)
    given["u"] = given["u"].bfloat16()
    y, x = selective_scan_fn(**given, delta_softplus=True, return_last_state=True)
    assert y.dtype == torch.bfloat16 and x.dtype == torch.float32 and error(y.float(), expected) <= 0.02


def test_constant_dt_B_and_C_make_an_S4D_real_layer():
    torch.manual_seed(0)
    d, n, l = 3, 4, 60
    layer, u = S4D(d, 2 * n, measure="diag-real").double(), signal(2, d, l, **DOUBLE)
    dt, A = layer.log_dt.detach().exp(), -layer.log_A_real.detach().exp()
    assert torch.allclose(A, -torch.arange(1.0, n + 1, **DOUBLE))
    B, C = signal(1, 1, n, seed=3, **DOUBLE)[0, 0], signal(1, 1, n, seed=4, **DOUBLE)[0, 0]
    scale = dt[:, None] * B / layer.discretize()[1].real.detach()            # makes B_bar = dt B
    layer.C.data = torch.stack([scale * C / 2, 0 * A], -1)                   # 2 Re
    x = signal(2, d, n, seed=5, **DOUBLE)
    y, last = selective_scan_fn(u, dt[:, None].expand(2, d, l), A, B[:, None].expand(2, n, l),
                                C[:, None].expand(2, n, l), layer.D, return_last_state=True, initial_state=x)
    expected, expected_last = layer(u, (x / scale).to(torch.complex128))
    assert error(y, expected) <= 1e-12 and error(last, scale * expected_last.real) <= 1e-12


def test_dt_selects_what_to_keep():
    u, ones = signal(1, 1, 30, **DOUBLE), torch.ones(1, 1, 30, **DOUBLE)
    dt = torch.zeros(1, 1, 30, **DOUBLE)
    dt[..., 7] = 50.0                              # takes this sample in, forgets the past, skips the rest
    y = selective_scan_fn(u, dt, -ones[..., 0], ones, ones, initial_state=ones[..., :1])
    assert torch.equal(y[..., :7], ones[..., :7])
    assert error(y[..., 7:], 50 * u[..., 7:8].expand(1, 1, 23)) <= 1e-12


@pytest.mark.parametrize("rate", [0.5, 1.0, 3.0])
def test_rate_multiplies_every_step_size(rate):
    layer, u = SelectiveSSM(5, 4, dt_rank=2).double(), signal(2, 5, 30, **DOUBLE)
    low, B, C = layer.x_proj(u.mT).mT.split([2, 4, 4], 1)
    dt = rate * torch.nn.functional.softplus(layer.dt_proj(low.mT)).mT
    expected = selective_scan_fn(u, dt, -layer.A_log.exp(), B, C, layer.D)
    for method in ("scan", "step"):
        assert error(layer(u, rate=rate, method=method)[0], expected) <= 1e-12


def test_initial_parameters():
    torch.manual_seed(0)
    layer = SelectiveSSM(4000, 3, dt_rank=1, dt_min=0.01, dt_max=0.1)
    dt = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert dt.min() >= 0.0099 and dt.max() <= 0.1001 and abs(dt.log().mean() - math.log(1e-3) / 2) < 0.1
    assert torch.allclose(layer.A_log.exp(), torch.tensor([1.0, 2.0, 3.0])) and (layer.D == 1).all()
    assert SelectiveSSM(33).dt_rank == 3 and SelectiveSSM(33, dt_rank=5).dt_proj.weight.shape == (33, 5)
    block = Mamba(32, 4, d_conv=3, expand=3)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes == {"A_log": (96, 4), "D": (96,), "x_proj.weight": (10, 96), "dt_proj.weight": (96, 2),
                      "dt_proj.bias": (96,), "in_proj.weight": (192, 32), "conv1d.weight": (96, 1, 3),
                      "conv1d.bias": (96,), "out_proj.weight": (32, 96)}


def test_what_is_trained_slowly():
    assert SelectiveSSM(4).ssm_lr == {}
    names = ["dt_proj.weight", "dt_proj.bias", "A_log", "x_proj.weight"]
    assert Mamba(4, 2, lr=0.01).ssm_lr == dict.fromkeys(names, 0.01)


@pytest.mark.parametrize("cls, options", [(SelectiveSSM, {"dt_rank": 3}), (SelectiveSSM, {"dt_min": 0.05}),
                                          (SelectiveSSM, {"dt_max": 0.01}), (Mamba, {"dt_rank": 3}),
                                          (Mamba, {"d_conv": 2}), (Mamba, {"expand": 1}),
                                          (Mamba, {"dt_min": 0.05}), (Mamba, {"dt_max": 0.01})], ids=str)
def test_every_option_changes_the_output(cls, options):
    outputs = []
    for extra in ({}, options):
        torch.manual_seed(0)
        layer = cls(4, 8, **extra)
        layer.D.data.zero_()
        outputs.append(layer(signal(2, 4, 50))[0])
    assert error(outputs[1], outputs[0]) > 1e-3


def test_mamba_is_causal():
    layer, u = Mamba(4, 4).double(), signal(1, 4, 20, **DOUBLE)
    y, _ = layer(u)
    for k in (0, 7, 19):
        other = u.clone()
        other[..., k] += 1
        changed = (layer(other)[0] - y).abs().amax((0, 1))
        assert (changed[:k] < 1e-14).all() and changed[k] > 1e-6


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_mamba_in_chunks_shorter_than_its_convolution(d_conv):
    layer, u = Mamba(4, 4, d_conv=d_conv).double(), signal(2, 4, 12, **DOUBLE)
    state = random_state(layer, 2)
    assert state[0].shape == (2, 8, d_conv - 1)
    whole, last = layer(u, state)
    for sizes in ([2, 1, 3, 1, 5], [3, 3, 3, 3]):
        pieces, x = [], state
        for piece in u.split(sizes, -1):
            y, x = layer(piece, x)
            pieces.append(y)
        assert error(torch.cat(pieces, -1), whole) <= 1e-12 and error(x[1], last[1]) <= 1e-12
        assert torch.allclose(x[0], last[0])
    for k in range(12):
        y, state = layer.step(u[..., k], state)
        assert error(y, whole[..., k]) <= 1e-12
    assert error(state[1], last[1]) <= 1e-12 and torch.allclose(state[0], last[0])


def test_mamba_refuses_other_states():
    layer, u = Mamba(4, 4), signal(2, 4, 5)
    inputs, ssm = layer.initial_state(2)
    wrong = [ssm, (inputs,), (inputs[:1], ssm), (inputs[..., 1:], ssm), (inputs, ssm[:1])]
    for state in wrong:
        with pytest.raises(ValueError, match="^state: "):
            layer(u, state)
    assert torch.equal(layer(u, (inputs, ssm))[0], layer(u)[0])              # a plain pair will do


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes() // x.itemsize)
        return result


def test_no_tensor_holds_the_states_of_all_steps():
    b, d, n, l = 2, 16, 8, 1024
    given = arguments(b, d, n, l, torch.float32)
    with Largest() as scan:
        gradients(selective_scan_fn, given, delta_softplus=True)
    assert scan.size <= b * d * l < b * d * n * l
