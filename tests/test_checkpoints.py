"""Parameters of the official implementations loaded into the layers, by the blocks of
docs/checkpoints.md as they stand there. golden/README.md says where the files come from."""

import re

import numpy as np
import pytest
import torch

from layers import ROOT, error, golden, pair

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


def block(word):
    """The block of the page that has this word."""
    found, = [code for code in BLOCKS if word in code]
    return found


def checkpoint(name):
    """A real state_dict, an input and the official output."""
    g = golden(f"checkpoint_{name}")
    official = {key[2:]: value for key, value in g.items() if key.startswith("p:")}
    return official, g["u"], g["y"]


def s4_of_measure(name):
    """legt and fout, from the parameters that the official module had: C_tilde is its C."""
    g = golden(f"s4_nplr_{name}")
    official = {
        "D": g["D"][None], "kernel.inv_dt": np.log(g["dt"])[:, None],
        "kernel.A_real": np.log(-g["w"].real), "kernel.A_imag": -g["w"].imag,
        "kernel.B": pair(g["B"])[None], "kernel.C": pair(g["C_tilde"])[None],
        "kernel.P": pair(g["P"]), "kernel.l_kernel": np.array(g["K"].shape[-1])}
    return official, g["u"].astype(np.float32), g["y"]


def minimal_s4d(name):
    g = golden(name)
    official = {"kernel.log_dt": np.log(g["min_dt"]), "kernel.C": pair(g["min_C"]),
                "kernel.log_A_real": np.log(-g["min_A"].real),
                "kernel.A_imag": g["min_A"].imag, "D": g["min_D"],
                "output_linear.0.weight": np.zeros((8, 4, 1)),
                "output_linear.0.bias": np.zeros(8)}
    return official, g["u"].astype(np.float32), g["min_y"]


@pytest.mark.parametrize("cls, source, name", [
    ("S4", checkpoint, "s4_nplr"), ("S4", checkpoint, "s4_nplr_one"),
    ("S4", checkpoint, "s4_diag"), ("S4", s4_of_measure, "legs"),
    ("S4", s4_of_measure, "legt"), ("S4", s4_of_measure, "fout"),
    ("S4D", minimal_s4d, "s4d_zoh"), ("S5", checkpoint, "s5"),
    ("S5", checkpoint, "s5_bidirectional"), ("LRU", checkpoint, "lru"),
    ("Mamba", checkpoint, "mamba")])
def test_official_parameters(cls, source, name):
    official, u, y = source(name)
    if cls not in ("S5", "LRU"):                            # the others are of JAX
        official = {key: torch.from_numpy(value) for key, value in official.items()}
    if cls == "Mamba":                                      # of a whole network
        names = {}
        exec(block("def of_layer"), names)
        other = {"backbone.embedding.weight": torch.zeros(3, 4)}
        official = names["of_layer"](official | other)
    names = {"official": official}
    exec(block(f"layer = {cls}("), names)
    with torch.no_grad():
        difference = error(names["layer"](torch.from_numpy(u))[0], y)
    print(f"{cls}, {name}: {difference:.1e}")
    assert difference <= 5e-6


def test_every_block_of_the_page_is_run():
    classes = ("S4", "S4D", "S5", "LRU", "Mamba")
    assert set(BLOCKS) == {block(f"layer = {cls}(") for cls in classes} | {block("def of")}
