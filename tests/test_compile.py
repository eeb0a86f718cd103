"""torch.compile by its default backend, inductor, torch.jit.trace, and any length.

Inductor has returned right outputs with wrong gradients where a view of a permuted tensor
met a complex number, so that every gradient is compared here.

    python tests/test_compile.py --all          every case, method, state and two lengths
    python tests/test_compile.py --all s4       those whose name contains s4; all: hours
"""

import importlib
import sys
import time
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._inductor import config

from layers import CASES, error, leaves, like, random_state, signal

LAYERS = ["lssl", "s4", "s4-legt-channels", "s4-diag-inv", "dss", "s4d", "gss", "s5", "lru",
          "selective", "mamba"]
# name, method, with a state: every kernel and every scan; dss.py and gss.py have those of
# s4d.py to the letter, and Mamba that of SelectiveSSM
FEW = [("s4d", "conv", True), ("s4", "conv", False), ("s4", "conv", True),
       ("lssl-each", "conv", True), ("s5", "scan", True), ("lru", "conv", True),
       ("selective", "scan", True)]


def named(name):
    return next(case for case in CASES if case.name == name)


def run(layer, call, u, x, method):
    """Outputs and the gradients of a sum over them, by name."""
    u = u.clone().requires_grad_()
    if x is not None:
        x = like(x, [t.clone().requires_grad_() for t in leaves(x)])
    y, last = call(u, x, method=method)
    loss = (y * signal(*y.shape, seed=5)).sum()
    for t in leaves(last):
        real = torch.view_as_real(t) if t.is_complex() else t
        weights = torch.randn(real.shape, generator=torch.Generator().manual_seed(6))
        loss = loss + (real * weights).sum()
    inputs = {"u": u} | {f"state {i}": t for i, t in enumerate(leaves(x))} | \
        {name: p for name, p in layer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, inputs.values(), allow_unused=True)
    results = {"y": y} | {f"last {i}": t for i, t in enumerate(leaves(last))}
    for name, gradient in zip(inputs, gradients):
        if gradient is not None:                # of C in mode dss, there is one without B
            results[f"gradient of {name}"] = gradient
    return results


def compare(case, method, with_state, l):
    """{what: relative difference between compiled and eager}, the largest first."""
    torch._dynamo.reset()
    layer = case.build()
    u = signal(2, case.h, l)
    x = random_state(layer, 2) if with_state else None
    expected = run(layer, layer, u, x, method)
    found = run(layer, torch.compile(layer, fullgraph=True), u, x, method)
    assert found.keys() == expected.keys()
    differences = {what: error(found[what], expected[what]) for what in expected}
    return dict(sorted(differences.items(), key=lambda pair: -pair[1]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, method, with_state", FEW)
@config.patch({"disable_cpp_codegen": True, "pattern_matcher": False,
               "compile_threads": 1, "cpp.vec_isa_ok": False})
def test_compiled_gradients(name, method, with_state, monkeypatch):
    """All of inductor but for C++ loops, each of which takes a compiler a second, and the
    search for patterns: `python tests/test_compile.py --all` has them. Strides, views and
    complex numbers, where it went wrong, are the same without. The steps make two digits of
    time, or levels of a scan."""
    case = named(name)
    set_block(monkeypatch, name, 2)
    l = 20 if name in ("s4d", "lru") else 3
    differences = compare(case, method, with_state, l)
    assert max(differences.values()) <= 1e-4, differences


def set_block(monkeypatch, name, T):
    """Blocks of T steps in the scans, for smaller graphs."""
    blocks = {"s5": "s5.linear_scan", "selective": "selective_scan.selective_scan",
              "mamba": "selective_scan.selective_scan"}
    if name in blocks:
        module, function = blocks[name].split(".")
        function = getattr(importlib.import_module(module), function)
        *others, block = function.__defaults__
        assert block in (16, 32)
        monkeypatch.setattr(function, "__defaults__", (*others, T))


def test_lengths_share_a_graph(monkeypatch):
    """With dynamic=True a selective scan has one graph for all lengths with as many doublings
    of blocks, here 1 and 2, and one more where the last block is full; torch.compile gives
    up after eight graphs of a function. (In s5.py and lru.py there is a graph for each
    number of chunks.)"""
    torch._dynamo.reset()
    set_block(monkeypatch, "selective", 4)
    case = named("selective")
    layer = case.build()
    counter = CompileCounter()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=counter)
    with torch.no_grad():
        for l in range(5, 17):
            u = signal(2, case.h, l)
            assert error(compiled(u)[0], layer(u)[0]) <= 1e-5, l
    assert counter.frame_count <= 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYERS)
def test_traced(name):
    """torch.jit.trace, at the traced length. A trace rounds a product of Python numbers and
    a tensor to single precision where l is in it, also if the tensor is in double."""
    case = named(name)
    layer = case.build().requires_grad_(False)
    u = signal(2, case.h, 30)
    v = signal(2, case.h, 30, seed=3)

    def call(u):
        return layer(u)[0]
    traced = torch.jit.trace(call, (u,), check_trace=False)
    assert error(traced(v), call(v)) <= 1e-5
    x = random_state(layer, 2)
    traced = torch.jit.trace(layer.forward, (u, x), check_trace=False)
    assert error(traced(v, x), layer(v, x)) <= 1e-5


def main(words):
    """Compile everything whose name contains one of the words; print one line for each."""
    warnings.simplefilter("ignore")
    worst = 0
    for case in CASES:
        if words and not any(word in case.name for word in words):
            continue
        for method in case.methods:
            for with_state in (False, True)[:1 + case.has_state]:
                for l in (1, 4) if method == "step" else (7, 70):
                    start = time.time()
                    differences = compare(case, method, with_state, l)
                    what, difference = next(iter(differences.items()))
                    worst = max(worst, difference)
                    state = "state" if with_state else "no state"
                    seconds = time.time() - start
                    print(f"{case.name:<20}{method:<6}{state:<9} l = {l:<4}"
                          f"{difference:8.1e}  {what:<26}{seconds:5.0f} s", flush=True)
    print(f"largest difference {worst:.1e}")
    return worst


if __name__ == "__main__":
    if "--all" not in sys.argv[1:]:
        sys.exit(__doc__)
    sys.exit(main([word for word in sys.argv[1:] if word != "--all"]) > 1e-4)
