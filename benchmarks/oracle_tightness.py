"""How much of what training one block alone would gain does the closed-form reference reach?

The oracle trains every block of the small GPT by itself with Adam on the fit tokens, stops on select, and is measured
on report, as the audit is. Example: python benchmarks/oracle_tightness.py --tokens 16000
"""

import argparse
import copy
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import peelwise
from common import write
from peelwise.model.architectures import find_blocks
from peelwise.model.checkpoints import open_model
from peelwise.probe.probe import Probe
from peelwise.probe.rows import Split
from peelwise.probe.texts import reference_prose

STAGES = sorted((Path(__file__).parents[1] / "examples/small_gpt/checkpoints").glob("step-*"))


RATES = (1e-3, 3e-3)
MOST_EPOCHS = 60


def loss_on(model: torch.nn.Module, split: Split) -> float:
    """Return the loss in nats per token."""
    with torch.no_grad():
        logits = model(split.inputs, use_cache=False).logits
    return float(F.cross_entropy(logits.flatten(0, 1), split.targets.flatten()))


def oracle(model: torch.nn.Module, index: int, probe: Probe, *, rate: float, patience: int) -> tuple[float, float, int]:
    """Train one block alone until select has not improved for ``patience`` epochs.

    Returns (loss on select, gain on report, epochs); the rate is then chosen by the first, like everything else.
    """
    trained = copy.deepcopy(model).requires_grad_(False)
    block = find_blocks(trained)[index]
    weights = [m.module.weight.requires_grad_(True) for m in block.linears]
    optimiser = torch.optim.Adam(weights, lr=rate)
    best, best_weights, since, epochs = loss_on(trained, probe.select), [w.detach().clone() for w in weights], 0, 0
    generator = torch.Generator().manual_seed(0)
    while since < patience and epochs < MOST_EPOCHS:
        for rows in torch.randperm(probe.fit.sequences, generator=generator).split(16):
            logits = trained(probe.fit.inputs[rows], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), probe.fit.targets[rows].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        epochs, since = epochs + 1, since + 1
        select = loss_on(trained, probe.select)
        if select < best:
            best, best_weights, since = select, [w.detach().clone() for w in weights], 0
    with torch.no_grad():
        for weight, kept in zip(weights, best_weights, strict=True):
            weight.copy_(kept)
    return best, loss_on(model, probe.report) - loss_on(trained, probe.report), epochs


def compare(stage: Path, tokens: int) -> dict[str, object]:
    """Return the oracle's and the reference's gain of every block of one stage."""
    opened = open_model(stage)
    probe = Probe.from_text(reference_prose(), opened.tokenizer, tokens=tokens, in_distribution=True)
    report = peelwise.audit(opened.model, probe, peelwise.AuditSettings(600, joint_rounds=1, controls=False))
    found = [b.recoverable_nats.mean if b.recoverable_nats else 0.0 for b in report.record.blocks]
    oracles = [min(oracle(opened.model, i, probe, rate=rate, patience=3) for rate in RATES) for i in range(len(found))]
    gains = [gain for _, gain, _ in oracles]
    return {
        "stage": stage.name,
        "fit_tokens": probe.fit.tokens,
        "reference_complete": report.record.complete,
        "reference_rounds": [b.rounds for b in report.record.blocks],
        "reference_forward_equivalents": report.record.cost.forward_equivalents,
        "reference_nats": found,
        "oracle_nats": gains,
        "oracle_epochs": [epochs for _, _, epochs in oracles],
        "oracle_forward_equivalents": 3.0 * sum(epochs for _, _, epochs in oracles) * probe.fit.tokens / _tokens(probe),
        "share_of_oracle": statistics.median(f / g for f, g in zip(found, gains, strict=True) if g > 0),
        "rank_correlation": float(spearmanr(found, gains).statistic),
    }


def _tokens(probe: Probe) -> int:
    return probe.fit.tokens + probe.select.tokens + probe.report.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--stages", type=Path, nargs="*", default=STAGES[1:], help="checkpoint folders")
    arguments = parser.parse_args()
    stages: list[dict[str, object]] = []
    for stage in arguments.stages:
        stages.append(compare(stage, arguments.tokens))
        write("oracle_tightness", {"stages": stages})  # after each stage, so that nothing is lost


if __name__ == "__main__":
    main()
