"""A demonstration: a small GPT learns real text, one block breaks half way and is mended, the live page shows it.

From a certain step on one block gets no gradient any more, and its weights grow a little at every step, as they would
under a weight decay of the wrong sign. Nothing in the block can undo that; the other blocks make up for some of it.
Later the block is mended: it trains again, and begins with the replacement weights that an audit finds for it.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peelwise.act import apply_witness_
from peelwise.api.audit import audit
from peelwise.api.monitor import Monitor
from peelwise.errors import StoreError
from peelwise.probe.probe import Probe
from peelwise.probe.texts import reference_prose
from peelwise.show.dashboard.serve import Address, Server
from peelwise.show.words import duration
from peelwise.tasks.audit.settings import AuditSettings
from peelwise.tasks.monitor.schedules import every

CONTEXT, BATCH, WIDTH, HEADS, BLOCKS, BYTES = 64, 16, 64, 4, 5, 256


@dataclass(frozen=True)
class Plan:
    """What happens in the demonstration.

    Attributes:
        steps: of training, 1,024 bytes each.
        cut_off: index of the block.
        from_step: from when on it gets no gradient.
        growth: share by which its weights grow at every step from then on.
        mended_at: step at which it gets gradients again, and the weights that an audit finds for it.
        rate: highest learning rate.
        probe_tokens: bytes of text that the monitor measures on.
        audit_tokens: bytes of other text that the audit measures on.
        every: steps between measurements; few, so that there is something to see within minutes. With a share of time
            alone, how often would depend on what else the machine does.
        budget: the monitor's share of time, at most; about twice what that takes.
    """

    steps: int = 1000
    cut_off: int = 2
    from_step: int = 400
    growth: float = 0.004
    mended_at: int = 680
    rate: float = 4e-3
    probe_tokens: int = 12_000
    audit_tokens: int = 40_000
    every: int = 40
    budget: float = 0.7


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, length, width]`` to the same."""
        split = self.qkv(self.norm_1(x)).view(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        found: Tensor = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return found


class SmallGPT(nn.Module):
    """Byte ids ``[batch, length]`` in, logits ``[batch, length, 256]`` out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(BYTES, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits of the next byte at every place."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def train(
    monitor: Monitor, model: SmallGPT, optimizer: torch.optim.Optimizer, stream: Tensor, plan: Plan
) -> Iterator[int]:
    """Train as planned, and yield the number of each step that is done."""
    cut_off = list(model.blocks[plan.cut_off].parameters())
    for step in range(plan.steps):
        if step == plan.mended_at:
            mend(model, optimizer, stream, plan)
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, plan)
        starts = torch.randint(len(stream) - CONTEXT, (BATCH, 1))
        batch = stream[starts + torch.arange(CONTEXT + 1)]  # [batch, context + 1]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        if plan.from_step <= step < plan.mended_at:
            with torch.no_grad():
                for parameter in cut_off:
                    parameter.grad = None
                    parameter.mul_(1 + plan.growth)
        optimizer.step()
        monitor.step(step, loss=loss)
        optimizer.zero_grad()
        yield step


def mend(model: SmallGPT, optimizer: torch.optim.Optimizer, stream: Tensor, plan: Plan) -> None:
    """Audit the model and add what the block could recover by itself to its weights."""
    probe = Probe.from_tokens(  # drawn with another seed, so that it is not the text that the monitor measures on
        stream, tokens=plan.audit_tokens, sequence_length=CONTEXT, in_distribution=True, seed=1
    )
    for index, block in enumerate(model.blocks):  # an audit asks about what trains
        block.requires_grad_(index == plan.cut_off)
    report = audit(model, probe, AuditSettings(joint_rounds=0, controls=False), budget="2m")
    model.blocks.requires_grad_(True)
    of_block = f"alone/blocks.{plan.cut_off}."
    own = {name: change for name, change in report.witness.items() if name.startswith(of_block)}
    if own:  # an audit of very little text may find nothing
        apply_witness_(model, own, optimizer, kind="alone")


def _rate(step: int, plan: Plan) -> float:
    """Linear warm-up, then half a cosine down to a thirtieth when the block is cut off."""
    warm_up = min(1.0, (step + 1) / 50)
    done = min(1.0, step / plan.from_step)
    return plan.rate * warm_up * (1 + 29 * 0.5 * (1 + math.cos(math.pi * done))) / 30


def demonstrate(
    store: Path | None,
    address: Address,
    *,
    browser: bool,
    stay: bool,
    say: Callable[[str], None],
    plan: Plan | None = None,
    open_browser: Callable[[str], object] = webbrowser.open,
) -> None:
    """Train, show the page meanwhile, and keep showing it until Ctrl-C.

    Args:
        store: file of the run history; ``None`` for one that is gone afterwards.
        address: where the page listens.
        browser: whether to open one.
        stay: whether the page stays when training is done.
        say: prints a line.
        plan: what happens.
        open_browser: opens an address; tests replace it.

    Raises:
        MissingExtraError: Without the extra ``dashboard``.
        StoreError: If ``store`` cannot be written.
        OptionError: If the address cannot be listened at.
    """
    plan = plan or Plan()
    with tempfile.TemporaryDirectory(prefix="peelwise-demo-") as folder:
        path = store or Path(folder) / "run.db"
        with ExitStack() as open_ones:
            monitor, steps = _prepared(path, plan)
            open_ones.enter_context(monitor)
            server = Server([path], address)  # reads the file, which the monitor has made
            thread = server.beside()
            open_ones.callback(thread.join, 5)
            open_ones.callback(server.stop)
            _say_what_to_see(say, server.url, plan)
            if browser:
                threading.Thread(target=open_browser, args=(f"{server.url}#block={plan.cut_off}",), daemon=True).start()
            try:
                _followed(steps, plan, say)
                monitor.close()
                if stay:
                    say("Training is done; the page stays until Ctrl-C.")
                    while thread.is_alive():
                        thread.join(0.5)
            except KeyboardInterrupt:
                say("Ended.")
        if store is not None:
            say(f"The history is kept: peelwise serve {store}")


def _prepared(path: Path, plan: Plan) -> tuple[Monitor, Iterator[int]]:
    torch.manual_seed(0)
    stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
    model = SmallGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate)
    probe = Probe.from_tokens(stream, tokens=plan.probe_tokens, sequence_length=CONTEXT, in_distribution=True)
    monitor = Monitor(
        model,
        probe,
        optimizer=optimizer,
        budget=plan.budget,
        schedule=every(plan.every),
        store=path,
        name=f"small GPT, block {plan.cut_off} without gradients from step {plan.from_step:,} to {plan.mended_at:,}",
    )
    if not monitor.recorded:  # a training would go on; this one is there to be seen
        raise StoreError(monitor.events[-1].text)
    return monitor, train(monitor, model, optimizer, stream, plan)


def _say_what_to_see(say: Callable[[str], None], url: str, plan: Plan) -> None:
    say(f"Open {url}#block={plan.cut_off}")
    say(
        f"A small GPT of {BLOCKS} blocks learns the prose of Python's reference, byte by byte, in {plan.steps:,} steps."
    )
    say(f"From step {plan.from_step:,} on, block {plan.cut_off} gets no gradient any more and its weights grow.")
    say(f"At step {plan.mended_at:,} it is mended with the weights that an audit finds for it.")
    say("See when the block turns red and green again, what its statistics do, and the list of what happened.")
    say("Ctrl-C ends it.")


def _followed(steps: Iterator[int], plan: Plan, say: Callable[[str], None]) -> None:
    began = time.monotonic()
    for step in steps:
        if step == plan.from_step:
            say(f"Step {step:,}: block {plan.cut_off} gets no gradient from now on.")
        elif step == plan.mended_at:
            say(f"Step {step:,}: block {plan.cut_off} has the weights that an audit found for it, and trains again.")
        elif step and step % 100 == 0:
            left = (time.monotonic() - began) / step * (plan.steps - step)
            say(f"step {step:,} of {plan.steps:,}, about {duration(left)} left")
