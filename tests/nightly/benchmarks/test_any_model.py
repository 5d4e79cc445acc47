"""Every causal language model that transformers can build is opened and replayed, or refused in one sentence.

Whether what is said of it is right takes minutes a type: `python benchmarks/any_model.py`.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from any_model import RESULTS, probe
from peelwise.engine.opening import checked_blocks
from peelwise.errors import PeelwiseError
from peelwise.model.guard import untouched
from peelwise.model.runner import Runner, check_replay
from peelwise.model.selfcheck import self_check
from tiny_models import OTHER, build

KNOWN = {
    name: line["outcome"] for name, line in json.loads((RESULTS / "any_model_other.json").read_text())["types"].items()
}
AT_A_TIME = 12
PARTS = [sorted(KNOWN)[start : start + AT_A_TIME] for start in range(0, len(KNOWN), AT_A_TIME)]


def opened(kind: str) -> str:
    """Return ``right`` if blocks that are called one by one give the model's own loss, or that it was refused."""
    model, text = build(kind, OTHER), probe()
    try:
        blocks = checked_blocks(model, text)
        with untouched(model):
            runner = Runner(model, blocks)
            self_check(runner, text.fit)
            trace = runner.trace(text.report)
            check_replay(runner, trace)
    except PeelwiseError as error:
        return "refused" if "\n" not in str(error) else str(error)
    assert torch.isfinite(trace.losses).all()
    return "right"


@pytest.mark.nightly
@pytest.mark.parametrize("kinds", PARTS, ids=[f"{part[0]}..{part[-1]}" for part in PARTS])
def test_every_type_is_replayed_or_refused(kinds: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {kind: opened(kind) for kind in kinds if KNOWN[kind] in ("right", "refused")}
    assert found == {kind: KNOWN[kind] for kind in found}
