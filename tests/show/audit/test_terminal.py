from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from peelwise.records.audit import AuditRecord
from peelwise.records.base import Interval
from peelwise.records.plain_text import clean
from peelwise.show import words
from peelwise.show.audit.terminal import print_record, render
from show.sample import HOSTILE, hostile, interval, partial, unmeasured, whole


def printed(record: AuditRecord, width: int, *, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print_record(record, Console(file=stream, width=width, color_system=None), folder="out/demo")
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 108, 120])
@pytest.mark.parametrize("record", [whole(), whole(2), whole(80), partial(), unmeasured(), hostile()])
def test_fits_the_width_and_shows_every_block(record: AuditRecord, width: int) -> None:
    lines = printed(record, width).splitlines()
    assert max(map(len, lines)) <= width
    shown = [line.split()[0] for line in lines if line[:5].strip().isdigit() and line.startswith("  ")]
    assert shown == [str(block.index) for block in record.blocks]


def test_verdicts_are_told_by_letter_and_words_without_colour() -> None:
    text = printed(whole(), 120)
    assert "\x1b" not in text
    for line in (
        "R certified under-optimised",
        "Y recoverable",
        "G nothing above the margin found",
        "? undecided",
    ):
        assert line in text
    assert "optimal" not in text.replace("under-optimised", "")


def test_negative_unique_values_are_flagged_as_interaction() -> None:
    rows = printed(whole(), 80).splitlines()
    place = next(number for number, row in enumerate(rows) if row.startswith("   14"))
    assert "-0.012" in rows[place]
    assert "interaction with" in rows[place + 1]
    assert "neighbours" in rows[place + 2]


def test_what_was_not_measured_is_never_a_zero() -> None:
    text = printed(unmeasured(), 100)
    assert "0.0000" not in text
    assert text.count(words.NOT_MEASURED) >= 2 * 6 + 4
    assert "Stopped early" in text


def test_hostile_strings_reach_the_terminal_as_plain_text() -> None:
    text = printed(hostile(), 100)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]b[/red]" in text


def test_a_terminal_without_unicode_keeps_the_columns() -> None:
    plain, rich = (printed(whole(), 100, encoding=name).splitlines() for name in ("ascii", "utf-8"))
    assert len(plain) == len(rich)
    assert [len(line) for line in plain] == [len(line) for line in rich]


def test_files_and_the_command_that_checks_them_are_named() -> None:
    text = printed(whole(), 120)
    assert "peelwise verify out/demo" in text
    assert "witness.safetensors" in text


def test_a_witness_that_does_not_lower_the_loss_is_not_called_a_proof() -> None:
    record = whole()
    loss = record.loss.model_copy(update={"composed_gain": interval(0.001, 0.004)})
    assert "nothing is proven" in printed(record.model_copy(update={"loss": loss}), 200)


def test_render_waits_for_the_width() -> None:
    view = render(whole())
    narrow, wide = (Console(width=width, file=io.StringIO()) for width in (80, 120))
    narrow.print(view)
    wide.print(view)
    assert "certified under-optimised" in wide.file.getvalue()  # type: ignore[attr-defined]
    assert "R under-optimised" in narrow.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "not measured"), (0.0312, "+0.0312"), (-0.00001, "+0.0000"), (-0.5, "-0.5000")]
)
def test_nats(value: float | None, text: str) -> None:
    assert words.nats(value, signed=True) == text


def test_a_lopsided_interval_is_given_both_ends() -> None:
    lopsided = Interval(
        mean=0.03, low=-0.01, high=0.07, standard_error=0.01, sequences=9, method="skewness-corrected-t"
    )
    assert words.with_ends(lopsided) == "+0.0300 [-0.0100, 0.0700]"
    assert words.with_ends(lopsided, 3) == "+0.030 [-0.010, 0.070]"
    assert words.bracket(lopsided) == "[-0.0100, +0.0700]"


def test_amounts_and_durations() -> None:
    assert [words.amount(n) for n in (12, 134_515_008)] == ["12", "134.5 M"]
    assert words.amount(1_932_735_283, 1024, "B") == "1.8 GiB"
    assert [words.duration(s) for s in (0.42, 48, 192, 7500)] == ["0.4 s", "48 s", "3 min 12 s", "2 h 05 min"]


def test_clean_keeps_ordinary_text() -> None:
    assert clean("Größe 名前 x²") == "Größe 名前 x²"
    assert "\x1b" not in clean(HOSTILE)


def test_showing_never_imports_torch() -> None:
    code = (
        "import sys, peelwise.show.audit.terminal, peelwise.show.audit.report\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
