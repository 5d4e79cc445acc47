"""OLD's tensors of all parts that hurt, put back into NEW together: what a certificate of a comparison offers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from peelwise.errors import CertificateError
from peelwise.model.architectures import find_blocks
from peelwise.model.fingerprint import is_plain, sha256_of
from peelwise.model.layers import plain_name, unwrapped
from peelwise.model.runner import Runner
from peelwise.records.compare import CompareConclusion, Mended
from peelwise.tasks.compare.measures import Pair, Part
from peelwise.tasks.compare.tensors import end_tensors


def part_tensors(runner: Runner, part: Part) -> dict[str, Tensor]:
    """Return the saved tensors of a part by their names in it (of the ends: in the model), as they are stored."""
    if part.block is None:
        return end_tensors(runner)[part.unit]
    state = unwrapped(runner.blocks[part.block].module).state_dict()
    return {plain_name(name): t.detach() for name, t in state.items() if isinstance(t, Tensor)}


def part_sha256(runner: Runner, part: Part) -> str:
    """Return the SHA-256 over the tensors of a part: name, shape, dtype and bytes of each."""
    return sha256_of(part_tensors(runner, part).items())


def parts_to_mend(pair: Pair, found: CompareConclusion, same_code: Mapping[int, bool | None]) -> list[Part]:
    """Return the parts that hurt and can be put back as tensors, from the input on.

    A block can where its code is the same in both models and its tensors have the same names and shapes and are not
    quantised. Embedding and head go together where they are one tensor; ends stay as they are where the head cannot be
    told apart.

    Args:
        pair: both models.
        found: what hurt.
        same_code: by block, whether OLD's code computes the same with NEW's weights.
    """
    ends = set(found.hurt_ends) if pair.heads_apart else set()
    if ends & {"embedding", "head"} and any(_is_tied(side.runner) for side in (pair.old, pair.new)):
        ends |= {"embedding", "head"}
    hurt = [
        part
        for part in pair.parts
        if (part.unit in ends if part.block is None else part.block in found.hurt and same_code[part.block])
    ]
    return [part for part in hurt if _fits(pair, part)]


def measure_mended(pair: Pair, parts: Iterable[Part]) -> Mended | None:
    """Return what all ``parts`` of OLD repair in NEW together; ``None`` if there are none."""
    parts = list(parts)
    if not parts:
        return None
    losses = pair.exchanged(pair.new, pair.old, parts)
    return Mended(
        blocks=tuple(part.block for part in parts if part.block is not None),
        ends=tuple(part.unit for part in parts if part.block is None),
        loss=pair.new.trace.mean_of(losses),
        gain=pair.gain(pair.new.trace.losses, losses).interval(),
    )


def mended_parts(pair: Pair, mended: Mended) -> list[Part]:
    """Return the parts that a record says were put back together."""
    return [p for p in pair.parts if (p.unit in mended.ends if p.block is None else p.block in mended.blocks)]


@torch.no_grad()
def put_back(new: nn.Module, old: nn.Module, mended: Mended) -> None:
    """Write OLD's tensors of the mended parts into ``new``, in its own dtypes.

    Raises:
        CertificateError: If the models hold other tensors than the record says.
    """
    runners = [Runner(model, find_blocks(model)) for model in (old, new)]
    for part in _parts_of(mended):
        theirs, own = (part_tensors(runner, part) for runner in runners)
        if theirs.keys() != own.keys() or any(theirs[name].shape != own[name].shape for name in own):
            where = part.unit if part.block is None else f"block {part.block}"
            raise CertificateError(f"OLD's tensors of {where} do not fit NEW, so nothing can be put back.")
        for name, tensor in own.items():
            tensor.copy_(theirs[name])


def _parts_of(mended: Mended) -> Iterator[Part]:
    yield from (Part("block", (1 + index,), index) for index in mended.blocks)
    yield from (Part(unit, ()) for unit in mended.ends)


def _is_tied(runner: Runner) -> bool:
    ends = end_tensors(runner)
    places = {tensor.data_ptr() for tensor in ends["embedding"].values()}
    return any(tensor.data_ptr() in places for tensor in ends["head"].values())


def _fits(pair: Pair, part: Part) -> bool:
    old, new = (part_tensors(side.runner, part) for side in (pair.old, pair.new))
    if old.keys() != new.keys() or not all(map(is_plain, (*old.values(), *new.values()))):
        return False
    return all(old[name].shape == new[name].shape for name in old)
