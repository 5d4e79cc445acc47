"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder, .gguf file, or `smollm2`.")]


TextOption = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="FILE", help="Text: .txt, .jsonl, .parquet or - ; may be repeated."),
]


TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="DIR", help="Folder of the tokenizer; default: the model's.")
]


FieldOption = Annotated[str, typer.Option(help="Field of .jsonl and .parquet that holds the text.")]


FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a certificate.")]


ForceOption = Annotated[bool, typer.Option("--force", help="Replace an earlier result.")]


DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]


TokensOption = Annotated[int, typer.Option(min=1, help="Tokens of text to use at most.")]


LengthOption = Annotated[int, typer.Option(min=2, help="Tokens per sequence.")]


BudgetOption = Annotated[str, typer.Option(help="Wall time: 90s, 5m, 1h.")]


InDistributionOption = Annotated[
    bool, typer.Option("--in-distribution", help="The text is what the model was trained on.")
]


MarginOption = Annotated[float | None, typer.Option(min=0.0, help="Nats per token that matter.")]


ControlsOption = Annotated[bool, typer.Option("--controls/--no-controls", help="Run the null controls.")]


DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


SeedOption = Annotated[int, typer.Option(help="Draws and splits the text.")]


OutOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for certificate, witness, report.")]


JsonOption = Annotated[bool, typer.Option("--json", help="Print the record as JSON instead of the table.")]


PickleOption = Annotated[bool, typer.Option("--allow-pickle", help="Also open pickled weights.")]
