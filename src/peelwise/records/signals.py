"""The table of layer signals: what each is called, measured in, and how it is compared with its own history. No torch.

Whoever computes, stores, watches, shows, exports or documents a signal reads it here. A new one is a function, a row of
`SIGNALS`, a test and a line in the changelog; the page of the documentation is made from this table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

from peelwise.errors import OptionError
from peelwise.records.base import NATS as NATS

Kind = Literal[
    "refinement",
    "backward",
    "forward",
    "weights",
    "codes",
    "drift",
    "model",
    "matrix",
    "neurons",
    "gain",
    "kin",
    "stream",
    "update",
    "gate",
    "joint",
    "score",
]
Side = Literal["both", "high", "low"]
OverLayers = Literal["sum", "root of sum", "mean", "largest"]

# What one sweep gives of every block for nothing more.
SWEPT: tuple[Kind, ...] = ("backward", "forward", "weights")
# What `check` compares over depth: from the weights alone, from a pass forward, from a pass backward.
FROM_WEIGHTS: tuple[Kind, ...] = ("matrix", "neurons", "gain", "kin")
FROM_FORWARD: tuple[Kind, ...] = ("stream", "update")
FROM_BACKWARD: tuple[Kind, ...] = ("gate", "joint")
OVER_DEPTH: tuple[Kind, ...] = FROM_WEIGHTS + FROM_FORWARD + FROM_BACKWARD
STEPS = "steps"
TOKENS = "tokens"
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
            kinds of `SWEPT`, from a `formats.signals.LowBitSignals` in ``codes``, from a `tasks.monitor.drift.Moved` in
            ``drift``, and for one part of a block in those of `OVER_DEPTH` (what `engine.depth` calls matrix, gain,
            stream, ..; of all blocks at once in ``kin``); it returns ``None`` where there is none. Empty where the task
            that measures the signal makes its row itself.
        over_layers: how a block's value is made from those of its linear layers.
        heading: of a narrow column; empty for the title.
        form: how the terminal prints a value.
        in_history: whether monitors record it unasked; certificates hold it either way.
        side: on which side of its neighbours' a value over depth says that a block is unlike them.
        resolution: the least spread over depth that deviations are measured in, of the value or its logarithm.
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
    side: Side = "both"
    resolution: float = 0.03

    @property
    def column(self) -> str:
        """What stands over a narrow column."""
        return self.heading or self.title

    def unit_of(self, loss: str) -> str:
        """Return what the value is in where losses are in ``loss``, such as ``squared error``."""
        if loss == NATS:
            return self.unit
        return "examples" if self.unit == TOKENS else self.unit.replace(NATS, loss).replace("nats", loss)


class _Row(NamedTuple):
    """A signal that `check` compares over depth, before it has a kind and a module."""

    name: str
    title: str
    unit: str
    meaning: str
    quotient: bool = True
    side: Side = "both"
    resolution: float = 0.03


def _over_depth(kind: Kind, module: str, *rows: _Row) -> tuple[Signal, ...]:
    """Return the rows of one kind; a signal's function is called as the signal is."""
    return tuple(Signal(**row._asdict(), kind=kind, function=f"{module}:{row.name}", in_history=False) for row in rows)


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
        "first_order",
        "first-order bound of the solo gain",
        NATS,
        "What the direction of a block that was not refined gains at most, by the slope of the loss along it, at twice "
        "the step that refined blocks take.",
        quotient=False,
        kind="refinement",
        heading="first-order bound",
        form="{:+.4f}",
    ),
    Signal(
        "recoverable_level",
        "level of the solo gain",
        NATS,
        "What successive measurements on different text say together of the solo gain, by witnesses of this kind; "
        "older ones weigh less, and drift is in the interval.",
        quotient=False,
        tracked=True,
        kind="refinement",
        heading="level",
        form="{:+.4f}",
    ),
    Signal(
        "unique_level",
        "level of the marginal gain",
        NATS,
        "The same of the marginal gain.",
        quotient=False,
        kind="refinement",
        heading="marginal level",
        form="{:+.4f}",
    ),
    Signal(
        "first_order_level",
        "level of the first-order bound",
        NATS,
        "The same of the first-order bound.",
        quotient=False,
        kind="refinement",
        heading="level of the bound",
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
        "tokens_to_decide",
        "tokens that would decide it",
        TOKENS,
        "Of an undecided block: about how many tokens to report on would tell its gain from the margin, if the gain "
        "stays as it was measured. Those of all measurements together, where they are made on different text.",
        quotient=False,
        kind="refinement",
        heading="to decide",
        form="{:,.0f}",
    ),
    Signal(
        "seconds_to_decide",
        "time until it is decided",
        "s",
        "Of an undecided block: about how long the run's budget takes to pay for what is missing of these tokens.",
        quotient=False,
        kind="refinement",
        heading="decided in",
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
        "expert_load",
        "busiest expert",
        "",
        "Tokens of the busiest expert of a mixture over those of an even load.",
        function="peelwise.engine.signals:expert_load",
        over_layers="largest",
        in_history=False,
    ),
    Signal(
        "expert_entropy",
        "expert entropy",
        "",
        "Entropy of the experts' shares of the tokens: 1 is an even load, 0 a router that has collapsed.",
        quotient=False,
        function="peelwise.engine.signals:expert_entropy",
        in_history=False,
    ),
    Signal(
        "experts_used",
        "experts used",
        "",
        "Share of a mixture's experts that any probe token was routed to; the others are dead on this text.",
        quotient=False,
        function="peelwise.engine.signals:experts_used",
    ),
    Signal(
        "expert_spread",
        "spread over experts",
        "",
        "Entropy of the experts' shares of the tokens between that of a router that gives all tokens to the same "
        "experts (0) and that of an even load (1).",
        quotient=False,
        function="peelwise.engine.signals:expert_spread",
    ),
    Signal(
        "expert_tokens",
        "even load of an expert",
        TOKENS,
        "Fit tokens that every expert of a mixture would get of an even load: how much an expert without one says.",
        quotient=False,
        function="peelwise.engine.signals:expert_tokens",
        over_layers="largest",
        form="{:,.0f}",
    ),
    Signal(
        "layer_slope",
        "largest gain slope of a layer",
        "nats per log scale",
        "How the loss answers to a scale on one linear layer's weight, the largest in absolute value: near 0 in a "
        "trained block, large where a sign or a size is wrong.",
        function="peelwise.engine.signals:layer_slope",
        over_layers="largest",
        heading="gain slope",
    ),
    Signal(
        "gradient_agreement",
        "agreement of fit and select gradients",
        "",
        "Cosine of the mean gradients on two sets of tokens, mean over layers: near 1 while there is a direction to "
        "go, near 0 where noise is left.",
        quotient=False,
        function="peelwise.engine.signals:gradient_agreement",
        over_layers="mean",
        heading="gradients agree",
    ),
    Signal(
        "input_rank",
        "directions of the inputs",
        "directions",
        "Participation number of the second moments of a layer's inputs, mean over layers: falls where the stream "
        "collapses onto few directions.",
        kind="forward",
        function="peelwise.engine.signals:input_rank",
        over_layers="mean",
        heading="input directions",
    ),
    Signal(
        "weight_norm",
        "norm of the weights",
        "",
        "Frobenius norm of all linear layers' weights.",
        kind="weights",
        function="peelwise.engine.signals:weight_norm",
        over_layers="root of sum",
    ),
    Signal(
        "rotation",
        "rotation since the start",
        "1 - cosine",
        "One minus the cosine of a layer's weights now and when monitoring began (at initialisation, if it began "
        "there), mean over layers: blocks that hardly turn hardly learn.",
        quotient=False,
        kind="drift",
        function="peelwise.tasks.monitor.drift:rotation",
        over_layers="mean",
    ),
    Signal(
        "progress",
        "direction kept",
        "",
        "Cosine of what the weights moved by since the last measurement and by before it, mean over layers: near 1 on "
        "a straight way, below 0 where steps go back and forth.",
        quotient=False,
        kind="drift",
        function="peelwise.tasks.monitor.drift:progress",
        over_layers="mean",
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
    Signal(
        "unlikeness",
        "unlike its neighbours (score)",
        "standard deviations",
        "How far the block's signals are from those of the blocks around it, as `peelwise check` has it before it "
        "tries factors; for monitors that record all of its signals.",
        quotient=False,
        tracked=True,
        kind="score",
    ),
    *_over_depth(
        "matrix",
        "peelwise.engine.depth.weights",
        _Row("weight_rms", "weight RMS", "", "Root mean square of a matrix's entries."),
        _Row("stable_rank", "stable rank", "", "Squared Frobenius norm over squared largest singular value."),
        _Row(
            "effective_rank",
            "effective rank",
            "of the smaller side",
            "Exponential of the entropy of the singular values, over their number.",
        ),
        _Row(
            "singular_tail",
            "tail of the spectrum",
            "of the median",
            "A small singular value (95 % lie above it) over the median: near 0 where the matrix is of low rank.",
        ),
        _Row("hill_alpha", "Hill exponent", "", "Of the eigenvalues above the median; small means heavy-tailed."),
        _Row("row_dispersion", "spread of row norms", "", "Standard deviation of the log norms of the rows (outputs)."),
        _Row(
            "column_dispersion",
            "spread of column norms",
            "",
            "Standard deviation of the log norms of the columns (inputs).",
        ),
        _Row(
            "trace_of_training",
            "trace of training",
            "of random weights",
            "Dispersion of rows and columns over that of independent normal weights: 1 where a matrix was never "
            "trained.",
            side="low",
        ),
        _Row(
            "weight_kurtosis",
            "weight kurtosis",
            "",
            "Fourth moment over squared variance: 3 for a normal distribution.",
        ),
        _Row(
            "smallest_head_share",
            "share of the smallest head",
            "of the mean head",
            "Smallest share of a head in a matrix of attention: 0 where a head is dead.",
            side="low",
        ),
        _Row(
            "largest_head_share",
            "share of the largest head",
            "of the mean head",
            "Largest share of a head in a matrix of attention.",
        ),
        _Row(
            "large_weights",
            "share of large weights",
            "of its weights",
            "Share of entries above one standard deviation (ZD).",
            quotient=False,
        ),
        _Row(
            "zero_share",
            "share of all-zero rows and columns",
            "of rows and columns",
            "Rows and columns all of whose weights are zero.",
            quotient=False,
            side="high",
            resolution=0.005,
        ),
        _Row(
            "head_similarity",
            "similarity of two heads",
            "",
            "Largest correlation of two heads' weights: 1 for a copy.",
            quotient=False,
            side="high",
        ),
    ),
    *_over_depth(
        "neurons",
        "peelwise.engine.depth.weights",
        _Row(
            "neuron_mismatch",
            "mismatch of neurons",
            "1 - correlation",
            "Of the log norms of a layer's rows and of the last layer's columns, neuron by neuron: near 1 where one "
            "side was permuted.",
            side="high",
        ),
    ),
    *_over_depth(
        "gain",
        "peelwise.engine.depth.weights",
        _Row("gain_rms", "gain RMS", "", "Root mean square of a norm's gains."),
        _Row(
            "gain_dispersion",
            "spread of gains",
            "",
            "Standard deviation of the log of a norm's absolute gains.",
        ),
    ),
    *_over_depth(
        "kin",
        "peelwise.engine.depth.weights",
        _Row(
            "stream_mismatch",
            "mismatch of channels",
            "1 - correlation",
            "Of the norms along the stream's channels with the neighbours': near 1 where channels are mixed up.",
            side="high",
        ),
        _Row(
            "head_mismatch",
            "mismatch of positions in heads",
            "1 - correlation",
            "Of the norms of the positions within heads with the neighbours': near 1 where rows follow another rotary "
            "convention.",
            side="high",
        ),
        _Row(
            "copy_similarity",
            "similarity to another block",
            "",
            "Largest correlation with the same matrix of another block: 1 for a copy.",
            quotient=False,
            side="high",
        ),
    ),
    *_over_depth(
        "stream",
        "peelwise.engine.depth.forward",
        _Row("block_influence", "block influence", "", "1 minus the mean cosine of a block's input and output."),
        _Row("angular_distance", "angular distance", "of a half turn", "Mean angle of a block's input and output."),
        _Row(
            "stream_kurtosis",
            "kurtosis of the update",
            "",
            "Fourth moment over squared second of a block's update, over channels: large where few channels do all.",
        ),
        _Row(
            "station_rank",
            "effective rank of the update",
            "directions",
            "Exponential of the entropy of the spectrum of a block's update over tokens.",
        ),
        _Row(
            "attention_entropy",
            "attention entropy",
            "of log(keys)",
            "Mean entropy of attention: 0 where it looks at one key, 1 at all alike.",
        ),
        _Row(
            "successive_cosine",
            "cosine of successive updates",
            "",
            "Mean cosine of a block's update and that of the block before.",
            quotient=False,
        ),
        _Row(
            "massive_share",
            "share of massive coordinates",
            "of the energy",
            "Energy of a block's update in coordinates above ten root mean squares.",
            quotient=False,
        ),
        _Row("linear_cka", "linear CKA", "", "Similarity of a block's input and output over tokens.", quotient=False),
        _Row(
            "recoverability",
            "linear recoverability",
            "",
            "What a linear function of its input explains of a block's update, held out.",
            quotient=False,
        ),
        _Row(
            "tokenwise_alignment",
            "alignment with a tokenwise update",
            "",
            "Mean cosine of a block's update and the part of it that each channel's own value explains: high where all "
            "tokens are treated alike, low where other tokens and channels decide.",
            quotient=False,
        ),
        _Row("attention_sink", "attention sink", "", "Mean attention paid to the first key.", quotient=False),
    ),
    *_over_depth(
        "update",
        "peelwise.engine.depth.forward",
        _Row(
            "update_ratio",
            "size of the update",
            "of the stream",
            "Root mean square of what a branch adds over that of the stream.",
        ),
        _Row(
            "update_cosine",
            "cosine of update and stream",
            "",
            "Below 0 where a branch takes away from the stream, above where it adds to what is there.",
            quotient=False,
        ),
    ),
    *_over_depth(
        "gate",
        "peelwise.engine.depth.backward",
        _Row(
            "gain_slope",
            "gain slope",
            "nats per log scale",
            "Derivative of the loss by the log of a scale on what the part gives: above 0 less would be better, below "
            "0 more.",
            quotient=False,
        ),
        _Row(
            "gain_t", "t-value of the gain slope", "", "Gain slope over its standard error over tokens.", quotient=False
        ),
        _Row(
            "gain_evidence",
            "evidence for other scales",
            "of chance",
            "Natural-gradient energy of one scale per channel, mean over channels: about 1 where no channel wants "
            "another scale.",
        ),
        _Row(
            "head_slope",
            "largest gain slope of a head",
            "nats per log scale",
            "Over attention's heads, in absolute value.",
        ),
        _Row(
            "weight_gradient_norm",
            "gradient norm of a weight",
            "nats per unit of weight",
            "Frobenius norm of a matrix's mean gradient.",
        ),
        _Row(
            "gradient_rank",
            "nuclear rank of the gradient",
            "",
            "Squared nuclear norm over squared Frobenius norm of a matrix's mean gradient.",
        ),
        _Row("fisher_trace", "trace of the Fisher", "", "Mean over tokens of the squared norms of gradient and input."),
        _Row(
            "gradient_sharpness",
            "sharpness along the gradient",
            "nats per squared unit of weight",
            "Curvature (empirical Fisher) of the loss along a matrix's mean gradient: large where a step soon meets a "
            "wall. Over random directions its mean is the trace of the Fisher over the number of weights.",
        ),
        _Row(
            "gradient_alignment",
            "agreement of gradients",
            "of chance",
            "Squared norm of the mean gradient times the number of tokens, over the mean squared norm: about 1 where "
            "tokens have nothing in common.",
        ),
    ),
    *_over_depth(
        "joint",
        "peelwise.engine.depth.joint",
        _Row(
            "marginal_evidence",
            "marginal evidence for other scales",
            "of chance",
            "What the gain slopes of this block explain that those of all others do not, over its expectation by "
            "chance; a damaged block's own, where every block behind it has large slopes too.",
            side="high",
        ),
    ),
)

SIGNALS: dict[str, Signal] = {row.name: row for row in _ROWS}


def over_depth(names: Collection[str]) -> tuple[str, ...]:
    """Return the names of signals over depth that are asked for; ``("all",)`` stands for all of them.

    Raises:
        OptionError: If there is none of a name.
    """
    known = [signal.name for signal in of_kinds(OVER_DEPTH)]
    for name in names:
        if name not in known and tuple(names) != ("all",):
            raise OptionError(f"signals: there is no signal {name!r}. Known: {', '.join(sorted(known))}.")
    return tuple(known) if tuple(names) == ("all",) else tuple(names)


def of_kinds(kinds: Collection[Kind]) -> list[Signal]:
    """Return the signals of some kinds, in the order of the table."""
    return [signal for signal in SIGNALS.values() if signal.kind in kinds]


def title_of(name: str) -> str:
    """Return what people call a signal; one that is not in the table is called by its own name."""
    return SIGNALS[name].title if name in SIGNALS else name
