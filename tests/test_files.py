"""The files as files: bad constructor arguments, a model file alone in an empty directory, silence on import, README."""

import importlib
import re
import subprocess
import sys

import pytest

from layers import ROOT
from mutations import MUTATIONS

NAN, INF = float("nan"), float("inf")
ODD = {"d_state": [0, -2, 3]}
DT = {"dt_min": [0.0, -1e-3, NAN, INF], "dt_max": [0.0, 1e-9, NAN, INF]}
BAD = {   # class: {argument: wrong values}
    ("s4d", "S4D"): ODD | DT | {"measure": ["lin", "legs"], "disc": ["ZOH", "dss"]},
    ("s4", "S4"): ODD | DT | {
        "mode": ["dplr", "NPLR"], "measure": ["lin", "diag-lin", "LegS"], "disc": ["zoh", "dss"],
        "real_type": ["Exp", "softplus"], "rank": [0, -1], "n_ssm": [3, 8], "channels": [0, -1], "gate": [0, -1],
        "bottleneck": [0, 3, 8]},
    ("lssl", "LSSL"): DT | {"d_state": [0, -1], "measure": ["fout", "diag-lin"], "alpha": [-0.1, 1.1, NAN],
                            "channels": [0, -1], "train_A": ["No", "all"]},
    ("dss", "DSS"): DT | {"d_state": [0, -1], "version": ["Softmax", "zoh"], "l_max": [0, -1]},
    ("gss", "GSS"): DT | {"d_state": [0, -1], "expand": [0, -1], "bottleneck": [0, 3, 8],
                          "measure": ["rand", "diag-legs"]},
    ("s5", "S5"): ODD | DT | {"blocks": [0, 3, 8, -1], "C_init": ["lecun", "normal"], "disc": ["ZOH", "dss"],
                              "step_rescale": [0.0, -1.0, NAN, INF]},
    ("lru", "LRU"): {"d_state": [0, -1], "r_min": [-0.1, 1.0, 2.0, NAN], "r_max": [0.0, 1.1, NAN],
                     "max_phase": [0.0, -1.0, NAN, INF]},
    ("selective_scan", "SelectiveSSM"): DT | {"d_state": [0, -1], "dt_rank": [0, -1]},
    ("selective_scan", "Mamba"): DT | {"d_state": [0, -1], "dt_rank": [0, -1], "d_conv": [0, -1],
                                       "expand": [0, -1]},
}


@pytest.mark.parametrize("module, cls", BAD, ids=lambda x: x)
def test_bad_constructor_arguments(module, cls):
    constructor = getattr(importlib.import_module(module), cls)
    for argument, values in BAD[module, cls].items():
        for value in values:
            with pytest.raises(ValueError) as caught:
                constructor(**({"d_model": 4, "d_state": 8} | {argument: value}))
            told, remedy = str(caught.value).split(": ")
            assert f"{argument}={value!r}" in told and remedy, (argument, value)
    with pytest.raises(TypeError):
        constructor(4, 8, unknown=1)


MODELS = sorted({module for module, _ in BAD})


@pytest.mark.parametrize("module", MODELS)
def test_model_file_alone(module, tmp_path):
    (tmp_path / f"{module}.py").write_bytes((ROOT / f"{module}.py").read_bytes())
    silent = subprocess.run([sys.executable, "-W", "error", "-c", f"import {module}"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    run = subprocess.run([sys.executable, f"{module}.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^(\S.*?) +differ by (\S+)$", run.stdout, re.M)
    exact = {name: float(error) for name, error in rows if "rate" not in name}
    assert len(exact) >= 2 and max(exact.values()) <= 1e-5, run.stdout
    assert len(rows) > len(exact) and max(float(error) for _, error in rows) <= 0.1, run.stdout


@pytest.mark.parametrize("module", MODELS)
def test_how_a_file_reads(module):
    text = (ROOT / f"{module}.py").read_text()
    assert max(map(len, text.splitlines())) <= 92
    assert not re.search(r"\b(assert|TODO|FIXME)\b|\*\*kwargs", text)
    assert not [m for m in re.findall(r"^\s*(?:from|import) (\w+)", text, re.M)
                if m != "torch" and m not in sys.stdlib_module_names]


def test_shared_code_is_the_same_to_the_letter():
    """A function of one name has one text in all model files, so that a reader recognises it."""
    found = {}
    for module in MODELS:
        text = (ROOT / f"{module}.py").read_text()
        for name, body in re.findall(r"^def (\w+)(.*?)(?=^\S)", text, re.M | re.S):
            found.setdefault(name, {}).setdefault(body.rstrip(), []).append(module)
    assert not {name: list(texts.values()) for name, texts in found.items() if len(texts) > 1}
    assert len(found["check"].popitem()[1]) == len(MODELS)


def test_mutations_are_up_to_date():
    """Each line that mutations.py breaks stands exactly once in its file."""
    for file, what, text, broken, _ in MUTATIONS:
        assert (ROOT / f"{file}.py").read_text().count(text) == 1 and broken != text, (file, what)
