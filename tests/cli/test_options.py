"""The command line and Python offer the same: every option of the settings classes, its default and its sentence."""

import inspect
import typing

import pytest
import typer.main

import peelwise
from peelwise.cli import runs
from peelwise.cli.main import app
from peelwise.model.options import OpenOptions, ShardedOptions
from peelwise.probe.options import ProbeOptions
from peelwise.records.options import options_of
from peelwise.references.map_search import BEAM_WIDTH
from peelwise.tasks.allocate.settings import AllocateSettings
from peelwise.tasks.anatomy.settings import AnatomySettings
from peelwise.tasks.audit.settings import AuditSettings
from peelwise.tasks.check.settings import CHECK_LENGTH, CHECK_TOKENS, CheckSettings
from peelwise.tasks.compare.settings import CompareSettings
from peelwise.tasks.peel.settings import PeelSettings
from peelwise.tasks.quantcheck.settings import QuantcheckSettings
from peelwise.tasks.quantise.settings import QuantiseSettings

SETTINGS = {
    "check": CheckSettings,
    "audit": AuditSettings,
    "peel": PeelSettings,
    "quantcheck": QuantcheckSettings,
    "quantise": QuantiseSettings,
    "allocate": AllocateSettings,
    "compare": CompareSettings,
    "anatomy": AnatomySettings,
}
CLASSES = (*SETTINGS.values(), OpenOptions, ShardedOptions, ProbeOptions)
RENAMED = {
    ("quantcheck", "format"): "form",
    ("quantise", "format"): "form",
}  # a parameter of this name would hide the built-in
OWN_DEFAULTS = {("check", "tokens"): CHECK_TOKENS, ("check", "sequence_length"): CHECK_LENGTH}


def parameters(command):
    return {parameter.name: parameter for parameter in typer.main.get_command(app).commands[command].params}


@pytest.mark.parametrize("settings", CLASSES, ids=lambda one: one.__name__)
def test_docstrings_say_the_sentence_of_every_option(settings):
    doc = " ".join(inspect.getdoc(settings).split())
    for name, one in options_of(settings).items():
        assert f"{name}: {one.help}" in doc
        assert one.rule is None or f"Default: {one.rule}" in doc


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        *((command, each) for command in SETTINGS for each in (SETTINGS[command], OpenOptions, ProbeOptions)),
        ("audit", ShardedOptions),
        ("check", ShardedOptions),
    ],
)
def test_the_command_has_every_option_with_its_sentence_panel_and_default(command, settings):
    found = parameters(command)
    for name, one in options_of(settings).items():
        parameter = found[RENAMED.get((command, name), name)]
        assert f"--{name.replace('_', '-')}" in parameter.opts
        assert parameter.help.startswith(one.help)
        assert parameter.rich_help_panel == one.panel
        default = tuple(parameter.default) if isinstance(parameter.default, list) else parameter.default
        assert (default or None) == (OWN_DEFAULTS.get((command, name), one.default) or None)
        if one.rule is not None:
            assert parameter.show_default == one.rule


def test_rules_say_what_the_code_does():
    from peelwise.evidence.verdict import default_margin

    assert options_of(AuditSettings)["margin"].rule == "the larger of 0.5 % of the loss and 0.003 nats per token"
    assert (default_margin(2.0), default_margin(0.1)) == (0.01, 0.003)
    assert options_of(PeelSettings)["rounds"].rule == "3 from a warm start, 10 from a cold one"
    assert [PeelSettings(start=start).most_rounds for start in ("warm", "cold")] == [3, 10]
    assert PeelSettings(rounds=2).most_rounds == 2
    assert PeelSettings().beam_width == BEAM_WIDTH


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        (
            "audit",
            ("red|yellow", "auto|float32|bfloat16|float16", "auto (CUDA if there is any), cpu, cuda or cuda:N"),
        ),
        ("peel", ("warm|cold",)),
        ("export", ("csv|jsonl|parquet|tensorboard",)),
    ],
)
def test_help_lists_choices_in_panels(command, choices, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run(command, "--help")
    assert all(choice in out for choice in choices)
    if command != "export":
        assert all(f"─ {panel} ─" in out for panel in ("Text", "Measurement", "Model", "Output"))
        assert "the larger of 0.5 % of the loss and 0.003 nats per token" in out


def test_the_choices_of_export_are_the_formats():
    from peelwise.store.export import FORMATS

    assert typing.get_args(typing.get_type_hints(runs.export)["to"]) == tuple(FORMATS)


@pytest.mark.parametrize("name", [*SETTINGS])
def test_functions_take_few_typed_arguments_and_no_settings_twice(name):
    settings = SETTINGS[name]
    arguments = inspect.signature(getattr(peelwise, name)).parameters
    assert set(options_of(settings)) & set(arguments) == set(options_of(settings)) & {"budget"}
    assert len(arguments) <= 10
    hints = typing.get_type_hints(settings.__init__, {**vars(inspect.getmodule(settings)), "Format": object})
    assert set(options_of(settings)) <= set(hints)
