"""What the page asks of a history, as plain data for JSON. Thinned here, so that a page of any run stays small.

Places in training are numbers of steps, losses nats per token. Every function is pure: a reader in, data out.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peelwise.evidence.verdict import default_margin
from peelwise.records.base import NATS
from peelwise.records.plain_text import clean
from peelwise.records.run import LETTERS, WHOLE_MODEL
from peelwise.records.signals import SIGNALS
from peelwise.show.words import VERDICTS, reason_words
from peelwise.store.reader import ALL_STEPS, Between, Run, RunReader

LOSS_BINS = 1_000
COLUMNS = 1_200  # of the heat map: about one per pixel of a wide screen
POINTS = 400  # of a small chart
EVENTS = 300
UPPER, LOWER = "bound_upper", "bound_lower"  # the cloud: statistics of the whole model

# Best first: where several measurements share a column, the last of these that occurs among them is shown.
_WORST_LAST = "".join(LETTERS[colour] for colour in ("frozen", "green", "grey", "yellow", "red"))
_RANK = np.zeros(256, np.uint8)
_RANK[np.frombuffer(_WORST_LAST.encode(), np.uint8)] = np.arange(len(_WORST_LAST), dtype=np.uint8)
_LETTER = np.frombuffer(_WORST_LAST.encode(), np.uint8)

Json = dict[str, Any]
Row = sqlite3.Row | Mapping[str, Any]


def verdict_words() -> list[Json]:
    """Return letter, colour, shape, words and meaning of the verdicts, worst first."""
    return [
        {"letter": w.letter, "colour": c, "shape": w.shape, "words": w.words, "meaning": w.meaning}
        for c, w in VERDICTS.items()
    ]


def run_facts(run: Run, key: str, file: str) -> Json:
    """Return what is known of a run besides its numbers."""
    info = run.info
    return {
        "key": key,
        "file": clean(file),
        "id": run.id,
        "name": clean(info.name),
        "status": run.status,
        "started": run.started,
        "ended": run.ended,
        "where": clean(f"process {run.pid} on {run.host}"),
        "architecture": clean(info.architecture),
        "parameters": info.parameters,
        "blocks": [clean(name) for name in info.blocks],
        "budget": info.budget,
        "in_distribution": info.in_distribution,
        "unit": unit_of_run(run),
    }


def unit_of_run(run: Run) -> str:
    """Return what the losses of a run are in."""
    return clean(str(run.info.probe.get("unit") or NATS))


def overview(reader: RunReader, run: Run, between: Between = ALL_STEPS) -> Json:
    """Return everything the page shows of a run but single blocks, thinned."""
    looks = reader.measurements(run.id, between=between)
    events = reader.events(run.id, most=EVENTS)
    loss = reader.loss_bins(run.id, most=LOSS_BINS, between=between)
    names = reader.statistic_names(run.id)
    last_step, last_probe, _ = reader.newest_ids(run.id)
    newest_step = reader.steps(run.id, after=last_step - 1) if last_step else []
    newest_probe = reader.probes(run.id, after=last_probe - 1) if last_probe else []
    return {
        "statistics": [statistic_facts(row, unit_of_run(run)) for row in names],
        "loss": loss_columns(loss),
        "looks": look_columns(looks),
        "bounds": cloud(reader, run, {row["id"]: row["probe_loss"] for row in looks}, between),
        "now": now(newest_step, newest_probe),
        "verdicts": [verdict(row) for row in _last_of_each(reader.verdicts(run.id))],
        "events": [event(row) for row in events],
        "cursor": [
            newest_step[-1]["id"] if newest_step else 0,
            newest_probe[-1]["id"] if newest_probe else 0,
            events[-1]["id"] if events else 0,
        ],
    }


def cloud(reader: RunReader, run: Run, losses: Mapping[int, float], between: Between = ALL_STEPS) -> Json:
    """Return the edges of the loss's cloud where they were measured, as ``[step, nats]`` each, thinned evenly.

    Args:
        reader: of the file.
        run: whose margin counts.
        losses: probe's id -> loss on the probe.
        between: first and last step.
    """
    found: Json = {}
    for edge, name in (("upper", UPPER), ("lower", LOWER)):
        held = reader.values(run, name, WHOLE_MODEL, between=between).probe_ids
        shown = _thinned([each for each in held.tolist() if each in losses], POINTS)
        values = {
            each: {row["probe_id"]: row for row in reader.at(shown, each, WHOLE_MODEL)} for each in (UPPER, LOWER)
        }
        found[edge] = [
            [row["step"], finite(cloud_edges(run, losses[probe_id], _values(values, probe_id))[edge])]
            for probe_id, row in values[name].items()
        ]
    return found


def cloud_edges(run: Run, probe_loss: float, bounds: Mapping[str, float]) -> dict[str, float]:
    """Return where red and green begin in one measurement, as `evidence.verdict.cloud_colour` has it; red comes first.

    Args:
        run: whose margin counts.
        probe_loss: of the measurement.
        bounds: those of ``bound_upper`` and ``bound_lower`` that were measured in it.
    """
    edges = {"upper": bounds[UPPER]} if UPPER in bounds else {}
    if LOWER in bounds:
        margin = run.info.settings.get("margin")
        edge = bounds[LOWER] + (default_margin(probe_loss, unit_of_run(run)) if margin is None else margin)
        edges["lower"] = min(edge, bounds.get(UPPER, edge))
    return edges


def heat(reader: RunReader, run: Run, name: str, between: Between = ALL_STEPS) -> Json:
    """Return how far a statistic is from its own running median, per column of the heat map and block.

    Of the measurements that share a column the one farthest from the median is shown.
    """
    looks = reader.measurements(run.id, between=between)
    stride = _stride(len(looks), COLUMNS)
    quotient = all(statistic_facts(row)["quotient"] for row in reader.statistic_names(run.id, name=name))
    columns = _places(looks, stride)
    held = reader.to_median(run, name, between=between)
    values: list[list[float | None]] = [[] for _ in columns["first"]]  # empty where no measurement of a column holds it
    if len(held.probe_ids):
        places = np.searchsorted([row["id"] for row in looks], held.probe_ids) // stride
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        found = _rounded(_farthest(held.numbers, starts, quotient))
        for place, row in zip(places[starts].tolist(), found, strict=True):
            values[place] = row
    return {"name": name, "quotient": quotient, "values": values} | columns


def block(reader: RunReader, run: Run, index: int, between: Between = ALL_STEPS) -> Json:
    """Return one block's history: every statistic with its intervals, its matrices, and why it has its verdict.

    Block -1 is the whole model.
    """
    held = "of_model" if index == WHOLE_MODEL else "of_blocks"
    names = [row["name"] for row in reader.statistic_names(run.id) if row[held]]
    series = {name: _series(reader, run, name, index, between) for name in names}
    return {
        "block": index,
        "series": {name: rows for name, rows in series.items() if rows},
        "matrices": _matrices(reader.matrices(run.id, index)),
        "verdicts": [verdict(row) for row in reader.verdicts(run.id) if row["block"] == index][-POINTS:],
    }


def _series(reader: RunReader, run: Run, name: str, index: int, between: Between) -> list[list[Any]]:
    """Return a statistic of one block at the last of the measurements that share a place, with the extremes.

    Places are counted from the newest measurement, so that the latest numbers are always there.
    """
    held = reader.values(run, name, index, between=between)
    count = len(held.probe_ids)
    if not count:
        return []
    stride = _stride(count, POINTS)
    ends = np.arange((count - 1) % stride, count, stride)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lowest, highest = (end.reduceat(held.numbers[:, 0], starts).tolist() for end in (np.minimum, np.maximum))
    rows = reader.at(held.probe_ids[ends].tolist(), name, index)
    if stride == 1:
        return [statistic(row) for row in rows]
    return [[*statistic(row), finite(low), finite(high)] for row, low, high in zip(rows, lowest, highest, strict=True)]


def loss_columns(rows: Sequence[sqlite3.Row]) -> Json:
    """Return bins of the training loss, column by column."""
    keys = ("first", "last", "rows", "mean", "low", "high", "share")
    return {
        "stride": rows[0]["stride"] if rows else 1,
        **{key: [finite(row[key]) for row in rows] for key in keys},
    }


def look_columns(probes: Sequence[sqlite3.Row]) -> Json:
    """Return measurements as columns of a heat map: the worst verdict of each block, the mean loss on the probe."""
    stride = _stride(len(probes), COLUMNS)
    losses = [row["probe_loss"] for row in probes]
    groups = [losses[start : start + stride] for start in range(0, len(losses), stride)]
    return _places(probes, stride) | {
        "loss": [finite(sum(group) / len(group)) for group in groups],
        "letters": worst([row["letters"] for row in probes], stride),
    }


def worst(letters: Sequence[str], stride: int) -> list[str]:
    """Return for every ``stride`` of the texts one text: at each place the worst letter (R, Y, ?, G, F) of theirs."""
    if not letters or not letters[0]:
        return ["" for _ in letters[::stride]]
    codes = np.frombuffer("".join(letters).encode("ascii"), np.uint8).reshape(len(letters), -1)
    ranks = np.maximum.reduceat(_RANK[codes], np.arange(0, len(letters), stride), axis=0)
    return [bytes(row).decode("ascii") for row in _LETTER[ranks]]


def now(steps: Sequence[sqlite3.Row], probes: Sequence[sqlite3.Row]) -> Json:
    """Return the present state: the newest step and the newest measurement."""
    return {"step": step(steps[-1]) if steps else None, "look": look(probes[-1]) if probes else None}


def step(row: sqlite3.Row) -> list[Any]:
    """Return ``[step, loss, share, time]``."""
    return [row["step"], finite(row["loss"]), row["share"], row["time"]]


def look(row: sqlite3.Row) -> Json:
    """Return what is known of a measurement itself."""
    keys = ("step", "time", "kind", "probe_loss", "slope", "slope_low", "slope_high", "seconds", "share", "letters")
    return {key: finite(row[key]) for key in keys} | {"still_falling": row["still_falling"]}


def statistic(row: Row) -> list[Any]:
    """Return ``[step, block, value, low, high, to_median]``."""
    return [row["step"], row["block"], *(finite(row[key]) for key in ("value", "low", "high", "to_median"))]


def verdict(row: Row) -> Json:
    """Return a change of a verdict."""
    keys = ("step", "block", "colour", "measured_step")
    return {key: row[key] for key in keys} | {"reason": clean(reason_words(row["reason"]))}


def event(row: sqlite3.Row) -> Json:
    """Return an event."""
    keys = ("id", "step", "time", "level", "kind", "block", "since_step")
    return {key: row[key] for key in keys} | {"text": clean(row["text"]), "suggestion": clean(row["suggestion"])}


def statistic_facts(row: sqlite3.Row, unit: str = NATS) -> Json:
    """Return how a statistic is called and compared; one that is not in the table of signals has its own name.

    ``in_cloud`` says that it is drawn with the loss, and needs no chart of its own; ``of_loss`` that it is in the unit
    of losses, which is ``unit``.
    """
    name = row["name"]
    known = SIGNALS.get(name)
    title = known.title if known else clean(name).replace("_", " ")
    return {
        "name": name,
        "title": title[:1].upper() + title[1:],
        "unit": known.unit_of(unit) if known else "",
        "of_loss": known is not None and known.unit == NATS,
        "meaning": known.meaning if known else "",
        "quotient": known.quotient if known else not row["has_interval"],
        "of_blocks": bool(row["of_blocks"]),
        "in_cloud": name in (UPPER, LOWER),
        "place": list(SIGNALS).index(name) if known else len(SIGNALS),
    }


def finite(value: Any) -> Any:
    """Return a value as JSON can hold it: infinite or undefined numbers become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _last_of_each(rows: Iterable[sqlite3.Row]) -> list[sqlite3.Row]:
    return list({row["block"]: row for row in rows}.values())


