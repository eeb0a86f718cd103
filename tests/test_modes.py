"""Every layer in every mode, against the oracle and against itself: the interface that all
eight files share."""

import copy
import io
import pickle

import pytest
import torch

from layers import (CASES, DOUBLE, error, in_pieces, in_steps, leaves, like, random_state,
                    signal)

LENGTHS = [1, 2, 3, 17, 64, 127, 128, 255, 256, 257, 1000]
RATES = [0.5, 1.0, 2.0, 1.7]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
STATEFUL = [case for case in CASES if case.has_state]
HELD = ["s4d", "s4d-legs", "s4d-real", "dss", "dss-growing", "dss-exp", "gss", "gss-plain",
        "s4-gss", "s5", "s5-no-pairs", "lru", "lru-ring", "s4-diag-inv", "s4-diag-dss"]
STABLE = ["s4d", "s4d-bilinear", "dss-exp", "gss-plain", "s5-bilinear-blocks",
          "s5-no-pairs", "lru", "s4", "s4-legt-channels", "s4-fout-relu", "s4-diag-inv",
          "s4-diag-bilinear", "s4-diag-dss", "selective", "mamba"]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def named(names):
    return each([case for case in CASES if case.name in names])


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


@named(HELD)
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


@each(STATEFUL)
def test_half_precision_parameters_are_refused(case):
    u = signal(2, case.h, 10)
    for dtype in (torch.bfloat16, torch.float16):
        layer = case.build().to(dtype)
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


@each(STATEFUL)
def test_chunks_equal_one_call(case):
    layer = case.build().requires_grad_(False)
    u, x = signal(2, case.h, 300), random_state(layer, 2)
    for method in case.methods:
        options = {"rate": 1.7, "method": method}
        pieces = in_pieces(layer, u, x, [1, 2, 64, 33, 128, 72], **options)
        assert error(pieces, layer(u, x, **options)) <= 1e-5


def gradients(layer, u, x, method):
    """Gradients of a random linear function of the output and the final state: by input,
    state and parameters."""
    u = u.clone().requires_grad_()
    x = None if x is None else like(x, [t.clone().requires_grad_() for t in leaves(x)])
    y, last = layer(u, x, method=method, rate=1.7)
    loss = (y * signal(*y.shape, seed=5, dtype=y.dtype)).sum()
    for t in leaves(last):
        t = torch.view_as_real(t) if t.is_complex() else t
        generator = torch.Generator().manual_seed(6)
        loss = loss + (t * torch.randn(t.shape, dtype=t.dtype, generator=generator)).sum()
    inputs = {"u": u} | {f"x{i}": t for i, t in enumerate(leaves(x))} | \
        {name: p for name, p in layer.named_parameters() if p.requires_grad}
    return dict(zip(inputs, torch.autograd.grad(loss, inputs.values())))


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


@named(STABLE)
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
        for dtype in (torch.float64, torch.float32):
            x = layer.to(dtype).initial_state(1)
            for method in case.methods:
                for y, last in (layer(u, method=method), layer(u, x, method=method)):
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
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@each(CASES)
def test_kernel_and_step_ignore_autocast(case):
    layer, u = case.build(), signal(2, case.h, 1)[..., 0]
    calls = []
    if hasattr(layer, "kernel"):
        calls.append(lambda: layer.kernel(50))
    if "LSSL" in case.layer:
        calls.append(lambda: layer.step(u, random_state(layer, 2)))
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = call()
        assert error(inside, call()) <= 1e-6


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


@each(CASES)
def test_no_tensor_is_created_on_the_wrong_device(case):
    layer = case.build().to("meta")
    u = torch.empty(2, case.h, 50, device="meta", requires_grad=True)
    for method in case.methods:
        l = 3 if method == "step" else 50               # a loop: each step is like the others
        for x in [None] + ([layer.initial_state(2)] if case.has_state else []):
            y, last = layer(u[..., :l], x, method=method)
            assert y.device.type == "meta" and y.shape[-1] == l
            (y.sum() + sum(t.abs().sum() for t in leaves(last))).backward()
    if case.has_state:
        y, _ = layer.step(u[..., 0], layer.initial_state(2), discrete=layer.discretize())
        assert y.device.type == "meta"


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
def test_learning_rates_are_recorded(case):
    layer = case.build()
    parameters = dict(layer.named_parameters())
    assert set(layer.ssm_lr) <= set(parameters)
    for name, rate in layer.ssm_lr.items():
        assert parameters[name].requires_grad == (rate > 0)


@each(CASES)
def test_bad_sequences_states_rates_and_methods(case):
    layer, u = case.build(), signal(2, case.h, 8)
    nan = float("nan")
    wrong = (u[0], u[..., :0], u[:, :2], u.long(), u.to(torch.complex64))
    calls = {
        "u": [lambda v=v: layer(v) for v in wrong],
        "method": [lambda v=v: layer(u, method=v) for v in ("fft", "Conv")],
        "rate": [lambda v=v: layer(u, rate=v) for v in (0.0, -1.0, nan, float("inf"))],
    }
    if hasattr(layer, "kernel"):
        calls["l"] = [lambda v=v: layer.kernel(v) for v in (0, -1)]
        calls["rate"] += [lambda v=v: layer.kernel(5, rate=v) for v in (0.0, nan)]
    if case.has_state:
        x = layer.initial_state(2)
        wrong = [[t[:1] for t in leaves(x)], [t[..., :-1] for t in leaves(x)],
                 [t.real if t.is_complex() else t.long() for t in leaves(x)]]
        wrong = [like(x, parts) for parts in wrong]
        calls["state"] = [lambda v=v: layer(u, v) for v in wrong]
        calls["state"] += [lambda v=v: layer.step(u[..., 0], v) for v in wrong]
        wrong = (u, u[:, :2, 0], u[..., 0].long())
        calls["u"] += [lambda v=v: layer.step(v, x) for v in wrong]
        calls["rate"] += [lambda v=v: layer.step(u[..., 0], x, rate=v) for v in (0.0, nan)]
        calls["rate"] += [lambda v=v: layer.discretize(v) for v in (-2.0, nan)]
    for argument, bad in calls.items():
        for i, call in enumerate(bad):
            with pytest.raises(ValueError, match=f"^{argument}") as caught:
                call()
            assert ":" in str(caught.value), (argument, i)
