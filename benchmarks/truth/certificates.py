"""Does a certificate hold where the arithmetic is another? Threads, micro-batches, kernels and number formats.

    python benchmarks/truth/certificates.py

Audits a few models on one thread, writes their certificates, and verifies them in full under other settings.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import own
import training
from cases import KEPT_SEED, SMALL, Case, probe_of
from common import write
from peelwise.certificate.audit import changes_of, read_certificate, verify_certificate
from peelwise.certificate.base import tolerance_of, write_certificate
from peelwise.engine.opening import open_report
from peelwise.model.architectures import find_blocks

CASES = (
    Case(SMALL, "healthy", "healthy", KEPT_SEED, 2400),
    Case(SMALL, "healthy", "healthy", KEPT_SEED, 600),
    Case(SMALL, "after training", "noise 0.5", KEPT_SEED, 2400, 3),
    Case(SMALL, "after training", "sign flip", KEPT_SEED, 2400, 2),
)
FORMATS = (torch.float32, torch.bfloat16)  # what the audited model holds; verified in the same, its fingerprint says so
TOKENS = 9_600


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# name -> (setting, tokens of a micro-batch)
SETTINGS: dict[str, tuple[Callable[[], Any], int]] = {
    "as audited": (contextlib.nullcontext, 1024),
    "2 threads": (lambda: threads(2), 1024),
    "4 threads": (lambda: threads(4), 1024),
    "micro-batches of 128 tokens": (contextlib.nullcontext, 128),
    "micro-batches of 8,192 tokens": (contextlib.nullcontext, 8192),
    "other kernels (no oneDNN)": (lambda: torch.backends.mkldnn.flags(enabled=False), 1024),
    "float32 products in bfloat16 where the processor can": (lambda: matmul_precision("medium"), 1024),
    "inside autocast to bfloat16, which is switched off": (lambda: torch.autocast("cpu", torch.bfloat16), 1024),
}


def in_float64(folder: Path, model: nn.Module) -> tuple[str, float, float]:
    """Return status, farthest loss and tolerance of the certified losses computed with products in float64.

    The fingerprint of a model in float64 is another one, so this goes around `verify_certificate`.
    """
    certificate = read_certificate(folder)
    record, tolerance = certificate.record, tolerance_of(model)
    exact = copy.deepcopy(model).double()
    blocks = find_blocks(exact)
    with torch.no_grad():
        session = open_report(exact, blocks, certificate.probe.report)
        trace = session.report
        farthest = [abs(trace.mean - record.loss.current)]
        if record.loss.composed is not None:
            losses = session.losses(trace, changes_of(certificate.witness, "composed", blocks))
            farthest.append(abs(trace.mean_of(losses) - record.loss.composed))
        for block in record.blocks:
            if block.recoverable_nats is not None:
                own = changes_of(certificate.witness, "alone", (blocks[block.index],))
                gain = trace.mean_of(trace.losses - session.losses(trace, own, block.index))
                farthest.append(abs(gain - block.recoverable_nats.mean))
    return ("holds" if max(farthest) <= tolerance else "does not hold"), max(farthest), tolerance


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for number_format in FORMATS:
        for case in CASES:
            model = case.model().to(number_format)
            outcome = own.audited(model, probe_of(SMALL, TOKENS), joint_rounds=2, solo_rounds=1)
            name = f"{case.name}-{str(number_format).removeprefix('torch.')}"
            folder = training.ROOT / "out" / "truth" / "certificates" / name
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_certificate(folder, outcome.record, outcome.witness, outcome.probe)
            status, farthest, tolerance = in_float64(folder, model)
            row = {"certificate": name, "setting": "products in float64", "status": status, "farthest": farthest}
            rows.append(row | {"tolerance": tolerance, "reason": ""})
            for setting, (entered, tokens) in SETTINGS.items():
                with entered():
                    found = verify_certificate(folder, model, full=True, micro_batch_tokens=tokens)
                farthest = max((abs(c.found - c.recorded) for c in found.checks), default=float("nan"))
                rows.append(
                    {
                        "certificate": name,
                        "setting": setting,
                        "status": found.status,
                        "farthest": farthest,
                        "tolerance": found.tolerance,
                        "reason": found.reason,
                    }
                )
                print(f"{name}: {setting}: {found.status} (farthest {farthest:.1e} nats)", flush=True)
    held = sum(row["status"] == "holds" for row in rows)
    write("truth/certificates", {"held": held, "checked": len(rows), "rows": rows})


if __name__ == "__main__":
    main()
