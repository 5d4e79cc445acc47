"""Watch a plain training loop: a small GPT, one block of which is starved on purpose.

    python examples/monitor.py [--steps 200] [--store run.db] [--budget 0.2]

Trains on the prose of Python's language reference, byte by byte; half a minute on one core. Block 2 is not given
to the optimiser, a mistake that no loss curve shows. The run history it leaves can be read by others:

    peelwise export run.db --to csv --out run
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peelwise
from peelwise.probe.texts import reference_prose

CONTEXT, BATCH, WIDTH, HEADS, BLOCKS, BYTES = 64, 16, 64, 4, 5, 256
STARVED, TOKENS = 2, 12_000


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm_1(x)).view(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.feed_forward(self.norm_2(x))


class SmallGPT(nn.Module):
    """Byte ids ``[batch, length]`` in, logits ``[batch, length, 256]`` out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(BYTES, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main(arguments: list[str] | None = None) -> peelwise.Monitor:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--store", type=Path, default=Path("run.db"))
    parser.add_argument("--budget", type=float, default=0.2, help="share of time; 0.03 is enough for longer runs")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
    model = SmallGPT()
    fed = [p for name, p in model.named_parameters() if not name.startswith(f"blocks.{STARVED}.")]
    optimizer = torch.optim.AdamW(fed, lr=3e-3)

    # Training text, but not the batches themselves: sequences from all over it.
    probe = peelwise.Probe.from_tokens(stream, tokens=TOKENS, sequence_length=CONTEXT, in_distribution=True)
    with peelwise.Monitor(
        model, probe, optimizer=optimizer, budget=options.budget, store=options.store, on_event=print
    ) as monitor:
        for step in range(options.steps):
            starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1))
            batch = stream[starts + torch.arange(CONTEXT + 1)]  # [batch, context + 1]
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            found = monitor.step(step, loss=loss)
            optimizer.zero_grad()
            if found is not None:
                print(f"step {step}: loss {loss:.3f}, {found.kind}, blocks {found.letters}, {found.seconds:.2f} s")
                for s in found.statistics:
                    if s.name in ("recoverable", "unique"):
                        print(f"    block {s.block}: {s.name} {s.value:+.4f} [{s.low:+.4f}, {s.high:+.4f}] nats")
        print(f"the monitor took {monitor.share:.1%} of the time, {options.budget:.1%} were asked for")
    return monitor


if __name__ == "__main__":
    main()
