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
            assert error(layer.kernel(g["K"].shape[-1]), g["K"]) <= tolerance
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
    h, half = g["A"].shape
    # with B = 1, the state is divided by B, and C multiplied by it
    layer = set_parameters(S4D(h, 2 * half, disc=disc), log_dt=np.log(g["dt"]), A_imag=g["A"].imag,
                           log_A_real=np.log(-g["A"].real), C=pair(g["B"] * g["C"]), D=g["D"])
    check(layer, g | {"x0": g["x0"] / g["B"], "xL": g["xL"] / g["B"]})
    A_bar, B_bar, C = layer.discretize()
    assert error(A_bar, g["dA"]) <= 1e-12 and error(B_bar, g["dB"] / g["B"]) <= 1e-12
    assert error(C, 2 * g["B"] * g["C"]) <= 1e-12


def test_s4d_minimal():
    from s4d import S4D
    g = load("s4d_zoh")
    h, half = g["min_A"].shape
    layer = set_parameters(S4D(h, 2 * half), log_dt=np.log(g["min_dt"]), A_imag=g["min_A"].imag,
                           log_A_real=np.log(-g["min_A"].real), C=pair(g["min_C"]), D=g["min_D"])
    check(layer, {"u": g["u"], "y": g["min_y"], "K": g["min_K"]})


@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_s4_nplr(measure):
    from s4 import S4
    g = load(f"s4_nplr_{measure}")
    h, half = g["w"].shape
    layer = set_parameters(S4(h, 2 * half, measure=measure), log_dt=np.log(g["dt"]), A_imag=g["w"].imag,
                           log_A_real=np.log(-g["w"].real), P=pair(g["P"]), B=pair(g["B"]),
                           C=pair(g["C_true"])[None], D=g["D"][None])
    check(layer, g)
    identity = np.eye(half)
    both = np.block([[identity, 1j * identity], [identity, -1j * identity]])     # [Re x; Im x] -> [x; conj x]
    A_bar, B_bar, C = layer.discretize()
    assert error(both @ A_bar.detach().numpy(), g["dA"] @ both) <= 1e-12
    assert error(B_bar.detach().numpy() @ both.T, g["dB"]) <= 1e-12 and error(C[0], g["dC"] @ both) <= 1e-10


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_s4_diagonal(disc):
    from s4 import S4
    g = load(f"s4d_{disc}")
    h, half = g["A"].shape
    layer = set_parameters(S4(h, 2 * half, mode="diag", disc=disc), log_dt=np.log(g["dt"]), A_imag=g["A"].imag,
                           log_A_real=np.log(-g["A"].real), B=pair(g["B"]), C=pair(g["C"])[None],
                           D=g["D"][None])
    check(layer, g)


@pytest.mark.parametrize("name", ["dss_softmax", "dss_exp"])
def test_disc_dss(name):
    """Both signs of Re A for DSS, feature by feature; negative ones for S4."""
    from dss import DSS
    from s4 import S4
    g = {key.removeprefix("s4diag_"): value for key, value in load(name).items() if key.startswith("s4diag_")}
    (h, half), l = g["A"].shape, g["K"].shape[-1]
    for i in range(h):
        layer = set_parameters(DSS(1, half, l_max=l), log_dt=np.log(g["dt"][i:i + 1]), Lambda_re=g["A"][i].real,
                               Lambda_im=g["A"][i].imag, W=pair(g["B"] * g["C"])[i:i + 1])
        assert error(layer.kernel(g["K"].shape[-1]), g["K"][i:i + 1]) <= 1e-10
    if name == "dss_exp":
        layer = S4(h, 2 * half, mode="diag", disc="dss", l_max=l)
        set_parameters(layer, log_dt=np.log(g["dt"]), log_A_real=np.log(-g["A"].real), A_imag=g["A"].imag,
                       B=pair(g["B"]), C=pair(g["C"])[None])
        assert error(layer.kernel(g["K"].shape[-1]), g["K"]) <= 1e-10


