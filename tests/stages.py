"""Where the stages of the small trained GPT lie."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = Path(__file__).resolve().parent.parent / "examples" / "small_gpt" / "checkpoints"
STAGES = ("early", "middle", "final")


def stage_folder(stage: str) -> Path:
    """Return the checkpoint folder of ``early``, ``middle`` or ``final``."""
    return dict(zip(STAGES, sorted(CHECKPOINTS.glob("step-*")), strict=True))[stage]
