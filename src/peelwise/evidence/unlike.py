"""Which blocks are unlike their neighbours: a rule over the signals of all blocks against depth. No torch.

Three kinds of evidence are put on one scale, that of a standard normal variable, and added in squares:

1. **Of its own scales.** `marginal_evidence` (engine.depth.joint) is about a chi-squared variable over its degrees of
   freedom, the block's gates, where nothing is wrong; the median over depth corrects for tokens that are not
   independent. It needs no neighbour, so the ends of the stack are judged like the middle.
2. **Of structure.** Every signal of weights and of the stream is compared over depth by kind of part (a query matrix
   with query matrices): its *deviation* is the difference, of logarithms where it is a quotient, from the median of the
   blocks up to three away, over the robust spread of such differences. A signal's deviations at a block, the largest
   and their root mean square over parts, are ranked against all blocks' once more, as logarithms, and the three signals
   that stand out most count. Blocks at both ends differ from the middle in every model, so theirs are discounted. Of
   two signals it is known what a broken part has, whatever its neighbours have (`_KNOWN`): these judge the ends too.
3. **Of gain.** A few factors are tried on both branches of the first and the last block and of those with the highest
   scores: what the best of them gains, in margins. It finds what breaks a model so badly at its entry that no block
   behind it is as it was.

A model whose loss lies above that of counting tokens is off its distribution in every block: gradients of its blocks
say little then, and damping any of the last gains something. By so many nats kinds 1 and 3 count less.

A block is named when the root of the sum reaches `THRESHOLD` and half of the highest score. The numbers below were
found on half of the kinds of damage in `benchmarks/check_truth.py`, whose other half judges them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from peelwise.records.check import SignalReason
from peelwise.records.signals import FROM_FORWARD, FROM_WEIGHTS, SIGNALS, Signal

Floats = NDArray[np.float64]
Key = tuple[str, str]  # signal, part

# How scores follow from signals, and which signals there are: a record names its rule, and one of another rule cannot
# be made again. 2: neurons by layer, both ends always tried with factors, less weight on models off their distribution.
RULE = 2
LEAST_BLOCKS = 5
THRESHOLD = 4.5
OWN = "marginal_evidence"
SLOPES = "gain_t"
_MOST_INFLATION = 3.0  # of chance; a broken block of a short stack would else hide behind what it does to all others
_MOST_OWN = 8.0  # standard deviations
_LEAST_LOG_P = 700.0
_REACH = 3
_COUNTED = 3  # signals of structure that count at a block
_SCREENED = 3  # blocks with the highest scores that factors are tried on
_LEAST_SPREAD = 0.2  # of the logarithms of deviations over depth
_UNIT = 2.5  # how far such a logarithm lies above the median, in spreads, for one standard deviation
# Signals whose value in a sound part (at least, or at most) and in a broken one is known: random weights have a trace
# of training of 1; neurons whose sides were permuted are not correlated.
_KNOWN = {"trace_of_training": (1.6, 1.0), "neuron_mismatch": (0.65, 0.95)}
_KNOWN_ALONE = frozenset({"neuron_mismatch"})  # not ranked over depth: neurons are paired well or not at all
_BROKEN = 6.0  # standard deviations that such a part among sound ones counts for
_OFF = 3.0  # nats above the loss of counting tokens that halve the evidence of own scales
_OFF_SHARE = 0.1  # of those nats that a gain must be of, to count as one margin
_ENDS = (4.0, 2.5, 1.0)  # discounts of the outermost, second and third block at either end, in spreads
_STRUCTURE = (*FROM_WEIGHTS, *FROM_FORWARD)
# Too noisy on a few thousand tokens to say something that the others do not.
_NOT_COUNTED = frozenset({"linear_cka", "station_rank", "recoverability", "tokenwise_alignment"})


@dataclass(frozen=True)
class Unlikeness:
    """The scores of all blocks, and what they are made of.

    Attributes:
        scores: ``[blocks]``, larger is more unlike its neighbours.
        own: ``[blocks]``, the evidence of its own scales, in standard deviations; 0 without gradients.
        structure: per signal ``[blocks]``, in standard deviations.
        gains: ``[blocks]``, what factors gain, in standard deviations; 0 where none were tried.
        off: nats that the model's loss lies above that of counting tokens, 0 for any sound model.
        deviations: per signal and part ``[blocks]``, in robust standard deviations over depth, NaN where there is none.
        typical: per signal and part ``[blocks]``, the median of the neighbours.
    """

    scores: Floats
    own: Floats
    structure: dict[str, Floats]
    gains: Floats
    off: float = 0.0
    deviations: dict[Key, Floats] = field(default_factory=dict)
    typical: dict[Key, Floats] = field(default_factory=dict)


def unlikeness(
    values: Mapping[Key, Sequence[float | None]], blocks: int, gates: Sequence[int] = (), off: float = 0.0
) -> Unlikeness | None:
    """Return the scores of all blocks, or ``None`` for fewer than five blocks, which have no depth to compare with.

    Args:
        values: per signal and part, one value per block, ``None`` where it has none.
        blocks: how many there are.
        gates: degrees of freedom of each block's own evidence.
        off: nats that the model's loss lies above that of counting tokens; 0 where it does not.
    """
    if blocks < LEAST_BLOCKS:
        return None
    rows = {key: np.array([np.nan if v is None else v for v in row]) for key, row in values.items()}
    found = {key: deviation(row, SIGNALS[key[0]]) for key, row in rows.items() if _counts(SIGNALS[key[0]])}
    deviations = {key: each[0] for key, each in found.items()}
    structure = {
        name: standing_out([d for (signal, _), d in deviations.items() if signal == name])
        for name in dict.fromkeys(signal for signal, _ in deviations)
        if name not in _KNOWN_ALONE
    }
    for name in _KNOWN:
        structure[name] = np.maximum(structure.get(name, np.zeros(blocks)), _broken(name, found, rows, blocks))
    own = np.zeros(blocks)
    if (OWN, "") in rows and gates:
        own = own_evidence(rows[OWN, ""], np.asarray(gates, dtype=float)) / (1 + off / _OFF)
    strongest = np.sort(np.array([np.zeros(blocks), *structure.values()]), axis=0)[::-1][:_COUNTED]
    scores = np.sqrt(np.maximum(own, 0) ** 2 + (np.maximum(strongest, 0) ** 2).sum(axis=0))
    typical = {key: each[1] for key, each in found.items()}
    return Unlikeness(scores, own, structure, np.zeros(blocks), off, deviations, typical)


def _counts(signal: Signal) -> bool:
    return signal.kind in _STRUCTURE and signal.name not in _NOT_COUNTED


def own_evidence(evidence: Floats, gates: Floats) -> Floats:
    """Return how many standard deviations a block's own evidence lies above chance, ``[blocks]``, at most eight.

    ``8 tanh(z / 8)`` with ``z(P(chi2_k >= k e / c))``, ``c`` such that the median block is at the median of its
    distribution. Bounded, since in a model that was broken at its entry many blocks have evidence without limit, and
    the one at fault may have structure or gains to show for it.

    Args:
        evidence: chi-squared over degrees of freedom; NaN where there is none.
        gates: degrees of freedom ``k``.
    """
    from scipy.stats import chi2, norm

    k = np.maximum(gates, 1)
    expected = chi2.median(k) / k
    inflation = min(float(np.nanmedian(evidence / expected)), _MOST_INFLATION)
    if not inflation > 0:
        return np.zeros(len(evidence))
    log_p = np.nan_to_num(chi2.logsf(k * evidence / inflation, k), nan=0.0, neginf=-_LEAST_LOG_P)
    z = norm.isf(np.exp(np.maximum(log_p, -_LEAST_LOG_P)))
    return np.asarray(_MOST_OWN * np.tanh(np.maximum(z, -_MOST_OWN) / _MOST_OWN))


def deviation(values: Floats, signal: Signal) -> tuple[Floats, Floats]:
    """Return robust deviations from the neighbours' median ``[blocks]``, and that median, for one signal over depth.

    Deviations on the side that says nothing are negative for a one-sided signal, and absolute for any other.

    Args:
        values: ``[blocks]``, NaN where there is none.
        signal: how it is compared.
    """
    x = np.log(np.maximum(values, 1e-12)) if signal.quotient else values
    near = np.array([_near(x, place) for place in range(len(x))])
    away = x - near
    known = np.abs(away[np.isfinite(away)])
    spread = max(1.4826 * float(np.median(known)) if len(known) else 0.0, signal.resolution)
    z = away / spread
    signed = {"both": np.abs(z), "high": z, "low": -z}[signal.side]
    return signed, np.exp(near) if signal.quotient else near


def standing_out(parts: Sequence[Floats]) -> Floats:
    """Return how far each block stands out in one signal, ``[blocks]``, in standard deviations; below 0 is nothing.

    Args:
        parts: deviations ``[blocks]`` of each part that has the signal.
    """
    table = np.maximum(np.nan_to_num(np.array(parts)), 0)
    blocks = table.shape[1]
    found = _above_the_others(table.max(axis=0))
    if len(table) > 2:
        found = np.maximum(found, _above_the_others(np.sqrt((table**2).mean(axis=0))))
    discount = np.zeros(blocks)
    for away, spreads in enumerate(_ENDS[: max(1, (blocks - 2) // 4)]):  # a short stack has short ends
        discount[[away, blocks - 1 - away]] = spreads
    return (found - discount) / _UNIT


def to_screen(scores: Floats) -> list[int]:
    """Return the blocks whose branches are worth trying factors on: those with the highest scores, and both ends.

    A score that stands out by far is no reason to leave the ends out: what breaks a model at its entry makes blocks far
    behind stand out, and one factor may undo it.
    """
    order = [int(b) for b in np.argsort(-scores, kind="stable")]
    return list(dict.fromkeys([*order[:_SCREENED], 0, len(scores) - 1]))


def with_gains(found: Unlikeness, gains: Mapping[int, float], margin: float) -> Unlikeness:
    """Return the scores with what factors gain, ``2 log2(1 + gain / (margin + off / 10))`` standard deviations.

    Args:
        found: without.
        gains: per block that was tried, the largest decrease of the loss on select, nats per token; 0 for none.
        margin: smallest gain that matters, nats per token.
    """
    z = np.zeros(len(found.scores))
    for block, gain in gains.items():
        z[block] = 2 * np.log2(1 + max(gain, 0.0) / (margin + _OFF_SHARE * found.off))
    return replace(found, scores=np.sqrt(found.scores**2 + z**2), gains=z)


def _broken(name: str, found: Mapping[Key, tuple[Floats, Floats]], rows: Mapping[Key, Floats], blocks: int) -> Floats:
    """Return for every block the evidence that a part is as a broken one is known to be, in standard deviations.

    It does not take neighbours to tell, so that the ends of the stack are judged like the middle; where the neighbours'
    parts are not sound either, nothing is said.
    """
    sound, broken = _KNOWN[name]
    evidence = np.zeros(blocks)
    for key, (_, typical) in found.items():
        if key[0] == name:
            share = (sound - rows[key]) / (sound - broken)
            share = np.where((sound - typical) / (sound - broken) <= 0, np.nan_to_num(share), 0.0)
            evidence = np.maximum(evidence, _BROKEN * np.clip(share, 0, 1))
    return evidence


def named(scores: Floats, threshold: float = THRESHOLD) -> list[int]:
    """Return the blocks whose score reaches the threshold and half of the highest, the most unlike first."""
    least = max(threshold, float(scores.max()) / 2)
    return [int(b) for b in np.argsort(-scores, kind="stable") if scores[b] >= least]


def reasons(
    found: Unlikeness, values: Mapping[Key, Sequence[float | None]], block: int, most: int = 3
) -> tuple[SignalReason, ...]:
    """Return what says most clearly that a block is unlike, the strongest first.

    Its own evidence speaks by the t-value of the part whose scale it is most certain of, a signal of structure by the
    part that deviates most.
    """
    strength = {name: float(row[block]) for name, row in found.structure.items()}
    strength[SLOPES] = float(found.own[block])
    chosen: list[SignalReason] = []
    for name in sorted(strength, key=lambda name: -strength[name])[:most]:
        if strength[name] < 1 and chosen:
            break
        reason = _slope_reason(values, block) if name == SLOPES else _deviating_part(found, values, name, block)
        if reason is not None:
            chosen.append(reason)
    return tuple(chosen)


def _slope_reason(values: Mapping[Key, Sequence[float | None]], block: int) -> SignalReason | None:
    ts = {key: row[block] for key, row in values.items() if key[0] == SLOPES}
    known = {key: value for key, value in ts.items() if value is not None}
    if not known:
        return None
    key = max(known, key=lambda key: abs(known[key]))
    return SignalReason(signal=SLOPES, part=key[1], value=known[key], typical=0.0, deviation=known[key])


def _deviating_part(
    found: Unlikeness, values: Mapping[Key, Sequence[float | None]], name: str, block: int
) -> SignalReason | None:
    rows = {key: float(row[block]) for key, row in found.deviations.items() if key[0] == name}
    known = {key: value for key, value in rows.items() if np.isfinite(value) and values[key][block] is not None}
    if not known:
        return None
    key = max(known, key=lambda key: known[key])
    typical = float(found.typical[key][block])
    value = values[key][block]
    assert value is not None
    return SignalReason(
        signal=name,
        part=key[1],
        value=value,
        typical=typical if np.isfinite(typical) else None,
        deviation=known[key],
    )


def _above_the_others(sizes: Floats) -> Floats:
    """Return how far the logarithms of deviations lie above their median over depth, in robust spreads."""
    x = np.log1p(sizes)
    away = x - np.median(x)
    return np.asarray(away / max(1.4826 * float(np.median(np.abs(away))), _LEAST_SPREAD))


def _near(x: Floats, place: int) -> float:
    """Return the median of the values up to `_REACH` blocks away, without that of the place itself."""
    around = np.concatenate([x[max(0, place - _REACH) : place], x[place + 1 : place + 1 + _REACH]])
    alive = around[np.isfinite(around)]
    return float(np.median(alive)) if len(alive) else float("nan")
