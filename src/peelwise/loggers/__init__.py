"""Where a monitored run is told while it lasts: console, files, trackers; a file for each and one table. No torch."""

from peelwise.loggers.base import Logger
from peelwise.loggers.table import LOGGERS, logger_of

__all__ = ["LOGGERS", "Logger", "logger_of"]
