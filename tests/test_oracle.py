"""The oracle against the official implementations' numbers (tests/golden), and against itself elsewhere.

Error: max |a - b| / max |b|. Tolerance 1e-10. Measured: 6e-12 for s4 fout, whose golden numbers carry that
error themselves (golden/README.md), 1.4e-12 for dss, 2e-13 or less elsewhere; `python tests/test_oracle.py`
prints each.
"""

from pathlib import Path

import numpy as np
import pytest

import oracle

TOLERANCE = 1e-10
MEASURED = {}  # largest error of each test file or topic, printed by `python tests/test_oracle.py`


def golden(name):
    return np.load(Path(__file__).parent / "golden" / f"{name}.npz")


def close(topic, actual, expected):
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    MEASURED[topic] = max(MEASURED.get(topic, 0.0), error)
    assert error <= TOLERANCE, f"{topic}: relative error {error:.1e}"


def as_real(a):
    """(...) complex -> (..., 2)."""
    return np.stack([a.real, a.imag], axis=-1)


def impulse(h, l):
    """u (1, h, l) with a one at step 0, so that y is the kernel."""
    u = np.zeros((1, h, l))
    u[:, :, 0] = 1
    return u


def without_D(p):
    return {**p, "D": 0 * p["D"]}


def random_input(b=2, h=4, l=12, seed=0):
    return np.random.default_rng(seed).standard_normal((b, h, l))


def check_chunks(topic, layer, u, cuts=(1, 5, 6)):
    """Cutting the sequence and passing the state on changes nothing."""
    y, state = layer(u, None)
    parts, x = [], None
    for chunk in np.split(u, cuts, axis=2):
        part, x = layer(chunk, x)
        parts.append(part)
    close(topic, np.concatenate(parts, axis=2), y)
    close(topic, x, state)


# ---- discretization ----


def test_expm():
    rotation = np.array([[0.0, -30.0], [30.0, 0.0]])
    c, s = np.cos(30.0), np.sin(30.0)
    close("expm", oracle.expm(rotation), np.array([[c, -s], [s, c]]))
    close("expm", oracle.expm(np.array([[0.0, 5.0], [0.0, 0.0]])), np.array([[1.0, 5.0], [0.0, 1.0]]))
    close("expm", oracle.expm(np.zeros((3, 3))), np.eye(3))
    A = np.random.default_rng(0).standard_normal((6, 6))
    w, V = np.linalg.eig(A)
    close("expm", oracle.expm(A), (V * np.exp(w) @ np.linalg.inv(V)).real)


def test_zoh():
    A = np.random.default_rng(0).standard_normal((4, 4)) - 2 * np.eye(4)
    B = np.random.default_rng(1).standard_normal((4, 2))
    A_bar, B_bar = oracle.zoh(A, B, 0.3)
    close("zoh", A_bar, oracle.expm(0.3 * A))
    close("zoh", B_bar, np.linalg.solve(A, (A_bar - np.eye(4)) @ B))
    integrator = np.array([[0.0, 1.0], [0.0, 0.0]])  # singular: position and velocity under a constant force
    A_bar, B_bar = oracle.zoh(integrator, np.array([0.0, 1.0]), 0.5)
    close("zoh", A_bar, np.array([[1.0, 0.5], [0.0, 1.0]]))
    close("zoh", B_bar, np.array([0.125, 0.5]))


@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_hippo(measure):
    g = golden(f"s4_nplr_{measure}")
    A, B = getattr(oracle, f"hippo_{measure}")(16)
    close("hippo", A, g["hippo_A"])
    close("hippo", B, g["hippo_B"])


# ---- S4D and S4 ----


def s4d_parameters(g, prefix=""):
    A = g[f"{prefix}A"]
    p = {
        "log_dt": np.log(g[f"{prefix}dt"]),
        "log_A_real": np.log(-A.real),
        "A_imag": A.imag,
        "C": as_real(g[f"{prefix}C"]),
        "D": g[f"{prefix}D"],
    }
    if f"{prefix}B" in g:
        p["B"] = as_real(g[f"{prefix}B"])
    return p


