"""Options of the commands. Those of the settings classes take sentence, panel and default from there, so that the
command line and Python say the same; the others concern what a command leaves behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peelwise.model.options import Dtype, OpenOptions, ShardedOptions
from peelwise.probe.options import ProbeOptions
from peelwise.records.options import options_of


def flag(settings: type[Any], name: str, *names: str, **how: Any) -> Any:
    """Return the option of the command line for a field of a settings class.

    Args:
        settings: the class.
        name: of the field.
        names: what the option is called; default: like the field, a boolean also with ``--no-``.
        how: further arguments of ``typer.Option``.
    """
    one = options_of(settings)[name]
    return typer.Option(*names, help=one.help, show_default=one.rule or True, rich_help_panel=one.panel, **how)


def output(*names: str, help: str, **how: Any) -> Any:
    """Return an option that says what a command leaves or prints."""
    return typer.Option(*names, help=help, rich_help_panel="Output", **how)


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder, .gguf file, or `smollm2`.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a certificate.")]

# The text.
TextOption = Annotated[list[str] | None, flag(ProbeOptions, "text", metavar="FILE")]
FieldOption = Annotated[str, flag(ProbeOptions, "field")]
TokensOption = Annotated[int, flag(ProbeOptions, "tokens", min=1)]
LengthOption = Annotated[int, flag(ProbeOptions, "sequence_length", min=1)]
InDistributionOption = Annotated[bool, flag(ProbeOptions, "in_distribution", "--in-distribution")]
SeedOption = Annotated[int, flag(ProbeOptions, "seed")]

# How a model is opened.
DeviceOption = Annotated[str, flag(OpenOptions, "device")]
DtypeOption = Annotated[Dtype, flag(OpenOptions, "dtype")]
PickleOption = Annotated[bool, flag(OpenOptions, "allow_pickle", "--allow-pickle")]
StoredOption = Annotated[bool, flag(OpenOptions, "as_stored", "--as-stored")]
StreamOption = Annotated[bool, flag(OpenOptions, "stream", "--stream")]
ShardOption = Annotated[bool, flag(ShardedOptions, "shard", "--shard")]
TokenizerOption = Annotated[Path | None, flag(OpenOptions, "tokenizer", metavar="DIR")]

# What a command leaves and prints.
OutOption = Annotated[Path | None, output(metavar="DIR", help="Folder for certificate, witness and report.")]
ForceOption = Annotated[bool, output("--force", help="Replace an earlier result.")]
JsonOption = Annotated[bool, output("--json", help="Print the record as JSON instead of the table.")]


def probe_options(
    text: list[str] | None, field: str, tokens: int, sequence_length: int, in_distribution: bool, seed: int
) -> ProbeOptions:
    """Return the text that a command was given; the option may be repeated, and left out for the reference prose."""
    return ProbeOptions(tuple(text or ()), field, tokens, sequence_length, in_distribution, seed)
