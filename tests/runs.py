"""Run histories as a monitor would write them, without a model."""

from __future__ import annotations

from pathlib import Path

from peelwise.records.run import WHOLE_MODEL, Event, MatrixShare, Measurement, RunInfo, Statistic, StepRow, VerdictRow
from peelwise.store.writer import RunWriter

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
STATISTICS = ("energy", "gradient_norm")


def run_info(name: str = "run", blocks: tuple[str, ...] = BLOCKS) -> RunInfo:
    return RunInfo(
        name,
        "PlainGPT",
        1234,
        blocks,
        budget=0.03,
        in_distribution=True,
        probe={"fit_tokens": 64},
        settings={"margin": None},
        versions={"python": "3.11"},
    )


def measurement_row(step: int, *, kind="ranking", events: tuple[Event, ...] = (), letters: str = "RG?") -> Measurement:
    """Return a probe whose every number can be told from its step, block and name."""
    statistics = [
        Statistic(name, block, step + block / 10 + place / 100, to_median=1.5)
        for place, name in enumerate(STATISTICS)
        for block in range(len(letters))
    ]
    if kind != "ranking":
        statistics.append(Statistic("recoverable", 1, 0.03, 0.02, 0.04))
        statistics.append(Statistic("bound_upper", WHOLE_MODEL, 2.99))
        statistics.append(Statistic("bound_lower", WHOLE_MODEL, 2.9 - step / 1000, 2.88, 2.92))
    return Measurement(
        step,
        kind,
        probe_loss=3.0 - step / 1000,
        seconds=0.5,
        share=0.029,
        letters=letters,
        slope=-1e-3,
        slope_low=-2e-3,
        slope_high=-1e-4,
        still_falling=True,
        statistics=tuple(statistics),
        matrices=(MatrixShare(1, "attention.out", 0.7), MatrixShare(1, "feed_forward.0", 0.3)),
        verdicts=(VerdictRow(0, "red", "above-margin", step),),
        events=events,
    )


def event(step: int, **changes) -> Event:
    plain = {"level": "alert", "kind": "red", "text": "block 0 is red", "block": 0, "suggestion": "Look."}
    return Event(step, **(plain | changes))


def write_run(path: Path, steps: int = 40, every: int = 10, name: str = "run") -> Path:
    """Write a whole run: a loss at every step, a probe at every tenth, an event at the last."""
    with RunWriter(path, run_info(name)) as writer:
        for step in range(steps):
            writer.step(StepRow(step, 4.0 - step / 100, 0.03))
            if step % every == 0:
                last = step + every >= steps
                kind = "alone" if step % (2 * every) else "ranking"
                writer.measurement(measurement_row(step, kind=kind, events=(event(step),) if last else ()))
    return path
