"""What is particular to lru.py: the ring and the normalization; and how accurate its scan,
which is also that of s5.py, stays at length."""

import copy
import functools
import math

import numpy as np
import pytest
import torch

import lru as lru_file
import s5 as s5_file
from layers import DOUBLE, error, golden, in_pieces, signal
from lru import LRU
from s5 import S5


def test_initialization_is_the_official_one(monkeypatch):
    g = golden("lru")
    u = torch.from_numpy(np.stack([g["init_u1"], g["init_u2"]]))
    inner = (u - 1e-6) / (1 - 2e-6)             # it avoids 0 and 1
    monkeypatch.setattr(torch, "rand", lambda *size, **_: inner)
    options = {name: float(g[f"init_{name}"]) for name in ("r_min", "r_max", "max_phase")}
    torch.set_default_dtype(torch.float64)
    try:
        layer = LRU(1, 13, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("nu_log", "theta_log", "gamma_log"):
        assert error(layer.get_parameter(name), g[f"init_{name}"]) <= 1e-9


def test_ring_is_uniform_in_area_and_phase():
    torch.manual_seed(0)
    n, r_min, r_max, max_phase = 20000, 0.4, 0.9, 1.5
    layer = LRU(1, n, r_min=r_min, r_max=r_max, max_phase=max_phase)
    A_bar = layer.discretize()[0].detach()
    radius, phase = A_bar.abs(), A_bar.angle()
    assert r_min <= radius.min() and radius.max() <= r_max
    assert 0 < phase.min() and phase.max() < max_phase
    uniform = torch.linspace(0, 1, n)
    area = (radius.square() - r_min ** 2) / (r_max ** 2 - r_min ** 2)
    for sample in (area, phase / max_phase):
        # Kolmogorov-Smirnov
        assert (sample.sort().values - uniform).abs().max() < 2 / math.sqrt(n)
    assert abs(np.corrcoef(area, phase)[0, 1]) < 0.03
    assert error(layer.gamma_log.exp(), torch.sqrt(1 - radius.square())) <= 1e-5


def test_states_have_unit_variance_for_white_noise():
    torch.manual_seed(0)
    layer = LRU(64, 20, r_max=0.95).requires_grad_(False)
    layer.B.div_(layer.B.square().sum((1, 2), keepdim=True).sqrt())     # 1 on average
    _, x = layer(torch.randn(2000, 64, 100), layer.initial_state(2000))
    assert (x.abs().square().mean(0) - 1).abs().max() < 0.15
    assert abs(LRU(64, 2000).B.square().sum((1, 2)).mean() - 1) < 0.01
    assert abs(20 * LRU(64, 20).C.square().mean() - 1) < 0.1


@pytest.mark.parametrize("kind", ["S5", "S5, clipped", "LRU"])
@pytest.mark.parametrize("constant", [True, False])
def test_accuracy_at_length(kind, constant):
    """2^17 steps in float32, slow states, against float64: the blocks keep a rounded A_bar
    from adding up; whole and in pieces."""
    torch.manual_seed(0)
    if kind == "LRU":
        layer = LRU(2, 16, r_min=0.999, r_max=0.9999, max_phase=0.01)
    else:
        layer = S5(2, 16, clip_eigs=kind == "S5, clipped")
    layer.requires_grad_(False)
    if kind == "S5, clipped":
        layer.Lambda_re.fill_(5.0)      # to the least decay, exp(-1e-4 dt) per step
    l = 2 ** 17
    u = torch.ones(1, 2, l) if constant else signal(1, 2, l)
    zero = layer.initial_state(1)
    found = layer(u, zero)
    expected = copy.deepcopy(layer).double()(u.double(), zero, method="conv")
    assert error(found, expected) <= 5e-6
    sizes = [1, 2 ** 16 - 2, 1000, 2 ** 16 - 999]
    assert error(in_pieces(layer, u, zero, sizes), found) <= 1e-5


@pytest.mark.parametrize("module", [lru_file, s5_file])
def test_scan_in_any_order_and_in_blocks_of_any_length(module):
    """(3) is associative: the steps combined from the left, from the right and in blocks."""
    generator = torch.Generator().manual_seed(0)
    a = torch.polar(torch.rand(4, generator=generator, **DOUBLE), torch.arange(4.0).double())
    v = torch.randn(2, 37, 4, dtype=a.dtype, generator=generator)
    x = torch.randn(2, 4, dtype=a.dtype, generator=generator)
    states = module.loop_scan(a, v, x)
    for T in (2, 3, 8, 36, 37, 100):
        assert error(module.linear_scan(a, v, x, T), states) <= 1e-12, T
    steps = [(a, v_k) for v_k in v.unbind(1)]
    left = functools.reduce(module.combine, steps)
    right = functools.reduce(lambda late, early: module.combine(early, late), steps[::-1])
    for decay, end in (left, right):
        assert error(decay * x + end, states[:, -1]) <= 1e-12
    with pytest.raises(ValueError, match="^T=1: pass a chunk length"):
        module.linear_scan(a, v, x, 1)
