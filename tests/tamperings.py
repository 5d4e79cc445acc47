"""What somebody with peelwise's own code could do to the certificate of an audit, by class: name -> what it does.

Every change gets the record ``content`` (a dictionary), the ``witness`` and the ``probe`` (tensors by name), all copies
of its own, and is sealed again over the new files afterwards. Bytes flipped without a new seal are in `BYTES`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peelwise.certificate.base import read_probe
from peelwise.errors import PeelwiseError
from peelwise.records.base import SealedRecord
from peelwise.records.files import PROBE_FILE, RECORD_FILE, WITNESS_FILE

Content = dict[str, Any]
Tensors = dict[str, Tensor]
Change = Callable[[Content, Tensors, Tensors], object]

BYTES = [(file, fraction) for file in ("witness", "probe") for fraction in (0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.999)]


def forged(kind: type[SealedRecord], original: tuple[Content, Tensors, Tensors], change: Change, folder: Path) -> Path:
    """Write a changed certificate and seal it again, the probe's fingerprint and sizes too where it was changed."""
    content, witness, probe = (copy.deepcopy(each) for each in original)
    change(content, witness, probe)
    folder.mkdir()
    save_file(witness, folder / WITNESS_FILE)
    save_file(probe, folder / PROBE_FILE)
    path = folder / WITNESS_FILE
    if isinstance(content.get("witness"), dict):
        content["witness"] |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / RECORD_FILE).write_text(json.dumps(content))
    try:
        record: Any = kind.model_validate(content)
        if other_tensors(probe, original[2]):
            found = read_probe(folder, record).record()
            record = record.model_copy(update={"probe": found.model_copy(update={"source": record.probe.source})})
    except (PeelwiseError, ValueError):
        return folder
    (folder / RECORD_FILE).write_text(record.sealed().to_json())
    return folder


def other_tensors(one: Tensors, other: Tensors) -> bool:
    """Return whether two files of tensors differ."""
    return one.keys() != other.keys() or any(not torch.equal(one[name], other[name]) for name in one)


def place(content: Content, path: str) -> tuple[Any, Any]:
    """Return the container and the last key of a path such as ``blocks.0.name``."""
    *outer, last = path.split(".")
    where: Any = content
    for key in outer:
        where = where[int(key) if isinstance(where, list) else key]
    return where, int(last) if isinstance(where, list) else last


def put(path: str, value: object) -> Change:
    """Return a change that sets one value."""

    def change(content: Content, witness: Tensors, probe: Tensors) -> None:
        where, last = place(content, path)
        where[last] = copy.deepcopy(value)

    return change


def add(path: str, by: float) -> Change:
    """Return a change that adds to one number."""

    def change(content: Content, witness: Tensors, probe: Tensors) -> None:
        where, last = place(content, path)
        where[last] += by

    return change


def gains(path: str, by: float) -> Change:
    """Return a change that moves a whole interval."""
    return lambda c, w, p: [add(f"{path}.{part}", by)(c, w, p) for part in ("mean", "low", "high")]


def exchanged(first: int, second: int, *keys: str) -> Change:
    """Return a change that exchanges what two blocks have under some keys."""

    def change(content: Content, witness: Tensors, probe: Tensors) -> None:
        one, other = content["blocks"][first], content["blocks"][second]
        for key in keys:
            one[key], other[key] = other[key], one[key]

    return change