@pytest.mark.parametrize("key", ["legs", "legt", "hazy_legt"])
def test_lssl(key):
    from lssl import LSSL
    g = {name.removeprefix(f"{key}_"): value for name, value in load("lssl").items()}
    values = {"log_dt": np.log(g["dt"]), "A": g["A"], "B": g["B"], "C": g["C"][None], "D": g["D"][None]}
    h, n = g["C"].shape
    check(set_parameters(LSSL(h, n), **values), {name: g[name] for name in ("u", "y", "K")})
    for alpha, suffix in ((0.0, "_alpha0"), (0.5, ""), (1.0, "_alpha1")):
        if "dA" + suffix in g:
            A_bar, B_bar, _ = set_parameters(LSSL(h, n, alpha=alpha), **values).discretize()
            assert error(A_bar, g["dA" + suffix]) <= 1e-12 and error(B_bar, g["dB" + suffix]) <= 1e-12


def test_dss_softmax_function():
    """A complex dt does what the two columns of the official log_dt do: their numbers, 1e-7 included."""
    from dss import softmax_weights, two_digits, vandermonde
    g = load("dss_softmax")
    real, imag = np.exp(g["log_dt"]).T[..., None]
    z = torch.from_numpy(real * g["Lambda"].real + 1j * imag * g["Lambda"].imag)
    Lambda, W = torch.from_numpy(g["Lambda"]), torch.from_numpy(g["W"])
    for expected in (g["K"], g["K_half"]):
        l = expected.shape[-1]
        C, share = softmax_weights(W, Lambda, z, l)
        K = vandermonde(C * share * torch.expm1(z) / Lambda, two_digits(torch.exp(z), l, z.dtype), l)
        assert error(K, expected) <= 1e-10


@pytest.mark.parametrize("version", ["softmax", "exp"])
def test_dss(version):
    """Each feature as a layer with Lambda = z / dt of its own, and W to match.

    For softmax 1 / dt is so large that the layer adds nothing to |x|^2, x = Lambda (exp(l z) - 1), where
    the official code adds 1e-7: the tolerance is what that makes.
    """
    from dss import DSS
    g = load(f"dss_{version}")
    real, imag = np.exp(g["log_dt"]).T[..., None]
    z = real * g["Lambda"].real + 1j * imag * g["Lambda"].imag
    dt = 1.0 if version == "exp" else 1e-5
    (h, n), l = z.shape, g["u"].shape[-1]
    x = g["Lambda"] * (np.exp(np.where(z.real > 0, -l, l) * z) - 1)
    tolerance = 1e-10 if version == "exp" else (1e-7 / np.abs(x) ** 2).max()
    for i in range(h):
        Lambda = z[i] / dt
        layer = set_parameters(DSS(1, n, version=version, l_max=l), log_dt=np.log([dt]), D=g["D"][i:i + 1],
                               Lambda_re=np.log(-Lambda.real) if version == "exp" else Lambda.real,
                               Lambda_im=Lambda.imag, W=pair(g["W"][i:i + 1] * Lambda / g["Lambda"]))
        check(layer, {"u": g["u"][:, i:i + 1], "y": g["y"][:, i:i + 1], "K": g["K"][i:i + 1]}, tolerance)


@pytest.mark.parametrize("suffix", ["", "_clip", "_rescale2", "_clip_rescale2"])
@pytest.mark.parametrize("name", ["zoh", "bilinear", "bidirectional"])
def test_s5(name, suffix):
    from s5 import S5
    g, two_ways = load(f"s5_{name}"), name == "bidirectional"
    options = dict(disc="zoh" if two_ways else name, clip_eigs="clip" in suffix,
                   step_rescale=2.0 if "rescale2" in suffix else 1.0)
    values = dict(Lambda_re=g["Lambda"].real, Lambda_im=g["Lambda"].imag, B=pair(g["B_tilde"]), D=g["D"],
                  log_step=g["log_step"])
    C = [g["C1_tilde"], g["C2_tilde"]] if two_ways else [g["C_tilde"]]
    p, h = g["B_tilde"].shape
    layer, forward = S5(h, 2 * p, bidirectional=two_ways, **options), S5(h, 2 * p, **options)
    set_parameters(layer, C=pair(np.concatenate(C, 1)), **values)
    set_parameters(forward, C=pair(C[0]), **values)
    u = torch.from_numpy(g["u"])
    for method in ("scan", "conv", "step"):
        assert error(layer(u, method=method)[0], g["y" + suffix]) <= 1e-10
        assert error(forward(u, forward.initial_state(len(u)), method=method)[1], g["xL" + suffix]) <= 1e-10
        if two_ways:
            first = forward(u.flip(-1), forward.initial_state(len(u)), method=method)[1]
            assert error(first, g["xrev0" + suffix]) <= 1e-10
    A_bar, B_bar, C_bar = forward.discretize()
    assert error(A_bar, g["Lambda_bar" + suffix]) <= 1e-12 and error(B_bar, g["B_bar" + suffix]) <= 1e-12
    assert error(C_bar, 2 * C[0]) <= 1e-15


