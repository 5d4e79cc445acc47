"""What is tried on the certificates of audits is tried on those of peels, checks and comparisons, and counted."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import peelwise
from peelwise.certificate.check import differences
from peelwise.errors import PeelwiseError
from peelwise.evidence.unlike import named
from peelwise.records.base import SealedRecord
from peelwise.records.check import CheckRecord
from peelwise.records.compare import CompareRecord
from peelwise.records.files import PROBE_FILE, RECORD_FILE, WITNESS_FILE, read_any_record
from peelwise.records.peel import PeelRecord
from peelwise.tasks.check.run import run_check
from peelwise.tasks.check.settings import CheckSettings
from tamperings import MALFORMED, TAMPERINGS, Change, Content, Tensors, add, exchanged, forged, put

PAGE = Path(__file__).parents[2] / "docs" / "threat-model.md"
KINDS: dict[str, type[SealedRecord]] = {"peel": PeelRecord, "check": CheckRecord, "compare": CompareRecord}
OF_EVERY_KIND = (
    "the margin",
    "what stands beside the numbers",
    "the configuration",
    "settings",
    "the split of the text",
)
MOST_SECONDS = 60.0  # far above what it takes: processors are shared
BLOCK = 3

# What they do not compute with: it is said not to be rechecked. A setting of theirs is none of an audit's.
NOT_RECHECKED = {"probe.in_distribution = False"}
PASSED_ON = {  # malformed in an audit only, or of no tensor that these have
    *(f"witness of {v}" for v in ("nan", "inf")),
    *("one NaN in a witness", "huge witness", "complex witness", "float8 witness", "transposed witness"),
    *("witness of one number", "witness of no number", "verdict blue", "a loss of 1e200"),
    *(f"standard error {v:g}" for v in (1e200, 1e20, 1e308)),
}


def witnesses(value: float, dtype: torch.dtype | None = None) -> Change:
    """Return a change of every tensor of a witness."""
    return lambda c, w, p: w.update({name: torch.full_like(t, value).to(dtype or t.dtype) for name, t in w.items()})


def _first_interval(value: Any) -> dict[str, Any] | None:
    if isinstance(value, dict):
        if "standard_error" in value:
            return value
        value = list(value.values())
    found = (_first_interval(each) for each in value) if isinstance(value, list) else iter(())
    return next(filter(None, found), None)


def _standard_error(value: float) -> Change:
    def change(content: Content, witness: Tensors, probe: Tensors) -> None:
        interval = _first_interval(content)
        assert interval is not None
        interval["standard_error"] = value

    return change


def _unlike_no_more(content: Content, witness: Tensors, probe: Tensors) -> None:
    """Say, without a contradiction, that no block is unlike its neighbours."""
    for block in content["blocks"]:
        block["score"] = min(block["score"], 1.0)
        block["ablation"] = None
    content.update(unlike=[], gain_witnesses=[], composed_loss=None, composed_gain=None)
    witness.clear()


def _another_is_unlike(content: Content, witness: Tensors, probe: Tensors) -> None:
    """Say, without a contradiction, that another block is unlike its neighbours, and it alone."""
    _unlike_no_more(content, witness, probe)
    content["blocks"][1]["score"] = 20.0
    content["settings"]["most_witnesses"] = 0
    content["unlike"] = [{"block": 1, "score": 20.0, "reasons": []}]
    assert named(np.array([block["score"] for block in content["blocks"]])) == [1]


def _a_signal(content: Content, witness: Tensors, probe: Tensors) -> None:
    """Change a signal where it stands at its block and where it stands at its layer."""
    matrix = content["matrices"][0]
    name, value = next(iter(matrix["signals"].items()))
    matrix["signals"][name] = content["blocks"][matrix["block"]]["signals"][f"{name}.{matrix['part']}"] = 2 * value + 1


def _a_witness_less(content: Content, witness: Tensors, probe: Tensors) -> None:
    """Drop a factor that is not among the composed ones from record and file."""
    dropped = next(w for w in content["gain_witnesses"] if not w["composed"])
    content["gain_witnesses"].remove(dropped)
    head = "" if dropped["head"] is None else f".head.{dropped['head']}"
    del witness[f"factor/{dropped['layer']}{head}"]


def _lowered(path: str) -> Change:
    return lambda c, w, p: [add(f"{path}.{end}", -0.01)(c, w, p) for end in ("mean", "low", "high")]


OF_A_CHECK: dict[str, Change] = {
    "the loss": add("loss", -0.01),
    "the composed loss": add("composed_loss", -0.01),
    "the composed gain": _lowered("composed_gain"),
    "composed loss and gain": lambda c, w, p: [add("composed_loss", 0.01)(c, w, p), _lowered("composed_gain")(c, w, p)],
    "an ablation": _lowered(f"blocks.{BLOCK}.ablation"),
    "no ablation": put(f"blocks.{BLOCK}.ablation", None),
    "a gain": _lowered("gain_witnesses.0.gain"),
    "a gain of a million": lambda c, w, p: [
        add(f"gain_witnesses.0.gain.{e}", 1e6)(c, w, p) for e in ("mean", "low", "high")
    ],
    "a narrow interval": add("gain_witnesses.0.gain.low", 0.01),
    "another standard error": add("gain_witnesses.0.gain.standard_error", 0.01),
    "a factor of the record": add("gain_witnesses.0.factor", 0.5),
    "a factor of the file": lambda c, w, p: w.update({name: t + 0.5 for name, t in w.items()}),
    "a factor of another block": put("gain_witnesses.0.block", 1),
    "a factor of nothing": put("gain_witnesses.0.layer", "model.layers.3.nothing"),
    "no factors": put("gain_witnesses", []),
    "nothing composed": lambda c, w, p: [each.update(composed=False) for each in c["gain_witnesses"]],
    "nothing unlike": put("unlike", []),
    "unlike is not known": put("unlike", None),
    "a block less": lambda c, w, p: c["blocks"].pop(),
    "order of blocks": lambda c, w, p: c["blocks"].reverse(),
    "scores of two blocks": exchanged(BLOCK, 0, "score"),
    "names of two blocks": exchanged(BLOCK, 4, "name"),
    "a score": put("blocks.0.score", 30.0),
    "no score": put("blocks.0.score", None),
    "a signal of a layer alone": lambda c, w, p: c["matrices"][0]["signals"].update(weight_rms=1e6),
    "a threshold that nobody reaches": lambda c, w, p: c.update(threshold=1e9, unlike=[]),
    "informative": put("informative", True),
}
# The record agrees with itself, so only a check that is made again tells.
ONLY_IN_FULL: dict[str, Change] = {
    "no block is unlike": _unlike_no_more,
    "another block is unlike": _another_is_unlike,
    "a signal": _a_signal,
    "a witness less": _a_witness_less,
    "another reason": put("unlike.0.reasons.0.signal", "weight_rms"),
}


@pytest.fixture(scope="module")
def models(stored_stage, broken_folder) -> tuple[Any, Any]:
    """The healthy small GPT, and the one whose block 3 subtracts."""
    return stored_stage("final")[0], peelwise.model.checkpoints.open_model(broken_folder).model


@pytest.fixture(scope="module")
def probe(training_probe) -> peelwise.Probe:
    rows = [row for part in ("fit", "select", "report") for row in getattr(training_probe, part).rows()]
    return peelwise.Probe.from_tokens(rows, tokens=31 * 128, in_distribution=True, source="training text")


@pytest.fixture(scope="module")
def originals(models, probe, tmp_path_factory) -> dict[str, tuple[Content, Tensors, Tensors]]:
    """Record, witness and probe of an honest certificate of each kind."""
    healthy, broken = models
    root = tmp_path_factory.mktemp("kinds")
    maps = peelwise.PeelSettings(maps=[[1, 2, 5, 5, 5, 6], [1, 2, 3, 4, 5, 6]], rounds=1, controls=False)
    peelwise.peel(broken, probe, maps).save(root / "peel")
    peelwise.check(broken, probe, out=root / "check")
    peelwise.compare(healthy, broken, probe, out=root / "compare")
    return {
        kind: (
            json.loads((root / kind / RECORD_FILE).read_text()),
            load_file(root / kind / WITNESS_FILE),
            load_file(root / kind / PROBE_FILE),
        )
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def again(models, probe) -> CheckRecord:
    """The check made again, as `verify --full` does."""
    return run_check(models[1], probe, CheckSettings())


def checked(kind: str, folder: Path, models: tuple[Any, Any], **options: Any) -> Any:
    healthy, broken = models
    return peelwise.verify(folder, broken, old=healthy if kind == "compare" else None, **options)


def why_not(verify: Callable[[], Any]) -> str:
    """Return in one line why a certificate does not hold or cannot be read; nothing if it holds."""
    began = time.monotonic()
    try:
        result = verify()
        reason = "" if result.holds else result.reason
    except PeelwiseError as error:
        reason = str(error)
    assert "\n" not in reason
    assert time.monotonic() - began < MOST_SECONDS
    return reason


CASES = [(kind, name) for kind in OF_EVERY_KIND for name in TAMPERINGS[kind] if name not in NOT_RECHECKED]
SHAPES = {name: change for name, change in MALFORMED.items() if name not in PASSED_ON} | {
    **{f"standard error {value:g}": _standard_error(value) for value in (1e200, 1e20)},
    **{f"witness of {value}": witnesses(value) for value in (float("nan"), float("inf"))},
    "complex witness": witnesses(1.0, torch.complex64),
    "float8 witness": witnesses(1.0, torch.float8_e4m3fn),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_untouched_one_holds_sealed_again(kind, originals, models, tmp_path):
    """The control of all others."""
    result = checked(
        kind, forged(KINDS[kind], originals[kind], lambda c, w, p: None, tmp_path / "same"), models, full=True
    )
    assert result.status == "holds", result.reason
    assert result.split.startswith("rechecked: ")
    assert any("whether the text is training text" in what for what in result.not_rechecked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "name"), CASES)
def test_a_tampering_is_found(kind, what, name, originals, models, tmp_path):
    folder = forged(KINDS[kind], originals[kind], TAMPERINGS[what][name], tmp_path / "forged")
    reason = why_not(lambda: checked(kind, folder, models))
    assert reason, f"{what}: {name}"
    assert "changed after it was written" not in reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_what_cannot_be_read_is_one_line_and_soon(kind, name, originals, models, tmp_path):
    if "witness" in name and not originals[kind][1]:
        folder = forged(
            KINDS[kind], originals[kind], lambda c, w, p: w.update({"x": torch.ones(2)}), tmp_path / "malformed"
        )
    else:
        folder = forged(KINDS[kind], originals[kind], SHAPES[name], tmp_path / "malformed")
    assert why_not(lambda: checked(kind, folder, models)), name


@pytest.mark.parametrize("name", OF_A_CHECK)
def test_a_tampering_of_a_check_is_found(name, originals, models, tmp_path):
    folder = forged(CheckRecord, originals["check"], OF_A_CHECK[name], tmp_path / "forged")
    reason = why_not(lambda: checked("check", folder, models))
    assert reason, name
    assert "changed after it was written" not in reason


@pytest.mark.parametrize("name", ONLY_IN_FULL)
def test_what_is_not_rechecked_at_once_is_said_and_differs_from_a_check_made_again(
    name, again, originals, models, tmp_path
):
    folder = forged(CheckRecord, originals["check"], ONLY_IN_FULL[name], tmp_path / "forged")
    quick = checked("check", folder, models)
    assert quick.status == "losses hold, verdicts not rechecked", quick.reason
    assert any("--full" in what for what in quick.not_rechecked)
    assert next(differences(read_any_record(folder), again), None), name


@pytest.mark.nightly
def test_in_full_a_check_is_made_again(originals, models, tmp_path):
    folder = forged(CheckRecord, originals["check"], _unlike_no_more, tmp_path / "forged")
    assert "score" in why_not(lambda: checked("check", folder, models, full=True))
    batches = forged(CheckRecord, originals["check"], put("settings.micro_batch_tokens", 300), tmp_path / "batches")
    result = checked("check", batches, models, full=True)
    assert result.status == "holds", result.reason


def test_a_check_of_an_earlier_rule_holds_as_far_as_it_can_be_made_again(originals, models, tmp_path):
    """What an earlier version wrote has other signals and scores: that is no lie, and no proof either."""

    def of_old(content: Content, witness: Tensors, probe: Tensors) -> None:
        del content["rule"]
        for block in content["blocks"]:
            block["signals"].pop(next(name for name in block["signals"] if "." not in name))  # of no matrix

    result = checked("check", forged(CheckRecord, originals["check"], of_old, tmp_path / "old"), models, full=True)
    assert result.status == "losses hold, verdicts not rechecked", result.reason
    assert any("rule 1 of an earlier version" in each for each in result.not_rechecked)
    later = forged(CheckRecord, originals["check"], put("rule", 99), tmp_path / "later")
    assert "rule 99" in why_not(lambda: checked("check", later, models))


def test_the_page_counts_what_is_tried():
    page = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^\| certificates of (\w+) \| (\d+) \|", page, flags=re.MULTILINE)
    of_every = len(CASES) + len(SHAPES)
    own = {"peels": of_every, "checks": of_every + len(OF_A_CHECK) + len(ONLY_IN_FULL), "comparisons": of_every}
    assert {kind: int(count) for kind, count in found} == own