@pytest.mark.parametrize("layer", [oracle.s4d, oracle.s4_diag])
@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_s4d(layer, disc):
    g = golden(f"s4d_{disc}")
    p = s4d_parameters(g)
    close("s4d", layer(p, g["u"], disc=disc)[0], g["y"])
    y, state = layer(p, g["u"], g["x0"], disc=disc)
    close("s4d", y, g["y_from_x0"])
    close("s4d", state, g["xL"])
    y, state = layer(without_D(p), g["u"], g["x0"], disc=disc)
    close("s4d", y, g["y_step"])
    close("s4d", state, g["xL_step"])
    close("s4d", layer(without_D(p), 0 * g["u"], g["x0"], disc=disc)[0], g["K_state"])
    for name, rate in (("K", 1.0), ("K_rate2", 2.0), ("K_rate05", 0.5)):
        close("s4d", layer(without_D(p), impulse(4, 64), rate=rate, disc=disc)[0][0], g[name])


def test_s4d_minimal():
    g = golden("s4d_zoh")
    p = s4d_parameters(g, "min_")
    assert "B" not in p
    close("s4d minimal", oracle.s4d(p, g["u"])[0], g["min_y"])
    close("s4d minimal", oracle.s4d(without_D(p), impulse(4, 64))[0][0], g["min_K"])


def test_s4d_real_type():
    g = golden("s4d_zoh")
    p, real = s4d_parameters(g), -g["A"].real
    inverse = {"relu": real - 1e-4, "softplus": np.log(np.expm1(real)), "none": real}
    for real_type, raw in inverse.items():
        close("s4d", oracle.s4d({**p, "log_A_real": raw}, g["u"], real_type=real_type)[0], g["y"])


def s4_parameters(g):
    w = g["w"]
    return {
        "log_dt": np.log(g["dt"]),
        "log_A_real": np.log(-w.real),
        "A_imag": w.imag,
        "B": as_real(g["B"]),
        "C": as_real(g["C_true"]),
        "D": g["D"],
        "P": as_real(g["P"]),
    }


def real_state(x):
    return np.concatenate([x.real, x.imag], axis=-1)


@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_s4_nplr(measure):
    g, topic = golden(f"s4_nplr_{measure}"), f"s4 {measure}"
    p = s4_parameters(g)
    for i in range(4):
        A = oracle.nplr_matrix(g["w"][i], g["P"][:, i])
        A_bar, B_bar = oracle.bilinear(A, oracle.conjugate_pairs(g["B"][i]), g["dt"][i])
        close(topic, A, g["A"][i])
        close(topic, A_bar, g["dA"][i])
        close(topic, B_bar, g["dB"][i])
    close(topic, oracle.s4_nplr(p, g["u"])[0], g["y"])
    y, state = oracle.s4_nplr(p, g["u"], real_state(g["x0"]))
    close(topic, y, g["y_from_x0"])
    close(topic, state, real_state(g["xL"]))
    y, state = oracle.s4_nplr(without_D(p), g["u"], real_state(g["x0"]))
    close(topic, y, g["y_step"])
    close(topic, state, real_state(g["xL_step"]))
    close(topic, oracle.s4_nplr(without_D(p), 0 * g["u"], real_state(g["x0"]))[0], g["K_state"])
    for name, rate in (("K", 1.0), ("K_rate2_exact", 2.0), ("K_rate05_exact", 0.5)):
        K = oracle.s4_nplr(without_D(p), impulse(4, g[name].shape[1]), rate=rate)[0][0]
        close(topic, K, g[name])


def test_s4_channels_and_copies():
    p, u = s4_parameters(golden("s4_nplr_legt")), random_input()
    more = {**p, "C": np.stack([p["C"], -2 * p["C"]]), "D": np.stack([p["D"], -2 * p["D"]])}
    y, state = oracle.s4_nplr(p, u)
    y_more, state_more = oracle.s4_nplr(more, u)
    close("s4 channels", y_more, np.concatenate([y, -2 * y], axis=1))
    close("s4 channels", state_more, state)
    two = {**p, "P": p["P"][:, :2], **{k: p[k][:2] for k in ("B", "log_A_real", "A_imag")}}
    repeated = [0, 1, 0, 1]
    four = {**p, "P": p["P"][:, repeated], **{k: p[k][repeated] for k in ("B", "log_A_real", "A_imag")}}
    close("s4 copies", oracle.s4_nplr(two, u)[0], oracle.s4_nplr(four, u)[0])
    close("s4 copies", oracle.s4_diag(two, u)[0], oracle.s4d(four, u)[0])


