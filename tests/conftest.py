"""Models and text that the tests share."""

from __future__ import annotations

import copy
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import stage_folder

# No test may reach for the network; read by huggingface_hub when it is imported, so it is set first.
os.environ["HF_HUB_OFFLINE"] = "1"

# Threads that spin while they wait double the time of these small products on a busy machine; read by
# OpenMP when torch is imported, so it is set first too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Several workers share the processors instead of each taking all of them.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

TESTS = Path(__file__).resolve().parent

# Tests write `from small_gpt.text import ...`.
sys.path.insert(0, str(TESTS.parent / "examples"))

SmallGPT = Callable[..., tuple[Any, Any]]


# What a test needs shows in the fixtures that it asks for, its own or those of its fixtures, and in its top folder.
NEEDS = {"stored_stage": "trained", "chromium": "browser"}
# Whole runs of a product are slow, wherever they are started from.
SLOW = ("api", "certificate", "cli", "distributed", "docs", "examples", "integrations", "tasks")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--nightly``."""
    parser.addoption("--nightly", action="store_true", help="run what is marked nightly, and nothing else")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import what is slow where it is left out."""
    slow = collection_path.parent == TESTS and collection_path.name in SLOW
    return True if slow and "not slow" in config.option.markexpr else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep tests of the day or of the night, mark what ``make check`` leaves out, begin with what takes long."""
    for item in items:
        if item.path.relative_to(TESTS).parts[0] == "nightly":
            item.add_marker("nightly")
    by_night = config.getoption("--nightly")
    nightly = {item for item in items if item.get_closest_marker("nightly")}
    if by_night or len(nightly) < len(items):  # whoever names tests of the night alone gets them
        kept = [item for item in items if (item in nightly) == by_night]
        config.hook.pytest_deselected(items=[item for item in items if (item in nightly) != by_night])
        items[:] = kept
    for item in items:
        needed = {NEEDS[name] for name in getattr(item, "fixturenames", ()) if name in NEEDS}
        slow = {"slow"} if item.path.relative_to(TESTS).parts[0] in SLOW else set()
        for marker in needed | slow:
            item.add_marker(marker)
    # A file is one process's work: long ones are begun first, so that no process is left alone with one at the end.
    long = {item.path for item in items if any(item.get_closest_marker(m) for m in ("slow", "trained", "browser"))}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def stored_stage() -> Callable[[str], tuple[Any, Any]]:
    """Open a stage once per session; use ``small_gpt``, which hands out copies."""
    opened: dict[str, tuple[Any, Any]] = {}

    def load(stage: str) -> tuple[Any, Any]:
        if stage not in opened:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            folder = stage_folder(stage)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            opened[stage] = model.eval(), AutoTokenizer.from_pretrained(folder)
        return opened[stage]

    return load


@pytest.fixture
def small_gpt(stored_stage: Callable[[str], tuple[Any, Any]]) -> SmallGPT:
    """Return ``stage -> (model, tokenizer)``: float32, eval mode, the test's own copy."""
    return lambda stage="final": copy.deepcopy(stored_stage(stage))


@pytest.fixture(scope="session")
def held_out_windows(stored_stage: Callable[[str], tuple[Any, Any]]) -> Any:
    """Token ids ``[w, 129]`` of the text that the small GPT never saw."""
    from small_gpt.evaluate import token_stream, windows
    from small_gpt.text import held_out_documents

    return windows(token_stream(stored_stage("final")[1], held_out_documents()))


@pytest.fixture(scope="session")
def zoo() -> dict[str, Callable[[], Any]]:
    """Name -> factory of the models that must be handled; parametrised tests import ``zoo.ZOO``."""
    from zoo import ZOO

    return ZOO


@pytest.fixture(scope="session")
def training_probe(stored_stage: Callable[[str], tuple[Any, Any]]) -> Any:
    """Some 9,600 tokens of the text that the small GPT was trained on."""
    from peelwise import Probe
    from small_gpt.text import training_documents

    openings = [document[:1_500] for document in training_documents()[::12]]  # few sequences from each
    tokenizer = stored_stage("final")[1]
    return Probe.from_text(openings, tokenizer, tokens=9_600, in_distribution=True, source="training text")


@pytest.fixture(scope="session")
def broken_folder(stored_stage: Callable[[str], tuple[Any, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small GPT whose block 3 subtracts what it should add."""
    from damage import sign_flip

    model, tokenizer = stored_stage("final")
    folder = tmp_path_factory.mktemp("models") / "broken"
    sign_flip(model, 3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def audited(broken_folder: Path, training_probe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return the report of a whole audit of the broken model on a little text, and where it is saved."""
    import peelwise

    rows = [row for part in ("fit", "select", "report") for row in getattr(training_probe, part).rows()]
    probe = peelwise.Probe.from_tokens(rows, tokens=31 * 128, in_distribution=True, source="training text")
    report = peelwise.audit(broken_folder, probe, peelwise.AuditSettings(joint_rounds=2, solo_rounds=1))
    return report, report.save(tmp_path_factory.mktemp("audited") / "certificate")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Return the path of the browser of this machine."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("chromium is not installed")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; return exit code, standard output and standard error."""

    from peelwise.cli.main import main

    def run_here(*arguments: Any, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peelwise", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run_here
