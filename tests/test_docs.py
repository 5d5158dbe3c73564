"""The examples of the documentation run as they stand."""

import os
import re
from pathlib import Path

import accelerate  # noqa: F401
import pytest
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

import hf_gradutils.trainer  # what is imported here is loaded in the process that the examples start from
from tests.harness.ranks import run_ranks

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^(?P<not_run><!-- not run -->\s*)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
NO_LAUNCHER = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def examples():
    for page in sorted(DOCS.glob("*.md")):
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
    for page in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for target in re.findall(r"\]\(([^)#]+\.md)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name} → {target}"