def copied(source: str, target: str, rows: int | None = None) -> Change:
    """Return a change of the probe: sequences of one part take the place of those of another."""

    def change(content: Content, witness: Tensors, probe: Tensors) -> None:
        for kind in ("ids", "lengths"):
            count = len(probe[f"{target}.{kind}"]) if rows is None else rows
            taken = probe[f"{source}.{kind}"]
            fitting = taken.repeat(-(-count // len(taken)), *[1] * (taken.ndim - 1))[:count]
            probe[f"{target}.{kind}"] = torch.cat([fitting, probe[f"{target}.{kind}"][count:]])

    return change


def repeated(part: str) -> Change:
    """Return a change of the probe: one sequence is the whole part."""
    return lambda c, w, p: [
        p.update({f"{part}.{kind}": p[f"{part}.{kind}"][:1].repeat_interleave(len(p[f"{part}.{kind}"]), 0)})
        for kind in ("ids", "lengths")
    ]


def edited(part: str, other: str) -> Change:
    """Return a change of the probe: a sequence of a part is one of another with its last id changed."""

    def change(content: Content, witness: Tensors, probe: Tensors) -> None:
        row = probe[f"{other}.ids"][0].clone()
        row[-1] = (row[-1] + 1) % 100
        probe[f"{part}.ids"][0] = row

    return change


def tensors(kind: str, make: Callable[[Tensor], Tensor], *, every: bool = False) -> Change:
    """Return a change of the first (or every) tensor of the witness whose name begins with ``kind``."""

    def change(content: Content, witness: Tensors, probe: Tensors) -> None:
        names = [name for name in sorted(witness) if name.startswith(kind)]
        for name in names if every else names[:1]:
            witness[name] = make(witness[name]).contiguous()

    return change


def renamed(kind: str, to: str) -> Change:
    """Return a change that names the first tensor of a kind otherwise."""
    return lambda c, w, p: w.update({to: w.pop(next(n for n in sorted(w) if n.startswith(kind)))})


def without_evidence(index: int) -> Change:
    """Return a change that takes away what made a block red."""

    def change(content: Content, witness: Tensors, probe: Tensors) -> None:
        content["blocks"][index].update(
            recoverable_nats=None, unique_nats=None, verdict="grey", reason_code="not-refined", tokens_needed=None
        )

    return change


def configured(name: str, value: object) -> Change:
    """Return a change that sets one entry of the model's configuration."""
    return lambda c, w, p: c["model"]["configuration"].update({name: value})


def report_order(content: Content, witness: Tensors, probe: Tensors) -> None:
    """Put the report's sequences in another order."""
    for kind in ("ids", "lengths"):
        probe[f"report.{kind}"] = probe[f"report.{kind}"].flip(0)


def parts_exchanged(content: Content, witness: Tensors, probe: Tensors) -> None:
    """Exchange one sequence of fit and one of report: chosen instead of drawn."""
    for kind in ("ids", "lengths"):
        fit, report = probe[f"fit.{kind}"], probe[f"report.{kind}"]
        first = fit[0].clone()
        fit[0], report[0] = report[0], first


INTERVALS = ["loss.composed_gain", "loss.head_control_gain", "loss.shuffled_gain", "loss.untrained_gain"]
INTERVALS += [f"blocks.{i}.{key}" for i in (0, 3) for key in ("recoverable_nats", "unique_nats", "removal_nats")]
BAD_MARGINS = [-10, 0, 0.0, 1e-4, 4.9e-4, 1.01, 10.0, 1e9, "nan", "inf", "0.01", True]
BAD_SETTINGS = {
    "budget_seconds": ["long", -1, True],
    "joint_rounds": [-1, 1.5, "4", True],
    "alone_rounds": [-1, "4", 2.5],
    "controls": [1, "yes", 0.5],
    "micro_batch_tokens": ["x", -5, 1.5, False],
}
PLACES = {
    **{f"probe.{k}": 7 for k in ("sequence_length", "fit_tokens", "select_tokens", "report_tokens")},
    **{f"probe.{k}": 3 for k in ("fit_sequences", "select_sequences", "report_sequences", "pool_sequences")},
    "probe.fingerprint": "0" * 64,
    "probe.in_distribution": False,
    "probe.documents": 17,
    "probe.pool_left_out": 10**6,
    "seed": 12345,
    "model.fingerprint": "0" * 64,
    "model.parameters": 1,
    "model.blocks": 5,
    "model.dtype": "bfloat16",
    "model.architecture": "GPT2LMHeadModel",
}
FAR = {"mean": 0.01, "low": -0.01, "high": 0.01, "standard_error": 0.01, "skewness": 0.2}

# Class -> name -> change. All of these must be found by `verify` without --full.
TAMPERINGS: dict[str, dict[str, Change]] = {
    "a loss or an interval": {
        **{f"{path}.{part} {by:+g}": add(f"{path}.{part}", by) for path in INTERVALS for part, by in FAR.items()},
        **{f"loss.{k} -0.01": add(f"loss.{k}", -0.01) for k in ("current", "composed", "shuffled", "untrained")},
        "loss.unigram -0.01": add("loss.unigram", -0.01),
        "one sequence more": add("loss.composed_gain.sequences", 1),
        "current and composed lowered alike": lambda c, w, p: [
            add("loss.current", -0.01)(c, w, p),
            add("loss.composed", -0.01)(c, w, p),
        ],
    },
    "a gain that cannot be": {
        **{f"block {i} gains {by:g}": gains(f"blocks.{i}.recoverable_nats", by) for i in (0, 5) for by in (20.0, 1e6)},
        "a marginal gain of a million": gains("blocks.2.unique_nats", 1e6),
        "a negative loss": put("loss.composed", -0.5),
    },
    "a verdict or a conclusion": {
        **{f"block {i} is {c}": put(f"blocks.{i}.verdict", c) for i in range(6) for c in ("green", "yellow")},
        "a reason": put("blocks.2.reason_code", "nothing-above-margin"),
        "tokens needed": put("blocks.2.tokens_needed", 5),
        "nothing was found": put("conclusion.case", "none-found"),
        "other blocks": put("conclusion.blocks", [0]),
        "no harm": put("conclusion.harmful", [5]),
        "above a baseline": put("conclusion.above", "unigram"),
        "nothing unlike in its check": put("check.unlike", []),
        "another score in its check": put("check.scores.0", 50.0),
        "informative": lambda c, w, p: c.update(informative=not c["informative"]),
    },
    "the margin": {
        **{f"asked for {m!r}": put("settings.margin_nats", m) for m in BAD_MARGINS},
        **{f"margin {m!r}": put("margin_nats", m) for m in (-10.0, 0.0, 0.5, 10.0)},
        **{
            f"both {m!r}": lambda c, w, p, m=m: (c["settings"].update(margin_nats=m), c.update(margin_nats=m))
            for m in (-10.0, 0.0, 1e-4, 10.0)
        },
    },
    "blocks exchanged or evidence removed": {
        **{f"names of {i} and {i + 1}": exchanged(i, i + 1, "name") for i in range(5)},
        "numbers of 2 and 3": exchanged(2, 3, "recoverable_nats", "unique_nats", "removal_nats"),
        "names and layers of 2 and 3": exchanged(2, 3, "name", "matrices"),
        "order of blocks": lambda c, w, p: c["blocks"].reverse(),
        "a block fewer": lambda c, w, p: c["blocks"].pop(),
        **{f"red evidence of block {i}": without_evidence(i) for i in (2, 3, 4)},
        "ablations of one block": put("blocks.0.removal_nats", None),
        "a layer that is not there": put("blocks.1.matrices.0.name", "mlp.nothing"),
        "a format that is not held": put("blocks.1.matrices.0.format", "ternary"),
    },
    "what stands beside the numbers": {f"{path} = {value!r}"[:60]: put(path, value) for path, value in PLACES.items()},
    "the configuration": {
        "another rotary base": configured("rope_parameters.rope_theta", 100.0),
        "another epsilon": configured("rms_norm_eps", 1e-3),
        "a buffer of another size": configured("buffer model.rotary_emb.inv_freq mean size", 1.0),
        "an entry less": lambda c, w, p: c["model"]["configuration"].pop("rms_norm_eps"),
        "an entry more": configured("nothing", 1),
        "none": put("model.configuration", None),
    },
    "settings": {
        f"{name} = {value!r}": put(f"settings.{name}", value)
        for name, values in BAD_SETTINGS.items()
        for value in values
    },
    "the split of the text": {
        "fit = report": copied("report", "fit"),
        "select = report": copied("report", "select"),
        "fit = select": copied("select", "fit", 2),
        "one of report in fit": copied("report", "fit", 1),
        "one of report in select": copied("report", "select", 1),
        "one of fit in report": copied("fit", "report", 1),
        "one sequence is the report": repeated("report"),
        "one sequence is the fit": repeated("fit"),
        "nearly the same in fit and report": edited("report", "fit"),
        "nearly the same in select and report": edited("report", "select"),
        "one exchanged": parts_exchanged,
        "another order": report_order,
    },
    "the witness": {
        "of zeros": tensors("composed/", torch.zeros_like, every=True),
        "negated": tensors("composed/", torch.neg, every=True),
        "one tensor negated": tensors("composed/model.layers.3.mlp.down_proj", torch.neg),
        "doubled": tensors("composed/", lambda t: 2 * t, every=True),
        "a tensor less": lambda c, w, p: w.pop("composed/model.layers.3.mlp.down_proj"),
        "a name of nothing": renamed("alone/", "alone/model.layers.9.mlp.down_proj"),
        "a kind of nothing": renamed("alone/", "beside/model.layers.1.mlp.down_proj"),
        "no witness": lambda c, w, p: w.clear(),
    },
}

# These cannot be read as a certificate at all: one line and exit code 2.
MALFORMED: dict[str, Change] = {
    **{
        f"witness of {v}": tensors("composed/", lambda t, v=v: torch.full_like(t, v))
        for v in (float("nan"), float("inf"))
    },
    "one NaN in a witness": tensors(
        "alone/", lambda t: t.index_put((torch.tensor(0), torch.tensor(0)), t.new_tensor(float("nan")))
    ),
    "huge witness": tensors("composed/", lambda t: torch.full_like(t, 3e38), every=True),
    "complex witness": tensors("composed/", lambda t: t.to(torch.complex64)),
    "float8 witness": tensors("composed/", lambda t: t.to(torch.float8_e4m3fn)),
    "transposed witness": tensors("composed/model.layers.0.mlp.down_proj", lambda t: t.T),
    "witness of one number": tensors("composed/", lambda t: t.flatten()[:1]),
    "witness of no number": tensors("composed/", lambda t: t[:0]),
    **{f"standard error {v:g}": put("blocks.2.recoverable_nats.standard_error", v) for v in (1e200, 1e20, 1e308)},
    "a loss of 1e200": put("loss.current", 1e200),
    "an integer beyond 64 bits": put("probe.report_tokens", 10**30),
    "a name of two lines": lambda c, w, p: c["settings"].update({"a\nb": 1e200}),
    "a tensor of two lines": lambda c, w, p: w.update({"alone/a\nb": torch.full((1,), float("nan"))}),
    "settings of a list": put("settings.margin_nats", [1]),
    "settings of an object": put("settings", {"a": {"b": 1}}),
    "no settings": lambda c, w, p: c.pop("settings"),
    "blocks as text": put("blocks", "all"),
    "a block of nothing": put("blocks.0", {}),
    "verdict blue": put("blocks.0.verdict", "blue"),
    "no loss": put("loss", None),
    "schema 99": put("schema", 99),
    "another kind": put("kind", "prophecy"),
    "kind of a list": put("kind", ["audit"]),
    "ids beyond the vocabulary": lambda c, w, p: p["report.ids"].__setitem__((0, 0), 10**6),
    "negative ids": lambda c, w, p: p["report.ids"].__setitem__((0, 0), -1),
    "ids as floats": lambda c, w, p: p.update({"fit.ids": p["fit.ids"].float()}),
    "complex ids": lambda c, w, p: p.update({"fit.ids": p["fit.ids"].to(torch.complex64)}),
    "lengths beyond the ids": lambda c, w, p: p["fit.lengths"].fill_(10**6),
    "lengths of 0": lambda c, w, p: p["fit.lengths"].fill_(0),
    "no report": lambda c, w, p: p.pop("report.ids"),
    "sequences longer than the context": lambda c, w, p: p.update(
        {
            "report.ids": torch.ones(4, 100_000, dtype=torch.int32),
            "report.lengths": torch.full((4,), 100_000, dtype=torch.int32),
        }
    ),
}
