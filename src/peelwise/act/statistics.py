"""One number per block from what an audit, a check or a monitor found."""

from __future__ import annotations

from typing import Any

from peelwise.errors import OptionError


def weights_from(found: Any, statistic: str, *, least: float = 0.0) -> list[float]:
    """Return one number per block, ready for `param_groups` or a rule.

    Args:
        found: the record of an audit or a check, a report that has one, or a monitor's measurement.
        statistic: a field of the blocks (``"gradient_norm"``, ``"natural_energy"``; of intervals, such as
            ``"ablation"`` or ``"unique_nats"``, the mean), a signal by its key there, or a monitor's statistic by name.
        least: smaller numbers are raised to this one: rates need positive weights, and an ablation may be below 0.

    Returns:
        One number per block, in the statistic's own unit.

    Raises:
        OptionError: If there is no such statistic, or a block lacks it.
    """
    rows = _rows(found)
    known = sorted({name for row in rows for name in row})
    if statistic not in known:
        raise OptionError(f"There is no statistic {statistic!r} here. Known: {', '.join(known) or 'none'}.")
    missing = [index for index, row in enumerate(rows) if statistic not in row]
    if missing:
        raise OptionError(f"{statistic} was not measured for blocks {missing}: choose another one, or measure all.")
    return [max(row[statistic], least) for row in rows]


def _rows(found: Any) -> list[dict[str, float]]:
    record = getattr(found, "record", found)
    if hasattr(record, "statistics"):
        return _of_measurement(record)
    if not hasattr(record, "blocks"):
        raise OptionError(f"Expected a record with blocks or a measurement, got {type(found).__name__}.")
    return [_of_block(block) for block in record.blocks]


def _of_measurement(found: Any) -> list[dict[str, float]]:
    count = 1 + max((s.block for s in found.statistics), default=-1)
    rows: list[dict[str, float]] = [{} for _ in range(count)]
    for s in found.statistics:
        if s.block >= 0:  # below stands what is of the whole model
            rows[s.block][s.name] = float(s.value)
    return rows


def _of_block(block: Any) -> dict[str, float]:
    row = {name: float(value) for name, value in (getattr(block, "signals", None) or {}).items()}
    for name, value in vars(block).items():
        value = getattr(value, "mean", value)  # of an interval
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "index":
            row[name] = float(value)
    return row