# ---- LSSL ----


@pytest.mark.parametrize("measure", ["legs", "legt", "hazy_legt"])
def test_lssl(measure):
    g = golden("lssl")
    A, B, C, D, dt = (g[f"{measure}_{name}"] for name in ("A", "B", "C", "D", "dt"))
    p = {"A": A, "B": B, "C": C[None], "D": D[None], "log_dt": np.log(dt)}
    close("lssl", oracle.lssl(p, g["u"])[0], g[f"{measure}_y"])
    close("lssl", oracle.lssl(without_D(p), impulse(4, 64))[0][0], g[f"{measure}_K"])
    for alpha, suffix in ((0.5, ""), (0.0, "_alpha0"), (1.0, "_alpha1")):
        if f"{measure}_dA{suffix}" in g:
            discrete = [oracle.gbt(A, B, step, alpha) for step in dt]
            close("lssl", np.stack([A_bar for A_bar, _ in discrete]), g[f"{measure}_dA{suffix}"])
            close("lssl", np.stack([B_bar for _, B_bar in discrete]), g[f"{measure}_dB{suffix}"])
    each = {**p, "A": np.stack([A] * 4), "B": np.stack([B] * 4)}
    close("lssl", oracle.lssl(each, g["u"])[0], g[f"{measure}_y"])
    faster = {**p, "log_dt": p["log_dt"] + np.log(2)}
    close("lssl", oracle.lssl(p, g["u"], rate=2.0, alpha=1.0)[0], oracle.lssl(faster, g["u"], alpha=1.0)[0])


# ---- DSS and GSS ----


def dss_parameters(g, version):
    Lambda = g["Lambda"]
    real = np.log(-Lambda.real) if version == "exp" else Lambda.real
    names = ("log_dt", "D")
    return {"Lambda_re": real, "Lambda_im": Lambda.imag, "W": as_real(g["W"]), **{k: g[k] for k in names}}


@pytest.mark.parametrize("version", ["softmax", "exp"])
def test_dss(version):
    g = golden(f"dss_{version}")
    p = dss_parameters(g, version)
    close("dss", oracle.dss(p, g["u"], version=version, l_max=64)[0], g["y"])
    close("dss", oracle.dss(without_D(p), impulse(4, 64), version=version, l_max=64)[0][0], g["K"])
    close("dss", oracle.dss(without_D(p), impulse(4, 32), version=version, l_max=32)[0][0], g["K_half"])


def test_dss_shared_log_dt_is_two_equal_columns():
    g = golden("dss_softmax")
    p = {**dss_parameters(g, "softmax"), "log_dt": g["log_dt"][:, 0]}
    q = {**p, "log_dt": np.stack([p["log_dt"]] * 2, axis=1)}
    close("dss", oracle.dss(p, g["u"], l_max=64)[0], oracle.dss(q, g["u"], l_max=64)[0])


def test_dss_softmax_is_a_softmax():
    """Without eps, K_k = Re sum_n W_n / Lambda_n softmax_k(k z_n) at rate 1, for either sign of Re Lambda."""
    g = golden("dss_softmax")
    z = np.exp(g["log_dt"][:, :1]) * g["Lambda"].real + 1j * np.exp(g["log_dt"][:, 1:]) * g["Lambda"].imag
    powers = np.exp(z[..., None] * np.arange(64))
    K = np.einsum("hn,hnl->hl", g["W"] / g["Lambda"], powers / powers.sum(-1, keepdims=True)).real
    p = without_D(dss_parameters(g, "softmax"))
    close("dss softmax identity", oracle.dss(p, impulse(4, 64), l_max=64, eps=0.0)[0][0], K)


def test_dss_rate_is_zero_order_hold():
    """The kernel is the zero-order hold of x' = Lambda x + u, y = Re(W / (exp(l_max dt Lambda) - 1) x)."""
    g = golden("dss_softmax")
    dt, Lambda = np.exp(g["log_dt"][:, 0]), g["Lambda"]
    p = without_D({**dss_parameters(g, "softmax"), "log_dt": np.log(dt)})
    systems = []
    for i in range(4):
        A_bar, B_bar = oracle.zoh(np.diag(Lambda), np.ones(16), 1.7 * dt[i])
        systems.append((A_bar, B_bar, (g["W"][i] / (np.exp(64 * dt[i] * Lambda) - 1))[None], np.zeros(1)))
    K, _ = oracle.simulate_features(systems, impulse(4, 20), np.zeros((1, 4, 16), dtype=complex))
    close("dss rate identity", oracle.dss(p, impulse(4, 20), rate=1.7, l_max=64, eps=0.0)[0], K)


