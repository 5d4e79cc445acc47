"""How much of what training a block alone for real would gain does a witness reach, and at which share of the cost?

    python benchmarks/truth/oracle.py

The oracle trains every linear map of one block with Adam on plenty of training text, the rest frozen, until select
stops improving and the learning rate has been halved four times. Reference and oracle are measured on the same
fresh text.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

import own
import training
from cases import KEPT_SEED, SMALL, Case, probe_of
from common import environment, rounded
from peelwise.model.architectures import find_blocks
from peelwise.model.runner import Runner
from peelwise.probe.probe import SHARES, Probe
from peelwise.probe.rows import Split

CASES = (
    Case(SMALL, "healthy", "healthy", KEPT_SEED, 600),
    Case(SMALL, "after training", "noise 0.3", KEPT_SEED, 2400, 3),
    Case(
        SMALL, "healthy", "healthy", KEPT_SEED, 2400
    ),  # nothing is left to gain: no shares, but no gains to find either
    Case(SMALL, "after training", "stale", 102, 400, 5),
)
ORACLE_TOKENS = 32_768  # of training text in all three parts; half of them to train on
MOSTLY_FIT = (0.8, 0.1, 0.1)
# Tokens, rounds, and shares of fit, select and report of the closed-form references.
REFERENCES = (
    (4_800, 1, SHARES),
    (9_600, 1, SHARES),
    (9_600, 2, SHARES),
    (19_200, 1, SHARES),
    (9_600, 1, MOSTLY_FIT),
    (14_400, 1, MOSTLY_FIT),
    (28_800, 1, MOSTLY_FIT),
)
RATE, HALVINGS, MOST_EPOCHS, BATCH = 2e-3, 4, 30, 16
SOMETHING = 0.003  # nats, all blocks together; less is no gain to take a share of
KEPT = training.ROOT / "out" / "truth" / "oracle"


def loss_on(model: nn.Module, split: Split) -> float:
    """Return the loss in nats per token."""
    losses, tokens = own.loss_by_sequence(model, split)
    return float(losses.sum() / tokens.sum())


def trained_alone(model: nn.Module, index: int, probe: Probe) -> tuple[nn.Module, int]:
    """Train one block until select does not improve at the smallest rate; return the best model and the epochs."""
    trained = copy.deepcopy(model).requires_grad_(False)
    weights = [m.module.weight.requires_grad_(True) for m in find_blocks(trained)[index].linears]
    optimiser = torch.optim.Adam(weights, lr=RATE)
    generator = torch.Generator().manual_seed(0)
    best, best_weights, halvings, epochs = loss_on(trained, probe.select), _copies(weights), 0, 0
    while halvings <= HALVINGS and epochs < MOST_EPOCHS:
        for rows in torch.randperm(probe.fit.sequences, generator=generator).split(BATCH):
            logits = trained(probe.fit.inputs[rows], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), probe.fit.targets[rows].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        epochs += 1
        select = loss_on(trained, probe.select)
        if select < best:
            best, best_weights = select, _copies(weights)
        else:
            _put(weights, best_weights)
            halvings += 1
            for group in optimiser.param_groups:
                group["lr"] /= 2
    _put(weights, best_weights)
    return trained.requires_grad_(False), epochs


def _copies(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [w.detach().clone() for w in weights]


@torch.no_grad()
def _put(weights: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def oracle(case: Case, fresh: Split) -> dict[str, Any]:
    """Return every block's gain on fresh text by real training, and the token passes it took; kept once done."""
    file = KEPT / f"{case.name}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    model, probe = case.model(), probe_of(SMALL, ORACLE_TOKENS, seed=2)
    runner = Runner(model, find_blocks(model))
    before, gains, epochs, passes = loss_on(model, fresh), [], [], 0.0
    for block in runner.blocks:
        trained, count = trained_alone(model, block.index, probe)
        gains.append(before - loss_on(trained, fresh))
        epochs.append(count)
        above = sum(runner.shares[block.index :]) + runner.head_share
        passes += count * ((1 + 2 * above) * probe.fit.tokens + probe.select.tokens)
        print(f"{case.name}: block {block.index} alone gains {gains[-1]:.4f} in {count} epochs", flush=True)
    found = {
        "case": case.name,
        "gains": gains,
        "epochs": epochs,
        "token_passes": passes,
        "fit_tokens": probe.fit.tokens,
    }
    KEPT.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found) + "\n")
    return found


def reference(case: Case, probe: Probe, rounds: int, fresh: Split) -> dict[str, Any]:
    """Return every block's gain on fresh text by its witness, and the token passes of the whole audit."""
    model = case.model()
    outcome = own.audited(model, probe, joint_rounds=0, solo_rounds=rounds)
    found = {row["block"]: row["fresh"] for row in own.on_fresh_text(model, outcome, fresh) if row["what"] == "alone"}
    blocks = outcome.record.blocks
    every = probe.fit.tokens + probe.select.tokens + probe.report.tokens
    return {
        "tokens": every,
        "fit_tokens": probe.fit.tokens,
        "rounds": rounds,
        "gains": [found.get(b.index, 0.0) for b in blocks],
        "natural_energy": [b.natural_energy for b in blocks],
        "token_passes": outcome.record.cost.forward_equivalents * every,
    }


def compared(case: Case) -> dict[str, Any]:
    """Return oracle and references of one case, with shares of gain and cost."""
    probes = [probe_of(SMALL, tokens, shares=shares) for tokens, _, shares in REFERENCES]
    fresh = probe_of(SMALL, 4 * 12_288, seed=3).fit
    for probe in (*probes, probe_of(SMALL, ORACLE_TOKENS, seed=2)):
        fresh = own.without(fresh, probe)
    truth = oracle(case, fresh)
    references = []
    for probe, (_, rounds, _) in zip(probes, REFERENCES, strict=True):
        found = reference(case, probe, rounds, fresh)
        whole = sum(truth["gains"])
        found["share_of_gain"] = sum(found["gains"]) / whole if whole > SOMETHING else None
        found["share_of_cost"] = found["token_passes"] / truth["token_passes"]
        found["rank_correlation"] = processes(found["gains"], truth["gains"])
        references.append(found)
        print(case.name, {key: found[key] for key in ("fit_tokens", "share_of_gain", "share_of_cost")}, flush=True)
    return {"oracle": truth, "fresh_tokens": fresh.tokens, "references": references}


def main() -> None:
    torch.set_num_threads(1)
    file = training.ROOT / "benchmarks" / "results" / "truth" / "oracle.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    cases: list[dict[str, Any]] = []
    for case in CASES:
        cases.append(compared(case))
        found = {"cases": cases, "rank_correlation_of_all_blocks": ranks_of_all(cases)}
        file.write_text(json.dumps(rounded(environment() | found), indent=1) + "\n")


def ranks_of_all(cases: list[dict[str, Any]]) -> list[float]:
    """Return per reference the rank correlation with the oracle over the blocks of all models."""
    truth = [gain for case in cases for gain in case["oracle"]["gains"]]
    found = [[g for case in cases for g in case["references"][i]["gains"]] for i in range(len(REFERENCES))]
    return [processes(gains, truth) for gains in found]


def processes(found: list[float], truth: list[float]) -> float | None:
    """Return Spearman's correlation, or nothing where all are alike."""
    return float(spearmanr(found, truth).statistic) if len(set(found)) > 1 < len(set(truth)) else None


if __name__ == "__main__":
    main()
