"""The monitor: follows a training run and measures it within a budget."""

from peelwise.tasks.monitor.codewatch import CodeWatch
from peelwise.tasks.monitor.schedules import every, log_spaced

__all__ = ["CodeWatch", "every", "log_spaced"]
