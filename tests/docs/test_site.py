"""The documentation site is built as `make docs` builds it; a broken link or reference stops the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from peelwise.records.signals import SIGNALS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("mkdocs.yml", "docs", "README.md", "NOTES.md", "CHANGELOG.md", "examples/small_gpt/README.md")
# What the build reads, by the name it is imported under.
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings_handlers", "typer") if find_spec(name) is None]
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f'not installed: {", ".join(MISSING)}. Run: pip install "peelwise[docs]"'),
]


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / "mkdocs.yml"), "-d", str(out)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )


@pytest.fixture
def copy(tmp_path):
    """The sources of the site, free to be spoilt; without the Python reference, which takes most of the time."""
    for name in SOURCES:
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (tmp_path / "src").symlink_to(ROOT / "src")
    for page in (tmp_path / "docs" / "reference").glob("*.md"):
        page.write_text(re.sub(r"(?m)^:::.*\n(    .*\n)*", "", page.read_text()))
    return tmp_path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    found = build(ROOT, out)
    assert found.returncode == 0, found.stderr
    return out


class Loaded(HTMLParser):
    """Every address that a page loads by itself: scripts, styles, images, fonts, frames."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(found.get("href") or "")
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(found.get("src") or "")


def test_pages_need_no_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        parser = Loaded()
        parser.feed(page.read_text())
        assert parser.addresses, page
        outside = [address for address in parser.addresses if re.match(r"(https?:)?//", address)]
        assert not outside, (page, outside)
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style


def test_every_command_and_public_name_is_there(site):
    import peelwise
    from peelwise.cli.main import app

    commands = (site / "commands.html").read_text()
    names = [name for group in app.registered_groups for name in _names(group.typer_instance)]
    assert "audit" in names
    for name in names:
        assert f'id="peelwise-{name}"' in commands, name
    reference = (site / "reference" / "peelwise.html").read_text()
    reference += (site / "reference" / "integrations.html").read_text()
    for name in peelwise.__all__:
        assert f">{name}</span>" in reference, name
    signals = (site / "signals.html").read_text()
    assert all(f"<code>{name}</code>" in signals for name in SIGNALS)


def _names(app):
    return [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]


def test_start_page_is_the_first_screen_of_the_readme(site):
    page = (site / "index.html").read_text()
    first, rest = (ROOT / "README.md").read_text().split("<!-- end of the first screen -->")
    sentence = re.search(r"\*\*(peelwise .*?)\*\*", first).group(1)
    assert sentence.split("'")[0] in page
    heading = re.search(r"^## (.*)$", rest, flags=re.MULTILINE).group(1)
    assert f">{heading}<" not in page


def test_sources_as_they_are_build(copy):
    found = build(copy, copy / "out")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("docs/method.md", "[no such page](no-such-page.md)"),
        *(
            pytest.param(page, text, marks=pytest.mark.nightly)
            for page, text in (
                ("docs/method.md", "[no such heading](terms.md#no-such-heading)"),
                ("docs/method.md", "![no such figure](figures/no-such-figure.svg)"),
                ("README.md", "[no such page](docs/no-such-page.md)"),
                ("NOTES.md", "[no such heading](docs/method.md#no-such-heading)"),
            )
        ),
        ("docs/reference/nn.md", "::: peelwise.nn.NoSuchLayer"),
    ],
)
def test_something_broken_stops_the_build(copy, page, text):
    path = copy / page
    path.write_text(path.read_text().replace("\n\n", f"\n\n{text}\n\n", 1))
    found = build(copy, copy / "out")
    assert found.returncode != 0
    assert re.search("no-such|NoSuch", found.stderr), found.stderr


def test_a_page_that_nobody_finds_stops_the_build(copy):
    (copy / "docs" / "forgotten.md").write_text("# Forgotten\n")
    found = build(copy, copy / "out")
    assert found.returncode != 0
    assert "forgotten.md" in found.stderr
