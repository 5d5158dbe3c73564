"""The docstrings of the Python standard library on this machine, as a data set.

Every function, method, class and module with a docstring becomes one row. The sources are parsed with ``ast`` and
never imported, so nothing runs and nothing is downloaded.
"""

import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Features, Value

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HELD_OUT_PERCENT = 15


def load_stdlib_docstrings(cache_dir: str) -> tuple[Dataset, Dataset]:
    """Read the docstrings, or load them from the cache, and split them by module.

    Args:
        cache_dir: Folder of the cache. The key covers the Python version, the library's folder and this file, so
            that a change of any of them reads the library again.

    Returns:
        The training and the held-out rows, with the columns ``module`` (``asyncio.tasks``), ``package``
        (``asyncio``; None for a module outside any package), ``prompt`` and ``docstring``.
    """
    library = sysconfig.get_path("stdlib")
    this_file = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    rows = Dataset.from_generator(
        read_docstrings,
        features=Features({name: Value("string") for name in ("module", "package", "prompt", "docstring")}),
        gen_kwargs={"library": library, "cache_key": f"{sys.version} {this_file}"},
        cache_dir=cache_dir,
    )
    held_out = [is_held_out(module) for module in rows["module"]]
    return (
        rows.select([row for row, out in enumerate(held_out) if not out]),
        rows.select([row for row, out in enumerate(held_out) if out]),
    )


def load_stdlib_chats(cache_dir: str) -> tuple[Dataset, Dataset]:
    """Load the docstrings as chats, in the column ``messages``: the docstring answers what an object does."""
    return tuple(rows.map(as_chat, remove_columns=rows.column_names) for rows in load_stdlib_docstrings(cache_dir))


def as_chat(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    question = {"role": "user", "content": f"What does this do?\n{row['prompt']}"}
    return {"messages": [question, {"role": "assistant", "content": row["docstring"]}]}


def is_held_out(module: str) -> bool:
    """Decide by a hash of the module's name, so that the split is the same on every machine."""
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def read_docstrings(library: str, cache_key: str) -> Iterator[dict[str, str | None]]:
    """Yield one row per documented object; duplicate texts are skipped."""
    root, seen = Path(library), set()
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parent.parts
        if SKIPPED_FOLDERS.intersection(folders):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template or a deliberately broken file
            continue
        module = ".".join(folders if path.stem == "__init__" else (*folders, path.stem))
        for prompt, docstring in documented_objects(tree, module):
            if docstring not in seen:
                seen.add(docstring)
                package = folders[0] if folders else None
                yield {"module": module, "package": package, "prompt": prompt, "docstring": docstring}


def documented_objects(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name and signature, docstring) of a module, class or function and its members."""
    docstring = ast.get_docstring(node)
    if docstring and re.search("[a-z]", docstring):
        yield headline(node, name), docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from documented_objects(child, f"{name}.{child.name}")


def headline(node: ast.AST, name: str) -> str:
    r"""Format the line that defines an object, with the qualified name.

    Example:
        >>> headline(ast.parse("def wait(fs, *, timeout=None): ...").body[0], "asyncio.tasks.wait")
        'def asyncio.tasks.wait(fs, *, timeout=None):\n'
    """
    if isinstance(node, ast.Module):
        return f"module {name}:\n"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases}):\n" if bases else f"class {name}:\n"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {name}({ast.unparse(node.args)}){returns}:\n"