def test_lru():
    from lru import LRU
    g = load("lru")
    logs = {name: g[name] for name in ("nu_log", "theta_log", "gamma_log")}
    n, h = g["B"].shape
    layer = set_parameters(LRU(h, n), B=pair(g["B"]), C=pair(g["C"]), D=g["D"], **logs)
    for method in ("scan", "conv", "step"):
        y, last = layer(torch.from_numpy(g["u"]), layer.initial_state(len(g["u"])), method=method)
        assert error(y, g["y"]) <= 1e-10 and error(last, g["xL"]) <= 1e-10


@pytest.mark.parametrize("name", ["selective_scan_fn", "selective_scan_seq"])
def test_selective_scan(name):
    import selective_scan
    scan = getattr(selective_scan, name)
    g = {key: torch.from_numpy(value) for key, value in load("selective_scan").items() if key != "meta"}
    given = [g[key] for key in ("u", "delta", "A", "B", "C", "D")]
    options = dict(delta_bias=g["delta_bias"], delta_softplus=True)
    y, last = scan(*given, z=g["z"], return_last_state=True, **options)
    assert error(y, g["y"]) <= 1e-12 and error(last, g["xL"]) <= 1e-12
    assert error(scan(*given, **options), g["y_noz"]) <= 1e-12
    assert error(scan(*given[:5], **options), g["y_noz"] - g["D"][:, None] * g["u"]) <= 1e-12
    dt = torch.nn.functional.softplus(g["delta"] + g["delta_bias"][:, None])
    assert error(scan(g["u"], dt, *given[2:]), g["pscan_y"]) <= 1e-12
    single = [x.float() for x in given]
    y, last = scan(*single, z=g["z"].float(), delta_bias=g["delta_bias"].float(), delta_softplus=True,
                   return_last_state=True)
    assert error(y, g["y_f32"]) <= 1e-6 and error(last, g["xL_f32"]) <= 1e-6
    for k in (0, 30, 62):                          # from the state after step k: mamba.py returns all of them
        u, delta, B, C = (g[key][..., k + 1:] for key in ("u", "delta", "B", "C"))
        y, last = scan(u, delta, g["A"], B, C, g["D"], return_last_state=True,
                       initial_state=g["pscan_h"][:, k], **options)
        assert error(y, g["y_noz"][..., k + 1:]) <= 1e-12 and error(last, g["xL"]) <= 1e-12


def test_selective_ssm_and_mamba():
    from selective_scan import Mamba, SelectiveSSM
    g = load("selective_scan")
    ssm = {"x_proj.weight": g["mm_x_proj_W"], "dt_proj.weight": g["mm_dt_proj_W"],
           "dt_proj.bias": g["mm_dt_proj_b"], "A_log": g["mm_A_log"], "D": g["mm_D"]}
    block = ssm | {"in_proj.weight": g["mm_in_proj_W"], "out_proj.weight": g["mm_out_proj_W"],
                   "conv1d.weight": g["mm_conv_W"][:, None], "conv1d.bias": g["mm_conv_b"]}
    for layer, values, u, y in ((SelectiveSSM(8, 8, dt_rank=2), ssm, g["mm_x"], g["mm_y"]),
                                (Mamba(4, 8, dt_rank=2), block, g["mm_block_in"], g["mm_block_out"])):
        assert set(values) == set(layer.state_dict())
        set_parameters(layer, **values)
        for method in ("scan", "step"):
            assert error(layer(torch.from_numpy(u), method=method)[0], y) <= 1e-12