@pytest.mark.parametrize("version", ["softmax", "exp"])
def test_s4_diag_dss(version):
    g = golden(f"dss_{version}")
    A = g["s4diag_A"]  # some with a positive real part, so real_type "none": A = -log_A_real + i A_imag
    p = {
        "log_dt": np.log(g["s4diag_dt"]),
        "log_A_real": -A.real,
        "A_imag": A.imag,
        "B": as_real(g["s4diag_B"]),
        "C": as_real(g["s4diag_C"]),
        "D": np.zeros(4),
    }
    K = oracle.s4_diag(p, impulse(4, 64), disc="dss", real_type="none", l_max=64)[0][0]
    close("s4 diag, dss", K, g["s4diag_K"])


def test_gss_around_the_identity():
    """With an inner SSM that passes its input on, the block is a formula in u."""
    rng, u = np.random.default_rng(0), random_input()
    V, W, Y, O = (rng.standard_normal(shape) for shape in ((8, 4), (2, 4), (8, 2), (4, 8)))
    bias = rng.standard_normal(8)
    y, state = oracle.gss(u, lambda w: (w, "state"), (V, bias), (W, None), (Y, None), (O, None))
    assert state == "state"
    v, w = oracle.gelu(V @ u + bias[:, None]), oracle.gelu(W @ u)
    close("gss", y, O @ (v * (Y @ w)))


# ---- S5 and LRU ----


@pytest.mark.parametrize("name", ["s5_zoh", "s5_bilinear", "s5_bidirectional"])
@pytest.mark.parametrize("clip_eigs", [False, True])
@pytest.mark.parametrize("rate", [1.0, 2.0])
def test_s5(name, clip_eigs, rate):
    g, both = golden(name), name == "s5_bidirectional"
    suffix = ("_clip" if clip_eigs else "") + ("_rescale2" if rate == 2 else "")
    p = s5_parameters(g)
    disc = "bilinear" if name == "s5_bilinear" else "zoh"
    y, state = oracle.s5(p, g["u"], rate=rate, disc=disc, clip_eigs=clip_eigs, bidirectional=both)
    close("s5", y, g[f"y{suffix}"])
    close("s5", state, g[f"xL{suffix}"])


def s5_parameters(g):
    C = np.concatenate([g["C1_tilde"], g["C2_tilde"]], axis=1) if "C1_tilde" in g else g["C_tilde"]
    Lambda = g["Lambda"]
    return {
        "Lambda_re": Lambda.real,
        "Lambda_im": Lambda.imag,
        "log_step": g["log_step"],
        "B": as_real(g["B_tilde"]),
        "C": as_real(C),
        "D": g["D"],
    }


def test_s5_without_conj_sym_needs_both_halves():
    p = s5_parameters(golden("s5_zoh"))
    flip = np.array([1.0, -1.0])
    whole = {
        "Lambda_re": np.tile(p["Lambda_re"], 2),
        "Lambda_im": np.concatenate([p["Lambda_im"], -p["Lambda_im"]]),
        "log_step": np.tile(p["log_step"], 2),
        "B": np.concatenate([p["B"], p["B"] * flip]),
        "C": np.concatenate([p["C"], p["C"] * flip], axis=1),
        "D": p["D"],
    }
    u = random_input()
    close("s5", oracle.s5(whole, u, conj_sym=False)[0], oracle.s5(p, u)[0])


def lru_parameters(g):
    names = ("nu_log", "theta_log", "gamma_log", "D")
    return {**{k: g[k] for k in names}, "B": as_real(g["B"]), "C": as_real(g["C"])}


def test_lru():
    g = golden("lru")
    y, state = oracle.lru(lru_parameters(g), g["u"])
    close("lru", y, g["y"])
    close("lru", state, g["xL"])


