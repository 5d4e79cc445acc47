"""peelwise: how far each part of a transformer is from what it could achieve, with proof.

Names are imported when they are first used, so that ``import peelwise`` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peelwise.api import AuditReport, apply, audit, verify
    from peelwise.api_monitor import Monitor
    from peelwise.api_peel import PeelReport, peel
    from peelwise.api_quant import quantcheck
    from peelwise.integrations.huggingface import attach as attach
    from peelwise.pipeline.schedules import every, log_spaced
    from peelwise.pipeline.yes.bounds import YesMonitor, yes_bounds
    from peelwise.pipeline.yes.result import YesBounds
    from peelwise.probes import Probe

__all__ = [
    "AuditReport",
    "Monitor",
    "PeelReport",
    "Probe",
    "YesBounds",
    "YesMonitor",
    "apply",
    "audit",
    "every",
    "log_spaced",
    "peel",
    "quantcheck",
    "verify",
    "yes_bounds",
]

_YES = "peelwise.pipeline.yes"
_HOME = {
    "Monitor": "peelwise.api_monitor",
    "Probe": "peelwise.probes",
    "YesBounds": f"{_YES}.result",
    "YesMonitor": f"{_YES}.bounds",
    "attach": "peelwise.integrations.huggingface",
    "every": "peelwise.pipeline.schedules",
    "quantcheck": "peelwise.api_quant",
    "log_spaced": "peelwise.pipeline.schedules",
    "yes_bounds": f"{_YES}.bounds",
}
_HOME |= dict.fromkeys(("PeelReport", "peel"), "peelwise.api_peel")


def __getattr__(name: str) -> Any:
    # What needs an extra is not in __all__: "from peelwise import *" works without any.
    if name not in __all__ and name not in _HOME:
        raise AttributeError(f"module 'peelwise' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME.get(name, "peelwise.api")), name)
