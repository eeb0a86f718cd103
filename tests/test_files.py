"""The files as files: bad constructor arguments, a model file alone in an empty directory, silence on import, README."""

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from layers import ROOT
from mutations import MUTATIONS

NAN, INF = float("nan"), float("inf")
SIZES = {"d_model": [0, -1, 1.5, "4", None, True], "d_state": [0, -2, 3, 4.0, None]}
EVEN_OR_ODD = {"d_state": [0, -2, 4.0, None, True]}
DT = {"dt_min": [0.0, -1e-3, NAN, INF, "a", None], "dt_max": [0.0, 1e-9, NAN, INF, None]}
LR = {"lr": [-1.0, NAN, "a", {"C": 0.1}, {"dt": -1.0}, {"dt": None}]}
FLOAT_LR = {"lr": [-1.0, NAN, "a", {"C": 0.1}]}
BAD = {   # class: {argument: wrong values}
    ("s4d", "S4D"): SIZES | DT | LR | {"measure": ["lin", "legs", None, 0], "disc": ["ZOH", "dss", None],
                                       "real_type": ["Exp", None]},
    ("s4", "S4"): SIZES | DT | LR | {
        "mode": ["dplr", "NPLR", None, ["nplr"]], "measure": ["lin", "diag-lin", "LegS", None, 0],
        "disc": ["zoh", "dss", 0], "real_type": ["Exp", None], "rank": [0, -1, 1.5, "1", True],
        "n_ssm": [0, 3, 8, -1, 2.0, True], "channels": [0, -1, 2.0, None, True], "gate": [0, -1, 2.0, True],
        "bottleneck": [0, 3, 8, -1, 2.0, True], "l_max": [0, -1, 9.0, "9"], "bidirectional": [None, 1, "no"]},
    ("lssl", "LSSL"): SIZES | EVEN_OR_ODD | DT | LR | {
        "measure": ["fout", "diag-lin", "LegS", None, 0], "alpha": [-0.1, 1.1, NAN, INF, "0.5", None],
        "channels": [0, -1, 2.0, None, True], "train_A": ["No", "all", True, None],
        "train_dt": [None, 1, "no"]},
    ("dss", "DSS"): SIZES | EVEN_OR_ODD | DT | LR | {
        "version": ["Softmax", "zoh", None, 0], "l_max": [0, -1, 9.0, INF, None, True]},
    ("gss", "GSS"): SIZES | EVEN_OR_ODD | DT | LR | {
        "expand": [0, -1, 2.0, None, True], "bottleneck": [0, 3, 8, -1, 2.0, None, True],
        "measure": ["rand", "diag-legs", None, 0], "gate": [None, 4, "no"], "train_B": [None, 1, "no"],
        "train_dt": [None, 1, "no"]},
    ("s5", "S5"): SIZES | DT | LR | {
        "blocks": [0, 3, 8, -1, 2.0, None, True], "C_init": ["lecun", None, 0], "disc": ["ZOH", "dss", None],
        "step_rescale": [0.0, -1.0, NAN, INF, "1", None, True], "conj_sym": [None, 1, "no"],
        "clip_eigs": [None, 1, "no"], "bidirectional": [None, 1, "no"]},
    ("lru", "LRU"): SIZES | EVEN_OR_ODD | LR | {
        "r_min": [-0.1, 1.0, 2.0, NAN, "0", None], "r_max": [0.0, 1.1, NAN, INF, "1", None, True],
        "max_phase": [0.0, -1.0, NAN, INF, "1", None, True]},
    ("selective_scan", "SelectiveSSM"): SIZES | EVEN_OR_ODD | DT | LR | {
        "dt_rank": [0, -1, 2.0, "Auto", None, True]},
    ("selective_scan", "Mamba"): SIZES | EVEN_OR_ODD | DT | LR | {
        "dt_rank": [0, -1, 2.0, "Auto", None, True], "d_conv": [0, -1, 4.0, None, True],
        "expand": [0, -1, 2.0, None, True]},
}


@pytest.mark.parametrize("module, cls", BAD, ids=lambda x: x)
def test_bad_constructor_arguments(module, cls):
    constructor = getattr(importlib.import_module(module), cls)
    for argument, values in BAD[module, cls].items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{argument} = ") as caught:
                constructor(**({"d_model": 4, "d_state": 8} | {argument: value}))
            assert ":" in str(caught.value), "the message names no remedy"
    with pytest.raises(TypeError):
        constructor(4, 8, unknown=1)


MODELS = sorted({module for module, _ in BAD})


@pytest.mark.parametrize("module", MODELS)
def test_model_file_alone(module, tmp_path):
    (tmp_path / f"{module}.py").write_bytes((ROOT / f"{module}.py").read_bytes())
    silent = subprocess.run([sys.executable, "-W", "error", "-c", f"import {module}"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    run = subprocess.run([sys.executable, f"{module}.py", "figure.png"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    rows = re.findall(r"^(\S.*?) {2,}(\d\.\de[+-]\d\d) +[\d.]+$", run.stdout, re.M)
    exact = {name: float(error) for name, error in rows if "second" not in name}
    assert len(exact) >= 3 and max(exact.values()) <= 1e-5, run.stdout


@pytest.mark.parametrize("module", MODELS)
def test_how_a_file_reads(module):
    text = (ROOT / f"{module}.py").read_text()
    assert max(map(len, text.splitlines())) <= 110
    assert not re.search(r"\b(assert|TODO|FIXME)\b|\*\*kwargs", text)
    assert not [m for m in re.findall(r"^\s*(?:from|import) (\w+)", text, re.M)
                if m not in ("torch", "numpy", "matplotlib") and m not in sys.stdlib_module_names]


def test_shared_code_is_the_same_to_the_letter():
    """A function of one name has one text in all model files, so that a reader recognises it."""
    found = {}
    for module in MODELS:
        text = (ROOT / f"{module}.py").read_text()
        for name, body in re.findall(r"^def (\w+)(.*?)(?=^\S)", text, re.M | re.S):
            found.setdefault(name, {}).setdefault(body.rstrip(), []).append(module)
    assert not {name: list(texts.values()) for name, texts in found.items() if len(texts) > 1 and name != "demo"}
    assert len(found["require"].popitem()[1]) == len(MODELS)


def test_mutations_are_up_to_date():
    """Each line that mutations.py breaks stands exactly once in its file."""
    for file, what, text, broken, _ in MUTATIONS:
        assert (ROOT / f"{file}.py").read_text().count(text) == 1 and broken != text, (file, what)
