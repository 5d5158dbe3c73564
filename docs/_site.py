"""Hooks of mkdocs: pages from the top folder, the API reference, and links that work on a forge and on the site.

Pages link to files as they lie in the repository, which a forge follows. Here such a link becomes one to the page that
the file makes; a link to another file leads to the repository (``repo_url``), or is text where that is not set. A link
to a file that does not exist is a warning, which fails the strict build.
"""

import logging
import posixpath
import re
import runpy
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LOG = logging.getLogger("mkdocs.hooks.site")
_ROOT = Path(__file__).parent.parent

_TOP_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "hf_gradutils/coordination/README.md": "coordination.md",
}
"""File of the repository → page of the site."""

_TITLES = {
    "accelerator": "Accelerator",
    "coordination": "First ranks and barriers",
    "coordination.route": "First ranks and barriers",
    "dist_utils": "dist_utils",
    "grad_utils": "grad_utils",
    "invariance": "Checks of invariance",
    "programs.blocks": "Programs",
    "trainer": "Trainers",
}
"""Module of public names → title of the page that describes them; another module's is its name."""

_MODULES = {
    "errors": (),
    "plots": (),
    "sync": ("SyncContext", "discard_deferred"),
    "window": ("AccumulationWindow", "WindowReport"),
}
"""Public module → its documented names; () are all of them, those in ``__all__`` if there is one."""

_WITH_INHERITED = ("GradUtilsAccelerator",)
"""Classes whose bases are internal and described nowhere else."""

_OVERVIEW = """# API

Names of `hf_gradutils`, from their docstrings. [Stability](../stability.md) says what is promised of them.
"""

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s]+)\)")
_ATTRIBUTE = re.compile(r'(?P<name>\b(?:src|srcset|href))="(?P<target>[^"\s]+)"')
_ROLE = re.compile(r":(?:attr|class|func|meth|mod):(?=<code)")
_CODE = re.compile(r"^(?P<fence>```+).*?^(?P=fence)[ \t]*$|`[^`\n]+`(?!\])", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API's pages into the navigation, in place of the entry ``API: api``."""
    pages = list(_api_pages())
    config.nav = [{"API": pages} if entry == {"API": "api"} else entry for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the top folder and those of the API, and the pictures that the former show."""
    for source, page in _TOP_PAGES.items():
        if (_ROOT / source).is_file():
            files.append(File.generated(config, page, content=(_ROOT / source).read_text(encoding="utf-8")))
    for page, text in _api_pages().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Repair links, and let tables inside ``<details>`` be tables."""
    if page.file.src_uri.startswith("api/"):
        return markdown
    sources = {target: source for source, target in _TOP_PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def place(target: str) -> str | None:
        return _place(target, source, config.repo_url or "", files)

    def repaired(link: re.Match[str]) -> str:
        target = place(link["target"])
        if target is None:
            return link["text"]
        if "://" not in target and not target.startswith("#"):
            target = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"{link['image']}[{link['text']}]({target})"

    def repaired_attribute(attribute: re.Match[str]) -> str:
        path, hash_mark, anchor = (place(attribute["target"]) or "").partition("#")
        file = files.get_file_from_path(path)
        url = path if file is None else file.url_relative_to(page.file)
        return f'{attribute["name"]}="{url}{hash_mark}{anchor}"'

    def repair(text: str) -> str:
        text = text.replace("<details>", '<details markdown="1">')
        return _LINK.sub(repaired, _ATTRIBUTE.sub(repaired_attribute, text))

    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [repair(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, repair(markdown[end:])])


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles of docstrings: ``:func:`` and the like."""
    return _ROLE.sub("", html)


def _place(target: str, source: str, repository: str, files: Files) -> str | None:
    """The place of a link's target, which the file ``source`` names: in the site's files, or an address.

    None: the file is not on the site, and where the repository is is not known.
    """
    path, hash_mark, anchor = target.partition("#")
    if not path or ":" in path:
        return target
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (_ROOT / file).exists():
        _LOG.warning(f"{source} links to {target!r}, but there is no {file} in the repository")
        return None
    on_site = files.get_file_from_path(_TOP_PAGES.get(file) or file.removeprefix("docs/"))
    if on_site is not None and (file in _TOP_PAGES or file.startswith("docs/")) and on_site.inclusion.is_included():
        return f"{on_site.src_uri}{hash_mark}{anchor}"
    return f"{repository.rstrip('/')}/blob/HEAD/{file}{hash_mark}{anchor}" if repository else None


def _api_pages() -> dict[str, str]:
    """Page → its text, the overview first. Reads the public names without torch."""
    package: dict[str, Any] = runpy.run_path(str(_ROOT / "hf_gradutils" / "__init__.py"))
    by_title: dict[str, list[str]] = {}
    for module, names in package["_PLACES"].items():
        by_title.setdefault(_TITLES.get(module, module), []).extend(names)
    overview, pages = [_OVERVIEW], {"api/index.md": ""}
    for title, names in by_title.items():
        page = f"{title.lower().replace(' ', '_')}.md"
        pages[f"api/{page}"] = f"# {title}\n\n" + "\n".join(map(_block, names))
        links = ", ".join(f"[`{name}`][hf_gradutils.{name}]" for name in names)
        overview.append(f"- [{title}]({page}): {links}")
    for module, names in _MODULES.items():
        members = f"      members: [{', '.join(names)}]\n" if names else ""
        block = f"::: hf_gradutils.{module}\n    options:\n      show_root_heading: false\n{members}"
        pages[f"api/{module}.md"] = f"# {module}\n\n{block}"
        overview.append(f"- [hf_gradutils.{module}]({module}.md)")
    pages["api/index.md"] = "\n".join(overview) + "\n"
    return pages


def _block(name: str) -> str:
    """The place where mkdocstrings describes a name."""
    inherited = "    options:\n      inherited_members: true\n" if name in _WITH_INHERITED else ""
    return f"::: hf_gradutils.{name}\n{inherited}"
