"""The files as files: a model file alone in an empty directory, silence, style."""

import re
import subprocess
import sys

import pytest

from layers import CASES, ROOT
from mutations import MUTATIONS

MODELS = sorted({case.layer.split(".")[0] for case in CASES})


@pytest.mark.parametrize("module", MODELS)
def test_model_file_alone(module, tmp_path):
    (tmp_path / f"{module}.py").write_bytes((ROOT / f"{module}.py").read_bytes())

    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, text=True,
                              capture_output=True)

    silent = python("-W", "error", "-c", f"import {module}")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    run = python(f"{module}.py")
    assert run.returncode == 0, run.stderr
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
    starts where each file says; and in selective_scan.py each step has its own decay."""
    different = ("squares", "times", "free_response", "last_state", "initial_A",
                 "linear_scan")
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
