"""What `mkdocs build` makes from other files: start page, command line, signals, notes, changelog, the small GPT.

Each text has one source. The start page is the first part of README.md, the command line is read from the typer app,
the signals from their table. Links are rewritten from the place of the source to that of the page.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

ROOT = Path(__file__).resolve().parents[2]
FIRST_SCREEN = "<!-- end of the first screen -->"
PAGES = {"NOTES.md": "notes.md", "CHANGELOG.md": "changelog.md", "examples/small_gpt/README.md": "small-gpt.md"}
LINK = re.compile(r"(\]\()([^)\s#:]+\.(?:md|png|svg))(#[^)\s]*)?(\))")  # relative ones only: no scheme


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from other files."""
    root = Path(config.config_file_path).parent
    texts = {page: (root / source).read_text("utf-8") for source, page in PAGES.items()}
    texts = {
        page: moved(text, source, page) for (source, page), text in zip(PAGES.items(), texts.values(), strict=True)
    }
    texts["index.md"] = start_page(root)
    texts["commands.md"], texts["signals.md"] = from_code(root)
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/ (``../NOTES.md``) point to the page made from that file."""
    source = page.file.src_uri
    return markdown if page.file.generated_by else moved(markdown, f"docs/{source}", source)


def moved(text: str, source: str, page: str) -> str:
    """Return ``text`` with its links as seen from ``page``, where it stood in the file ``source`` of the repository."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else f"docs/{target}")
        if target == "docs/README.md":
            target = "index.md"
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(page) or '.')}{match[3] or ''}{match[4]}"

    return LINK.sub(link, text)


def start_page(root: Path) -> str:
    """Return README.md up to the end of its first screen, and what follows it on the site alone."""
    readme = (root / "README.md").read_text("utf-8")
    if FIRST_SCREEN not in readme:
        raise PluginError(f"README.md has no line {FIRST_SCREEN!r}; the start page ends there.")
    first = moved(readme.split(FIRST_SCREEN)[0], "README.md", "index.md")
    further = (root / "docs" / "site" / "start.md.in").read_text("utf-8")
    return f"---\ntitle: peelwise\nhide: [toc]\n---\n\n{first}\n{further}"


def from_code(root: Path) -> tuple[str, str]:
    """Return the pages of the command line and of the signals. Nothing here imports torch."""
    sys.path.insert(0, str(root / "src"))
    try:
        from peelwise.cli.main import app
        from peelwise.show.signals import page

        return commands(app), page()
    finally:
        sys.path.remove(str(root / "src"))


def commands(app: typer.Typer) -> str:
    """Return the page of the command line, as typer writes it."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(
        obj=command, ctx=typer.Context(command, info_name="peelwise"), name="peelwise", title="Command line"
    )
    for name in command.commands:
        text = text.replace(f"* `{name}`: ", f"* [`{name}`](#peelwise-{name}): ", 1)
    return text.replace("```console", "```{ .console .no-copy }")
