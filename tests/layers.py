"""The layers under test, small, each with the function of oracle.py that simulates it, and
what several test files share."""

import importlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
import oracle  # noqa: E402

torch.set_num_threads(1)        # the tests are small: threads would only wait

DOUBLE = {"dtype": torch.float64}
CONV = ("conv", "step")
SCAN = ("scan", "step")
ALL = ("scan", "conv", "step")


@dataclass
class Case:
    """One layer with its options. simulate(p, u, state, rate) -> y, state is the oracle."""
    name: str
    layer: str                          # file.class
    simulate: Callable
    options: dict
    methods: tuple = CONV
    h: int = 3
    d_state: int = 8
    has_kernel: bool = True
    has_state: bool = True
    growth: float = None                # of dss: the largest Re Lambda

    def build(self, seed=0):
        torch.manual_seed(seed)
        module, cls = self.layer.split(".")
        constructor = getattr(importlib.import_module(module), cls)
        layer = constructor(self.h, self.d_state, **self.options)
        if self.growth is not None:
            layer.Lambda_re.data = torch.linspace(-1, self.growth, self.d_state)
        return layer

    def oracle(self, layer, u, state=None, rate=1.0):
        """y and the last state by the oracle, numpy, with the parameters of the layer."""
        return self.simulate(parameters(layer), to_numpy(u), to_numpy(state), rate)

    def oracle_kernel(self, layer, l, rate=1.0):
        """The impulse response by the oracle, without D: (m h, l)."""
        impulse = torch.zeros(1, layer.D.shape[-1], l)
        impulse[..., 0] = 1
        y, _ = self.oracle(layer, impulse, None, rate)
        y[0, :, 0] -= to_numpy(layer.D).flatten()
        return y[0]


def chosen(options, *names):
    """Those options that the oracle has too."""
    return {name: options[name] for name in names if name in options}


def s4d_case(name, **options):
    return Case(name, "s4d.S4D", partial(oracle.s4d, **chosen(options, "disc")), options)


def s4_case(name, h=3, **options):
    known = chosen(options, "mode", "disc", "real_type", "l_max")
    alone = not {"gate", "bottleneck"} & set(options)
    return Case(name, "s4.S4", partial(oracle.s4, **known), options, h=h, has_kernel=alone)


def lssl_case(name, **options):
    simulate = partial(oracle.lssl, **chosen(options, "alpha"))
    return Case(name, "lssl.LSSL", simulate, options)


def dss_case(name, growth=None, **options):
    simulate = partial(oracle.dss, **chosen(options, "version", "l_max"))
    return Case(name, "dss.DSS", simulate, options, growth=growth)


def gss_case(name, **options):
    return Case(name, "gss.GSS", oracle.gss, options, h=4, has_kernel=False)


def s5_case(name, **options):
    known = ("disc", "conj_sym", "clip_eigs", "bidirectional", "step_rescale")
    simulate = partial(oracle.s5, **chosen(options, *known))
    two_ways = "bidirectional" in options
    return Case(name, "s5.S5", simulate, options, ("scan", "conv") if two_ways else ALL,
                has_kernel=False, has_state=not two_ways)


def lru_case(name, **options):
    return Case(name, "lru.LRU", oracle.lru, options, ALL, d_state=7, has_kernel=False)


def selective_case(name, cls="SelectiveSSM", simulate=oracle.selective_ssm, **options):
    return Case(name, f"selective_scan.{cls}", simulate, options, SCAN, has_kernel=False)


CASES = [
    s4d_case("s4d"),
    s4d_case("s4d-bilinear", disc="bilinear", measure="diag-inv"),
    s4d_case("s4d-legs", measure="diag-legs"),
    s4d_case("s4d-real", measure="diag-real", real_random=True),
    s4d_case("s4d-quad", measure="diag-quad", imag_random=True),
    dss_case("dss", l_max=1000),
    dss_case("dss-growing", l_max=1000, growth=0.4),
    dss_case("dss-exp", version="exp", l_max=10),
    gss_case("gss"),
    gss_case("gss-plain", gate=False, bottleneck=1, measure="diag-lin", train_B=True,
             train_dt=True, dt_min=1e-3, dt_max=0.1),
    s4_case("s4-gss", mode="diag", measure="diag-rand", gate=4, bottleneck=2, dt_min=1.0,
            dt_max=1.0, h=4),
    s4_case("s4-bottleneck", bottleneck=2, channels=2, h=4),
    s5_case("s5"),
    s5_case("s5-bilinear-blocks", disc="bilinear", blocks=2, clip_eigs=True,
            step_rescale=0.5),
    s5_case("s5-no-pairs", conj_sym=False, C_init="complex_normal", clip_eigs=True),
    s5_case("s5-bidirectional", bidirectional=True, C_init="trunc_standard_normal"),
    lru_case("lru"),
    lru_case("lru-ring", r_min=0.9, r_max=0.999, max_phase=0.3),
    selective_case("selective"),
    selective_case("mamba", "Mamba", oracle.mamba, dt_rank=2),
    lssl_case("lssl"),
    lssl_case("lssl-legt-euler", measure="legt", alpha=1.0, channels=2, train_A="shared",
              train_dt=True),
    lssl_case("lssl-each", alpha=0.7, train_A="each", train_dt=True),
    s4_case("s4"),
    s4_case("s4-legt-channels", measure="legt", rank=3, channels=2),
    s4_case("s4-fout-relu", measure="fout", real_type="relu"),
    s4_case("s4-hippo-shared", measure="hippo", n_ssm=2, rank=2, h=4),
    s4_case("s4-none", real_type="none"),
    s4_case("s4-diag-inv", mode="diag", measure="diag-inv", channels=2, n_ssm=1),
    s4_case("s4-diag-bilinear", mode="diag", measure="diag", disc="bilinear", h=4),
    s4_case("s4-diag-dss", mode="diag", disc="dss", measure="diag-legs", l_max=1000,
            real_type="relu"),
]
STATEFUL = [case for case in CASES if case.has_state]


