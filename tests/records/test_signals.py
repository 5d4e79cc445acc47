"""The table of signals is the only place that lists them: a row more, and the signal is everywhere."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import pytest

import peelwise
from audits import tiny_probe
from peelwise.engine.signals import LayerSums
from peelwise.model.architectures import find_blocks
from peelwise.records.run import Measurement, Statistic
from peelwise.records.signals import RANKED_BY, SIGNALS, SWEPT, Signal, title_of
from peelwise.show.signals import page
from peelwise.store.reader import RunReader
from peelwise.tasks.monitor.chronicle import Chronicle
from peelwise.tasks.monitor.measure import Measured
from zoo import BLOCKS, ZOO


def largest_weight(of: LayerSums) -> float:
    return float(of.linear.weight().abs().max())


MEASUREMENTS = 5
ROW = Signal(
    "largest_weight",
    "largest absolute weight",
    "units of weight",
    "The largest absolute weight of the block.",
    watched=True,
    tracked=True,
    kind="weights",
    function=f"{__name__}:largest_weight",
    over_layers="largest",
    heading="largest weight",
    form="{:.5f}",
)


class Listening:
    """A logger that keeps what trackers would be told."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def step(self, row: object) -> None: ...

    def measurement(self, row: Measurement) -> None:
        self.scalars |= row.scalars()

    def event(self, event: object) -> None: ...

    def close(self) -> None: ...


def monitored(path: Path) -> tuple[dict[int, float], dict[str, float]]:
    """Return each block's largest weight, and what trackers were told; their history is written."""
    model, listening = ZOO["plain"](), Listening()
    options = {"budget": None, "schedule": peelwise.every(1), "store": path, "loggers": [listening]}
    monitor = peelwise.Monitor(model, tiny_probe(), **options)
    for step in range(1, MEASUREMENTS + 1):
        monitor.step(step, loss=3.0)
    monitor.close()
    blocks = find_blocks(model)
    return {b.index: max(float(m.weight().abs().max()) for m in b.linears) for b in blocks}, listening.scalars


@pytest.fixture
def with_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNALS, ROW.name, ROW)


@pytest.mark.usefixtures("with_row")
@pytest.mark.slow
def test_a_row_more_and_the_signal_is_in_history_terminal_page_export_trackers_and_docs(tmp_path, run) -> None:
    path = tmp_path / "run.db"
    expected, told = monitored(path)
    assert len(expected) == BLOCKS
    with RunReader(path) as reader:
        rows = reader.newest(reader.latest().id, ROW.name)
        assert {block: row["value"] for block, row in rows.items()} == expected
        assert {row["to_median"] for row in rows.values()} == {1.0}  # against its own history, as a quotient
    assert {
        f"peelwise/{ROW.name}/block_{block:02d}": value for block, value in expected.items()
    }.items() <= told.items()

    code, printed, _ = run("watch", path, "--once")
    assert code == 0
    assert ROW.heading in printed
    assert all(f"{value:.5f}" in printed for value in expected.values())

    code, _, _ = run("export", path, "--to", "csv", "--out", tmp_path / "exported")
    assert code == 0
    with (tmp_path / "exported" / "statistics.csv").open(newline="") as file:
        values = [float(row["value"]) for row in csv.DictReader(file) if row["name"] == ROW.name]
    assert values == MEASUREMENTS * list(expected.values())

    assert f"| `{ROW.name}` | {ROW.title} | {ROW.unit} | {ROW.meaning} | quotient | yes | yes | yes |" in page()


@pytest.mark.usefixtures("with_row")
@pytest.mark.slow
def test_the_live_page_gets_its_words_and_values_by_query(tmp_path) -> None:
    pytest.importorskip("uvicorn", reason="the live page needs starlette and uvicorn")
    from peelwise.show.dashboard import queries

    expected, _ = monitored(tmp_path / "run.db")
    with RunReader(tmp_path / "run.db") as reader:
        latest = reader.latest()
        facts = {each["name"]: each for each in queries.overview(reader, latest)["statistics"]}[ROW.name]
        series = queries.block(reader, latest, 1)["series"][ROW.name]
        heat = queries.heat(reader, latest, ROW.name)
    assert (facts["title"], facts["unit"]) == ("Largest absolute weight", ROW.unit)
    assert (facts["meaning"], facts["quotient"], facts["in_cloud"]) == (ROW.meaning, True, False)
    assert [row[2] for row in series] == [expected[1]] * MEASUREMENTS
    assert heat["values"][-1] == [1.0] * BLOCKS  # against its own history


