"""torch.compile by its default backend, inductor, torch.jit.trace, and any length.

Inductor has returned right outputs with wrong gradients where a view of a permuted tensor
met a complex number, so that every gradient is compared here.

    COMPILE_ALL=1 python -m pytest tests/test_compile.py -k "gradients and s4"
        every case whose name contains s4, every method, two lengths, by C++; all: hours
"""

import importlib
import os

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._inductor import config

from layers import CASES, error, gradients, named, random_state, signal

LAYERS = ["lssl", "s4", "s4-legt-channels", "s4-diag-inv", "dss", "s4d", "gss", "s5", "lru",
          "selective", "mamba"]
ALL = "COMPILE_ALL" in os.environ
# name, method, with a state: every kernel and every scan; dss.py and gss.py have those of
# s4d.py to the letter, and Mamba that of SelectiveSSM
FEW = [("s4d", "conv", True), ("s4", "conv", False), ("s4", "conv", True),
       ("lssl-each", "conv", True), ("s5", "scan", True), ("lru", "conv", True),
       ("selective", "scan", True)]


def cases():
    """name, method, with a state: FEW, or what there is."""
    if not ALL:
        return FEW
    found = []
    for case in CASES:
        for method in case.methods:
            for with_state in (False, True)[:1 + case.has_state]:
                found.append((case.name, method, with_state))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, method, with_state", cases())
@config.patch({} if ALL else {"disable_cpp_codegen": True, "pattern_matcher": False,
                              "compile_threads": 1, "cpp.vec_isa_ok": False})
def test_compiled_gradients(name, method, with_state, monkeypatch):
    """All of inductor but for C++ loops, each of which takes a compiler a second, and the
    search for patterns: COMPILE_ALL=1 has them. Strides, views and complex numbers, where
    it went wrong, are the same without. The steps make two digits of time, or levels of a
    scan."""
    case, = named(name)
    lengths = [20 if name in ("s4d", "lru") else 3]
    if ALL:
        lengths = [1, 4] if method == "step" else [7, 70]
    else:
        set_block(monkeypatch, name, 2)
    for l in lengths:
        torch._dynamo.reset()
        layer = case.build()
        u, x = signal(2, case.h, l), random_state(layer, 2) if with_state else None
        compiled = torch.compile(layer, fullgraph=True)
        found = gradients(layer, u, x, method, compiled)
        for what, expected in gradients(layer, u, x, method).items():
            assert error(found[what], expected) <= 1e-4, (what, l)


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
    set_block(monkeypatch, "selective", 2)
    case, = named("selective")
    layer = case.build()
    counter = CompileCounter()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=counter)
    with torch.no_grad():
        for l in range(3, 9):
            u = signal(2, case.h, l)
            assert error(compiled(u)[0], layer(u)[0]) <= 1e-5, l
    assert counter.frame_count <= 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYERS)
def test_traced(name):
    """torch.jit.trace, at the traced length. A trace rounds a product of Python numbers and
    a tensor to single precision where l is in it, also if the tensor is in double."""
    case, = named(name)
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
