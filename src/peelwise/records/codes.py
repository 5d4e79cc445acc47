"""The codes that records hold instead of sentences. What they mean in words is said in `show`, and there alone.

A code once written stays readable for ever: add, do not rename.
"""

from __future__ import annotations

from typing import Literal

# Why a block has its colour.
Reason = Literal[
    "above-margin",  # red
    "still-falling",  # yellow: the training loss still falls
    "within-progress",  # yellow: whatever it could gain at most, training at its present slope gains soon
    "foreign-text",  # yellow: no training text, so it may be adaptation
    "own-above-margin",  # red on text that is no training text: its marginal gain is above the margin
    "nothing-of-its-own",  # green on such text: its marginal gain is below the margin
    "nothing-above-margin",  # green
    "screened",  # green: not refined, since the slope of its direction leaves no room for a gain above the margin
    "more-tokens",  # grey: the interval covers the margin
    "not-refined",  # grey: not refined by itself within the budget
    "marginal-only",  # grey: the same, but its marginal gain is above the margin
    "run-at-fault",  # grey: nothing found, but the whole run is at fault, or worse than no blocks
    "frozen",  # no colour: none of its linear layers is asked about, since training does not change them
]
INTERACTS = "+interacts"  # behind a reason in a run history: the block's marginal gain is significantly negative

# What a text costs without the model.
Baseline = Literal[
    "unigram",  # one who only counts tokens
    "without-blocks",  # a new head on the embedding
]

# What the wall time of an audit, a peel, a comparison or an anatomy went into.
Stage = Literal[
    "self-checks",
    "losses",
    "statistics",
    "ablation",
    "joint-rounds",
    "joint-rounds-dense",
    "leave-one-out",
    "solo-rounds",
    "head",
    "head-control",
    "maps",
    "map-heads",
    "shuffled-control",
    "untrained-control",
    "best-weights",
    "best-weights-losses",
    "fine-tune",
    "quantised-inputs",
    "curvature",
    "codes",
    "codes-losses",
    "weight-signals",
    "pass-signals",
    "gain-witnesses",
    "changes",
    "outputs",
    "repairs",
    "breaks",
    "block-formats",
    "layers",
    "swap-path",
    "mended",
    "predictability",
    "bending",
    "recovery",
]

# What a reader of a record should know besides its numbers; the values that each has are in `base.Note`.
NoteCode = Literal[
    "stopped",
    "budget-ended",
    "low-bit",
    "no-head",
    "logits-changed",
    "not-initialised",
    "few-fit-tokens",
    "few-expert-tokens",
    "more-damping",
    "dense-references",
    "no-head-fit",
    "head-steps",
    "map-unfinished",
    "few-heads",
    "other-tensors",
    "shared-tensors",
    "left-out",
    "no-text",
    "no-gradients",
    "few-blocks",
    "frozen-layers",
    "untied",
    "checkpoint",
    "autocast",
    "factor-first",
    "no-curvature",
    "smaller-groups",
    "scales-per-channel",
    "read-as-numbers",
    "adapters-on-codes",
    "router-collapsed",
    "dead-experts",
    "copied-experts",
    "fake-quant-off",
    "own-loss",
    "encoder-left-out",
    "stacks-left-out",
    "resumed",
]
