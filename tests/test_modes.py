"""Every layer in every mode, against the oracle and against itself: the interface that all
eight files share."""

import copy
import io
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch

from layers import (CASES, DOUBLE, STATEFUL, each, error, gradients, in_steps, leaves, like,
                    named, random_state, signal)

LENGTHS = [1, 2, 3, 17, 64, 127, 128, 255, 256, 257, 1000]
RATES = [0.5, 1.0, 2.0, 1.7]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
HELD = ["s4d", "s4d-legs", "s4d-real", "dss", "dss-growing", "dss-exp", "gss", "gss-plain",
        "s4-gss", "s5", "s5-no-pairs", "lru", "lru-ring", "s4-diag-inv", "s4-diag-dss"]
STABLE = ["s4d", "s4d-bilinear", "dss-exp", "gss-plain", "s5-bilinear-blocks",
          "s5-no-pairs", "lru", "s4", "s4-legt-channels", "s4-fout-relu", "s4-diag-inv",
          "s4-diag-bilinear", "s4-diag-dss", "selective", "mamba"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each(STATEFUL)
def test_oracle_at_every_length(case, dtype):
    layer, tolerance = case.build().to(dtype), TOLERANCE[dtype]
    u, x = signal(2, case.h, 1000, dtype=dtype), random_state(layer, 2)
    expected, _ = case.oracle(layer, u, x)
    without, _ = case.oracle(layer, u)
    for l in LENGTHS:
        for method in case.methods:
            if method == "step" and l not in (1, 3, 257, 1000):     # slow, and all alike
                continue
            with torch.no_grad():
                y, last = layer(u[..., :l], x, method=method)
            assert y.dtype == dtype
            assert error(y, expected[..., :l]) <= tolerance, (l, method)
            if method != "step" or l < 1000:
                with torch.no_grad():
                    y0, none = layer(u[..., :l], method=method)
                assert none is None and y0.dtype == dtype
                assert error(y0, without[..., :l]) <= tolerance, (l, method)
            if l in (1, 64, 257):
                _, expected_last = case.oracle(layer, u[..., :l], x)
                assert error(last, expected_last) <= tolerance, (l, method)


@pytest.mark.parametrize("rate", RATES)
@each(STATEFUL)
def test_rates(case, rate):
    layer = case.build().double()
    u, x = signal(2, case.h, 40, **DOUBLE), random_state(layer, 2)
    expected = case.oracle(layer, u, x, rate)
    for method in case.methods:
        assert error(layer(u, x, rate=rate, method=method), expected) <= 1e-9
    assert error(in_steps(layer, u, x, rate), expected) <= 1e-9
    y, _ = layer.step(u[..., 0], x, rate=rate)
    assert error(y, expected[0][..., 0]) <= 1e-9


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@each([case for case in CASES if not case.has_state])
def test_bidirectional(case, dtype):
    layer = case.build().to(dtype)
    for l, rate in ((1, 1.0), (2, 0.5), (31, 1.7), (257, 1.0)):
        u = signal(2, case.h, l, dtype=dtype)
        expected, _ = case.oracle(layer, u, None, rate)
        for method in case.methods:
            y, none = layer(u, rate=rate, method=method)
            assert none is None and error(y, expected) <= TOLERANCE[dtype], (l, method)


@each(named(*HELD))
def test_zero_order_hold_is_exact_for_held_inputs(case):
    layer = case.build().double()
    u, x = signal(2, case.h, 40, **DOUBLE), random_state(layer, 2)
    for rate in (1.0, 2.0):
        y, last = layer(u.repeat_interleave(2, -1), x, rate=rate / 2)
        assert error(layer(u, x, rate=rate), (y[..., 1::2], last)) <= 1e-9


@each([case for case in CASES if case.has_kernel])
def test_kernel_is_the_impulse_response(case):
    layer = case.build().double()
    for l in (1, 5, 100):
        for rate in (1.0, 1.7):
            expected = case.oracle_kernel(layer, l, rate)
            assert error(layer.kernel(l, rate=rate), expected) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each(CASES)
def test_half_precision_of_one_parameter_is_refused(case, dtype):
    u = signal(2, case.h, 10)
    for name, _ in case.build().named_parameters():
        layer = case.build()
        p = layer.get_parameter(name)
        p.data = p.data.to(dtype)
        for method in case.methods:
            with pytest.raises(ValueError, match="^parameters are .*autocast"):
                layer(u, method=method)
        with pytest.raises(ValueError, match="^parameters are .*autocast"):
            layer.discretize()


@each(STATEFUL)
def test_state_of_another_precision(case):
    layer = case.build()
    u, x = signal(2, case.h, 10), random_state(layer, 2)
    dtypes = [t.dtype for t in leaves(x)]
    other = {torch.complex128: torch.complex64, torch.float64: torch.float32,
             torch.float32: torch.float64}
    moved = like(x, [t.to(other[t.dtype]) for t in leaves(x)])
    runs = [(layer(u, moved, method=method), layer(u, x, method=method))
            for method in case.methods]
    runs.append((layer.step(u[..., 0], moved), layer.step(u[..., 0], x)))
    for found, expected in runs:
        assert found[0].dtype == torch.float32 and error(found, expected) <= 1e-6
        assert [t.dtype for t in leaves(found[1])] == dtypes


@pytest.mark.parametrize("l", [1, 2, 65])
@pytest.mark.parametrize("with_state", [False, True])
@each(STATEFUL)
def test_gradients_agree_between_modes(case, with_state, l):
    layer = case.build().double()
    u, x = signal(2, case.h, l, **DOUBLE), random_state(layer, 2) if with_state else None
    expected = gradients(layer, u, x, "step")
    for method in case.methods:
        found = gradients(layer, u, x, method)
        for name, gradient in expected.items():
            assert error(found[name], gradient) <= 1e-8, (method, name)


@each([case for case in CASES if case.growth is None])
def test_first_and_second_derivatives(case):
    """Against finite differences, in the input, the state and the parameters."""
    layer = case.build().double()
    values = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    whole, x = signal(1, case.h, 35, **DOUBLE), None
    if case.has_state:
        x = random_state(layer, 1)
        x = like(x, [t.requires_grad_() for t in leaves(x)])
    for method in case.methods:
        def run(u, *inputs):
            state = None if x is None else like(x, inputs[:len(leaves(x))])
            parameters = dict(zip(values, inputs[len(leaves(x)):]))
            y, last = torch.func.functional_call(layer, parameters, (u, state),
                                                 {"method": method})
            return y, *leaves(last)
        l = 7 if method == "step" else 35               # a loop: each step is like the others
        u = whole[..., :l].clone().requires_grad_()
        inputs = (u, *leaves(x), *values.values())
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@each(named(*STABLE))
def test_stable_wherever_training_moves_the_parameters(case):
    layer, u = case.build(), signal(1, case.h, 40)
    for where in ("inside", "corner", "origin"):
        for p in layer.parameters():
            p.data.uniform_(-20, 20)
            if where == "corner":
                p.data.sign_().mul_(20)
            if where == "origin":
                p.data.zero_()
        A_bar = layer.double().discretize()[0]
        if "selective" not in case.layer:
            eigenvalues = torch.linalg.eigvals(A_bar) if A_bar.dim() == 3 else A_bar
            assert eigenvalues.abs().max() <= 1 + (1e-9 if A_bar.dim() == 3 else 0)
        for dtype, rate in ((torch.float64, 2.0), (torch.float32, 0.5)):
            x = layer.to(dtype).initial_state(1)
            for method in case.methods:
                options = {"method": method, "rate": rate}
                for y, last in (layer(u, **options), layer(u, x, **options)):
                    assert all(t.abs().isfinite().all() for t in [y, *leaves(last)])
        y.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@each(CASES)
def test_inputs_of_any_layout_and_dtype(case):
    layer = case.build()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    u = signal(2, case.h, 50)
    linear = any(isinstance(module, torch.nn.Linear) for module in layer.modules())
    for method in case.methods:
        y, _ = layer(u, method=method)
        for v, expected in ((u.mT.contiguous().mT, y), (u[:1], y[:1]),
                            (u[:1].expand(2, -1, -1), y[:1].expand(2, -1, -1))):
            assert error(layer(v, method=method)[0], expected) <= 1e-6
        half, _ = layer(u.bfloat16(), method=method)
        assert half.dtype == torch.bfloat16 and error(half.float(), y) <= 0.05
        assert layer(u.double(), method=method)[0].dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside, _ = layer(u, method=method)
        assert inside.dtype == u.dtype
        if not linear:                          # the SSM itself ignores autocast
            assert error(inside, y) <= 1e-6
    if hasattr(layer, "kernel"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = layer.kernel(50)
        assert error(inside, layer.kernel(50)) <= 1e-6
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@each(CASES)
def test_built_in_double_precision(case):
    """Every parameter has memory of its own: an optimizer refuses an expanded one."""
    torch.set_default_dtype(torch.float64)
    try:
        layer = case.build()
    finally:
        torch.set_default_dtype(torch.float32)
    layer(signal(1, case.h, 9, dtype=torch.float64))[0].square().sum().backward()
    torch.optim.AdamW(layer.parameters()).step()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each(CASES)
def test_cuda_agrees_with_cpu(case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    layer = case.build()
    u, x = signal(2, case.h, 257), random_state(layer, 2) if case.has_state else None
    expected, _ = layer(u, x)
    layer, x = layer.cuda(), None if x is None else like(x, [t.cuda() for t in leaves(x)])
    for method in case.methods:
        y, last = layer(u.cuda(), x, method=method)
        y.sum().backward()
        assert error(y, expected) <= 1e-5 and all(t.is_cuda for t in leaves(last))


@each(CASES)
def test_initial_state_copies_and_round_trips(case):
    layer, u = case.build(), signal(2, case.h, 20)
    y, _ = layer(u)
    other = case.build(seed=7)
    assert error(other(u)[0], y) > 1e-3
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(u)[0], y)
    if case.has_state:
        zero = layer.initial_state(2)
        again, last = layer(u, zero)
        assert all((t == 0).all() for t in leaves(zero)) and error(again, y) <= 1e-6
        assert [t.dtype for t in leaves(zero)] == [t.dtype for t in leaves(last)]
        double = leaves(layer.double().initial_state(1))
        assert all(t.dtype in (torch.float64, torch.complex128) for t in double)


@each(CASES)
def test_bad_sequences_states_rates_and_methods(case):
    """The message says what is expected, and the input does not satisfy it."""
    layer, u = case.build(), signal(2, case.h, 8)
    rates = [0.0, -1.0, math.nan, math.inf, None, "2", np.ones(8)]
    rate = "rate=.*: pass one positive number"
    if case.layer.split(".")[0] not in ("s5", "lru", "selective_scan"):
        rates += [torch.ones(8), torch.tensor(2.0), [1.0] * 8]
        rate += "; for irregular sampling take s5.py or lru.py, or a rate of its own for"
    sequence, kind = "u is .*: pass", "u is a (ndarray|list): pass a tensor"
    wrong = (u[0], u[..., :0], u[:, :2], u.long(), u.to(torch.complex64))
    bad = {                                             # message: calls
        sequence: [partial(layer, v) for v in wrong],
        kind: [partial(layer, u.numpy()), partial(layer, u.tolist())],
        r"u is empty, \(0, ": [partial(layer, u[:0])],
        rf"u is .*\(2, 100, {case.h}\): pass .*\(b, {case.h}, l\)":     # time first
            [partial(layer, signal(2, 100, case.h))],
        "method.*: ": [partial(layer, u, method=v) for v in ("fft", "Conv")],
        rate: [partial(layer, u, rate=v) for v in rates],
    }
    bad[rate] += [partial(layer.discretize, v) for v in rates]
    if hasattr(layer, "kernel"):
        bad["l.*: "] = [partial(layer.kernel, v) for v in (0, -1)]
        bad[rate] += [partial(layer.kernel, 8, rate=v) for v in rates]
    if case.has_state:
        u_0, x = u[..., 0], layer.initial_state(2)
        parts = leaves(x)
        states = [parts[-1][..., None], (u, x)]         # (u, x): like what a call returned
        for i, t in enumerate(parts):
            for v in (t[:1], t[..., :-1], t.real if t.is_complex() else t.long()):
                states.append(like(x, [*parts[:i], v, *parts[i + 1:]]))
        bad["state: .*, pass "] = [partial(layer, u, v) for v in states]
        bad["state: .*, pass "] += [partial(layer.step, u_0, v) for v in states]
        last = layer.initial_state(3)                   # of a larger batch
        bad[r"state: .* 3, .*, pass .*\(2, "] = [partial(layer, u, last),
                                                 partial(layer.step, u_0, last)]
        bad[r"state: NoneType, .*initial_state\(\)"] = [partial(layer.step, u_0, None)]
        wrong = (u, u[:, :2, 0], u_0.long())
        bad[sequence] += [partial(layer.step, v, x) for v in wrong]
        bad[kind] += [partial(layer.step, v, x) for v in (u_0.numpy(), u_0.tolist())]
        bad[rate] += [partial(layer.step, u_0, x, rate=v) for v in rates]
    for message, calls in bad.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"^{message}"):
                call()
