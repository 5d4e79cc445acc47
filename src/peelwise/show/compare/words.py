"""What a comparison of two models found, in sentences, made from its numbers and codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from peelwise.records.base import Interval, Value
from peelwise.records.compare import BlockChange, CompareRecord, EndChange, FirstDifference, KindOfChange
from peelwise.show.words import NOT_IN_BUDGET, NOT_MEASURED, behind, data_words, nats, significant, this_data

SIGNS = (
    "Repairs: what the loss of NEW falls by when this part of OLD is put back. Breaks: what the loss of OLD rises by "
    "when this part of NEW is put in. Positive speaks against NEW in both."
)
PATH = (
    "On the way, parts of OLD are put back one after another, from the embedding on or from the head on: the steps of "
    "each way add up to the difference of the two models. Interaction is what a step does beyond what the part "
    "repairs by itself."
)
ENDS: Mapping[str, str] = MappingProxyType({"embedding": "embedding", "norm": "final norm", "head": "head"})

# A line for every kind; a test says so.
KINDS: Mapping[KindOfChange, str] = MappingProxyType(
    {
        "unchanged": "unchanged",
        "rounding": "rounded",
        "zeroed": "set to zero",
        "copied": "copied from another block",
        "duplicated": "rows or columns duplicated",
        "scale": "scaled",
        "sign": "sign flipped",
        "transposed": "transposed",
        "permutation": "permuted",
        "lattice": "quantised",
        "truncated": "cut to low rank",
        "low-rank": "update of low rank",
        "re-drawn": "drawn anew at random",
        "replaced": "other weights altogether",
        "noise": "like noise added",
        "shifted": "shifted by a constant",
        "config-or-code": "same weights, other configuration or code",
        "other": "changed throughout, such as by training",
    }
)
MEANINGS: Mapping[KindOfChange, str] = MappingProxyType(
    {
        "noise": "The difference is like independent random numbers: no direction stands out. Late steps of training "
        "can look like that too.",
        "low-rank": "The difference has few directions, as a merged LoRA has.",
        "truncated": "The new weight itself has few directions left.",
        "lattice": "Weights lie on few values per group, as quantised ones do.",
        "config-or-code": "OLD's code computes something else with the same weights: look at the configuration.",
        "replaced": "Uncorrelated with the old weight, but not random: of another run, or far along.",
    }
)


def kind_words(code: KindOfChange, values: Mapping[str, Value]) -> str:
    """Return a kind of change with its numbers, for example ``scaled by 1.3``."""
    detail = _DETAILS[code](values) if code in _DETAILS else ""
    return KINDS.get(code, code) + detail


def _scale(values: Mapping[str, Value]) -> str:
    if "factor" in values:
        return f" by {_number(values['factor'])}{_where(values)}"
    if "least" in values:
        return f" {values.get('by')} by {values.get('by')}, {_number(values['least'])} to {_number(values['largest'])}"
    return f" {values['by']} by {values['by']}" if "by" in values else ""


def _where(values: Mapping[str, Value]) -> str:
    parts = [f"{values[key]} {key}" for key in ("rows", "columns") if key in values]
    return f" ({' x '.join(parts)})" if parts else ""


def _zeroed(values: Mapping[str, Value]) -> str:
    share = f" ({100 * float(values['share']):.0f} %)" if "share" in values else ""
    return _where(values) or share


def _permuted(values: Mapping[str, Value]) -> str:
    group = values.get("group", 1)
    return f": {values.get('of', '')}" + (f" in groups of {group}" if group != 1 else "") if "of" in values else ""


def _lattice(values: Mapping[str, Value]) -> str:
    where = " per row" if values.get("group") == 0 else f" per {values['group']} weights" if "group" in values else ""
    if "steps" in values:
        return f": {int(values['steps']) + 1} values{where}"
    return f": {values['levels']} values{where}" if "levels" in values else ""


def _rank(values: Mapping[str, Value]) -> str:
    return f" ({values['rank']})" if "rank" in values else ""


_DETAILS: Mapping[KindOfChange, Callable[[Mapping[str, Value]], str]] = {
    "rounding": lambda values: f" to {values['dtype']}" if "dtype" in values else "",
    "zeroed": _zeroed,
    "copied": lambda values: f" ({values['block']})" if "block" in values else "",
    "scale": _scale,
    "sign": lambda values: _where(values) or (f" {values['by']} by {values['by']}" if "by" in values else ""),
    "permutation": _permuted,
    "lattice": _lattice,
    "truncated": _rank,
    "low-rank": _rank,
    "noise": lambda values: f", {_number(values['relative'])} of the norm" if "relative" in values else "",
    "shifted": lambda values: f" ({_number(values['by'])})" if "by" in values else "",
}


def _number(value: Value) -> str:
    return f"{float(value):.3g}"


def witness(record: CompareRecord) -> str:
    """Return what is proved, and what is not."""
    return (
        f"A block that repairs is proof that NEW can do better on {this_data(record)}: OLD's weights are the "
        f"replacement. That a change costs nothing here says nothing of other {data_words(record)}."
    )


def conclusion(record: CompareRecord) -> str:
    """Return what was found, and no more than that."""
    found, damage = record.conclusion, record.loss.damage
    said = {
        "identical": "Both models are the same: no weight differs, and every part computes the same.",
        "same-function": f"Other weights, the same function: losses agree to {significant(abs(damage.mean), 1)}.",
        "worse": f"NEW is worse by {damage.mean:.4f}{behind(record)} (95 % interval {_ends(damage)}).",
        "better": f"NEW is better by {-damage.mean:.4f}{behind(record)} (95 % interval {_ends(_turned(damage))}).",
        "no-difference": f"The losses are not distinguishable: NEW - OLD is {damage.mean:+.4f} ({_ends(damage)}).",
    }[found.case]
    if found.case == "identical":
        return said
    return " ".join([said, *_blamed(record), *_first(record.first_difference), *_code(found.unexplained)])


def _blamed(record: CompareRecord) -> list[str]:
    found, lines = record.conclusion, []
    margin = nats(record.margin_nats)
    if found.hurt:
        lines.append(f"Putting back {_blocks(found.hurt)} repairs more than the margin of {margin}.")
        top = record.blocks[found.hurt[0]]
        effect = NOT_MEASURED if top.repairs_nats is None else nats(top.repairs_nats.mean)
        lines.append(f"Block {top.index} repairs {effect}: {kind_words(top.kind_of_change, top.kind_values)}.")
    if found.hurt_ends:
        lines.append(f"Putting back {_ends_named(found.hurt_ends)} of OLD repairs more than the margin of {margin}.")
    if found.helped:
        lines.append(f"The change of {_blocks(found.helped)} helped by more than the margin.")
    if not (found.hurt or found.hurt_ends or found.helped) and found.changed:
        top = record.blocks[found.changed[0]]
        effect = NOT_IN_BUDGET if top.repairs_nats is None else f"{top.repairs_nats.mean:+.4f}"
        lines.append(
            f"No block is shown to matter by more than the margin of {margin}; the largest effect is that of block "
            f"{top.index} ({effect}): {kind_words(top.kind_of_change, top.kind_values)}."
        )
    return lines


def mended(record: CompareRecord) -> str:
    """Return what all parts that hurt repair together; "" where nothing hurts."""
    found, one = record.mended, record.conclusion
    if found is None:
        hurt = bool(one.hurt or one.hurt_ends)
        return (
            "What hurts cannot be put back as tensors: OLD's code differs, or its tensors do not fit." if hurt else ""
        )
    parts = [_blocks(found.blocks)] if found.blocks else []
    parts += [_ends_named(found.ends)] if found.ends else []
    left_out = set(one.hurt) - set(found.blocks)
    also = f" {_blocks(tuple(sorted(left_out))).capitalize()} cannot be put back as tensors." if left_out else ""
    said = (
        f"NEW with {' and '.join(parts)} of OLD has loss {nats(found.loss)}: {nats(found.gain.mean)} lower "
        f"(95 % interval {_ends(found.gain)}).{also}"
    )
    return said if can_apply(record) else f"{said} That is no proof of a gain."


def can_apply(record: CompareRecord) -> bool:
    """Whether `peelwise apply` writes what all parts that hurt repair together: it is a gain beyond chance."""
    return record.mended is not None and record.mended.gain.low > 0


def _ends_named(units: Sequence[str]) -> str:
    return " and ".join(f"the {ENDS[unit]}" for unit in units)


def _first(first: FirstDifference | None) -> list[str]:
    if first is None:
        return []
    where = f"block {first.block}" if first.block is not None else f"the {ENDS[first.unit]}"
    cause = "its weights" if first.cause == "weights" else "configuration or code, since its weights are equal"
    return [f"The first part that computes something else is {where}: {cause}."]


def _code(unexplained: tuple[int, ...]) -> list[str]:
    if not unexplained:
        return []
    return [f"In {_blocks(unexplained)} configuration or code differs, whatever the weights do."]


def _blocks(indices: tuple[int, ...], most: int = 6) -> str:
    named = ", ".join(map(str, indices[:most]))
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"{'block' if len(indices) == 1 else 'blocks'} {named}{more}"


def _ends(interval: Interval) -> str:
    return f"{interval.low:.4f} to {interval.high:.4f}"


def _turned(interval: Interval) -> Interval:
    return interval.model_copy(update={"low": -interval.high, "high": -interval.low})


def part_name(part: BlockChange | EndChange) -> str:
    """Return what a part is called in a table."""
    return str(part.index) if isinstance(part, BlockChange) else ENDS[part.unit]


def in_order(record: CompareRecord) -> list[BlockChange | EndChange]:
    """Return all parts from the input on."""
    front = [end for end in record.ends if end.unit == "embedding"]
    return [*front, *record.blocks, *(end for end in record.ends if end.unit != "embedding")]
