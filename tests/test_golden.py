"""Layers and oracle with the parameters of the official implementations loaded, against the
official outputs. golden/README.md says where each number comes from."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import selective_scan
from layers import (dss_case, error, golden, lru_case, lssl_case, pair, s4_case, s4d_case,
                    s5_case, selective_case)
from oracle import conjugate_pairs, mamba
from s4 import cauchy_kernel


def load(case, h, n, **values):
    """A case with h features and n states, and its layer with these parameters."""
    case = replace(case, h=h, d_state=n)
    layer = case.build().double()
    for name, value in values.items():
        parameter = layer.get_parameter(name)
        assert parameter.shape == value.shape, (name, parameter.shape, value.shape)
        parameter.data.copy_(torch.tensor(value))
    return case, layer


def check(case, layer, g, tolerance=1e-10):
    """By every method and by the oracle: the output, that from the state x0, and the last
    state; by the kernel and the oracle: three rates; what the golden file has of these."""
    u = torch.from_numpy(g["u"])
    for run in [partial(layer, method=method) for method in case.methods] + \
            [partial(case.oracle, layer)]:
        y, _ = run(u)
        assert error(y, g["y"]) <= tolerance
        if "x0" in g:
            x0 = torch.from_numpy(g["x0"])
            y, last = run(u, x0)
            assert error(y, g.get("y_from_x0", g["y"])) <= tolerance
            assert error(last, g["xL"]) <= tolerance
        if "xL_step" in g:
            without_D = layer.D.detach().reshape(-1, 1) * u
            assert error(torch.as_tensor(y) - without_D, g["y_step"]) <= tolerance
            assert error(last, g["xL_step"]) <= tolerance
            assert error(run(0 * u, x0)[0][0], g["K_state"][0]) <= tolerance
    for key, rate in (("K", 1.0), ("K_rate2", 2.0), ("K_rate05", 0.5)):
        K = g.get(key + "_exact", g.get(key))
        if K is not None:
            l = K.shape[-1]
            assert error(layer.kernel(l, rate=rate), K) <= tolerance
            assert error(case.oracle_kernel(layer, l, rate), K) <= tolerance


def diagonal(g, prefix=""):
    """What S4D and S4 in mode diag call A and dt."""
    A = g[f"{prefix}A"]
    return {"log_dt": np.log(g[f"{prefix}dt"]), "A_imag": A.imag,
            "log_A_real": np.log(-A.real)}


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_s4d(disc):
    g = golden(f"s4d_{disc}")
    h, half = g["A"].shape
    C = g["B"] * g["C"]         # with B = 1, C is multiplied by B, and the state divided
    case, layer = load(s4d_case("s4d", disc=disc), h, 2 * half, C=pair(C), D=g["D"],
                       **diagonal(g))
    A_bar, B_bar, C_bar = layer.discretize()
    assert error(A_bar, g["dA"]) <= 1e-12 and error(B_bar, g["dB"] / g["B"]) <= 1e-12
    assert error(C_bar, C) <= 1e-12
    check(case, layer, g | {name: g[name] / g["B"] for name in ("x0", "xL", "xL_step")})
    check(*load(s4_case("s4", mode="diag", disc=disc), h, 2 * half, B=pair(g["B"]),
                C=pair(g["C"])[None], D=g["D"][None], **diagonal(g)), g)


def test_s4d_minimal():
    g = golden("s4d_zoh")
    h, half = g["min_A"].shape
    case, layer = load(s4d_case("s4d"), h, 2 * half, C=pair(g["min_C"]), D=g["min_D"],
                       **diagonal(g, "min_"))
    check(case, layer, {"u": g["u"], "y": g["min_y"], "K": g["min_K"]})


def dense(a, Q, S):
    """diag(a) - Q S over both of each conjugate pair: (h, n, n)."""
    A_bar = np.stack([np.diag(diagonal) for diagonal in conjugate_pairs(a)])
    return A_bar - np.einsum("rhi,rhj->hij", conjugate_pairs(Q), conjugate_pairs(S))


@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_s4_nplr(measure):
    g = golden(f"s4_nplr_{measure}")
    h, half = g["w"].shape
    case, layer = load(s4_case("s4", measure=measure), h, 2 * half, B=pair(g["B"]),
                       P=pair(g["P"]), C=pair(g["C_true"])[None], D=g["D"][None],
                       **diagonal(g | {"A": g["w"]}))
    check(case, layer, g)
    for key, rate in (("K", 1.0), ("K_rate2", 2.0), ("K_rate05", 0.5)):
        K = g.get(key + "_exact", g[key])       # a layer in double has it by dense powers
        assert error(cauchy_kernel(*layer.continuous(rate), K.shape[-1])[0], K) <= 1e-7
    a, B_bar, Q, S, C = (matrix.detach().numpy() for matrix in layer.discretize())
    assert error(dense(a, Q, S), g["dA"]) <= 1e-12
    assert error(conjugate_pairs(B_bar), g["dB"]) <= 1e-12
    assert error(conjugate_pairs(C[0]), g["dC"]) <= 1e-10


@pytest.mark.parametrize("name", ["dss_softmax", "dss_exp"])
def test_disc_dss(name):
    """Both signs of Re A for DSS, feature by feature; negative ones for S4."""
    g = {key.removeprefix("s4diag_"): value for key, value in golden(name).items()
         if key.startswith("s4diag_")}
    (h, half), l = g["A"].shape, g["K"].shape[-1]
    for A, dt, W, K in zip(g["A"], g["dt"], pair(g["B"] * g["C"]), g["K"]):
        case, layer = load(dss_case("dss", l_max=l), 1, half, log_dt=np.log([dt]),
                           Lambda_re=A.real, Lambda_im=A.imag, W=W[None])
        assert error(layer.kernel(l), K[None]) <= 1e-10
        assert error(case.oracle_kernel(layer, l), K[None]) <= 1e-10
    if name == "dss_exp":
        case, layer = load(s4_case("s4", mode="diag", disc="dss", l_max=l), h, 2 * half,
                           B=pair(g["B"]), C=pair(g["C"])[None], **diagonal(g))
        assert error(layer.kernel(l), g["K"]) <= 1e-10
        assert error(case.oracle_kernel(layer, l), g["K"]) <= 1e-10


@pytest.mark.parametrize("key", ["legs", "legt", "hazy_legt"])
def test_lssl(key):
    g = {name.removeprefix(f"{key}_"): value for name, value in golden("lssl").items()}
    values = {"log_dt": np.log(g["dt"]), "A": g["A"], "B": g["B"], "C": g["C"][None],
              "D": g["D"][None]}
    shape = g["C"].shape
    official = {name: g[name] for name in ("u", "y", "K")}
    check(*load(lssl_case("lssl"), *shape, **values), official)
    for alpha, suffix in ((0.0, "_alpha0"), (0.5, ""), (1.0, "_alpha1")):
        if "dA" + suffix in g:
            case = lssl_case("lssl", alpha=alpha, dt_min=1e-4, dt_max=1e-3)
            _, layer = load(case, *shape, **values)
            A_bar, B_bar, _ = layer.discretize()
            assert error(A_bar, g["dA" + suffix]) <= 1e-12
            assert error(B_bar, g["dB" + suffix]) <= 1e-12


@pytest.mark.parametrize("version", ["softmax", "exp"])
def test_dss(version):
    """Each feature as a layer with Lambda = z / dt of its own, and W to match.

    For softmax 1 / dt is so large that the layer adds nothing to |x|^2,
    x = Lambda (exp(l z) - 1), where the official code adds 1e-7: the tolerance is what that
    makes.
    """
    g = golden(f"dss_{version}")
    real, imag = np.exp(g["log_dt"]).T[..., None]
    z = real * g["Lambda"].real + 1j * imag * g["Lambda"].imag
    dt = 1.0 if version == "exp" else 1e-5
    (h, n), l = z.shape, g["u"].shape[-1]
    x = g["Lambda"] * (np.exp(np.where(z.real > 0, -l, l) * z) - 1)
    tolerance = 1e-10 if version == "exp" else (1e-7 / np.abs(x) ** 2).max()
    for i in range(h):
        Lambda = z[i] / dt
        real = np.log(-Lambda.real) if version == "exp" else Lambda.real
        case, layer = load(dss_case("dss", version=version, l_max=l), 1, n,
                           log_dt=np.log([dt]), D=g["D"][i:i + 1], Lambda_re=real,
                           Lambda_im=Lambda.imag,
                           W=pair(g["W"][i:i + 1] * Lambda / g["Lambda"]))
        official = {"u": g["u"][:, i:i + 1], "y": g["y"][:, i:i + 1], "K": g["K"][i:i + 1]}
        check(case, layer, official, tolerance)


@pytest.mark.parametrize("suffix", ["", "_clip", "_rescale2", "_clip_rescale2"])
@pytest.mark.parametrize("name", ["zoh", "bilinear", "bidirectional"])
def test_s5(name, suffix):
    g, two_ways = golden(f"s5_{name}"), name == "bidirectional"
    options = {"disc": "zoh" if two_ways else name, "clip_eigs": "clip" in suffix,
               "step_rescale": 2.0 if "rescale2" in suffix else 1.0}
    values = {"Lambda_re": g["Lambda"].real, "Lambda_im": g["Lambda"].imag,
              "B": pair(g["B_tilde"]), "D": g["D"], "log_step": g["log_step"]}
    C = [g["C1_tilde"], g["C2_tilde"]] if two_ways else [g["C_tilde"]]
    p, h = g["B_tilde"].shape
    u = torch.from_numpy(g["u"])
    if two_ways:
        check(*load(s5_case("s5", bidirectional=True, **options), h, 2 * p,
                    C=pair(np.concatenate(C, 1)), **values),
              {"u": g["u"], "y": g["y" + suffix]})
    case, forward = load(s5_case("s5", **options), h, 2 * p, C=pair(C[0]), **values)
    zero = forward.initial_state(len(u))
    for run in [partial(forward, method=method) for method in case.methods] + \
            [partial(case.oracle, forward)]:
        y, last = run(u, zero)
        assert error(last, g["xL" + suffix]) <= 1e-10
        if two_ways:
            assert error(run(u.flip(-1), zero)[1], g["xrev0" + suffix]) <= 1e-10
        else:
            assert error(y, g["y" + suffix]) <= 1e-10
    A_bar, B_bar, C_bar = forward.discretize()
    assert error(A_bar, g["Lambda_bar" + suffix]) <= 1e-12
    assert error(B_bar, g["B_bar" + suffix]) <= 1e-12 and error(C_bar, 2 * C[0]) <= 1e-15


def test_lru():
    g = golden("lru")
    logs = {name: g[name] for name in ("nu_log", "theta_log", "gamma_log")}
    n, h = g["B"].shape
    case, layer = load(lru_case("lru"), h, n, B=pair(g["B"]), C=pair(g["C"]), D=g["D"],
                       **logs)
    check(case, layer, g | {"x0": np.zeros((len(g["u"]), n), dtype=complex)})


@pytest.mark.parametrize("name", ["selective_scan_fn", "selective_scan_seq"])
def test_selective_scan(name):
    scan = partial(getattr(selective_scan, name), return_last_state=True)
    g = golden("selective_scan")
    g = {key: torch.from_numpy(value) for key, value in g.items() if key != "meta"}
    given = [g[key] for key in ("u", "delta", "A", "B", "C", "D")]
    options = {"delta_bias": g["delta_bias"], "delta_softplus": True}
    y, last = scan(*given, z=g["z"], **options)
    assert error(y, g["y"]) <= 1e-12 and error(last, g["xL"]) <= 1e-12
    assert error(scan(*given, **options)[0], g["y_noz"]) <= 1e-12
    y, _ = scan(*given[:5], **options)
    assert error(y, g["y_noz"] - g["D"][:, None] * g["u"]) <= 1e-12
    dt = F.softplus(g["delta"] + g["delta_bias"][:, None])
    assert error(scan(g["u"], dt, *given[2:])[0], g["pscan_y"]) <= 1e-12
    single = [x.float() for x in given]
    y, last = scan(*single, z=g["z"].float(), delta_bias=g["delta_bias"].float(),
                   delta_softplus=True)
    assert error(y, g["y_f32"]) <= 1e-6 and error(last, g["xL_f32"]) <= 1e-6
    for k in (0, 30, 62):       # from the state after step k: mamba.py returns all of them
        u, delta, B, C = (g[key][..., k + 1:] for key in ("u", "delta", "B", "C"))
        y, last = scan(u, delta, g["A"], B, C, g["D"], initial_state=g["pscan_h"][:, k],
                       **options)
        assert error(y, g["y_noz"][..., k + 1:]) <= 1e-12 and error(last, g["xL"]) <= 1e-12


def mamba_parameters(g):
    """The state_dict of the official block, and of the SSM in it."""
    ssm = {"x_proj.weight": g["mm_x_proj_W"], "dt_proj.weight": g["mm_dt_proj_W"],
           "dt_proj.bias": g["mm_dt_proj_b"], "A_log": g["mm_A_log"], "D": g["mm_D"]}
    block = {"in_proj.weight": g["mm_in_proj_W"], "out_proj.weight": g["mm_out_proj_W"],
             "conv1d.weight": g["mm_conv_W"][:, None], "conv1d.bias": g["mm_conv_b"]}
    return ssm | block, ssm


def test_selective_ssm_and_mamba():
    g = golden("selective_scan")
    block, ssm = mamba_parameters(g)
    d, n = ssm["A_log"].shape
    dt_rank = ssm["dt_proj.weight"].shape[1]
    case, layer = load(selective_case("selective", dt_rank=dt_rank), d, n, **ssm)
    check(case, layer, {"u": g["mm_x"], "y": g["mm_y"]}, 1e-12)
    case = selective_case("mamba", "Mamba", mamba, dt_rank=dt_rank)
    case, layer = load(case, len(block["out_proj.weight"]), n, **block)
    assert set(block) == set(layer.state_dict())
    check(case, layer, {"u": g["mm_block_in"], "y": g["mm_block_out"]}, 1e-12)
