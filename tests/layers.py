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

torch.set_num_threads(1)        # the tests are small: threads would only wait for each other

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
    h: int = 3
    d_state: int = 8
    methods: tuple = ("conv", "step")
    has_kernel: bool = True
    has_state: bool = True
    l_max: int = 1000           # longest sequence that the layer accepts
    prepare: Callable = field(default=lambda layer: None)    # moves the parameters somewhere interesting

    def build(self, seed=0):
        torch.manual_seed(seed)
        layer = getattr(importlib.import_module(self.module), self.cls)(self.h, self.d_state, **self.options)
        with torch.no_grad():
            self.prepare(layer)
        return layer


def s4d_case(name, **options):
    disc = options.get("disc", "zoh")
    return Case(name, "s4d", "S4D", options, lambda p, u, x, rate: oracle.s4d(p, u, x, rate, disc=disc))


def s4_case(name, **options):
    if options.get("mode") == "diag":
        arguments = {"disc": options.get("disc", "zoh"), "l_max": options.get("l_max"),
                     "real_type": options.get("real_type", "exp")}
        simulate = oracle.s4_diag
    else:
        arguments = {"real_type": options.get("real_type", "exp")}
        simulate = oracle.s4_nplr

    def ssm(p, u, x, rate):
        return simulate(p, u, x, rate, **arguments)

    def gated(p, u, x, rate):
        return oracle.gss(u, lambda v: ssm(p, v, x, rate), *projections(p))

    h = options.pop("h", 3)
    return Case(name, "s4", "S4", options, gated if {"gate", "bottleneck"} & set(options) else ssm, h=h, has_kernel=not {"gate", "bottleneck"} & set(options))


def lssl_case(name, **options):
    return Case(name, "lssl", "LSSL", options, lambda p, u, x, rate: oracle.lssl(p, u, x, rate, options.get("alpha", 0.5)))


def dss_case(name, prepare=lambda layer: None, **options):
    version, l_max = options.get("version", "softmax"), options.get("l_max")
    return Case(name, "dss", "DSS", options, lambda p, u, x, rate: oracle.dss(p, u, x, rate, version, l_max),
                prepare=prepare)


def projections(p):
    """The four linear maps of a gated block for oracle.gss, None where the block has none."""
    return [(p[f"{name}.weight"], p[f"{name}.bias"]) if f"{name}.weight" in p else None
            for name in ("input_gate", "input_linear", "output_gate", "output_linear")]


def gss_case(name, **options):
    def simulate(p, u, x, rate):     # DSS without conjugates is S4D with pairs, if C counts half
        pairs = p | {"C": p["C"] / 2}
        return oracle.gss(u, lambda v: oracle.s4d(pairs, v, x, rate), *projections(p))

    return Case(name, "gss", "GSS", options, simulate, h=4, has_kernel=False)


def s5_case(name, **options):
    arguments = {k: options[k] for k in ("disc", "conj_sym", "clip_eigs", "bidirectional") if k in options}
    rescale = options.get("step_rescale", 1.0)
    return Case(name, "s5", "S5", options, lambda p, u, x, rate: oracle.s5(p, u, x, rate * rescale, **arguments),
                methods=("scan", "conv", "step"), has_kernel=False, has_state="bidirectional" not in options)


CASES = [
    s4d_case("s4d"),
    s4d_case("s4d-bilinear", disc="bilinear", measure="diag-inv"),
    s4d_case("s4d-legs", measure="diag-legs"),
    s4d_case("s4d-real", measure="diag-real", real_random=True),
    s4d_case("s4d-quad", measure="diag-quad", imag_random=True),
    dss_case("dss", l_max=1000),
    dss_case("dss-growing", l_max=1000, prepare=lambda layer: layer.Lambda_re.copy_(torch.linspace(-1, 0.4, 8))),
    dss_case("dss-exp", version="exp"),
    gss_case("gss"),
    gss_case("gss-plain", gate=False, bottleneck=1, measure="diag-lin", train_B=True, train_dt=True, dt_min=1e-3,
             dt_max=0.1),
    s4_case("s4-gss", mode="diag", measure="diag-rand", gate=4, bottleneck=2, dt_min=1.0, dt_max=1.0, h=4),
    s4_case("s4-bottleneck", bottleneck=2, channels=2, h=4),
    s5_case("s5"),
    s5_case("s5-bilinear-blocks", disc="bilinear", blocks=2, clip_eigs=True, step_rescale=0.5),
    s5_case("s5-no-pairs", conj_sym=False, C_init="complex_normal"),
    s5_case("s5-bidirectional", bidirectional=True, C_init="trunc_standard_normal"),
    Case("lru", "lru", "LRU", {}, oracle.lru, methods=("scan", "conv", "step"), has_kernel=False),
    Case("lru-ring", "lru", "LRU", {"r_min": 0.9, "r_max": 0.999, "max_phase": 0.3}, oracle.lru, d_state=7,
         methods=("scan", "conv", "step"), has_kernel=False),
    Case("selective", "selective_scan", "SelectiveSSM", {}, oracle.selective_ssm, methods=("scan", "step"),
         has_kernel=False),
    Case("mamba", "selective_scan", "Mamba", {"dt_rank": 2}, oracle.mamba, methods=("scan", "step"), has_kernel=False),
    lssl_case("lssl"),
    lssl_case("lssl-legt-euler", measure="legt", alpha=1.0, channels=2, train_A="shared", train_dt=True),
    lssl_case("lssl-each", alpha=0.7, train_A="each", train_dt=True),
    s4_case("s4"),
    s4_case("s4-legt-channels", measure="legt", channels=2),
    s4_case("s4-fout-relu", measure="fout", real_type="relu"),
    s4_case("s4-hippo-shared", measure="hippo", n_ssm=2, rank=2, h=4),
    s4_case("s4-diag-inv", mode="diag", measure="diag-inv", channels=2, n_ssm=1),
    s4_case("s4-diag-bilinear", mode="diag", measure="diag", disc="bilinear", h=4),
    s4_case("s4-diag-dss", mode="diag", disc="dss", measure="diag-legs", l_max=1000),
]


def parameters(layer):
    """The parameters as float64 numpy arrays, for the oracle."""
    return {name: p.detach().double().cpu().numpy() for name, p in layer.named_parameters()}


def leaves(state):
    """A state as a list of tensors (Mamba's is a pair)."""
    return [] if state is None else [state] if isinstance(state, torch.Tensor) else list(state)


def like(state, leaves):
    """The reverse of leaves()."""
    return leaves[0] if isinstance(state, torch.Tensor) else tuple(leaves)


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
    got, expected = (x.detach().cpu().resolve_conj().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
                     for x in (got, expected))
    if got.shape != expected.shape or not np.isfinite(got).all():
        return np.inf
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)