def test_lru_rate_is_zero_order_hold():
    """A held input sampled twice as often at rate 1/2 leaves the same outputs at the common times."""
    p, u = lru_parameters(golden("lru")), random_input()
    y, state = oracle.lru(p, u)
    y_fine, state_fine = oracle.lru(p, np.repeat(u, 2, axis=2), rate=0.5)
    close("lru", y_fine[:, :, 1::2], y)
    close("lru", state_fine, state)


# ---- selective scan ----


def test_selective_scan():
    g = golden("selective_scan")
    args = [g[k] for k in ("u", "delta", "A", "B", "C", "D")]
    options = {"delta_bias": g["delta_bias"], "delta_softplus": True}
    y, state = oracle.selective_scan(*args, z=g["z"], **options)
    close("selective scan", y, g["y"])
    close("selective scan", state, g["xL"])
    y, _ = oracle.selective_scan(*args, **options)
    close("selective scan", y, g["y_noz"])
    close("selective scan", y, g["pscan_y"])


def mamba_parameters(g):
    return {
        "in_proj.weight": g["mm_in_proj_W"],
        "conv1d.weight": g["mm_conv_W"][:, None],
        "conv1d.bias": g["mm_conv_b"],
        "x_proj.weight": g["mm_x_proj_W"],
        "dt_proj.weight": g["mm_dt_proj_W"],
        "dt_proj.bias": g["mm_dt_proj_b"],
        "A_log": g["mm_A_log"],
        "D": g["mm_D"],
        "out_proj.weight": g["mm_out_proj_W"],
    }


def test_mamba():
    g = golden("selective_scan")
    p = mamba_parameters(g)
    close("mamba", oracle.selective_ssm(p, g["mm_x"])[0], g["mm_y"])
    close("mamba", oracle.mamba(p, g["mm_block_in"])[0], g["mm_block_out"])


def test_selective_ssm_rate_multiplies_the_step():
    """softplus(x) = x for large x: there, rate 2 is the same as twice the bias of dt_proj."""
    g = golden("selective_scan")
    p, u = mamba_parameters(g), g["mm_x"][:, :, :12]
    p = {**p, "dt_proj.weight": 0 * p["dt_proj.weight"], "A_log": p["A_log"] - 6}
    once, twice = ({**p, "dt_proj.bias": np.full(8, bias)} for bias in (50.0, 100.0))
    close("mamba", oracle.selective_ssm(once, u, rate=2.0)[0], oracle.selective_ssm(twice, u)[0])


# ---- every layer: chunks ----


def test_chunks_with_the_state():
    u = random_input()
    s4d, s4 = s4d_parameters(golden("s4d_zoh")), s4_parameters(golden("s4_nplr_legt"))
    softmax, exp = (dss_parameters(golden(f"dss_{v}"), v) for v in ("softmax", "exp"))
    g = golden("lssl")
    lssl = {"A": g["legs_A"], "B": g["legs_B"], "C": g["legs_C"][None], "D": g["legs_D"][None]}
    lssl["log_dt"] = np.log(g["legs_dt"])
    s5, lru = s5_parameters(golden("s5_zoh")), lru_parameters(golden("lru"))
    layers = {
        "s4d": lambda u, x: oracle.s4d(s4d, u, x, rate=1.7),
        "s4 legt": lambda u, x: oracle.s4_nplr(s4, u, x, rate=1.7),
        "s4 diag, dss": lambda u, x: oracle.s4_diag(s4d, u, x, rate=1.7, disc="dss", l_max=64),
        "lssl": lambda u, x: oracle.lssl(lssl, u, x, rate=1.7),
        "dss softmax": lambda u, x: oracle.dss(softmax, u, x, rate=1.7, l_max=64),
        "dss exp": lambda u, x: oracle.dss(exp, u, x, rate=1.7, version="exp"),
        "s5": lambda u, x: oracle.s5(s5, u, x, rate=1.7),
        "lru": lambda u, x: oracle.lru(lru, u, x, rate=1.7),
    }
    for topic, layer in layers.items():
        check_chunks(f"chunks, {topic}", layer, u)
    p, u = mamba_parameters(golden("selective_scan")), random_input(h=8)
    check_chunks("chunks, selective ssm", lambda u, x: oracle.selective_ssm(p, u, x, rate=1.7), u)


if __name__ == "__main__":
    pytest.main(["-q", __file__])
    import sys

    for topic, error in sys.modules["test_oracle"].MEASURED.items():
        print(f"{topic:24s} {error:.1e}")
