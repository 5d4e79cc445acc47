"""English text that every Python installation carries: its help topics and the docstrings of its library.

Nothing is imported from the modules that are read: their source is parsed with ``ast``. The split into
training and held-out documents hangs on each document's name, so a Python release that adds or changes a
document does not move the others from one side to the other.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

SPLIT_SEED = 20261
HELD_OUT_SHARE = 0.08
SHORTEST_DOCUMENT = 400  # characters; below that a document is little more than a signature
SHORTEST_DUPLICATE = 60  # characters; shorter paragraphs ("Example:") repeat without giving anything away
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "__pycache__",
}


def training_documents() -> list[str]:
    """Return the documents the model is trained on, in a fixed order."""
    return [text for name, text in _documents() if not _is_held_out(name)]


def held_out_documents() -> list[str]:
    """Return the documents the model never sees, in a fixed order; no long paragraph occurs in both parts."""
    return [text for name, text in _documents() if _is_held_out(name)]


@cache
def _documents() -> tuple[tuple[str, str], ...]:
    """Return ``(name, text)`` of every document, each long paragraph only where it comes first."""
    seen: set[str] = set()
    documents = []
    for name, text in [*_help_topics(), *_module_docstrings()]:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            # Help topics quote each other at length; spacing is ignored because they indent the quotation.
            key = " ".join(paragraph.split())
            if len(key) < SHORTEST_DUPLICATE or key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        kept = "\n\n".join(paragraphs).strip() + "\n"
        if len(kept) >= SHORTEST_DOCUMENT:
            documents.append((name, kept))
    return tuple(documents)


def _help_topics() -> Iterator[tuple[str, str]]:
    for name in sorted(topics):
        yield f"topic:{name}", topics[name]


def _module_docstrings() -> Iterator[tuple[str, str]]:
    """Yield every module's docstrings, in the order of the source, as one document."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts):
            yield f"module:{relative.as_posix()}", "\n\n".join(_docstrings(path))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # lib2to3 and the like keep deliberately broken files
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in _statements(tree) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield inspect.cleandoc(text)


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and the statements in it; expressions hold no documented ones, and are most of a file."""
    yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        inner = getattr(node, block, ())
        for child in inner if isinstance(inner, list) else ():
            yield from _statements(child)


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(f"{SPLIT_SEED}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64
