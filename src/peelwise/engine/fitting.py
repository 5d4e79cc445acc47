"""Whether formats go with the layers of a model, before any work is done; and groups where nobody names any."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from peelwise.errors import FormatError
from peelwise.formats.base import Format
from peelwise.formats.membership import scaled_part
from peelwise.model.layers import LinearLayer
from peelwise.records.base import Note, note

USUAL_GROUPS = (64, 32, 16)  # that engines have kernels for, the one that is taken where no format is given first
_LARGEST = 128  # group that is proposed
_NAMED = 3


def check_fits(linear: LinearLayer, form: Format, among: Collection[LinearLayer], option: str) -> None:
    """Refuse a format that does not go with a layer, in a sentence that says what would.

    Args:
        linear: the layer.
        form: the format.
        among: all layers that the option is about.
        option: of the command line, that names formats.

    Raises:
        FormatError: If the format's groups do not divide the layer, or its weights are not finite.
    """
    try:
        form.encode(linear.weight())
    except FormatError as error:
        raise FormatError(f"{linear.name}: {error}{_remedy(linear, form, among, option)}") from error


def common_groups(linears: Collection[LinearLayer]) -> Sequence[int]:
    """Return the group sizes that divide the inputs of every layer, largest first, none above 128."""
    width = math.gcd(*(linear.weight().shape[1] for linear in linears))
    return [size for size in range(_LARGEST, 1, -1) if width % size == 0]


def usual_layout(linears: Collection[LinearLayer]) -> tuple[str, tuple[Note, ...]]:
    """Return how many weights share a scale where nobody says it, as an option of formats, and what to say of it.

    That is the largest of `USUAL_GROUPS` that divides the inputs of every layer; if none does, the whole output.
    """
    groups = common_groups(linears)
    group = next((size for size in USUAL_GROUPS if size in groups), None)
    if group is None:
        return "channel", (note("scales-per-channel"),)
    return f"group={group}", () if group == USUAL_GROUPS[0] else (note("smaller-groups", group=group),)


def _remedy(linear: LinearLayer, form: Format, among: Collection[LinearLayer], option: str) -> str:
    layout = getattr(scaled_part(form), "layout", None)
    if (
        layout is None
        or layout.option not in form.name
        or layout.per != "group"
        or linear.weight().shape[1] % layout.size == 0
    ):
        return ""
    sizes = [str(size) for size in common_groups(among)[:_NAMED]]
    if not sizes:
        return f" No group divides the inputs of all layers; {option} takes formats with a scale per channel."
    listed = " or ".join([", ".join(sizes[:-1]), sizes[-1]] if len(sizes) > 1 else sizes)
    family = form.name.partition(":")[0]
    return f" Groups of {listed} divide the inputs of all layers: {option} {family}:group={sizes[0]}."
