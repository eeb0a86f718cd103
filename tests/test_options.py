"""The options of all layers: wrong values are refused, each changes something, step sizes
start where they should, and what is trained slowly."""

import importlib
import math

import pytest
import torch
from torch.nn import functional as F

from layers import error, signal

NAN, INF = float("nan"), float("inf")
WIDTH = {"d_model": [0, -1], "lr": [-1.0, NAN]}
EVEN = WIDTH | {"d_state": [0, -2, 3]}
ANY = WIDTH | {"d_state": [0, -1]}
DT = {"dt_min": [0.0, -1e-3, NAN, INF], "dt_max": [0.0, 1e-9, NAN, INF]}
BAD = {     # class: {argument: wrong values}
    "s4d.S4D": EVEN | DT | {"measure": ["lin", "legs"], "disc": ["ZOH", "dss"]},
    "s4.S4": EVEN | DT | {
        "mode": ["dplr", "NPLR"], "measure": ["lin", "diag-lin", "LegS"],
        "disc": ["zoh", "dss"], "real_type": ["Exp", "softplus"], "rank": [0, -1],
        "n_ssm": [3, 8], "channels": [0, -1], "gate": [0, -1], "bottleneck": [0, 3, 8]},
    "lssl.LSSL": ANY | DT | {
        "measure": ["fout", "diag-lin"], "alpha": [-0.1, 1.1, NAN], "channels": [0, -1],
        "train_A": ["No", "all"]},
    "dss.DSS": ANY | DT | {"version": ["Softmax", "zoh"], "l_max": [0, -1]},
    "gss.GSS": ANY | DT | {"expand": [0, -1], "bottleneck": [0, 3, 8],
                           "measure": ["rand", "diag-legs"]},
    "s5.S5": EVEN | DT | {
        "blocks": [0, 3, 8, -1], "C_init": ["lecun", "normal"], "disc": ["ZOH", "dss"],
        "step_rescale": [0.0, -1.0, NAN, INF]},
    "lru.LRU": ANY | {"r_min": [-0.1, 1.0, 2.0, NAN], "r_max": [0.0, 1.1, NAN],
                      "max_phase": [0.0, -1.0, NAN, INF]},
    "selective_scan.SelectiveSSM": ANY | DT | {"dt_rank": [0, -1]},
    "selective_scan.Mamba": ANY | DT | {"dt_rank": [0, -1], "d_conv": [0, -1],
                                        "expand": [0, -1]},
}
TIME = [{"dt_min": 0.05}, {"dt_max": 0.01}]
MEASURES = {"mode": "diag", "measure": "diag-lin"}
CHANGES = {  # class: options, each of which changes the output
    "s4d.S4D": [{"measure": "diag-inv"}, {"measure": "diag-quad"}, {"measure": "diag-real"},
                {"measure": "diag-legs"}, {"disc": "bilinear"}, {"real_random": True},
                {"imag_random": True}, *TIME],
    "s4.S4": [{"mode": "diag"}, {"measure": "legt"}, {"measure": "fout"},
              {"measure": "hippo"}, {"rank": 2}, {"channels": 2}, {"bidirectional": True},
              {"gate": 2}, {"gate": 3}, {"bottleneck": 2}, {"bottleneck": 4}, *TIME,
              MEASURES, MEASURES | {"measure": "diag-inv"},
              MEASURES | {"measure": "diag-quad"}, MEASURES | {"measure": "diag-real"},
              MEASURES | {"measure": "diag-rand"}, MEASURES | {"measure": "diag"},
              {"mode": "diag", "disc": "bilinear"},
              {"mode": "diag", "disc": "dss", "l_max": 60},
              {"mode": "diag", "disc": "dss", "l_max": 90}],
    "lssl.LSSL": [{"measure": "legt"}, {"alpha": 0.0, "dt_max": 0.03}, {"alpha": 1.0},
                  {"channels": 2},
                  *TIME],
    "dss.DSS": [{"version": "exp"}, {"l_max": 60}, *TIME],
    "gss.GSS": [{"gate": False}, {"expand": 2}, {"bottleneck": 1}, {"measure": "diag-lin"},
                {"train_B": True}, {"dt_min": 0.1}, {"dt_max": 3.0}],
    "s5.S5": [{"blocks": 2}, {"C_init": "trunc_standard_normal"},
              {"C_init": "complex_normal"}, {"disc": "bilinear"}, {"conj_sym": False},
              {"clip_eigs": True}, {"bidirectional": True}, {"step_rescale": 0.5}, *TIME],
    "lru.LRU": [{"r_min": 0.5}, {"r_max": 0.5}, {"max_phase": 0.1}],
    "selective_scan.SelectiveSSM": [{"dt_rank": 3}, *TIME],
    "selective_scan.Mamba": [{"dt_rank": 3}, {"d_conv": 2}, {"expand": 1},
                             {"bias": True}, {"conv_bias": False}, *TIME],
}


