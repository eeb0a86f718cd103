"""What users of such layers have run into: gradients that are not finite, arguments that do
nothing, states of another layout, wrapped linear maps, huge samples."""

import importlib
import math
from functools import partial

import pytest
import torch
from torch import nn

from layers import (CASES, DOUBLE, STATEFUL, each, error, in_steps, leaves, like, named,
                    random_state, signal)

SCANS = ("s5", "lru", "selective_scan")


def build(name, h, d_state, **options):
    torch.manual_seed(0)
    module, cls = name.split(".")
    return getattr(importlib.import_module(module), cls)(h, d_state, **options)


def finite_gradients(layer, h, l, **options):
    """Output, and the gradients of its mean square for the parameters, are finite."""
    y, _ = layer(signal(1, h, l), **options)
    y.square().mean().backward()
    assert y.isfinite().all()
    for name, p in layer.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


# ---- finite gradients ----

def sizes():
    """|log A_bar| from 1e-8 to 1e4, closely where exp(-size) is subnormal."""
    return torch.cat([torch.logspace(-8, 4, 200, **DOUBLE), torch.linspace(690, 760, 71)])


@pytest.mark.parametrize("l", [2, 7, 1000, 16384])
@pytest.mark.parametrize("file", ["s4d", "dss", "gss"])
def test_gradients_of_powers(file, l):
    """c log A_bar has these sizes, c being 1, a block length, or the last power."""
    powers = importlib.import_module(file).powers
    T = int(l ** 0.5)
    for c in {1, T, (l - 1) // T * T, l} - {0}:
        for angle in (0.0, 2.0):
            A_bar = torch.exp(torch.complex(-sizes() / c, torch.full_like(sizes(), angle)))
            for dtype in (torch.float32, torch.float64):
                x = A_bar[None].clone().requires_grad_()
                tens, ones = powers(x, l, dtype)
                (tens.abs().sum() + ones.real.sum()).backward()
                assert tens.isfinite().all() and x.grad.isfinite().all(), (c, angle)


@pytest.mark.parametrize("file", ["s5", "lru"])
def test_gradients_of_states_by_fft(file):
    """Also where A_bar = 0, and there they are those of the loop."""
    l, module = 200, importlib.import_module(file)
    for c in (1, l - 1, l):
        log = torch.complex(-sizes() / c, torch.ones_like(sizes()))
        a = torch.exp(log).requires_grad_()
        v = torch.randn(1, l, len(a), dtype=torch.complex64)
        x = torch.randn(1, len(a), dtype=torch.complex128)
        states = module.fft_scan(a, v, x)
        states.real.sum().backward()
        assert states.isfinite().all() and a.grad.isfinite().all(), c
    a = torch.zeros(4, dtype=torch.complex128, requires_grad=True)
    v = torch.randn(1, 9, 4, dtype=torch.complex128)
    x = torch.randn(1, 4, dtype=torch.complex128)
    found, = torch.autograd.grad(module.fft_scan(a, v, x).real.square().sum(), a)
    expected, = torch.autograd.grad(module.loop_scan(a, v, x).real.square().sum(), a)
    assert error(found, expected) <= 1e-12


DEFAULTS = [
    ("s4d.S4D", 16, {}), ("s4d.S4D", 128, {"measure": "diag-real"}),
    ("s4d.S4D", 16, {"measure": "diag-real", "dt_min": 10.0, "dt_max": 10.0}),
    ("s4d.S4D", 16, {"measure": "diag-quad", "disc": "bilinear"}), ("s4.S4", 4, {}),
    ("s4.S4", 4, {"measure": "fout", "dt_max": 10.0}), ("lssl.LSSL", 2, {}),
    ("s4.S4", 16, {"mode": "diag", "measure": "diag-real"}),
    ("dss.DSS", 16, {"l_max": 2 ** 18}), ("dss.DSS", 16, {"version": "exp"}),
    ("gss.GSS", 16, {}), ("s5.S5", 4, {}), ("lru.LRU", 4, {}),
    ("lru.LRU", 4, {"r_min": 0.999, "r_max": 1.0}), ("selective_scan.SelectiveSSM", 2, {}),
    ("selective_scan.Mamba", 2, {"dt_max": 10.0})]


@pytest.mark.parametrize("name, h, options", DEFAULTS, ids=str)
def test_gradients_as_built(name, h, options):
    n = 16 if "selective" in name else 64
    for l in (1000, 16384):
        finite_gradients(build(name, h, n, **options), h, l)
    if name in ("s5.S5", "lru.LRU"):
        finite_gradients(build(name, h, n, **options), h, 1000, method="conv")


@pytest.mark.parametrize("name, n, options", [
    ("s4d.S4D", 64, {}), ("s4d.S4D", 64, {"measure": "diag-real"}), ("gss.GSS", 64, {}),
    ("lru.LRU", 8, {}), ("dss.DSS", 64, {"version": "exp"})], ids=str)
def test_gradients_at_length_and_at_any_rate(name, n, options):
    finite_gradients(build(name, 4, n, **options), 4, 2 ** 18)
    for rate in (1e-6, 11.2, 1e5):
        finite_gradients(build(name, 128, n, **options), 128, 1024, rate=rate)


ZERO = [("s5.S5", {}, ["Lambda_re", "Lambda_im"]),
        ("dss.DSS", {}, ["Lambda_re", "Lambda_im"]),
        ("s5.S5", {"disc": "bilinear"}, ["Lambda_re", "Lambda_im"]),
        ("s4.S4", {"mode": "diag", "real_type": "none"}, ["log_A_real", "A_imag"])]


@pytest.mark.parametrize("name, options, parameters", ZERO, ids=str)
def test_gradient_where_A_is_exactly_0(name, options, parameters):
    """Against differences: B_bar and its derivative have limits there."""
    layer = build(name, 4, 8, **options).double()
    values = [layer.get_parameter(parameter) for parameter in parameters]
    with torch.no_grad():
        for p in values:
            p[..., 0] = 0
        if hasattr(layer, "B"):
            layer.B.fill_(0.7)
    u = signal(1, 4, 30, **DOUBLE)
    loss = layer(u)[0].square().sum()
    gradients = torch.autograd.grad(loss, values)
    for p, gradient in zip(values, gradients):
        with torch.no_grad():
            p[..., 0] = 1e-7
            above = layer(u)[0].square().sum()
            p[..., 0] = -1e-7
            below = layer(u)[0].square().sum()
            p[..., 0] = 0
        difference = (above - below) / 2e-7
        assert abs(gradient[..., 0].sum() - difference) <= 1e-4 * (1 + abs(difference))


# ---- samples at irregular times ----

def rates(b, l):
    generator = torch.Generator().manual_seed(4)
    return 0.2 + 2.8 * torch.rand(b, l, generator=generator)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@each([case for case in CASES if case.layer.split(".")[0] in SCANS])
def test_irregular_samples(case, dtype, tolerance):
    layer, u, rate = case.build().to(dtype), signal(2, case.h, 100, dtype=dtype), rates(2, 100)
    if not case.has_state:                              # bidirectional: both directions
        y, _ = layer(u, rate=rate)
        assert error(layer(u[:1], rate=rate[:1])[0], y[:1]) <= tolerance
        flat, _ = layer(u, rate=torch.full((2, 100), 2.0))
        assert error(flat, layer(u, rate=2.0)[0]) <= 1e-5
        return
    x = random_state(layer, 2)
    expected = layer(u, x, rate=rate, method="step")
    assert error(layer(u, x, rate=rate), expected) <= tolerance
    both, _ = layer.step(u[..., 0], x, rate=rate[:, 0])     # sequences of one batch
    for i in range(2):
        alone = like(x, [t[i:i + 1] for t in leaves(x)])
        y, _ = layer.step(u[i:i + 1, :, 0], alone, rate=rate[i, 0].item())
        assert error(both[i:i + 1], y) <= 1e-5
    if "conv" in case.methods:
        with pytest.raises(ValueError, match="^rate varies"):
            layer(u, x, rate=rate, method="conv")
    for wrong in (rate[0], rate[:, :1], -rate, 0 * rate, math.inf * rate, math.nan * rate):
        for method in ("scan", "step"):
            with pytest.raises(ValueError, match="^rate is "):
                layer(u, x, rate=wrong, method=method)
    with pytest.raises(ValueError, match="^rate is "):
        layer.step(u[..., 0], x, rate=rate)


# ---- memory: layouts, states that own theirs ----

@each(named("lssl", "s4", "s4-diag-inv", "dss", "s4d", "gss", "s5", "lru", "mamba"))
def test_parameters_of_any_layout(case):
    """In channels_last, and in one vector from an odd place on, as vector_to_parameters and
    replicas have them."""
    layer, u = case.build().double(), signal(2, case.h, 9, **DOUBLE)
    expected, _ = layer(u)
    assert error(layer.to(memory_format=torch.channels_last)(u)[0], expected) <= 1e-12
    memory = torch.empty(1 + sum(p.numel() for p in layer.parameters()), **DOUBLE)
    start = 1
    for p in layer.parameters():
        place = memory[start:start + p.numel()].view(p.shape)
        p.data = place.copy_(p.data)
        start += p.numel()
    y, _ = layer(u)
    y.sum().backward()
    assert error(y, expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each(STATEFUL)
def test_a_state_owns_its_memory(case, dtype):
    layer, u = case.build().to(dtype), signal(2, case.h, 300, dtype=dtype)
    for method in case.methods[:-1]:                    # a step reads y from the next state
        y, last = layer(u, random_state(layer, 2), method=method)
        for t in leaves(last):
            assert t.untyped_storage().nbytes() <= 2 * t.numel() * t.itemsize, method
            t.detach().zero_()                          # as at the end of an episode
        y.sum().backward()


def test_the_state_of_selective_scan_fn_owns_its_memory():
    scan = importlib.import_module("selective_scan").selective_scan_fn
    u, B = signal(2, 3, 300, **DOUBLE), signal(2, 4, 300, **DOUBLE)
    _, x = scan(u, u.abs(), -torch.ones(3, 4, **DOUBLE), B, B, return_last_state=True)
    assert x.untyped_storage().nbytes() == x.numel() * x.itemsize


# ---- rare numbers ----

def test_infinite_decay():
    for cls in ("SelectiveSSM", "Mamba"):
        layer = build(f"selective_scan.{cls}", 4, 4)
        layer.A_log.data.fill_(89.0)                    # A is infinite in single precision
        u, x = signal(2, 4, 20), layer.initial_state(2)
        assert error(layer(u, x), layer(u, x, method="step")) <= 1e-5


def test_second_derivative_where_Lambda_is_0():
    layer = build("s5.S5", 2, 4).double()
    u = signal(1, 2, 30, **DOUBLE)

    def loss(Lambda_re):
        p = {"Lambda_re": Lambda_re, "Lambda_im": torch.zeros(2, **DOUBLE)}
        return torch.func.functional_call(layer, p, (u,))[0].square().sum()

    def curvature(where):
        return torch.func.hessian(loss)(torch.full((2,), where, **DOUBLE))
    assert error(curvature(0.0), (curvature(1e-3) + curvature(-1e-3)) / 2) <= 1e-4


# ---- arguments ----

@each(STATEFUL)
def test_discrete_with_a_rate_or_of_another_layer(case):
    """Matrices of fewer states or features would broadcast."""
    layer, u = case.build(), signal(2, case.h, 1)[..., 0]
    x, discrete = layer.initial_state(2), layer.discretize(2.0)
    with pytest.raises(ValueError, match="^rate .*discrete"):
        layer.step(u, x, rate=2.0, discrete=discrete)
    layer.step(u, x, discrete=discrete)
    first, *rest = discrete
    for wrong in (first[..., :1], first[:1]):
        if wrong.shape != first.shape:
            with pytest.raises(ValueError, match="^discrete: "):
                layer.step(u, x, discrete=(wrong, *rest))


def test_sizes_that_are_not_whole():
    with pytest.raises((ValueError, TypeError)):
        build("s4d.S4D", 4, 8.0)


# ---- states ----

def layouts(x):
    """The same numbers in other strides: sliced, transposed in memory, and conjugated
    lazily; each a list of leaves."""
    parts = leaves(x)
    padded = [torch.stack([t, t.flip(0)], -1)[..., 0] for t in parts]
    wider = [torch.cat([t, t], -1)[..., :t.shape[-1]] for t in parts]
    moved = [t.mT.contiguous().mT for t in parts]
    lazy = [t.conj().resolve_conj().conj() if t.is_complex() else t for t in parts]
    return [padded, wider, moved, lazy]


@each(STATEFUL)
def test_states_of_any_layout(case):
    layer, u = case.build(), signal(2, case.h, 4)
    one = random_state(layer, 1)
    x = like(one, [t.expand(2, *t.shape[1:]) for t in leaves(one)])
    whole = like(one, [t.contiguous() for t in leaves(x)])
    states = [x] + [like(one, parts) for parts in layouts(random_state(layer, 2))]
    plain = [whole] + [like(one, [t.contiguous() for t in leaves(s)]) for s in states[1:]]
    for state, expected in zip(states, plain):
        for method in case.methods:
            found = layer(u, state, method=method)
            assert error(found, layer(u, expected, method=method)) <= 1e-6, method
            sum(t.abs().sum() for t in [found[0], *leaves(found[1])]).backward()
        found = layer.step(u[..., 0], state)
        assert error(found, layer.step(u[..., 0], expected)) <= 1e-6


def test_last_state_by_fft_where_states_decay_fast():
    layer = build("lru.LRU", 4, 8, r_max=0.1)
    u, x = signal(2, 4, 1000), layer.initial_state(2)
    _, expected = layer(u, x, method="step")
    for method in ("scan", "conv"):
        assert error(layer(u, x, method=method)[1], expected) <= 1e-6, method


# ---- causality ----

@each(STATEFUL)
def test_a_huge_last_sample(case):
    """By step and scan it changes nothing before it, and neither does a NaN. An FFT is
    exact relative to the largest number of the sequence: 1e6 times 6e-8."""
    layer, u = case.build(), signal(2, case.h, 64)
    for method in case.methods:
        y, _ = layer(u, method=method)
        for value in (1e6, math.nan):
            v = u.clone()
            v[..., -1] = value
            found, _ = layer(v, method=method)
            if method in ("step", "scan"):
                assert error(found[..., :-1], y[..., :-1]) <= 1e-6, method
            elif value == 1e6:
                assert error(found[..., :-1], y[..., :-1]) <= 2.0


# ---- linear maps are called as layers ----

class LowRank(nn.Module):
    """A linear layer plus a trained matrix of rank 1, as in LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(base.in_features)
        self.left = nn.Parameter(torch.randn(base.out_features, 1, generator=generator))
        self.right = nn.Parameter(torch.randn(1, base.in_features, generator=generator))

    def forward(self, u):
        return self.base(u) + u @ self.right.mT @ self.left.mT


def linear_layers(layer):
    """(module that holds it, its name there, linear layer) of all linear layers."""
    found = []
    for parent in layer.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                found.append((parent, name, child))
    return found


@each(named("gss", "gss-plain", "s4-gss", "s4-bottleneck", "selective", "mamba"))
def test_low_rank_adapters_and_hooks(case):
    """An adapter around every linear layer gives what the sum of both matrices gives, and
    its hooks see every call."""
    adapted, merged = case.build(), case.build()
    for parent, name, linear in linear_layers(adapted):
        setattr(parent, name, LowRank(linear))
    wrappers = [m for m in adapted.modules() if isinstance(m, LowRank)]
    with torch.no_grad():
        for wrapper, (_, _, linear) in zip(wrappers, linear_layers(merged), strict=True):
            linear.weight += wrapper.left @ wrapper.right
    called = set()
    for wrapper in wrappers:
        wrapper.register_forward_hook(lambda module, *_: called.add(module))
    u = signal(2, case.h, 20)
    y, _ = merged(u)
    runs = [partial(adapted, u, method=method) for method in case.methods]
    for run in [*runs, partial(in_steps, adapted, u, adapted.initial_state(2))]:
        called.clear()
        assert error(run()[0], y) <= 1e-5 and called == set(wrappers) != set()
    adapted(u)[0].square().sum().backward()
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)
