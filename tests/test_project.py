"""Workflows, templates and pages of the project name commands, files and versions that exist."""

import datetime
import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import hf_gradutils

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(set((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) - {GITHUB / "ISSUE_TEMPLATE" / "config.yml"})
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(GITHUB.glob("*.md"))]
PAGES += [ROOT / ".pre-commit-config.yaml", *WORKFLOWS]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORD = r"[\w-]+(?![\w=-])"  # and not the name of a variable
IN_CODE = re.compile(rf"(?:^ *|`|run: |entry: |&& )make((?: {WORD})+)", re.MULTILINE)


def load(path):
    return yaml.safe_load(path.read_text())


def targets():
    return set(re.findall(rf"^({WORD}):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def unknown_targets(text):
    return [name for names in IN_CODE.findall(text) for name in names.split() if name not in targets()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_make_targets_that_a_page_names_exist(page):
    assert unknown_targets(page.read_text()) == []


def test_targets_that_do_not_exist_are_found():
    text = "`make test` and `make tests`\nmake gone check\n    - run: make lost A=b\n        entry: make format"
    assert unknown_targets(text) == ["tests", "gone", "lost"]
    text = "`make test_fast`, `make test2 TORCH=torch==2.11.0`, `make testAll`, `make test-`, `make test-fast-2`"
    assert unknown_targets(text) == ["test_fast", "test2", "testAll", "test-", "test-fast-2"]
    assert {"check", "docs-test", "tag-check", "test-fast"} <= targets()
    named = {name for page in PAGES for names in IN_CODE.findall(page.read_text()) for name in names.split()}
    assert {"check", "docs", "format", "test", "test-fast", "test-gpu", "test-wide"} <= named


def test_every_target_is_phony_and_explained():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    explained = set(re.findall(rf"^({WORD}):.*##", makefile, re.MULTILINE))
    assert set(phony.split()) == targets() == explained


# ---- Workflows ----


JOBS = [pytest.param(job, id=f"{path.stem}-{name}") for path in WORKFLOWS for name, job in load(path)["jobs"].items()]


def commands(job):
    """What a job runs, with the values of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    cells = matrix.get("include") or [{name: value} for name, values in matrix.items() for value in values] or [{}]
    for cell in cells:
        for step in job["steps"]:
            if "run" in step:
                yield re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name, cell=cell: cell[name[1]], step["run"])


@pytest.mark.parametrize("job", JOBS)
def test_a_job_runs_make_and_known_actions_within_a_limit(job):
    assert job["timeout-minutes"] <= 90
    for step in job["steps"]:
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1", step["uses"])
    for command in commands(job):
        assert re.fullmatch(rf"make(?: {WORD})+(?: [A-Z]+=[\w.=-]+)*", command)
        assert unknown_targets(f"run: {command}") == []


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_make_knows_how_to_do_what_a_job_runs(job):
    for command in commands(job):
        subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_only_the_job_that_publishes_has_a_right_beyond_reading():
    rights = {}
    for path in WORKFLOWS:
        workflow = load(path)
        assert workflow["permissions"] == {"contents": "read"}
        rights |= {
            f"{path.stem}-{name}": job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job
        }
    assert rights == {"publish-publish": {"id-token": "write"}}


def test_the_workflow_tests_the_versions_that_are_called_supported():
    of = load(GITHUB / "workflows" / "ci.yml")["jobs"]
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) and newer \| (.*) \|$", page_on_versions(), re.MULTILINE)
    declared = {name: oldest for name, oldest, _ in rows}
    tested = {name: cell.split(", ") for name, _, cell in rows}
    asked = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", name).groups() for name in PROJECT["dependencies"])
    assert declared == asked | {"Python": PROJECT["requires-python"].removeprefix(">=")}
    pythons = of["fast"]["strategy"]["matrix"]["python"]
    assert declared["Python"] == pythons[0]
    fast = f"the fast lane on {', '.join(pythons[:-1])} and {pythons[-1]}"
    assert ", ".join(tested.pop("Python")) == f"the whole suite on {pythons[0]}; the workflow runs {fast}"
    assert f"Programming Language :: Python :: {pythons[0]}" in PROJECT["classifiers"]
    pairs = of["suite"]["strategy"]["matrix"]["include"]
    assert pairs[0] == {name: f"{name}=={declared[name]}.0" for name in ("torch", "transformers")}
    assert f"TORCH  ?= {pairs[1]['torch']}" in (ROOT / "Makefile").read_text()
    for name in ("torch", "transformers"):
        minors = dict.fromkeys(re.fullmatch(rf"{name}==(\d+\.\d+)\.\d+", pair[name])[1] for pair in pairs)
        assert tested[name] == list(minors)
    commands = re.findall(r"^make test (.*)$", page_on_versions(), re.MULTILINE)
    assert commands == [f"TORCH={pair['torch']} TRANSFORMERS={pair['transformers']}" for pair in pairs]
    for name, versions in tested.items():
        installed = importlib.metadata.version(name)
        assert all(at_least(version, declared[name]) for version in [*versions, installed]), name
        assert at_least(installed, versions[0]), f"{versions[0]} of {name} was not what make installs"


def page_on_versions():
    return (ROOT / "docs" / "stability.md").read_text()


def at_least(version, other):
    first, second = ([int(part) for part in re.findall(r"\d+", name)[:2]] for name in (version, other))
    return first >= second


# ---- Versions and templates ----


def test_versions_agree():
    version = hf_gradutils.__version__
    citation = load(ROOT / "CITATION.cff")
    assert citation["version"] == version
    (date,) = re.findall(rf"^## {re.escape(version)} \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert date == citation["date-released"]
    assert datetime.date.fromisoformat(date)


TAG = f"v{hf_gradutils.__version__}"
NO_FAULT = ("CITATION.cff", "", "")
FAULTS = {
    "nothing": (TAG, NO_FAULT, ""),
    "another tag": ("v9.9.9", NO_FAULT, "the tag is 'v9.9.9'"),
    "no tag": ("", NO_FAULT, "the tag is ''"),
    "the citation": (TAG, ("CITATION.cff", "version: ", "version: 9."), "CITATION.cff has another version"),
    "the changelog": (TAG, ("CHANGELOG.md", f"## {TAG[1:]} (", f"## {TAG[1:]}.1 ("), "CHANGELOG.md has no section"),
    "no date": (TAG, ("CHANGELOG.md", f"## {TAG[1:]} (", f"## {TAG[1:]}, unreleased ("), "CHANGELOG.md has no section"),
}
"""What is wrong → the tag, a change to a file, and the complaint."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_tag_is_compared_with_the_version(fault, tmp_path):
    tag, (name, before, after), complaint = FAULTS[fault]
    (tmp_path / "hf_gradutils").mkdir()
    for file in ("Makefile", "CITATION.cff", "CHANGELOG.md", "hf_gradutils/__init__.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    text = (tmp_path / name).read_text()
    assert before in text
    (tmp_path / name).write_text(text.replace(before, after) if before else text)
    done = subprocess.run(["make", "tag-check", f"TAG={tag}"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == (not complaint)
    assert complaint in done.stdout


def test_the_citation_has_the_fields_of_the_format():
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"authors", "message", "title"} <= citation.keys()
    assert all(author.get("name") or author.get("family-names") for author in citation["authors"])
    assert citation["license"] == PROJECT["license"]
    assert isinstance(citation["version"], str)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issues_are_asked_for_what_the_commands_print(path):
    form = load(path)
    assert form["name"]
    assert form["description"]
    fields = {part["id"]: part["attributes"] for part in form["body"] if part["type"] != "markdown"}
    assert len(fields) == len([part for part in form["body"] if part["type"] != "markdown"])
    assert all(field["label"] for field in fields.values())
    assert "`hf-gradutils env`" in fields["env"]["label"]
    assert "`hf-gradutils check`" in fields["check"]["label"]


def test_the_hooks_before_a_commit_are_this_machine_s():
    repositories = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    assert {hook["language"] for hook in repositories[0]["hooks"]} == {"system"}


# ---- Sentences of the pages ----


def test_what_the_tests_read_is_in_the_source_archive():
    archive = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"][
        "include"
    ]
    read = {path.relative_to(ROOT).parts[0] for path in [*PAGES, *FORMS]}
    assert read | {"hf_gradutils", "tests", "recipes", "benchmarks", "configs", "Makefile", "mkdocs.yml"} <= set(
        archive
    )
    assert [name for name in archive if not (ROOT / name).exists()] == []


FILES = [*(ROOT / f"{name}.md" for name in ("AGENTS", "CHANGELOG", "CONTRIBUTING", "SECURITY", "docs/stability"))]
FILES += [ROOT / "Makefile", *WORKFLOWS, *FORMS, *sorted(GITHUB.glob("*.md"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_lines_but_those_of_tables_have_at_most_120_characters(path):
    lines = path.read_text().splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("| ")] == []


def test_the_environment_is_read_where_the_pages_say():
    read = re.compile(r"\benviron(?:\.get\b|\[)|\bgetenv\b")
    package = ROOT / "hf_gradutils"
    files = [path.relative_to(package) for path in package.rglob("*.py") if read.search(path.read_text())]
    assert Path("_environment.py") in files
    assert {path.parts[0] for path in files} <= {"_environment.py", "programs"}


def test_pre_commit_is_among_the_tools():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"]
    assert any(str(tool).startswith("pre-commit") for tool in tools)
    assert "`.venv/bin/pre-commit install`" in (ROOT / "CONTRIBUTING.md").read_text()