def named(*names):
    """The cases of these names."""
    return [case for case in CASES if case.name in names]


def each(cases):
    """A test with each of these cases."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def parameters(layer):
    """The parameters as float64 numpy arrays, for the oracle."""
    return {name: to_numpy(p) for name, p in layer.named_parameters()}


def to_numpy(x):
    """A tensor in double precision, a pair of them, or None, for the oracle."""
    if x is None:
        return None
    if isinstance(x, tuple):
        return tuple(to_numpy(part) for part in x)
    x = x.detach().cpu().resolve_conj()
    return x.to(torch.promote_types(x.dtype, torch.float64)).numpy()


def leaves(state):
    """A state as a list of tensors (Mamba's is a pair)."""
    if state is None:
        return []
    return [state] if isinstance(state, torch.Tensor) else list(state)


def like(state, leaves):
    """The reverse of leaves()."""
    return leaves[0] if isinstance(state, torch.Tensor) else tuple(leaves)


def random_state(layer, b, seed=1):
    """A random state of the layer's shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    zero = layer.initial_state(b)
    draws = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in leaves(zero)]
    return like(zero, draws)


def signal(b, h, l, seed=2, dtype=torch.float32):
    """A random input (b, h, l)."""
    return torch.randn(b, h, l, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def in_pieces(layer, u, state, sizes, **options):
    """Output and last state of a sequence that is read piece by piece."""
    outputs = []
    for piece in u.split(sizes, -1):
        y, state = layer(piece, state, **options)
        outputs.append(y)
    return torch.cat(outputs, -1), state


def in_steps(layer, u, state, rate=1.0):
    """The same by layer.step, from one discretization."""
    discrete = layer.discretize(rate)
    outputs = []
    for u_k in u.unbind(-1):
        y_k, state = layer.step(u_k, state, discrete=discrete)
        outputs.append(y_k)
    return torch.stack(outputs, -1), state


def gradients(layer, u, x, method, compiled=None):
    """Output and last state of the layer, or of its compiled form, and the gradients of a
    random linear function of both: by input, state and parameters."""
    call = layer if compiled is None else compiled
    u = u.clone().requires_grad_()
    x = None if x is None else like(x, [t.clone().requires_grad_() for t in leaves(x)])
    y, last = call(u, x, method=method, rate=1.7)
    loss = (y * signal(*y.shape, seed=5, dtype=y.dtype)).sum()
    for t in leaves(last):
        t = torch.view_as_real(t) if t.is_complex() else t
        generator = torch.Generator().manual_seed(6)
        loss = loss + (t * torch.randn(t.shape, dtype=t.dtype, generator=generator)).sum()
    inputs = {"u": u} | {f"x{i}": t for i, t in enumerate(leaves(x))} | \
        {name: p for name, p in layer.named_parameters() if p.requires_grad}
    results = {"y": y} | {f"last {i}": t for i, t in enumerate(leaves(last))}
    return results | dict(zip(inputs, torch.autograd.grad(loss, inputs.values())))


def golden(name):
    """The arrays of a golden file: official outputs, see golden/README.md."""
    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        return {key: file[key] for key in file}


def pair(z):
    """(..) complex -> (.., 2) real."""
    return np.stack([z.real, z.imag], -1)


def error(got, expected):
    """Largest difference relative to the largest expected value; inf where got is not
    finite or misshapen. Of the pairs that are states of Mamba, the larger one."""
    if isinstance(expected, tuple):
        return max(error(a, b) for a, b in zip(got, expected, strict=True))
    got, expected = [x.detach().cpu().resolve_conj().numpy()
                     if isinstance(x, torch.Tensor) else np.asarray(x)
                     for x in (got, expected)]
    if got.shape != expected.shape or not np.isfinite(got).all():
        return np.inf
    largest = max(np.abs(expected).max(initial=0), 1e-30)
    return np.abs(got - expected).max(initial=0) / largest
