"""Every layer in every mode, against the oracle and against itself: the interface that all eight files share."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from layers import CASES, error, leaves, like, parameters, random_state, signal, to_numpy

LENGTHS = [1, 2, 3, 17, 64, 127, 128, 255, 256, 257, 1000]
RATES = [0.5, 1.0, 2.0, 1.7]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
STATEFUL = [case for case in CASES if case.has_state]
IDS = dict(ids=lambda case: case.name)
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STATEFUL, **IDS)
def test_oracle_at_every_length(case, dtype):
    layer = case.build().to(dtype)
    u, x = signal(2, case.h, case.l_max, dtype=dtype), random_state(layer, 2)
    expected, _ = case.simulate(parameters(layer), u.double().numpy(), to_numpy(x), 1.0)
    without, _ = case.simulate(parameters(layer), u.double().numpy(), None, 1.0)
    for l in [l for l in LENGTHS if l <= case.l_max]:
        for method in case.methods:
            if method == "step" and l not in (1, 3, 257):       # the loop is slow and all lengths are alike to it
                continue
            with torch.no_grad():
                y, last = layer(u[..., :l], x, method=method)
                y0, none = layer(u[..., :l], method=method)
            assert none is None and y.dtype == y0.dtype == dtype
            assert error(y, expected[..., :l]) <= TOLERANCE[dtype], (l, method)
            assert error(y0, without[..., :l]) <= TOLERANCE[dtype], (l, method)
            if l in (1, 64, 257):
                _, expected_last = case.simulate(parameters(layer), u[..., :l].double().numpy(), to_numpy(x), 1.0)
                for got, want in zip(leaves(last), [expected_last] if len(leaves(last)) == 1 else expected_last):
                    assert error(got, want) <= TOLERANCE[dtype], (l, method)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", STATEFUL, **IDS)
def test_step_mode_at_full_length(case, dtype):
    layer = case.build().to(dtype)
    u = signal(1, case.h, case.l_max, dtype=dtype)
    expected, _ = case.simulate(parameters(layer), u.double().numpy(), None, 1.0)
    with torch.no_grad():
        assert error(layer(u, method="step")[0], expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("case", STATEFUL, **IDS)
def test_rates(case, rate):
    layer = case.build().double()
    u, x = signal(2, case.h, 40, dtype=torch.float64), random_state(layer, 2)
    expected, expected_last = case.simulate(parameters(layer), u.numpy(), to_numpy(x), rate)
    runs = [layer(u, x, rate=rate, method=method) for method in case.methods]
    discrete, y, state = layer.discretize(rate), [], x
    for u_t in u.unbind(-1):
        y_t, state = layer.step(u_t, state, discrete=discrete)
        y.append(y_t)
    runs.append((torch.stack(y, -1), state))
    y_t, state = layer.step(u[..., 0], x, rate=rate)
    assert error(y_t, expected[..., 0]) <= 1e-9
    for y, last in runs:
        assert error(y, expected) <= 1e-9
        for got, want in zip(leaves(last), [expected_last] if len(leaves(last)) == 1 else expected_last):
            assert error(got, want) <= 1e-9


@pytest.mark.parametrize("case", [case for case in CASES if case.has_kernel], **IDS)
def test_kernel_is_the_impulse_response(case):
    layer = case.build().double()
    for l in (1, 5, 100):
        for rate in (1.0, 1.7):
            impulse = torch.zeros(1, case.h, l, dtype=torch.float64)
            impulse[..., 0] = 1
            y, _ = case.simulate(parameters(layer), impulse.numpy(), None, rate)
            K = layer.kernel(l, rate=rate)
            y[..., 0] -= layer.D.detach().numpy().reshape(-1)
            assert error(K, y[0]) <= 1e-9


@pytest.mark.parametrize("case", STATEFUL, **IDS)
def test_half_precision_parameters_are_refused(case):
    u = signal(2, case.h, 10)
    for dtype in (torch.bfloat16, torch.float16):
        layer = case.build().to(dtype)
        for method in case.methods:
            with pytest.raises(ValueError, match="^parameters are .*autocast"):
                layer(u, method=method)
        with pytest.raises(ValueError, match="^parameters are .*autocast"):
            layer.discretize()


@pytest.mark.parametrize("case", STATEFUL, **IDS)
def test_state_of_another_precision(case):
    layer = case.build()
    u, x = signal(2, case.h, 10), random_state(layer, 2)
    dtypes = [t.dtype for t in leaves(x)]
    other = {torch.complex128: torch.complex64, torch.float64: torch.float32, torch.float32: torch.float64}
    moved = like(x, [t.to(other[t.dtype]) for t in leaves(x)])
    calls = [lambda x, m=method: layer(u, x, method=m) for method in case.methods] + \
        [lambda x: layer.step(u[..., 0], x)]
    for call in calls:
        (y, last), (expected, expected_last) = call(moved), call(x)
        assert y.dtype == torch.float32 and error(y, expected) <= 1e-6
        assert [t.dtype for t in leaves(last)] == dtypes
        assert all(error(a, b) <= 1e-6 for a, b in zip(leaves(last), leaves(expected_last)))


@pytest.mark.parametrize("case", STATEFUL, **IDS)
def test_chunks_equal_one_call(case):
    layer = case.build()
    u, x = signal(2, case.h, 300), random_state(layer, 2)
    for method in case.methods:
        with torch.no_grad():
            whole, last = layer(u, x, method=method, rate=1.7)
            pieces, state = [], x
            for piece in u.split([1, 2, 64, 33, 128, 72], -1):
                y, state = layer(piece, state, method=method, rate=1.7)
                pieces.append(y)
        assert error(torch.cat(pieces, -1), whole) <= 1e-5
        for got, want in zip(leaves(state), leaves(last)):
            assert error(got, want) <= 1e-5


def gradients(layer, u, x, method, **options):
    """Gradients of a random linear function of the output and the final state: by input, state and parameters."""
    u = u.clone().requires_grad_()
    x = None if x is None else like(x, [t.clone().requires_grad_() for t in leaves(x)])
    y, last = layer(u, x, method=method, **options)
    loss = (y * signal(*y.shape, seed=5, dtype=y.dtype)).sum()
    for t in leaves(last):
        t = torch.view_as_real(t) if t.is_complex() else t
        loss = loss + (t * torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(6))).sum()
    inputs = {"u": u} | {f"x{i}": t for i, t in enumerate(leaves(x))} | \
        {name: p for name, p in layer.named_parameters() if p.requires_grad}
    return dict(zip(inputs, torch.autograd.grad(loss, inputs.values())))


@pytest.mark.parametrize("l", [1, 2, 65])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("case", STATEFUL, **IDS)
def test_gradients_agree_between_modes(case, with_state, l):
    layer = case.build().double()
    u, x = signal(2, case.h, l, dtype=torch.float64), random_state(layer, 2) if with_state else None
    expected = gradients(layer, u, x, "step", rate=1.7)
    for method in case.methods:
        found = gradients(layer, u, x, method, rate=1.7)
        for name, gradient in expected.items():
            assert error(found[name], gradient) <= 1e-8, (method, name)


@pytest.mark.parametrize("case", CASES, **IDS)
def test_inputs_of_any_layout_and_dtype(case):
    layer = case.build()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    u = signal(2, case.h, 50)
    for method in case.methods:
        y, _ = layer(u, method=method)
        assert torch.equal(layer(u.mT.contiguous().mT, method=method)[0], y) or \
            error(layer(u.mT.contiguous().mT, method=method)[0], y) <= 1e-6
        assert error(layer(u[:1], method=method)[0], y[:1]) <= 1e-6
        assert error(layer(u[:1].expand(2, -1, -1), method=method)[0], y[:1].expand(2, -1, -1)) <= 1e-6
        half, _ = layer(u.bfloat16(), method=method)
        assert half.dtype == torch.bfloat16 and error(half.float(), y) <= 0.05
        assert layer(u.double(), method=method)[0].dtype == torch.float64
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside, _ = layer(u, method=method)
        assert inside.dtype == u.dtype
        if not any(isinstance(m, torch.nn.Linear) for m in layer.modules()):     # the SSM itself ignores autocast
            assert error(inside, y) <= 1e-6
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("case", CASES, **IDS)
def test_no_tensor_is_created_on_the_wrong_device(case):
    layer = case.build().to("meta")
    u = torch.empty(2, case.h, 50, device="meta", requires_grad=True)
    for method in case.methods:
        for x in [None] + ([layer.initial_state(2)] if case.has_state else []):
            y, last = layer(u, x, method=method)
            assert y.device.type == "meta" and y.shape[-1] == 50
            (y.sum() + sum(t.abs().sum() for t in leaves(last))).backward()
    if case.has_state:
        y, _ = layer.step(u[..., 0], layer.initial_state(2), discrete=layer.discretize())
        assert y.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, **IDS)
def test_cuda_agrees_with_cpu(case):
    layer = case.build()
    u, x = signal(2, case.h, 257), random_state(layer, 2) if case.has_state else None
    expected, _ = layer(u, x)
    layer, x = layer.cuda(), None if x is None else like(x, [t.cuda() for t in leaves(x)])
    for method in case.methods:
        y, last = layer(u.cuda(), x, method=method)
        y.sum().backward()
        assert error(y, expected) <= 1e-5 and all(t.is_cuda for t in leaves(last))


@pytest.mark.parametrize("case", CASES, **IDS)
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
        assert all((t == 0).all() for t in leaves(zero))
        assert error(layer(u, zero)[0], y) <= 1e-6
        assert [t.dtype.is_complex for t in leaves(zero)] == [t.dtype.is_complex for t in leaves(layer(u, zero)[1])]
        double = leaves(case.build().double().initial_state(1))
        assert all(t.dtype in (torch.float64, torch.complex128) for t in double)


@pytest.mark.parametrize("case", CASES, **IDS)
def test_learning_rates_are_recorded(case):
    layer = case.build()
    parameters = dict(layer.named_parameters())
    assert set(layer.ssm_lr) <= set(parameters)
    for name, rate in layer.ssm_lr.items():
        assert parameters[name].requires_grad == (rate > 0)


@pytest.mark.parametrize("case", CASES, **IDS)
def test_bad_sequences_states_rates_and_methods(case):
    layer, u = case.build(), signal(2, case.h, 8)
    nan = float("nan")
    calls = {
        "u": [lambda v=v: layer(v) for v in (u[0], u[..., :0], u[:, :2], u.long(), u.to(torch.complex64))],
        "method": [lambda v=v: layer(u, method=v) for v in ("fft", "Conv")],
        "rate": [lambda v=v: layer(u, rate=v) for v in (0.0, -1.0, nan, float("inf"))],
    }
    if case.has_kernel:
        calls["l"] = [lambda v=v: layer.kernel(v) for v in (0, -1)]
    if case.has_state:
        x = layer.initial_state(2)
        wrong = [like(x, [t[:1] for t in leaves(x)]), like(x, [t[..., :-1] for t in leaves(x)]),
                 like(x, [t.long() if not t.is_complex() else t.real for t in leaves(x)])]
        calls["state"] = [lambda v=v: layer(u, v) for v in wrong] + \
            [lambda v=v: layer.step(u[..., 0], v) for v in wrong]
        calls["u"] += [lambda v=v: layer.step(v, x) for v in (u, u[:, :2, 0], u[..., 0].long())]
        calls["rate"] += [lambda v=v: layer.step(u[..., 0], x, rate=v) for v in (0.0, nan)]
        calls["rate"] += [lambda v=v: layer.discretize(v) for v in (-2.0, nan)]
    for argument, bad in calls.items():
        for i, call in enumerate(bad):
            with pytest.raises(ValueError, match=f"^{argument}") as caught:
                call()
            assert ":" in str(caught.value), (argument, i)
