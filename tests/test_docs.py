"""The examples of the documentation run as they stand."""

import os
import re
import textwrap
import tomllib
from pathlib import Path

import accelerate  # noqa: F401
import pytest
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

import hf_gradutils.trainer  # what is imported here is loaded in the process that the examples start from
from tests.harness.ranks import run_ranks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*.md"))]
ONE_SCRIPT = DOCS / "custom.md"
"""Its blocks need those before; tests/test_custom_page.py runs them."""
BLOCK = re.compile(r"^(?P<not_run><!-- not run -->\s*)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
NO_LAUNCHER = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def examples():
    for page in sorted(set(DOCS.glob("*.md")) - {ONE_SCRIPT}):
        text = page.read_text()
        for block in BLOCK.finditer(text):
            if not block["not_run"]:
                yield pytest.param(block["code"], id=f"{page.name}:{text.count(chr(10), 0, block.start('code')) + 1}")


@pytest.mark.parametrize("code", list(examples()))
def test_the_example_runs(code, tmp_path):
    run_ranks(_execute, 1, code, str(tmp_path), init=False, env=NO_LAUNCHER)


def _execute(code, folder):
    os.chdir(folder)
    exec(compile(code, "the example", "exec"), {"__name__": "__main__"})


def test_examples_are_found_and_those_marked_so_are_not_run():
    text = "x\n```python\nrun()\n```\ny\n\n<!-- not run -->\n```python\nleft_out()\n```\n```bash\nls\n```\n"
    found = {block["code"]: bool(block["not_run"]) for block in BLOCK.finditer(text)}
    assert found == {"run()\n": False, "left_out()\n": True}
    assert any("sync.md" in parameter.id for parameter in examples())


def test_the_errors_of_the_page_on_errors_exist():
    package = Path(hf_gradutils.__file__).parent
    sources = " ".join(path.read_text() for path in package.rglob("*.py"))
    # A message may be broken into several literals.
    sources = re.sub(r'"\s*f?"', "", sources)
    wanted = re.findall(r'^### "(.*)"$', (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(wanted) > 10
    assert [text for text in wanted if text not in sources] == []


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+\.md)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name} → {target}"


def test_the_readme_shows_the_step_of_the_smallest_recipe():
    blocks = [block["code"] for block in BLOCK.finditer((ROOT / "README.md").read_text())]
    (step,) = [code for code in blocks if "get_sync_ctx(" in code]
    assert textwrap.indent(step, "    ") in (ROOT / "recipes" / "minimal.py").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page):
    assert missing_files(page.read_text()) == []


def test_files_that_do_not_exist_are_found():
    text = "`tests/test_docs.py`, (recipes/gone.py), `python -m benchmarks.gone`, bash tests/harness, configs/no.yaml."
    assert missing_files(text) == ["recipes/gone.py", "configs/no.yaml", "benchmarks/gone"]


def missing_files(text):
    """Files and modules of the repository that the text names and that are not there."""
    named = re.findall(r"\b((?:tests|recipes|benchmarks|configs|docs|hf_gradutils)/[\w/.-]*\w)", text)
    named += [module.replace(".", "/") for module in re.findall(r"-m (benchmarks[\w.]*\w)", text)]
    return [name for name in named if not any((ROOT / (name + end)).exists() for end in ("", ".py"))]


def test_the_architecture_draws_the_contract_and_every_file():
    tree = (ROOT / "ARCHITECTURE.md").read_text().split("```")[1]
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = re.split(r"^(?=\d)", tree, flags=re.MULTILINE)[1:]
    drawn = {int(layer.split()[0]): set(re.findall(r"^(?:\d+| ) (\w+)", layer, re.MULTILINE)) for layer in layers}
    assert drawn == {n: set(layer.split(" | ")) for n, layer in enumerate(reversed(contract["layers"]))}
    for package, lines in re.findall(r"^[\d ] (\w+)/ .*\n((?: {4}.*\n)*)", tree, re.MULTILINE):
        files = {path.name for path in (ROOT / "hf_gradutils" / package).glob("*.py")} - {"__init__.py"}
        assert sorted(re.findall(r"\w+\.py", lines)) == sorted(files), package


def test_the_ways_of_the_architecture_name_files_that_exist():
    ways = (ROOT / "ARCHITECTURE.md").read_text().partition("## Six ways")[2]
    lines = [line for block in ways.split("```")[1::2] for line in block.splitlines()]
    named = [path for line in lines for path in re.findall(r"\b[a-z]+/\w+\.py", line)]
    assert len(named) > 30
    assert [path for path in named if not (ROOT / "hf_gradutils" / path).is_file()] == []
