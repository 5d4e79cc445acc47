"""Low-bit models: the loss in three parts, on the terminal and in the report."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peelwise.records.audit import AuditRecord, BlockRecord, MatrixRecord
from peelwise.records.base import Interval, SplitRecord
from peelwise.records.plain_text import clean
from peelwise.show.audit import charts
from peelwise.show.html.markup import chart, esc, paragraph, section, table
from peelwise.show.words import NOT_MEASURED, bracket, nats

TITLE = "What is recoverable at the same bit width, and the quantisation gap"
GAP, SAME_BITS = "quantisation gap (upper bound)", "recoverable at the same bit width"
_MEANINGS = (
    ("irreducible", "no weights found get below this"),
    (GAP, "at most this is due to the bits"),
    (SAME_BITS, "certified"),
)
_MILLI = 1000.0


def is_low_bit(record: AuditRecord) -> bool:
    """Return whether the audited model holds low-bit layers."""
    return any(matrix.format is not None for block in record.blocks for matrix in block.matrices)


def terminal_view(record: AuditRecord) -> RenderableType | None:
    """Return the parts of the loss and a line per block, or ``None`` for a model without low-bit layers."""
    if not is_low_bit(record) and record.loss.split is None:
        return None
    lines: list[RenderableType] = [Text(f"\n{TITLE}, nats per token", style="bold")]
    if record.loss.split is not None:
        whole = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
        whole.add_column(no_wrap=True)
        whole.add_column(justify="right", no_wrap=True)
        whole.add_column()
        for (name, value, interval), (_, meaning) in zip(_parts(record), _MEANINGS, strict=True):
            style = "bold" if name == SAME_BITS else ""
            whole.add_row(Text(name, style), Text(value, style), Text(f"{interval} {meaning}".strip(), style="dim"))
        lines.append(Padding(whole, (0, 0, 0, 1)))
    lines.append(_block_lines(record))
    return Group(*lines)


def _parts(record: AuditRecord) -> list[tuple[str, str, str]]:
    """Return name, value and interval of the three parts of the whole loss."""
    split, loss = record.loss.split, record.loss
    assert split is not None
    return [
        ("irreducible", nats(split.irreducible), ""),
        (GAP, f"≤ {nats(split.price_of_precision)}", bracket(loss.price)),
        (SAME_BITS, nats(split.left_on_the_table), bracket(loss.composed_gain) if loss.composed_gain else ""),
    ]


def _block_lines(record: AuditRecord) -> Table:
    lines = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    for title in ("block", "gap\nat most", "recoverable\ncertified", "codes\nflipped"):
        lines.add_column(title, justify="right", no_wrap=True)
    lines.add_column("most of it in", overflow="fold")
    for block in record.blocks:
        lines.add_row(
            str(block.index),
            _mean(block.price_nats),
            _mean(block.recoverable_nats),
            _share(_flipped(block)),
            clean(_most_left(block)),
        )
    return lines


def low_bit(record: AuditRecord) -> str:
    """Return the section of the report, empty for a model without low-bit layers."""
    if not is_low_bit(record) and all(block.split is None for block in record.blocks):
        return ""
    meanings = dict(_MEANINGS)
    parts = ""
    if record.loss.split is not None:
        rows = [(esc(n), esc(v), esc(i), esc(meanings[n])) for n, v, i in _parts(record)]
        rows.append(("loss now", esc(nats(record.loss.current)), "", "the three parts add up to it"))
        titles = ("all blocks together", "nats per token", "95 % interval", "what it means")
        parts = table(titles, rows, caption="The loss in three parts", style="wide")
    picture = chart(
        charts.split(record),
        "Each block refined by itself. Dark: recoverable by codes and scales of the same format. Light: what the "
        "dense witness gains beyond that. The irreducible part is not drawn.",
        "",
    )
    about = paragraph(
        "Witnesses keep the format that each layer has; the witness file holds their codes and scales. The "
        "quantisation gap is the difference to a dense witness. It is an upper bound, because better codes may exist.",
        "small",
    )
    return section("bits", TITLE, parts, picture, about, _matrix_table(record))


def _matrix_table(record: AuditRecord) -> str:
    rows = [_matrix_row(block, matrix) for block in record.blocks for matrix in block.matrices if matrix.format]
    if not rows:
        return ""
    titles = ("layer", "format", "bits/weight", "codes flipped", "gap, at most", "recoverable", "now")
    listing = table(titles, rows, caption="Every low-bit layer against its own dense target", style="blocks")
    note = paragraph(
        "Per layer, in thousandths of a nat per token as its own curvature predicts them: its distance from the dense "
        "witness, of which at most the gap is due to the bits. Blocks above are measured, layers are predicted.",
        "small",
    )
    return f"<details><summary>Every low-bit layer ({len(rows)})</summary>{note}{listing}</details>"


def _matrix_row(block: BlockRecord, matrix: MatrixRecord) -> tuple[str, ...]:
    split = matrix.split
    bits = NOT_MEASURED if matrix.bits_per_weight is None else f"{matrix.bits_per_weight:.2f}"
    values = (split.price_of_precision, split.left_on_the_table, _total(split)) if split else (None,) * 3
    numbers = (NOT_MEASURED if value is None else f"{_MILLI * value:.3g}" for value in values)
    name = f"{block.index} {matrix.name}"
    return (esc(name), esc(matrix.format), esc(bits), esc(_share(matrix.flipped)), *map(esc, numbers))


def _total(split: SplitRecord) -> float:
    return split.irreducible + split.price_of_precision + split.left_on_the_table


def _flipped(block: BlockRecord) -> float | None:
    """Return the mean share of codes that the witness of the block alone changes."""
    known = [matrix.flipped for matrix in block.matrices if matrix.flipped is not None]
    return sum(known) / len(known) if known else None


def _mean(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.mean:+z.3f}"


def _share(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.2g} %"


def _most_left(block: BlockRecord) -> str:
    known = [(m.split.left_on_the_table, m) for m in block.matrices if m.split is not None]
    if not known:
        return NOT_MEASURED
    left, matrix = max(known, key=lambda pair: pair[0])
    return f"{matrix.name} ({matrix.format})" if left > 0 else "–"
