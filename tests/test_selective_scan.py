"""What is particular to selective_scan.py: the scan and its gradient, the Mamba block."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from layers import (DOUBLE, ROOT, error, in_pieces, in_steps, random_state, selective_case,
                    signal, to_numpy)
from selective_scan import (Mamba, SelectiveSSM, selective_scan, selective_scan_fn,
                            selective_scan_seq)


def arguments(b=2, d=3, n=4, l=20, dtype=torch.float64, decay=1.0):
    """All arguments of selective_scan_fn, random, dt A down to -decay, with gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, **DOUBLE)

    A = -torch.rand(d, n, generator=generator, **DOUBLE)
    values = {"u": normal(b, d, l), "delta": normal(b, d, l), "A": decay * A,
              "B": normal(b, n, l), "C": normal(b, n, l), "D": normal(d),
              "z": normal(b, d, l), "delta_bias": normal(d),
              "initial_state": normal(b, d, n)}
    return {name: x.to(dtype).requires_grad_() for name, x in values.items()}


def gradients(scan, given, softplus=True):
    """Output, last state and the gradients of a random linear function of both."""
    y, x = scan(**given, return_last_state=True, delta_softplus=softplus)
    loss = (y * signal(*y.shape, seed=5, **DOUBLE)).sum()
    loss = loss + (x * signal(*x.shape, seed=6, **DOUBLE)).sum()
    return {"y": y, "last": x} | dict(zip(given, torch.autograd.grad(loss, given.values())))


def check_gradients(found, expected, tolerance):
    for name in expected:                       # error() is infinite for nan
        assert error(found[name], expected[name]) <= tolerance, name


def grouped(at_once):
    """The function with at_once states in an operation: one block, or more."""
    return partial(selective_scan_fn, scan=partial(selective_scan, at_once=at_once))


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("without", [
    (), ("D",), ("z",), ("delta_bias",), ("initial_state",),
    ("D", "z", "delta_bias", "initial_state")], ids=str)
def test_gradients_of_everything(without, softplus):
    given = {name: x for name, x in arguments().items() if name not in without}
    if not softplus:                            # the step size: positive
        given["delta"] = (given["delta"].abs() + 3).detach().requires_grad_()
    found = gradients(selective_scan_fn, given, softplus)
    check_gradients(found, gradients(selective_scan_seq, given, softplus), 1e-11)
    alone = selective_scan_fn(**given, delta_softplus=softplus)
    assert torch.equal(alone, found["y"])


@pytest.mark.parametrize("at_once", [1, 2 ** 17])
@pytest.mark.parametrize("l", [1, 2, 4, 5, 20])
def test_derivatives_are_those_of_finite_differences(l, at_once):
    names, values = zip(*arguments(b=1, d=2, n=2, l=l).items())

    def scan(*x):
        return grouped(at_once)(**dict(zip(names, x)), delta_softplus=True,
                                return_last_state=True)

    assert torch.autograd.gradcheck(scan, values, fast_mode=l == 20)
    assert torch.autograd.gradgradcheck(scan, values, fast_mode=True)


@pytest.mark.parametrize("decay", [1.0, 200.0, 1e6])
@pytest.mark.parametrize("l", [1, 16, 33, 256, 257, 2049])
def test_any_length_and_strong_decay(l, decay):
    """In groups of one block, of three, or of all; and in single precision."""
    given = arguments(b=1, d=2, n=3, l=l, decay=decay)
    expected = gradients(selective_scan_seq, given)
    for at_once in (1, 20, 2 ** 17):
        check_gradients(gradients(grouped(at_once), given), expected, 1e-10)
    single = {name: x.detach().float().requires_grad_() for name, x in given.items()}
    check_gradients(gradients(selective_scan_fn, single), expected, 1e-5)


def by_definition(u, delta, A, B, C):
    """The oracle for B, C (b, d, n, l), one for each feature: feature by feature."""
    runs = [oracle.selective_scan(u[:, [i]], delta[:, [i]], A[[i]], B[:, i], C[:, i], [0.0])
            for i in range(len(A))]
    return tuple(np.concatenate(parts, 1) for parts in zip(*runs))


