"""peelwise: how far each part of a transformer is from what it could achieve, with proof.

Names are imported when they are first used, so that ``import peelwise`` does not import torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peelwise.api.allocate import AllocationReport, allocate
    from peelwise.api.anatomy import AnatomyReport, anatomy
    from peelwise.api.audit import AuditReport, audit
    from peelwise.api.certificate import apply, verify
    from peelwise.api.check import CheckReport, check
    from peelwise.api.compare import CompareReport, CompareSeriesReport, compare, compare_run
    from peelwise.api.monitor import Monitor
    from peelwise.api.peel import PeelReport, peel
    from peelwise.api.plan import PlanReport, plan
    from peelwise.api.quantcheck import QuantcheckReport, quantcheck
    from peelwise.api.quantise import QuantiseReport, quantise
    from peelwise.api.yes import YesBounds, yes_bounds
    from peelwise.integrations.huggingface import attach as attach
    from peelwise.model.options import OpenOptions, ShardedOptions
    from peelwise.probe.options import ProbeOptions
    from peelwise.probe.probe import Probe
    from peelwise.tasks.allocate.settings import AllocateSettings
    from peelwise.tasks.anatomy.settings import AnatomySettings
    from peelwise.tasks.audit.settings import AuditSettings
    from peelwise.tasks.check.settings import CheckSettings
    from peelwise.tasks.compare.settings import CompareSettings
    from peelwise.tasks.monitor.schedules import every, log_spaced
    from peelwise.tasks.peel.settings import PeelSettings
    from peelwise.tasks.plan.settings import PlanSettings
    from peelwise.tasks.quantcheck.settings import QuantcheckSettings
    from peelwise.tasks.quantise.settings import QuantiseSettings
    from peelwise.tasks.yes.bounds import YesMonitor

__all__ = [
    "AllocateSettings",
    "AllocationReport",
    "AnatomyReport",
    "AnatomySettings",
    "AuditReport",
    "AuditSettings",
    "CheckReport",
    "CheckSettings",
    "CompareReport",
    "CompareSeriesReport",
    "CompareSettings",
    "Monitor",
    "OpenOptions",
    "PeelReport",
    "PeelSettings",
    "PlanReport",
    "PlanSettings",
    "Probe",
    "ProbeOptions",
    "QuantcheckReport",
    "QuantcheckSettings",
    "QuantiseReport",
    "QuantiseSettings",
    "ShardedOptions",
    "YesBounds",
    "YesMonitor",
    "allocate",
    "anatomy",
    "apply",
    "audit",
    "check",
    "compare",
    "compare_run",
    "every",
    "log_spaced",
    "peel",
    "plan",
    "quantcheck",
    "quantise",
    "verify",
    "yes_bounds",
]
if find_spec("transformers") is not None:
    __all__ += ["attach"]  # needs this extra: "from peelwise import *" works without any

_HOME = {
    "AllocateSettings": "peelwise.tasks.allocate.settings",
    "AllocationReport": "peelwise.api.allocate",
    "AnatomyReport": "peelwise.api.anatomy",
    "AnatomySettings": "peelwise.tasks.anatomy.settings",
    "AuditReport": "peelwise.api.audit",
    "AuditSettings": "peelwise.tasks.audit.settings",
    "CheckReport": "peelwise.api.check",
    "CheckSettings": "peelwise.tasks.check.settings",
    "CompareReport": "peelwise.api.compare",
    "CompareSeriesReport": "peelwise.api.compare",
    "CompareSettings": "peelwise.tasks.compare.settings",
    "Monitor": "peelwise.api.monitor",
    "OpenOptions": "peelwise.model.options",
    "PeelReport": "peelwise.api.peel",
    "PeelSettings": "peelwise.tasks.peel.settings",
    "PlanReport": "peelwise.api.plan",
    "PlanSettings": "peelwise.tasks.plan.settings",
    "Probe": "peelwise.probe.probe",
    "ProbeOptions": "peelwise.probe.options",
    "QuantcheckReport": "peelwise.api.quantcheck",
    "QuantcheckSettings": "peelwise.tasks.quantcheck.settings",
    "QuantiseReport": "peelwise.api.quantise",
    "QuantiseSettings": "peelwise.tasks.quantise.settings",
    "ShardedOptions": "peelwise.model.options",
    "YesBounds": "peelwise.api.yes",
    "YesMonitor": "peelwise.tasks.yes.bounds",
    "allocate": "peelwise.api.allocate",
    "anatomy": "peelwise.api.anatomy",
    "apply": "peelwise.api.certificate",
    "attach": "peelwise.integrations.huggingface",
    "audit": "peelwise.api.audit",
    "check": "peelwise.api.check",
    "compare": "peelwise.api.compare",
    "compare_run": "peelwise.api.compare",
    "every": "peelwise.tasks.monitor.schedules",
    "log_spaced": "peelwise.tasks.monitor.schedules",
    "peel": "peelwise.api.peel",
    "plan": "peelwise.api.plan",
    "quantcheck": "peelwise.api.quantcheck",
    "quantise": "peelwise.api.quantise",
    "verify": "peelwise.api.certificate",
    "yes_bounds": "peelwise.api.yes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'peelwise' has no attribute {name!r}")
    import random
    from importlib import import_module

    before = random.getstate()  # packages may draw from it when they are first imported, as rich does
    try:
        return getattr(import_module(_HOME[name]), name)
    finally:
        random.setstate(before)
