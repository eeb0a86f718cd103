"""The layers with the parameters of the official implementations loaded, against the official outputs.

golden/README.md says which repository, commit and class each number comes from.
"""

import numpy as np
import pytest
import torch

from layers import GOLDEN, error


def load(name):
    """The arrays of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file}


def pair(z):
    """(..) complex -> (.., 2) real."""
    return np.stack([z.real, z.imag], -1)


def set_parameters(layer, **values):
    """Replace parameters of the layer by numpy arrays, in float64, shapes checked."""
    layer.double()
    for name, value in values.items():
        parameter = layer.get_parameter(name)
        assert parameter.shape == value.shape, (name, parameter.shape, value.shape)
        parameter.data.copy_(torch.from_numpy(np.array(value, dtype=np.float64)))
    return layer


def check(layer, g, tolerance=1e-10, D=None, methods=("conv", "step")):
    """y, kernels at three rates, the state's contribution and the final state, where the golden file has them."""
    u = torch.from_numpy(g["u"])
    with torch.no_grad():
        for method in methods:
            assert error(layer(u, method=method)[0], g["y"]) <= tolerance
        if "K" in g:
            assert error(layer.kernel(64), g["K"]) <= tolerance
        for key, rate in (("K_rate2", 2.0), ("K_rate05", 0.5)):
            exact = g.get(key + "_exact", g.get(key))
            if exact is not None:
                assert error(layer.kernel(exact.shape[-1], rate=rate), exact) <= tolerance
        if "x0" in g:
            x0 = torch.from_numpy(g["x0"])
            x0 = x0 if layer.initial_state(1).is_complex() else torch.cat([x0.real, x0.imag], -1)
            for method in methods:
                y, last = layer(u, x0, method=method)
                last = last if last.is_complex() else torch.complex(*last.chunk(2, -1))
                assert error(y, g["y_from_x0"]) <= tolerance
                assert error(last, g["xL"]) <= tolerance
                assert error(y - layer.D.reshape(-1, 1) * u, g["y_step"]) <= tolerance


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_s4d(disc):
    from s4d import S4D
    g = load(f"s4d_{disc}")
    layer = set_parameters(S4D(4, 16, disc=disc, train_B=True), log_dt=np.log(g["dt"]), A_imag=g["A"].imag,
                           log_A_real=np.log(-g["A"].real), B=pair(g["B"]), C=pair(g["C"]), D=g["D"])
    check(layer, g)
    A_bar, B_bar, C = layer.discretize()
    assert error(A_bar, g["dA"]) <= 1e-12 and error(B_bar, g["dB"]) <= 1e-12 and error(C, 2 * g["C"]) <= 1e-12


def test_s4d_minimal():
    from s4d import S4D
    g = load("s4d_zoh")
    layer = set_parameters(S4D(4, 16), log_dt=np.log(g["min_dt"]), A_imag=g["min_A"].imag,
                           log_A_real=np.log(-g["min_A"].real), C=pair(g["min_C"]), D=g["min_D"])
    check(layer, {"u": g["u"], "y": g["min_y"], "K": g["min_K"]})