def for_each_feature(t, b, d, l):
    """B or C of any form as (b, d, n, l)."""
    if t.ndim == 2:
        return np.broadcast_to(t[..., None], (b, *t.shape, l))
    t = t.reshape(b, -1, *t.shape[-2:])
    return t.repeat(d // t.shape[1], axis=1)


@pytest.mark.parametrize("scan", [selective_scan_fn, selective_scan_seq, grouped(40)])
@pytest.mark.parametrize("B_size", ["bnl", "bgnl", "dn"])
@pytest.mark.parametrize("C_size", ["bnl", "bgnl", "dn"])
def test_groups_of_features_and_constants(scan, B_size, C_size):
    sizes = {"b": 2, "g": 3, "d": 6, "n": 4, "l": 33}
    b, d, l = sizes["b"], sizes["d"], sizes["l"]
    given = {name: x.detach() for name, x in arguments(b, d, sizes["n"], l).items()
             if name in ("u", "delta", "A")}
    given["delta"] = given["delta"].abs()
    for seed, (name, size) in enumerate({"B": B_size, "C": C_size}.items()):
        generator = torch.Generator().manual_seed(seed)
        given[name] = torch.randn([sizes[i] for i in size], generator=generator, **DOUBLE)
    y, last = scan(**given, return_last_state=True)
    arrays = {name: to_numpy(x) for name, x in given.items()}
    for name in "BC":
        arrays[name] = for_each_feature(arrays[name], b, d, l)
    assert error((y, last), by_definition(**arrays)) <= 1e-12


@pytest.mark.parametrize("scan", [selective_scan_fn, selective_scan_seq])
def test_bad_arguments_of_the_function(scan):
    given = {name: x.detach() for name, x in arguments().items()}
    for name, x in given.items():
        wrong = [x[..., None], x.long(), x.to(torch.complex64), x[..., :0]]
        if name not in ("u", "A"):      # they say what the sizes are, which others follow
            wrong += [torch.cat([x, x], i) for i in range(x.ndim)]
        for value in wrong:
            with pytest.raises(ValueError, match=f"^{name} is .*: pass"):
                scan(**(given | {name: value}))
    two_groups = given["B"][:, None].expand(-1, 2, -1, -1)          # of 3 features
    for name, value in (("A", given["A"][:2]), ("B", given["B"].mT), ("C", given["A"].mT),
                        ("B", two_groups)):
        with pytest.raises(ValueError, match="^(A|B|C).*: pass "):
            scan(**(given | {name: value}))


def test_low_precision_inputs_and_autocast():
    given = {name: x.detach().float() for name, x in arguments(l=40).items()}
    expected = selective_scan_fn(**given, delta_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan_fn(**given, delta_softplus=True), expected)
    given["u"] = given["u"].bfloat16()
    y, x = selective_scan_fn(**given, delta_softplus=True, return_last_state=True)
    assert y.dtype == torch.bfloat16 and x.dtype == torch.float32
    assert error(y.float(), expected) <= 0.02


def test_initial_parameters():
    layer = SelectiveSSM(4, 3)
    assert torch.allclose(layer.A_log.exp(), torch.tensor([1.0, 2.0, 3.0]))
    assert (layer.D == 1).all() and SelectiveSSM(33).dt_rank == 3 and layer.ssm_lr == {}
    block = Mamba(32, 4, d_conv=3, expand=3)
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == {
        "A_log": (96, 4), "D": (96,), "x_proj.weight": (10, 96), "dt_proj.weight": (96, 2),
        "dt_proj.bias": (96,), "in_proj.weight": (192, 32), "conv1d.weight": (96, 1, 3),
        "conv1d.bias": (96,), "out_proj.weight": (32, 96)}


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
        gradients(selective_scan_fn, given)
    assert scan.size <= b * d * l < b * d * n * l


MEMORY = """
import resource, torch
from selective_scan import selective_scan_fn

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10

torch.set_num_threads(1)
b, d, n, l = 1, 256, 16, 2 ** 13
sizes = (b, d, l), (b, d, l), (d, n), (b, n, l), (b, n, l)
u, delta, A, B, C = (torch.randn(size).requires_grad_() for size in sizes)
for l in (256, l):                  # what is loaded only once is loaded now
    before = peak()
    y = selective_scan_fn(u[..., :l], delta[..., :l].abs() / 9, -A.abs(), B[..., :l],
                          C[..., :l])
    torch.autograd.grad(y.sum(), (u, delta, A, B, C))
print((peak() - before) / (b * d * n * l * 4 / 2 ** 20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted otherwise")
def test_freed_memory_is_used_again():
    """In multiples of the memory of all states: 2.6, and 6.4 with groups of equal size."""
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True,
                         text=True, check=True)
    assert float(run.stdout) <= 4


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization():
    """By the scale of each call, so that step and forward do not agree to rounding."""
    layer, u = Mamba(8, 4), signal(2, 8, 40)
    small = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    small = copy.deepcopy(small)
    assert not any(isinstance(module, nn.Linear) for module in small.modules())
    for method in ("scan", "step"):
        assert error(small(u, method=method)[0], layer(u)[0]) <= 0.1


def test_what_does_not_decay():
    """By names on the layer, which no way of loading or moving parameters can lose."""
    for layer in (SelectiveSSM(4, 4), Mamba(4, 4)):
        with torch.device("meta"):
            twin = type(layer)(4, 4)
        twin.load_state_dict(layer.state_dict(), assign=True)
        for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), twin):
            assert other.no_weight_decay == ("A_log", "D")
            assert set(other.no_weight_decay) < set(dict(other.named_parameters()))


@pytest.mark.parametrize("bias, conv_bias, d_conv", [
    (False, False, 1), (True, False, 2), (False, True, 3), (True, True, 4)])
def test_biases_and_convolution_of_mamba(bias, conv_bias, d_conv):
    case = selective_case("mamba", "Mamba", oracle.mamba, bias=bias, conv_bias=conv_bias,
                          d_conv=d_conv)
    layer, u = case.build().double(), signal(2, case.h, 20, **DOUBLE)
    names = set(layer.state_dict())
    assert ({"in_proj.bias", "out_proj.bias"} <= names) == bias
    assert ("conv1d.bias" in names) == conv_bias
    state = random_state(layer, 2)
    for method in case.methods:
        y = layer(u, state, method=method, rate=1.7)
        assert error(y, case.oracle(layer, u, state, 1.7)) <= 1e-12
    pieces = in_pieces(layer, u, state, [2, 1, 3, 1, 13], rate=1.7)     # also shorter ones
    assert error(pieces, y) <= 1e-12 and error(in_steps(layer, u, state, 1.7), y) <= 1e-12
