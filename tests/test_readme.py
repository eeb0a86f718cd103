"""README.md: its Python blocks print what they say, what it names exists."""

import contextlib
import io
import re

from layers import ROOT

TEXT = (ROOT / "README.md").read_text()


def test_python_blocks_print_what_their_comments_say():
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    assert len(blocks) >= 5
    namespace = {}
    for code in blocks:
        if "official" in code:                  # run by test_checkpoints.py
            continue
        assert len(code.splitlines()) <= 25
        expected = re.findall(r"^print\(.*\) +# (.*)$", code, re.M)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code, namespace)
        assert output.getvalue().splitlines() == expected and expected, code


def test_the_two_commands_stand_in_the_first_ten_lines():
    head = "\n".join(TEXT.splitlines()[:10])
    assert "pip install -r requirements.txt && python example.py --model s4d" in head
    assert "python -m pytest tests" in head


def test_links_and_files_exist():
    prose = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)   # net[0](u) is no link
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for name in re.findall(r"`(?:python )?((?:tests/)?\w+\.py)", TEXT):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
