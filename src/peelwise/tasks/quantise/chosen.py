"""Which layers of a model are quantised, and in which format each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from peelwise.engine.fitting import check_fits, usual_layout
from peelwise.errors import FormatError
from peelwise.formats.base import Format
from peelwise.formats.table import parse_format
from peelwise.model.layers import Block, LinearLayer
from peelwise.records.base import Note
from peelwise.tasks.quantise.settings import QuantiseSettings

WIDTH = 4  # bits of the format that is taken where none is given


@dataclass(frozen=True)
class Chosen:
    """What is to be quantised.

    Attributes:
        formats: the format of every layer that is.
        skipped: the names of the other layers of the blocks.
        notes: what to say of a format that nobody gave.
    """

    formats: dict[LinearLayer, Format]
    skipped: tuple[str, ...]
    notes: tuple[Note, ...] = ()

    @property
    def name(self) -> str:
        """The format of all layers, or that they have several."""
        names = {form.name for form in self.formats.values()}
        return names.pop() if len(names) == 1 else "mixed formats"


def chosen_layers(blocks: Sequence[Block], settings: QuantiseSettings) -> Chosen:
    """Return the format of every layer that is to be quantised; refuse what does not go before any work is done.

    Raises:
        FormatError: If settings name a layer that there is not, none is left, or a format does not go with one.
    """
    linears = [linear for block in blocks for linear in block.linears]
    plan = settings.parsed_plan()
    _check_names(linears, plan, settings.skip)
    asked = [m for m in linears if _words(m).isdisjoint(settings.skip) and (m.is_plain or m.is_expert)]
    form, notes = _for_all([m for m in asked if m.name not in plan], settings)
    formats = {m: own for m in asked if (own := plan.get(m.name, form)) and not own.name.startswith("dense")}
    if not formats:
        kinds = sorted({type(m.module).__name__ for m in linears if not (m.is_plain or m.is_expert)})
        others = f"; {', '.join(kinds)} may compute something else than nn.Linear" if kinds else ""
        raise FormatError(
            f"No linear layer is left to quantise inside the blocks{others}. Skip fewer layers, or give another model."
        )
    for linear, own in formats.items():
        try:
            check_fits(linear, own, formats, "--format")
        except FormatError as error:
            raise FormatError(f"{error} Or leave it out with --skip {linear.name}.") from error
    return Chosen(formats, tuple(m.name for m in linears if m not in formats), notes)


def _for_all(linears: Collection[LinearLayer], settings: QuantiseSettings) -> tuple[Format | None, tuple[Note, ...]]:
    """Return the format of the layers that no plan names, and what to say if it is not one that was given."""
    if settings.format is not None or not linears:
        return settings.parsed_format(), ()
    layout, notes = usual_layout(linears)
    return parse_format(f"int{WIDTH}:{layout}"), notes


def _check_names(linears: Sequence[LinearLayer], plan: Collection[str], skip: Sequence[str]) -> None:
    known = {linear.name for linear in linears}
    unknown = [one for one in plan if one not in known]
    if unknown:
        raise FormatError(f"The plan names {unknown[0]}, which is no linear layer of the model's blocks.")
    words = {word for linear in linears for word in _words(linear)}
    for word in skip:
        if word not in words:
            raise FormatError(f"skip names {word!r}, which is no linear layer of the model's blocks. Correct its name.")


def _words(linear: LinearLayer) -> set[str]:
    """Return what a layer may be called: its name and the last part of it, of an expert those of its parameter."""
    name = linear.name.rpartition(".")[0] if linear.is_expert else linear.name
    return {linear.name, name, name.rpartition(".")[2]}
