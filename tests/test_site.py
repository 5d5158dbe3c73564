"""The site builds without a broken link, has every public name, and is seen in a browser as a reader sees it."""

import functools
import http.server
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mkdocs.structure.files import Files

import hf_gradutils
import hf_gradutils.errors
import hf_gradutils.plots
from tests.harness import browser

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

SOURCES = ("docs", "hf_gradutils", "mkdocs.yml", *(path.name for path in ROOT.glob("*.md")))


def build(folder, site):
    """Run mkdocs strictly in a copy of the repository; what it said, None if it was content."""
    # Its formatter of signatures is looked for on the path.
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("REPOSITORY_URL", None)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.stderr if done.returncode else None


def copy_of_the_sources(folder):
    for name in SOURCES:
        path = ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / name)
    for name in ("recipes", "configs", "tests", "benchmarks"):  # links lead there
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    assert build(ROOT, folder) is None
    return folder


PLANTED = {
    "a page that is not there": ("docs/sync.md", "[x](gone.md)", "'gone.md'"),
    "an anchor that is not there": ("docs/sync.md", "[x](exactness.md#gone)", "'exactness.md#gone'"),
    "an anchor of its own": ("README.md", "[x](#gone)", "'#gone'"),
    "a page that the README names": ("README.md", "[x](docs/gone.md)", "docs/gone.md"),
    "a file of the repository": ("docs/sync.md", "[x](../recipes/gone.py)", "recipes/gone.py"),
    "a picture": ("README.md", '<img src="docs/gone.png">', "docs/gone.png"),
    "a page without a place": ("docs/new.md", "# New", "new.md"),
}
"""Each with a file, a line at its end, and a pattern of the complaint."""


def test_broken_links_and_pages_without_a_place_fail(tmp_path):
    sources = copy_of_the_sources(tmp_path)
    assert build(sources, tmp_path / "as_it_is") is None, "the control"
    for page, line, _ in PLANTED.values():
        with (sources / page).open("a") as file:
            file.write(f"\n\n{line}\n")
    complaint = build(sources, tmp_path / "site")
    assert complaint is not None
    missed = [title for title, (_, _, pattern) in PLANTED.items() if not re.search(pattern, complaint)]
    assert missed == [], complaint


def test_links_out_of_the_pages_lead_to_pages_of_the_site(site):
    page = (site / "index.html").read_text()
    for target in ("exactness/", "custom/#when-targets-are-counted", "architecture/"):
        assert f'href="{target}"' in page
    assert 'href="../coordination/"' in (site / "architecture" / "index.html").read_text()
    assert not [path.name for path in site.iterdir() if path.name.startswith(("_", "data"))]
    leftover = [path for path in site.rglob("*.html") if re.search(r'href="[^":]*\.(md|py)["#]', path.read_text())]
    assert leftover == []


def test_links_to_other_files_lead_to_the_repository_where_that_is_known():
    place = runpy.run_path(str(ROOT / "docs" / "_site.py"))["_place"]
    link = ("../recipes/minimal.py#L3", "docs/sync.md")
    assert place(*link, "https://forge/x/", Files([])) == "https://forge/x/blob/HEAD/recipes/minimal.py#L3"
    assert place(*link, "", Files([])) is None


def test_every_public_name_is_described(site):
    pages = " ".join(path.read_text() for path in (site / "api").rglob("*.html"))
    wanted = [f"hf_gradutils.{name}" for name in hf_gradutils.__all__]
    wanted += [f"hf_gradutils.plots.{name}" for name in hf_gradutils.plots.__all__]
    wanted += [f"hf_gradutils.errors.{name}" for name in vars(hf_gradutils.errors) if name.endswith("Error")]
    wanted += ["hf_gradutils.sync.SyncContext", "hf_gradutils.sync.discard_deferred"]
    wanted += ["hf_gradutils.window.AccumulationWindow", "hf_gradutils.window.WindowReport"]
    wanted += ["hf_gradutils.GradUtilsAccelerator.backward_whole_batch"]
    assert [name for name in wanted if f'id="{name}"' not in pages] == []
    assert {"plot_report", "read_runs"} <= set(hf_gradutils.plots.__all__)


def test_no_page_of_the_api_is_called_by_the_path_of_a_module(site):
    titles = re.findall(
        r"<title>(.*?) - hf_gradutils</title>", " ".join(p.read_text() for p in site.glob("api/*/*.html"))
    )
    assert {"Programs", "Trainers", "plots"} <= set(titles)
    assert [title for title in titles if "." in title] == []


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def tab(tmp_path, address):
    with browser.open_tab(found_browser(), tmp_path) as opened:
        yield opened


def found_browser():
    return browser.find_browser() or pytest.fail("no browser; make docs-test installs one")


def test_without_a_browser_what_needs_one_fails(monkeypatch):
    monkeypatch.setattr(browser, "find_browser", lambda: None)
    with pytest.raises(pytest.fail.Exception, match="make docs-test"):
        found_browser()


@pytest.mark.parametrize(("options", "are_run"), [((), False), (("--browser",), True)])
def test_what_needs_a_browser_is_run_where_it_is_asked_for(options, are_run):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *options, "tests/test_site.py"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert ("test_a_reader_sees" in done.stdout) == are_run
    assert "test_every_public_name_is_described" in done.stdout
    assert "--browser" in re.search(r"^docs-test:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


@pytest.mark.browser
def test_a_reader_sees_three_pages_and_finds_a_word(tab, address):
    tab.open(address)
    assert tab.ask("document.title") == "hf_gradutils"
    assert "Why: the mean of means is not the mean" in tab.ask("document.querySelector('article').innerText")
    assert tab.ask("document.querySelectorAll('nav .md-tabs__item').length") == 6
    tab.ask("document.querySelector('input.md-search__input').focus()")
    tab.call("Input.insertText", text="scheduler")
    found = tab.wait_for("document.querySelector('.md-search-result__list')?.innerText")
    assert "scheduler" in found
    assert tab.ask("document.querySelectorAll('.md-search-result__item a').length") > 1

    tab.open(address + "api/trainers/")
    assert tab.ask("document.title") == "Trainers - hf_gradutils"
    assert "GradUtilsSeq2SeqTrainer" in tab.ask("document.querySelector('article h2').innerText")
    assert "grad_plugin" in tab.ask("document.querySelector('article').innerText")

    tab.open(address + "exactness/")
    assert tab.ask("document.title").startswith("Exactness: every head in every layout")
    tab.ask("document.querySelector('details summary').click()")
    assert tab.ask("document.querySelector('details table').offsetHeight") > 500
    assert tab.ask("document.querySelector('article table td').innerText") == "one_rank"

    assert tab.complaints == []


@pytest.mark.browser
def test_what_a_page_lacks_is_seen(tab, address, site):
    broken = site / "broken"
    broken.mkdir()
    (broken / "index.html").write_text("<script src='/gone.js'></script><script>nothing()</script>")
    tab.open(address + "broken/")
    tab.wait_for("document.readyState === 'complete'")
    shutil.rmtree(broken)
    complaints = " ".join(tab.complaints)
    assert "404" in complaints
    assert "nothing is not defined" in complaints
