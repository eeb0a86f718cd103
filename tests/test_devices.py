"""A rehearsal for the GPU on a machine without one, and how many operators are launched."""

import importlib
import re
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fake_gpu import DEVICE, count_operators, on_fake_gpu, tensors
from layers import CASES, ROOT, each, named


def fake(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device=DEVICE, requires_grad=True)


def backward(result):
    """Backward of a sum over everything, which is on DEVICE."""
    found = tensors(result)
    assert found and all(t.device.type == DEVICE for t in found)
    real = [torch.view_as_real(t) if t.is_complex() else t for t in found]
    sum(t.sum() for t in real if t.requires_grad).backward()


def rehearse(layer, h, methods, has_state=True, l=5):
    """Everything of the interface, forward and backward, with a layer on DEVICE."""
    found = [layer(fake(2, h, l), rate=2.0)[0]]
    for method in methods:
        u = fake(2, h, 1 if method == "step" else l)
        found.append(layer(u, method=method))
        if has_state:
            found.append(layer(u, layer.initial_state(2), method=method))
    backward(found)
    with torch.no_grad():
        if hasattr(layer, "kernel"):
            assert layer.kernel(l).device.type == DEVICE
        if has_state:
            discrete = layer.discretize(2.0)
            found = layer.step(fake(2, h), layer.initial_state(2), discrete=discrete)
            found = layer.step(fake(2, h), found[1])
            assert all(t.device.type == DEVICE for t in tensors((found, discrete)))
    for p in layer.parameters():
        assert p.grad is None or p.grad.device.type == DEVICE


@each(CASES)
def test_one_device(case):
    layer = case.build()
    with on_fake_gpu(layer):
        rehearse(layer, case.h, case.methods, case.has_state)


@pytest.mark.parametrize("options, l", [({"bidirectional": True}, 5), ({}, 270)], ids=str)
def test_one_device_in_other_forms_of_s4(options, l):
    """In both directions; and by dense powers, for 16 n steps or more."""
    layer = importlib.import_module("s4").S4(4, 8, **options)
    with on_fake_gpu(layer):
        rehearse(layer, 4, ["conv"], not options, l)


@pytest.mark.parametrize("file", ["lssl", "s4"])
def test_a_tensor_without_a_device_is_noticed(file, monkeypatch):
    """A file in which one of its device=... is taken out must fail the rehearsal."""
    text = (ROOT / f"{file}.py").read_text()
    places = list(re.finditer(r", device=[\w.]+", text))
    assert places
    for place in places:
        broken = types.ModuleType(file)
        code = text[:place.start()] + text[place.end():]
        exec(compile(code, file, "exec"), broken.__dict__)
        monkeypatch.setitem(sys.modules, file, broken)
        with pytest.raises(Exception, match="(?i)device"):
            for case in CASES:
                if case.layer.startswith(file + "."):
                    test_one_device(case)
            if hasattr(broken, "reconstruct"):
                rehearse_reconstruct(broken.reconstruct)


def rehearse_reconstruct(reconstruct):
    with FakeTensorMode():
        for measure in ("legs", "legt"):
            backward(reconstruct(measure, fake(2, 3, 8), fake(5)))


def test_reconstruct_on_one_device():
    rehearse_reconstruct(importlib.import_module("lssl").reconstruct)


@pytest.mark.parametrize("name", ["selective_scan_fn", "selective_scan_seq"])
def test_selective_scan_fn_on_one_device(name):
    scan = getattr(importlib.import_module("selective_scan"), name)
    b, d, n, l = 2, 3, 4, 40 if name == "selective_scan_fn" else 3
    with FakeTensorMode():
        u, delta, z = fake(b, d, l), fake(b, d, l), fake(b, d, l)
        A, B, C = fake(d, n), fake(b, n, l), fake(b, n, l)
        backward(scan(u, delta, A, B, C))
        backward(scan(u, delta, A, B, C, fake(d), z, fake(d), True, True,
                      initial_state=fake(b, d, n)))


@pytest.mark.parametrize("activation, norm", [("glu", "layer"), ("half_glu2", "batch")])
def test_network_of_example_on_one_device(activation, norm):
    """One training step and an evaluation in every mode."""
    example = importlib.import_module("example")
    files = importlib.import_module("s4d"), importlib.import_module("selective_scan")
    functions = [lambda h: files[0].S4D(h, 8), lambda h: files[1].Mamba(h, 4)]
    net = example.StackedSSM(functions, 3, 10, d_model=4, n_layers=2, activation=activation,
                             norm=norm)
    with on_fake_gpu(net):
        optimizer = torch.optim.AdamW(example.param_groups(net, 0.01, 0.01))
        images = torch.zeros(2, 20, 3, dtype=torch.uint8, device=DEVICE)
        labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        F.cross_entropy(net(images)[0], labels).backward()
        optimizer.step()
        net.eval()
        with torch.no_grad():
            scores, state = net(images[:, :17], net.initial_state(2), rate=2.0)
            discrete = net.discretize(2.0)
            for pixel in images[:, 17:].unbind(1):
                scores, state = net.step(pixel, state, discrete=discrete)
        assert all(t.device.type == DEVICE for t in tensors((scores, state, discrete)))


@pytest.mark.parametrize("name", ["lssl", "s5", "selective"])
def test_launches_do_not_grow_with_the_length(name):
    """16 times as long: at most twice as many, for a scan has one level more. The other
    layers share their functions with these."""
    case, = named(name)
    few = count_operators(case.build(), case.h, 1024)
    many = count_operators(case.build(), case.h, 16384)
    assert 0 < many[0] <= 2 * few[0] and 0 < many[1] <= 2 * few[1], (few, many)