def constructor(layer):
    module, cls = layer.split(".")
    return getattr(importlib.import_module(module), cls)


@pytest.mark.parametrize("layer", BAD)
def test_bad_arguments(layer):
    for argument, values in BAD[layer].items():
        for value in values:
            with pytest.raises(ValueError) as caught:
                constructor(layer)(**{"d_model": 4, "d_state": 8} | {argument: value})
            told, remedy = str(caught.value).split(": ")
            assert f"{argument}={value!r}" in told and remedy, (argument, value)


@pytest.mark.parametrize("layer", CHANGES)
def test_every_option_changes_the_output(layer):
    outputs = []
    for options in [{}, *CHANGES[layer]]:
        torch.manual_seed(0)
        built = constructor(layer)(4, 16, **options)
        built.D.data.zero_()
        if hasattr(built, "C"):
            built.C.data.fill_(0.1)
        if layer == "gss.GSS" and built.B is not None:
            built.B.data.normal_()
        if layer == "s5.S5":
            built.Lambda_re.data.add_(0.6)      # unstable without clip_eigs
        y, _ = built(signal(2, 4, 50), rate=10.0 if layer == "s5.S5" else 1.0)
        for before in outputs:                  # error is infinite for another shape
            assert error(y, before) > 1e-3, options
        outputs.append(y)


@pytest.mark.parametrize("layer", [layer for layer in CHANGES if "LRU" not in layer])
def test_step_sizes_start_log_uniform(layer):
    torch.manual_seed(0)
    options = {"bottleneck": 1, "gate": False} if layer == "gss.GSS" else {}
    h, n = (2, 4000) if layer == "s5.S5" else (4000, 2)
    if layer == "s5.S5":
        options["blocks"] = n // 2
    built = constructor(layer)(h, n, dt_min=0.01, dt_max=0.1, **options)
    if "selective" in layer:
        dt = F.softplus(built.dt_proj.bias)
    else:
        dt = (built.log_step if layer == "s5.S5" else built.log_dt).exp()
    assert dt.min() >= 0.0099 and dt.max() <= 0.1001
    assert abs(dt.log().mean() - math.log(0.01 * 0.1) / 2) < 0.1


TRAINED = [     # class, options, what is trained slowly
    ("s4d.S4D", {}, ["log_dt", "log_A_real", "A_imag"]),
    ("dss.DSS", {}, ["log_dt", "Lambda_re", "Lambda_im"]),
    ("gss.GSS", {}, ["log_A_real", "A_imag"]),
    ("gss.GSS", {"train_B": True}, ["log_A_real", "A_imag", "B"]),
    ("gss.GSS", {"train_dt": True}, ["log_A_real", "A_imag", "log_dt"]),
    ("lssl.LSSL", {}, []),
    ("lssl.LSSL", {"train_dt": True}, ["log_dt"]),
    ("lssl.LSSL", {"train_A": "shared"}, ["A", "B"]),
    ("lssl.LSSL", {"train_A": "each"}, ["A", "B"]),
    ("s4.S4", {}, ["log_dt", "log_A_real", "A_imag", "P", "B"]),
    ("s4.S4", {"mode": "diag"}, ["log_dt", "log_A_real", "A_imag", "B"]),
    ("s5.S5", {}, ["log_step", "Lambda_re", "Lambda_im", "B"]),
    ("lru.LRU", {}, ["nu_log", "theta_log", "gamma_log", "B"]),
    ("selective_scan.Mamba", {}, ["dt_proj.weight", "dt_proj.bias", "A_log",
                                  "x_proj.weight"]),
]


@pytest.mark.parametrize("layer, options, names", TRAINED, ids=str)
def test_what_is_trained_slowly(layer, options, names):
    default = {} if "Mamba" in layer else dict.fromkeys(names, 1e-3)
    assert constructor(layer)(4, 8, **options).ssm_lr == default
    built = constructor(layer)(4, 8, lr=0.02, **options)
    assert built.ssm_lr == dict.fromkeys(names, 0.02)
    built(signal(1, 4, 30))[0].sum().backward()
    for name, p in built.named_parameters():
        frozen = name in ("log_dt", "A", "B") and name not in names
        assert p.requires_grad == (p.grad is not None) == (not frozen), name


@pytest.mark.parametrize("layer", ["s4.S4", "s5.S5"])
def test_bidirectional_has_neither_state_nor_step(layer):
    built, u = constructor(layer)(3, 8, bidirectional=True), signal(2, 3, 5)
    x = constructor(layer)(3, 8).initial_state(2)
    calls = [lambda: built(u, x), lambda: built.step(u[..., 0], x),
             lambda: built(u, method="step")]
    for call in calls:
        with pytest.raises(ValueError, match="^bidirectional=True: .* no step"):
            call()
