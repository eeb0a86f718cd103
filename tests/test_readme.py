"""README.md and docs/: their Python blocks print what they say, their links and files are
there, and what they say of all layers holds for all layers."""

import contextlib
import io
import re

import pytest
import torch

from layers import CASES, ROOT, error, signal           # before benchmark: sets sys.path
import benchmark

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
REMOVED = "test_exercises.py"                   # teachers may delete it


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.M | re.S)


def prose(page):
    """The page without blocks: net[0](u) is no link."""
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S)
    return re.sub(r"^    .*$", "", text, flags=re.M)


def anchors(page):
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(code, namespace):
    """What a block prints must be what the comments at its prints say."""
    expected = re.findall(r"^print\(.*\) +# (.*)$", code, re.M)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, namespace)
    assert output.getvalue().splitlines() == expected, code


def test_there_are_four_pages():
    assert PAGES == ["README.md", "docs/checkpoints.md", "docs/course.md", "docs/measured.md"]
    assert len(TEXTS["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("page", ["README.md", "docs/course.md", "docs/measured.md"])
def test_python_blocks_print_what_their_comments_say(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {}                              # those of checkpoints.md: test_checkpoints.py
    for code in blocks(page):
        assert len(code.splitlines()) <= 15
        run(code, namespace)
    assert "print(" in "".join(blocks(page)) or page == "docs/measured.md"


def test_a_newcomer_can_start_within_ten_lines():
    head = TEXTS["README.md"].splitlines()[:10]
    assert any("-m venv" in line for line in head)
    assert any("pip install -r requirements.txt" in line for line in head)
    assert any("python example.py --data builtin" in line for line in head)


@pytest.mark.parametrize("page", PAGES)
def test_links_headings_and_files_exist(page):
    here = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (here / path).resolve() if path else ROOT / page
            assert file.exists(), target
            if anchor:
                assert anchor in anchors(file.relative_to(ROOT).as_posix()), target
    for name in re.findall(r"\b((?:tests/|figures/)?\w+\.py)\b", TEXTS[page]):
        places = [ROOT / name, ROOT / "tests" / name, ROOT / "figures" / name]
        official = f"models/s4/{name}" in TEXTS[page]
        assert any(path.exists() for path in places) or official or REMOVED in name, name


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_that_the_programs_know(page):
    for file, options in re.findall(r"python (\w[\w/]*\.py)((?: [^`\n#]*)?)", TEXTS[page]):
        if (ROOT / file).exists():
            source = (ROOT / file).read_text()
            for option in set(re.findall(r"--[a-z-]+", options)) - {"--help"}:
                assert f'"{option}"' in source, (file, option)


def test_the_benchmark_writes_the_last_section_of_measured():
    rest = TEXTS["docs/measured.md"].split(benchmark.HEADING)
    assert len(rest) == 2 and rest[1].startswith("\ntests/benchmark.py on ")
    assert benchmark.MARKDOWN == ROOT / "docs" / "measured.md"


@pytest.mark.parametrize("page", PAGES)
def test_lines_fit_into_120_columns(page):
    for line in TEXTS[page].splitlines():
        assert len(line) <= 120 or line.startswith("|"), line


@pytest.mark.parametrize("cls", ["S4", "S4D", "LSSL", "DSS"])
def test_the_block_on_kernel_holds_for_each_class_that_readme_names(cls):
    code, = [code for code in blocks("README.md") if "kernel(1000)" in code]
    sentence = re.search(r"(.*) have such a kernel", TEXTS["README.md"])[1]
    assert cls in re.findall(r"\w+", sentence)
    module = __import__(cls.lower())
    torch.manual_seed(0)
    layer = getattr(module, cls)(4)
    u = torch.randn(2, 4, 1000)
    run(code.replace("layer.D", "layer.D.flatten()"), {"torch": torch, "layer": layer, "u": u})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_padding_changes_no_output_before_it_but_of_bidirectional_layers(case):
    layer = case.build()
    u = signal(2, case.h, 50)
    y, _ = layer(u)
    padded, _ = layer(torch.cat([u, signal(2, case.h, 30)], -1))    # with any numbers
    difference = error(padded[..., :50], y)
    if getattr(layer, "bidirectional", False):
        assert difference > 0.01
    else:
        assert difference <= 1e-5
