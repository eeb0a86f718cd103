"""Parameters of the official implementations loaded into the layers, by the snippets that README.md shows."""

import numpy as np
import pytest
import torch

from layers import error
from test_golden import load, pair

SNIPPETS = {
    "S4D": """\
from s4d import S4D
# official: state_dict() of an S4D of state-spaces/s4, models/s4/s4d.py; its output_linear is not in the SSM
layer = S4D(d_model=4, d_state=16)
layer.load_state_dict({name.removeprefix("kernel."): value for name, value in official.items()
                       if not name.startswith("output_linear")})
""",
    "S5": """\
from s5 import S5
# official: the Flax parameters of one S5SSM of lindermanlab/S5, a dict of JAX arrays
p = {name: torch.tensor(np.asarray(value)) for name, value in official.items()}
if "C1" in p:
    p["C"] = torch.cat([p.pop("C1"), p.pop("C2")], dim=1)
layer = S5(d_model=4, d_state=16, bidirectional="C1" in official)
layer.load_state_dict(p | {"log_step": p["log_step"][:, 0]})
""",
    "LRU": """\
from lru import LRU
# official: the Flax parameters of one LRU of NicolasZucchet/minimal-LRU, a dict of JAX arrays
p = {name: torch.tensor(np.asarray(value)) for name, value in official.items()}
for name in ("B", "C"):
    p[name] = torch.stack([p.pop(name + "_re"), p.pop(name + "_im")], dim=-1)
layer = LRU(d_model=4, d_state=16)
layer.load_state_dict(p)
""",
    "Mamba": """\
from selective_scan import Mamba
# official: the state_dict of a model of state-spaces/mamba
prefix = "backbone.layers.0.mixer."
layer = Mamba(d_model=4, d_state=8, dt_rank=2)
layer.load_state_dict({name.removeprefix(prefix): value for name, value in official.items()
                       if name.startswith(prefix)})
""",
}


def s4d_state_dict(g):
    official = {"kernel.log_dt": np.log(g["min_dt"]), "kernel.log_A_real": np.log(-g["min_A"].real),
                "kernel.A_imag": g["min_A"].imag, "kernel.C": pair(g["min_C"]), "D": g["min_D"],
                "output_linear.0.weight": np.zeros((8, 4, 1)), "output_linear.0.bias": np.zeros(8)}
    return {name: torch.from_numpy(value) for name, value in official.items()}, g["u"], g["min_y"]


def s5_parameters(g):
    C = {name: pair(g[f"{name}_tilde"]) for name in ("C", "C1", "C2") if f"{name}_tilde" in g}
    return C | {"Lambda_re": g["Lambda"].real, "Lambda_im": g["Lambda"].imag, "B": pair(g["B_tilde"]),
                "D": g["D"], "log_step": g["log_step"][:, None]}, g["u"], g["y"]


def lru_parameters(g):
    halves = {f"{name}_{part}": getattr(g[name], attribute) for name in ("B", "C")
              for part, attribute in (("re", "real"), ("im", "imag"))}
    return halves | {name: g[name] for name in ("nu_log", "theta_log", "gamma_log", "D")}, g["u"], g["y"]


def mamba_state_dict(g):
    block = {"in_proj.weight": g["mm_in_proj_W"], "out_proj.weight": g["mm_out_proj_W"],
             "conv1d.weight": g["mm_conv_W"][:, None], "conv1d.bias": g["mm_conv_b"],
             "x_proj.weight": g["mm_x_proj_W"], "dt_proj.weight": g["mm_dt_proj_W"],
             "dt_proj.bias": g["mm_dt_proj_b"], "A_log": g["mm_A_log"], "D": g["mm_D"]}
    official = {f"backbone.layers.0.mixer.{name}": torch.from_numpy(value) for name, value in block.items()}
    other = {"backbone.embedding.weight": torch.zeros(3, 4), "backbone.layers.0.norm.weight": torch.ones(4)}
    return official | other, g["mm_block_in"], g["mm_block_out"]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cls, file, parameters", [
    ("S4D", "s4d_zoh", s4d_state_dict), ("S5", "s5_zoh", s5_parameters), ("LRU", "lru", lru_parameters),
    ("S5", "s5_bidirectional", s5_parameters), ("Mamba", "selective_scan", mamba_state_dict)])
def test_official_parameters(cls, file, parameters, double):
    official, u, y = parameters(load(file))
    names = {"torch": torch, "np": np, "official": official}
    exec(SNIPPETS[cls], names)
    assert len(SNIPPETS[cls].splitlines()) <= 10
    assert error(names["layer"](torch.from_numpy(u))[0], y) <= 1e-12
