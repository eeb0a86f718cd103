"""The layers under test, small, each with the function of oracle.py that simulates it. Shared by the test files."""

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import oracle  # noqa: E402

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


@dataclass
class Case:
    """One layer with its options. simulate(p, u, state, rate) -> y, state is the oracle, p the parameters."""
    name: str
    module: str
    cls: str
    options: dict
    simulate: Callable
    d_state: int = 8
    methods: tuple = ("conv", "step")
    has_kernel: bool = True
    has_state: bool = True
    l_max: int = 1000           # longest sequence that the layer accepts
    prepare: Callable = field(default=lambda layer: None)    # moves the parameters somewhere interesting

    def build(self, h=3, seed=0):
        torch.manual_seed(seed)
        layer = getattr(importlib.import_module(self.module), self.cls)(h, self.d_state, **self.options)
        with torch.no_grad():
            self.prepare(layer)
        return layer


def s4d_case(name, **options):
    oracle_options = {k: options[k] for k in ("disc", "real_type") if k in options}
    return Case(name, "s4d", "S4D", options, lambda p, u, x, rate: oracle.s4d(p, u, x, rate, **oracle_options))


CASES = [
    s4d_case("s4d"),
    s4d_case("s4d-bilinear", disc="bilinear", measure="diag-inv"),
    s4d_case("s4d-legs-B", measure="diag-legs", train_B=True, real_type="softplus"),
    s4d_case("s4d-real-relu", measure="diag-real", real_type="relu", real_random=True),
    s4d_case("s4d-quad-none", measure="diag-quad", real_type="none", imag_random=True),
]


def parameters(layer):
    """The parameters as float64 numpy arrays, for the oracle."""
    return {name: p.detach().double().cpu().numpy() for name, p in layer.named_parameters()}


def leaves(state):
    """A state as a list of tensors (Mamba's is a pair)."""
    return [] if state is None else [state] if isinstance(state, torch.Tensor) else list(state)


def like(state, leaves):
    """The reverse of leaves()."""
    return leaves[0] if isinstance(state, torch.Tensor) else type(state)(leaves) if type(state) is tuple else \
        type(state)(*leaves)


def random_state(layer, b, seed=1):
    """A random state of the layer's shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    zero = layer.initial_state(b)
    return like(zero, [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in leaves(zero)])


def to_numpy(state):
    """The state for the oracle."""
    found = [x.detach().cpu().to(torch.complex128 if x.is_complex() else torch.float64).numpy() for x in leaves(state)]
    return None if not found else found[0] if len(found) == 1 else tuple(found)


def signal(b, h, l, seed=2, dtype=torch.float32):
    """A random input (b, h, l)."""
    return torch.randn(b, h, l, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def error(got, expected):
    """Largest difference relative to the largest expected value; inf where got is not finite or misshapen."""
    got, expected = (x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
                     for x in (got, expected))
    if got.shape != expected.shape or not np.isfinite(got).all():
        return np.inf
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)
