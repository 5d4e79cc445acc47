"""Feasible sets of weights: what a low-bit layer may hold, how it is written, and what it costs. Pure tensors."""

from peelwise.formats.base import Encoded, Format
from peelwise.formats.table import parse_format

__all__ = ["Encoded", "Format", "parse_format"]