@pytest.mark.usefixtures("with_row")
@pytest.mark.slow
def test_it_is_in_certificates_and_their_report(tmp_path) -> None:
    model = ZOO["plain"]()
    report = peelwise.audit(model, tiny_probe(), peelwise.AuditSettings(joint_rounds=0, solo_rounds=1, controls=False))
    expected = {b.index: max(float(m.weight().abs().max()) for m in b.linears) for b in find_blocks(model)}
    assert {b.index: b.signals[ROW.name] for b in report.record.blocks} == expected
    assert "Further signals of every block" in report.to_html()
    assert ROW.heading in report.to_html()
    assert peelwise.verify(report.save(tmp_path / "certificate"), model).holds


def measured(step: int, values: list[float]) -> Measured:
    return Measured("ranking", 3.0, {ROW.name: values})


def changes_of(watched: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is told of a history in which block 2 rises fourfold at step 30."""
    monkeypatch.setitem(SIGNALS, ROW.name, replace(ROW, watched=watched))
    made = Chronicle(4, margin=None, in_distribution=True)
    rows = [
        made.add(
            step,
            measured(
                step,
                [(1.0 + (step * 7 + b * 3) % 10 / 100) * (4.0 if b == 2 and step >= 30 else 1.0) for b in range(4)],
            ),
            seconds=1.0,
            share=0.0,
        )
        for step in range(60)
    ]
    return [event.text for row in rows for event in row.events]


def test_a_watched_signal_is_told_by_its_title_and_another_is_not_told(monkeypatch) -> None:
    (text,) = changes_of(True, monkeypatch)
    assert text.startswith("block 2: its largest absolute weight rose ")
    assert "between steps 29 and 30" in text
    assert changes_of(False, monkeypatch) == []


@pytest.mark.slow
def test_without_its_row_it_is_nowhere(tmp_path, run) -> None:
    """The control."""
    _, told = monitored(tmp_path / "run.db")
    with RunReader(tmp_path / "run.db") as reader:
        assert reader.newest(reader.latest().id, ROW.name) == {}
    assert ROW.heading not in run("watch", tmp_path / "run.db", "--once")[1]
    assert not any(ROW.name in tag for tag in told)
    assert ROW.name not in page()


def test_names_stay() -> None:
    """They are columns, keys and tags of files that exist: add, do not rename."""
    assert set(SIGNALS) >= {
        *("recoverable", "unique", "removal", "equivalent_steps", "composed", "bound_upper", "bound_lower"),
        *("natural_energy", "energy", "gradient_norm", "held_out_energy", "cross_energy"),
        *("codes_flipped", "near_threshold", "scale_drift", "dead_rows"),
    }
    assert all(name == signal.name for name, signal in SIGNALS.items())
    assert SIGNALS[RANKED_BY].kind in SWEPT


@pytest.mark.parametrize("signal", [s for s in SIGNALS.values() if s.function], ids=lambda s: s.name)
def test_every_function_is_where_its_row_says(signal) -> None:
    assert resolve_name(signal.function).__name__ == signal.name


def test_what_a_sweep_gives_has_a_function_and_only_that_is_watched() -> None:
    assert all(signal.function for signal in SIGNALS.values() if signal.kind in (*SWEPT, "codes"))
    assert all(signal.kind in SWEPT for signal in SIGNALS.values() if signal.watched)


def test_the_page_has_a_row_for_each() -> None:
    assert all(page().count(f"| `{name}` | {signal.title} |") == 1 for name, signal in SIGNALS.items())


def test_what_trackers_are_told_and_what_they_are_not() -> None:
    rows = (Statistic("natural_energy", 0, 1.0), Statistic("energy", 0, 2.0), Statistic("unheard_of", 0, 3.0))
    told = Measurement(1, "ranking", 2.0, 0.1, 0.0, "R", statistics=rows).scalars()
    assert {tag for tag in told if "block_0" in tag} == {"peelwise/natural_energy/block_00"}
    assert title_of("unheard_of") == "unheard_of"
