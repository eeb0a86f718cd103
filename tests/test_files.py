"""The files as files: a model file alone in an empty directory, silence, style."""

import inspect
import re
import subprocess
import sys

import pytest

import benchmark
import test_options
from layers import CASES, ROOT
from mutations import MUTATIONS

MODELS = sorted({case.layer.split(".")[0] for case in CASES})


@pytest.mark.parametrize("module", MODELS)
def test_model_file_alone(module, tmp_path):
    (tmp_path / f"{module}.py").write_bytes((ROOT / f"{module}.py").read_bytes())
    code = (f"import {module}, runpy\nprint('imported')\n"
            f"runpy.run_path('{module}.py', run_name='__main__')")
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, text=True,
                         capture_output=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    assert run.stdout.startswith("imported")                # nothing is printed before
    rows = re.findall(r"^(\S.*?) +differ by (\S+)$", run.stdout, re.M)
    exact = {name: float(error) for name, error in rows if "rate" not in name}
    assert len(exact) >= 2 and max(exact.values()) <= 1e-5, run.stdout
    assert len(rows) > len(exact), run.stdout
    assert max(float(error) for _, error in rows) <= 0.1, run.stdout


@pytest.mark.parametrize("module", MODELS)
def test_how_a_file_reads(module):
    text = (ROOT / f"{module}.py").read_text()
    assert max(map(len, text.splitlines())) <= 92
    assert not re.search(r"\b(assert|TODO|FIXME)\b|\*\*kwargs", text)
    assert not [m for m in re.findall(r"^\s*(?:from|import) (\w+)", text, re.M)
                if m != "torch" and m not in sys.stdlib_module_names]


def test_shared_code_is_the_same_to_the_letter():
    """A function of one name has one text in all model files: a reader recognises it.
    But for these: in s4.py A_bar may be a diagonal, in lssl.py never, elsewhere always; A
    starts where each file says; and a state is complex or real, a rate one number or more."""
    different = ("squares", "times", "matvec", "free_response", "last_state", "initial_A",
                 "check_input", "check_rate")
    found = {}
    for module in MODELS:
        text = (ROOT / f"{module}.py").read_text()
        for name, body in re.findall(r"^def (\w+)(.*?)(?=^\S)", text, re.M | re.S):
            found.setdefault(name, {}).setdefault(body.rstrip(), []).append(module)
    for name, texts in found.items():
        assert len(texts) == 1 or name in different, (name, list(texts.values()))
    assert len(found["check"].popitem()[1]) == len(MODELS)


def test_mutations_are_up_to_date():
    """Each line that mutations.py breaks stands exactly once in its file."""
    for file, what, text, broken, _ in MUTATIONS:
        count = (ROOT / f"{file}.py").read_text().count(text)
        assert count == 1 and broken != text, (file, what)


# options that have no wrong value, for they are true or false, but for l_max of s4.py, which
# is refused with disc dss alone (test_s4.py); and those that change only how the layer is
# trained (test_options.py: test_what_is_trained_slowly)
SWITCHES = {"l_max", "real_random", "imag_random", "bidirectional", "train_dt", "train_B",
            "gate", "conj_sym", "clip_eigs", "bias", "conv_bias"}
TRAINING = {"lr", "train_A", "train_dt"}


@pytest.mark.parametrize("name", sorted(test_options.BAD))
def test_every_option_is_explained_and_tested(name):
    """An option of a constructor stands in the docstring of its class, and has a value that
    changes the output and one that is refused (CHANGES and BAD in test_options.py)."""
    cls = test_options.constructor(name)
    options = set(inspect.signature(cls).parameters)
    docs = inspect.getdoc(cls)
    if cls.__base__.__module__ == cls.__module__:       # Mamba: the others as in the base
        docs += inspect.getdoc(cls.__base__)
    explained = set()
    for names in re.findall(r"^ *((?:\w+, )*\w+): ", docs, re.M):
        explained |= set(names.split(", "))
    assert options <= explained, options - explained
    changed = {"d_model", "d_state"} | TRAINING
    for change in test_options.CHANGES[name]:
        changed |= set(change)
    tested = " ".join(str(case.options) for case in CASES if case.layer == name)
    tested += (ROOT / "tests" / f"test_{name.split('.')[0]}.py").read_text()
    missing = {option for option in options - changed if option not in tested}
    assert not missing, f"changes nothing in CHANGES or any test: {missing}"
    missing = options - SWITCHES - set(test_options.BAD[name])
    assert not missing, f"no wrong value in BAD: {missing}"


def test_benchmark(tmp_path, monkeypatch, capsys):
    """The rows of s4d.py and the table of operators, small, into a temporary file."""
    small = {"H": 8, "N": 8, "L": 64, "BATCH": 2, "OPERATORS": {"s4d": "S4D"},
             "MARKDOWN": tmp_path / "benchmark.md"}
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    benchmark.main(["s4d", "--quick", "--markdown"])
    text = small["MARKDOWN"].read_text()
    assert "| s4d: kernel f+b" in text and "| s4d |" in text
    assert "differ" not in capsys.readouterr().out      # both sides of a row: same numbers
