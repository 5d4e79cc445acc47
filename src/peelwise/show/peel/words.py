"""The words that every view of a peel shares, so that no two views disagree."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from peelwise.evidence.peel import conclusion_of
from peelwise.records.peel import MapRecord, PartLosses, PeelConclusion, PeelRecord
from peelwise.records.plain_text import clean
from peelwise.show.audit.words import listed
from peelwise.show.words import NOT_IN_BUDGET

STATION_WORDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "needed": ("needed", "Leaving its station out as a target raises the loss."),
        "redundant": ("redundant", "Its station can be left out as a target and less than the margin is lost."),
        "misleading": ("better left out", "Leaving its station out as a target lowers the loss."),
        "undecided": ("undecided", "The interval covers both zero and the margin: more report tokens are needed."),
        "not measured": ("not measured", "No map with it, or none without it, was visited."),
    }
)
CAVEAT = "A map that beats the model proves; none found proves nothing. No map says which linear layer to blame."


def conclusion(record: PeelRecord) -> str:
    """Return what a peel found, made from its numbers, and no more than that."""
    # A record of old holds a sentence in its place, which nobody checked.
    found = record.conclusion if isinstance(record.conclusion, PeelConclusion) else conclusion_of(record)
    said = [_first(record, found)]
    for blocks, words in ((found.redundant, "redundant as a target"), (found.misleading, "better left out")):
        if blocks:
            said.append(f"Block{'' if len(blocks) == 1 else 's'} {listed(blocks)}: {words}.")
    return " ".join(said)


def _first(record: PeelRecord, found: PeelConclusion) -> str:
    rival = "the model and the model with its head re-fitted" if record.loss.over_head_control else "the model"
    over = record.loss.certified
    if found.case == "not-measured" or not record.maps:
        return "No verdict yet: no map was visited within the budget."
    best = record.maps[0]
    if found.case == "none-found" or over is None:
        return f"None found: of {len(record.maps)} maps visited, none is shown to beat {rival}, which proves nothing."
    if found.case == "uninformative":
        return f"The best map ({best.name}) beats {rival}, but not its null controls: uninformative."
    return (
        f"The stack of blocks is certified under-optimised: map {' '.join(map(str, best.stations))} ({best.name}) "
        f"beats {rival} by {over.mean:.3f} nats per token (95 % interval {over.low:.3f} to {over.high:.3f})."
    )


def stations(found: tuple[int, ...] | None) -> str:
    """Return a map as ``3 3 3 4``; long ones as runs, ``5 (5 times) 6 .. 30``."""
    if found is None:
        return "–"
    if len(found) <= 12:
        return " ".join(map(str, found))
    return " ".join(_runs(found))


def shown_loss(one: MapRecord) -> PartLosses:
    """Return a map's losses with a fitted head, or with the model's own where none was fitted."""
    return one.loss or one.own_head


def beats_head(record: PeelRecord) -> bool:
    """Whether the best map is shown to beat the model, also with its head re-fitted, and the null controls."""
    over = record.loss.certified
    return over is not None and over.low > 0 and record.informative is not False


def inside(record: PeelRecord) -> str:
    """Return ", references inside ternary:tensor" where the references of low-bit layers obey formats, else nothing."""
    return f", references inside {clean(record.reference_formats)}" if record.reference_formats else ""


def control_sentence(record: PeelRecord) -> str:
    """Return whether the bound may be believed, as its null controls tell."""
    loss = record.loss
    if loss.shuffled is None and loss.untrained is None:
        return f"Null controls: {NOT_IN_BUDGET}."
    if record.informative:
        return "Informative: the bound beats its null controls."
    return "Uninformative: the bound does not beat its null controls and should not be believed."


def control_rows(record: PeelRecord) -> list[tuple[str, float | None, str]]:
    """Return name, loss and meaning of the model, the bound and every control, in the order they are shown."""
    loss = record.loss
    return [
        ("model now", loss.current, "as it stands"),
        ("model, new head", loss.head_control, "head control: what a map has to beat"),
        ("best map", loss.bound, f"reference stack {stations(record.best_map)} with a light head"),
        ("shuffled targets", loss.shuffled, "null control: the best map from permuted targets"),
        ("untrained", loss.untrained, "null control: the best map at initialisation"),
    ]


def _runs(found: tuple[int, ...]) -> list[str]:
    """Write equal stations as ``5×7`` and each block's own as ``1..7``."""
    parts: list[str] = []
    start = 0
    while start < len(found):
        end = start
        own = found[start] == start + 1 and start + 1 < len(found) and found[start + 1] == start + 2
        while end + 1 < len(found) and (found[end + 1] == end + 2 if own else found[end + 1] == found[start]):
            end += 1
        length = end - start + 1
        if length == 1:
            parts.append(str(found[start]))
        else:
            parts.append(f"{found[start]}..{found[end]}" if own else f"{found[start]}×{length}")
        start = end + 1
    return parts