def _places(probes: Sequence[sqlite3.Row], stride: int) -> Json:
    """Return which steps share a column."""
    steps = [row["step"] for row in probes]
    starts = range(0, len(steps), stride)
    ends = [min(start + stride, len(steps)) for start in starts]
    return {
        "stride": stride,
        "first": [steps[start] for start in starts],
        "last": [steps[end - 1] for end in ends],
        "rows": [end - start for start, end in zip(starts, ends, strict=True)],
    }


def _stride(count: int, most: int) -> int:
    return max(math.ceil(count / most), 1)


def _thinned(items: Sequence[Any], most: int) -> list[Any]:
    stride = _stride(len(items), most)
    return [item for place, item in enumerate(items) if (len(items) - 1 - place) % stride == 0]


def _values(rows: Mapping[str, Mapping[int, sqlite3.Row]], probe_id: int) -> dict[str, float]:
    return {name: found[probe_id]["value"] for name, found in rows.items() if probe_id in found}


def _farthest(numbers: NDArray[Any], starts: NDArray[np.int64], quotient: bool) -> NDArray[np.float64]:
    """Return what is farthest from the median of the rows from each start to the next, NaN where nothing is finite."""
    table = np.where(np.isfinite(numbers), numbers, np.nan)
    lowest, highest = (end.reduceat(table, starts, axis=0).astype(np.float64) for end in (np.fmin, np.fmax))
    above = highest * np.maximum(lowest, 1e-300) >= 1 if quotient else highest + lowest >= 0
    found: NDArray[np.float64] = np.where(above, highest, lowest)
    return found


def _rounded(numbers: NDArray[np.float64]) -> list[list[float | None]]:
    """Return numbers with the three digits that the page shows, which are short as text, and null for NaN."""
    sizes = np.where(np.isfinite(numbers) & (numbers != 0), np.abs(numbers), 1.0)
    scales = 10.0 ** (2 - np.floor(np.log10(sizes)))
    short = (np.rint(numbers * scales) / scales).astype(object)
    short[np.isnan(numbers)] = None
    rows: list[list[float | None]] = short.tolist()
    return rows


def _matrices(rows: Sequence[sqlite3.Row]) -> list[Json]:
    """Return the newest share of each matrix, when it was seen, and the median of all its shares."""
    found: dict[str, list[sqlite3.Row]] = {}
    for row in rows:
        found.setdefault(row["matrix"], []).append(row)
    newest = max((row["step"] for row in rows), default=0)
    return [
        {
            "name": clean(name),
            "share": each[-1]["share"],
            "step": each[-1]["step"],
            "median": median(row["share"] for row in each),
        }
        for name, each in found.items()
        if each[-1]["step"] == newest
    ]
