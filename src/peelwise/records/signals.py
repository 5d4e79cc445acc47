"""The table of layer signals: what each is called, measured in, and how it is compared with its own history. No torch.

Whoever computes, stores, watches, shows, exports or documents a signal reads it here. A new one is a function, a row of
`SIGNALS`, a test and a line in the changelog; `docs/signals.md` is made from this table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Kind = Literal["refinement", "backward", "forward", "weights", "codes", "model"]
OverLayers = Literal["sum", "root of sum", "mean", "largest"]

# What one sweep gives of every block for nothing more.
SWEPT: tuple[Kind, ...] = ("backward", "forward", "weights")
NATS = "nats per token"
STEPS = "steps"
# The name of what ranks blocks before anything is evaluated.
RANKED_BY = "natural_energy"


@dataclass(frozen=True)
class Signal:
    """One number of a block, or of the whole model, at one moment.

    Attributes:
        name: in the run history, in records and in trackers; stays for ever.
        title: for people, within a sentence.
        unit: of the value, or empty for a plain number.
        meaning: one sentence.
        quotient: compared with its history as a quotient (2 is twice as much); else as a difference.
        watched: whether a lasting change against all other blocks is an event; for positive signals of a sweep.
        tracked: whether it goes to live loggers and trackers.
        kind: what it is computed from, which also says what ``function`` is given; it is shown with its kind.
        function: ``module:name`` of what computes it for one linear layer, from an `engine.signals.LayerSums` in the
            kinds of `SWEPT`, from a `formats.signals.LowBitSignals` in ``codes``; it returns ``None`` where there is
            none. Empty where the task that measures the signal makes its row itself.
        over_layers: how a block's value is made from those of its linear layers.
        heading: of a narrow column; empty for the title.
        form: how the terminal prints a value.
        in_history: whether monitors record it; certificates hold it either way.
    """

    name: str
    title: str
    unit: str
    meaning: str
    quotient: bool = True
    watched: bool = False
    tracked: bool = False
    kind: Kind = "backward"
    function: str = ""
    over_layers: OverLayers = "sum"
    heading: str = ""
    form: str = "{:.3g}"
    in_history: bool = True

    @property
    def column(self) -> str:
        """What stands over a narrow column."""
        return self.heading or self.title


# In the order in which they are shown.
_ROWS = (
    Signal(
        "recoverable",
        "solo gain",
        NATS,
        "What the loss falls by when this block alone is refined, by replacement weights; a lower bound.",
        quotient=False,
        tracked=True,
        kind="refinement",
        form="{:+.4f}",
    ),
    Signal(
        "unique",
        "marginal gain (leave-one-out)",
        NATS,
        "What all refined blocks together gain more than without this one: only this block can give it.",
        quotient=False,
        tracked=True,
        kind="refinement",
        heading="marginal gain",
        form="{:+.4f}",
    ),
    Signal(
        "removal",
        "ablation (block skipped)",
        NATS,
        "What the loss rises by when the block is skipped; below zero, the model is better without it.",
        quotient=False,
        kind="refinement",
        heading="ablation",
        form="{:+.4f}",
        in_history=False,
    ),
    Signal(
        "equivalent_steps",
        "solo gain in steps of training",
        STEPS,
        "The solo gain over what the training loss falls by per step, while it falls.",
        quotient=False,
        tracked=True,
        kind="refinement",
        heading="steps",
        form="{:,.0f}",
    ),
    Signal(
        "natural_energy",
        "natural-gradient score (held-out)",
        "nats per unit step",
        "Squared norm of the gradient in the metric of the Kronecker-factored curvature, as far as the direction holds "
        "on held-out tokens; it ranks blocks before anything is refined.",
        watched=True,
        tracked=True,
        function="peelwise.engine.signals:natural_energy",
        heading="natural-gradient score",
    ),
    Signal(
        "energy",
        "input-whitened score",
        "nats per unit step",
        "Squared norm of the gradient in the metric of the inputs, on the tokens it was computed from: "
        "`tr(C (S + 0.1)⁻¹ Cᵀ)`.",
        watched=True,
        function="peelwise.engine.signals:energy",
        heading="input-whitened score",
    ),
    Signal(
        "gradient_norm",
        "gradient norm",
        "nats per unit of weight",
        "Frobenius norm of the mean gradient of all linear layers.",
        watched=True,
        function="peelwise.engine.signals:gradient_norm",
        over_layers="root of sum",
    ),
    Signal(
        "held_out_energy",
        "input-whitened score (held-out)",
        "nats per unit step",
        "What of the input-whitened direction holds on held-out tokens.",
        function="peelwise.engine.signals:held_out_energy",
        in_history=False,
    ),
    Signal(
        "cross_energy",
        "input-whitened score (cross)",
        "nats per unit step",
        "The input-whitened score that two sets of tokens agree on, `tr(C (S + 0.1)⁻¹ C_sᵀ)`: free of noise on "
        "average, and negative at times.",
        quotient=False,
        function="peelwise.engine.signals:cross_energy",
        in_history=False,
    ),
    Signal(
        "codes_flipped",
        "codes flipped",
        "of its codes",
        "Share of codes that changed since the measurement before; mean over the block's layers.",
        kind="codes",
        function="peelwise.tasks.monitor.code_signals:codes_flipped",
        over_layers="mean",
        heading="flipped",
        form="{:.3%}",
    ),
    Signal(
        "near_threshold",
        "weights near a threshold",
        "of its weights",
        "Share of latent weights within 5 % of a level distance of a threshold between two codes: those that a small "
        "step can flip; mean over the block's layers.",
        kind="codes",
        function="peelwise.tasks.monitor.code_signals:near_threshold",
        over_layers="mean",
        heading="near a threshold",
        form="{:.1%}",
    ),
    Signal(
        "scale_drift",
        "scale drift",
        "of a scale",
        "Mean relative change of the scales since the measurement before; mean over the block's layers.",
        kind="codes",
        function="peelwise.tasks.monitor.code_signals:scale_drift",
        over_layers="mean",
        form="{:.2%}",
    ),
    Signal(
        "dead_rows",
        "all-zero outputs",
        "outputs",
        "Outputs all of whose weights are zero, over all layers of the block.",
        kind="codes",
        function="peelwise.tasks.monitor.code_signals:dead_rows",
        form="{:.0f}",
    ),
    Signal(
        "composed",
        "gain of all blocks refined together",
        NATS,
        "What the loss falls by with the replacement weights of all blocks.",
        quotient=False,
        tracked=True,
        kind="model",
        form="{:+.4f}",
    ),
    Signal(
        "bound_upper",
        "upper edge of the cloud",
        NATS,
        "Loss of a new head on the embeddings, without any block; above it the blocks still hurt.",
        quotient=False,
        tracked=True,
        kind="model",
        form="{:.4f}",
    ),
    Signal(
        "bound_lower",
        "lower edge of the cloud",
        NATS,
        "Loss with the replacement weights of all blocks, never above the model's own.",
        quotient=False,
        tracked=True,
        kind="model",
        form="{:.4f}",
    ),
)

SIGNALS: dict[str, Signal] = {row.name: row for row in _ROWS}


def of_kinds(kinds: Collection[Kind]) -> list[Signal]:
    """Return the signals of some kinds, in the order of the table."""
    return [signal for signal in SIGNALS.values() if signal.kind in kinds]


def title_of(name: str) -> str:
    """Return what people call a signal; one that is not in the table is called by its own name."""
    return SIGNALS[name].title if name in SIGNALS else name
