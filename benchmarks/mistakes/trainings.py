"""Ten small trainings, each with one usual mistake, and healthy ones that look odd in one way or another.

All train the small GPT of examples/monitor.py byte by byte. A mistake changes one thing; the rest is the healthy run.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from monitor import BATCH, CONTEXT, HEADS, Block  # noqa: E402

RATE, IGNORED = 2e-3, -100
SEEN_BY = 2  # the block in which a head sees the future, and which is frozen


@dataclass(frozen=True)
class Training:
    """What one training does differently from the plain healthy one.

    Attributes:
        kinds: events, any of which names the mistake; empty for a healthy run.
        rate: highest learning rate; ``schedule`` gives its part at a step of so many.
        change: makes something of the model before its training.
        groups: parameters for the optimiser, with their rates.
        batch: ids ``[batch, context + 1]`` and labels ``[batch, context]`` of a step.
        clears: whether gradients are cleared between steps.
    """

    kinds: tuple[str, ...] = ()
    rate: float = RATE
    decay: float = 0.01
    change: Callable[[nn.Module], object] = lambda model: None
    groups: Callable[[nn.Module, float], Iterable] = lambda model, rate: list(model.parameters())
    batch: Callable[[Tensor, int, torch.Generator], tuple[Tensor, Tensor]] = lambda *a: plain(*a)
    schedule: Callable[[int, int], float] = lambda step, steps: min(1.0, (step + 1) / 20)
    clears: bool = True
    clip: float | None = None


def rows(stream: Tensor, starts: Tensor, length: int = CONTEXT + 1) -> Tensor:
    return stream[starts + torch.arange(length)]


def plain(stream, step, generator):
    ids = rows(stream, torch.randint(len(stream) - CONTEXT - 2, (BATCH, 1), generator=generator))
    return ids, ids[:, 1:]


def shifted_twice(stream, step, generator):
    ids = rows(stream, torch.randint(len(stream) - CONTEXT - 2, (BATCH, 1), generator=generator), CONTEXT + 2)
    return ids[:, :-1], ids[:, 2:]


def not_shifted(stream, step, generator):
    ids, _ = plain(stream, step, generator)
    return ids, ids[:, :-1]


def padded(masked):
    def batch(stream, step, generator):
        ids, labels = plain(stream, step, generator)
        ids, labels = ids.clone(), labels.clone()
        for row, length in enumerate(torch.randint(CONTEXT // 4, CONTEXT, (BATCH,), generator=generator)):
            ids[row, length:] = 0
            labels[row, length:] = IGNORED if masked else 0
        return ids, labels

    return batch


def same_again(documents):
    def batch(stream, step, generator):
        """Return sequences from a few rows alone: what is left where a shuffle or an iterator is broken."""
        few = torch.linspace(0, len(stream) - CONTEXT - 2, documents).long()[:, None]
        ids = rows(stream, few[torch.randint(documents, (BATCH,), generator=generator)])
        return ids, ids[:, 1:]

    return batch


def epochs(stream, step, generator):
    """Return every sequence once in 100 steps: several epochs, which is no mistake."""
    many = torch.linspace(0, len(stream) - CONTEXT - 2, 100 * BATCH).long()
    order = torch.randperm(len(many), generator=torch.Generator().manual_seed(step // 100))
    ids = rows(stream, many[order[step % 100 * BATCH :][:BATCH], None])
    return ids, ids[:, 1:]


def freeze(model):
    model.blocks[SEEN_BY].requires_grad_(False)


class SeeingBlock(Block):
    """A block whose last head may be without a mask."""

    sees = False

    def forward(self, x):
        if not self.sees:
            return super().forward(x)
        split = self.qkv(self.norm_1(x)).view(*x.shape[:2], 3, HEADS, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        past = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        everything = F.scaled_dot_product_attention(q, k, v)
        mixed = torch.cat([past[:, :-1], everything[:, -1:]], dim=1)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.feed_forward(self.norm_2(x))


def let_one_head_see(model):
    for block in model.blocks:
        block.__class__ = SeeingBlock
    model.blocks[SEEN_BY].sees = True


def last_blocks_faster(model, rate):
    fast = [p for block in model.blocks[-2:] for p in block.parameters()]
    rest = [p for p in model.parameters() if all(p is not f for f in fast)]
    return [{"params": rest}, {"params": fast, "lr": 100 * rate}]


def drop_out(model):
    for block in model.blocks:
        block.feed_forward.append(nn.Dropout(0.1))


MISTAKES = {
    "frozen block": Training(kinds=("frozen",), change=freeze),
    "last blocks at 100 times the rate": Training(kinds=("rate-too-large",), groups=last_blocks_faster),
    "labels shifted twice": Training(kinds=("labels-shifted",), batch=shifted_twice),
    "a rate of 1e-6": Training(kinds=("rate-too-small",), rate=1e-6),
    "padding in the loss": Training(kinds=("padding-in-loss",), batch=padded(masked=False)),
    "bf16 without a float32 copy": Training(kinds=("updates-lost",), rate=1e-4, change=lambda m: m.bfloat16()),
    "the same data again and again": Training(kinds=("repeated-data",), batch=same_again(48)),
    "a head that sees the future": Training(kinds=("leak",), change=let_one_head_see),
    "far too strong decay": Training(kinds=("decay-too-strong",), decay=20.0),
    "gradients never cleared": Training(kinds=("gradients-kept",), clears=False),
}
HEALTHY = {
    "healthy": Training(),
    "healthy: slow warm-up": Training(schedule=lambda step, steps: min(1.0, (step + 1) / 200)),
    "healthy: cosine to zero": Training(schedule=lambda step, steps: 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    "healthy: padding masked": Training(batch=padded(masked=True)),
    "healthy: three epochs": Training(batch=epochs),
    "healthy: dropout and clipping": Training(change=drop_out, clip=1.0),
    "healthy: a small rate": Training(rate=1e-4),
}
TRAININGS = MISTAKES | HEALTHY
