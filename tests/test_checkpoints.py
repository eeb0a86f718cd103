"""Parameters of the official implementations loaded into the layers, by the snippets that
README.md shows."""

import re

import numpy as np
import pytest
import torch

from layers import ROOT, error, golden, pair
from oracle import conjugate_pairs
from test_golden import mamba_parameters


def snippet(cls):
    """The part of the README block on official parameters that loads those of a class."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    block, = [block for block in blocks if "official" in block]
    part, = [part for part in block.split("\n\n") if re.search(rf"import {cls}\b", part)]
    return part


def s4d_state_dict(g):
    official = {"kernel.log_dt": np.log(g["min_dt"]), "kernel.C": pair(g["min_C"]),
                "kernel.log_A_real": np.log(-g["min_A"].real),
                "kernel.A_imag": g["min_A"].imag, "D": g["min_D"],
                "output_linear.0.weight": np.zeros((8, 4, 1)),
                "output_linear.0.bias": np.zeros(8)}
    official = {name: torch.from_numpy(value) for name, value in official.items()}
    return official, g["u"], g["min_y"]


def s4_state_dict(g):
    """Of mode nplr: C is C (1 - A_bar^l), which the golden file does not have."""
    h, half = g["w"].shape
    l = g["K"].shape[-1]
    C = conjugate_pairs(g["C_true"])
    C = C - np.einsum("hi,hij->hj", C, np.linalg.matrix_power(g["dA"], l))
    official = s4_names(g | {"A": g["w"], "C": C[:, :half]}) | {"kernel.P": pair(g["P"])}
    official["kernel.l_kernel"] = np.array(l)
    return {name: torch.from_numpy(value) for name, value in official.items()}, g["u"], g["y"]


def s4_diagonal_state_dict(g):
    official = s4_names(g) | {"kernel.l_kernel": np.array(0)}
    return {name: torch.from_numpy(value) for name, value in official.items()}, g["u"], g["y"]


def s4_names(g):
    """What both have, under the official names."""
    return {"kernel.inv_dt": np.log(g["dt"])[:, None], "kernel.A_imag": g["A"].imag,
            "kernel.A_real": np.log(-g["A"].real), "kernel.B": pair(g["B"]),
            "kernel.C": pair(g["C"])[None], "D": g["D"][None]}


def s5_parameters(g):
    names = [name for name in ("C", "C1", "C2") if f"{name}_tilde" in g]
    C = {name: pair(g[f"{name}_tilde"]) for name in names}
    return C | {"Lambda_re": g["Lambda"].real, "Lambda_im": g["Lambda"].imag, "D": g["D"],
                "B": pair(g["B_tilde"]), "log_step": g["log_step"][:, None]}, g["u"], g["y"]


def lru_parameters(g):
    official = {name: g[name] for name in ("nu_log", "theta_log", "gamma_log", "D")}
    for name in ("B", "C"):
        official |= {f"{name}_re": g[name].real, f"{name}_im": g[name].imag}
    return official, g["u"], g["y"]


def mamba_state_dict(g):
    block, _ = mamba_parameters(g)
    official = {f"backbone.layers.0.mixer.{name}": torch.from_numpy(value)
                for name, value in block.items()}
    official |= {"backbone.embedding.weight": torch.zeros(3, 4),
                 "backbone.layers.0.norm.weight": torch.ones(4)}
    return official, g["mm_block_in"], g["mm_block_out"]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cls, file, parameters", [
    ("S4D", "s4d_zoh", s4d_state_dict), ("S4", "s4_nplr_legs", s4_state_dict),
    ("S4", "s4d_zoh", s4_diagonal_state_dict), ("S5", "s5_zoh", s5_parameters),
    ("S5", "s5_bidirectional", s5_parameters), ("LRU", "lru", lru_parameters),
    ("Mamba", "selective_scan", mamba_state_dict)])
def test_official_parameters(cls, file, parameters, double):
    official, u, y = parameters(golden(file))
    names = {"torch": torch, "np": np, "official": official}
    exec(snippet(cls), names)
    assert len(snippet(cls).splitlines()) <= 11
    tolerance = 1e-10 if "nplr" in file else 1e-12          # as in test_golden.py
    assert error(names["layer"](torch.from_numpy(u))[0], y) <= tolerance
