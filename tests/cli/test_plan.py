"""`peelwise plan`: what it prints, its JSON, and bad input in one or two lines."""

import inspect
import json
import re
from typing import get_args

import pytest
import typer.main

import peelwise
from peelwise.cli.main import app
from peelwise.errors import OptionError
from peelwise.records.options import options_of, parse_amount
from peelwise.records.plan import PlanRecord, Task
from peelwise.show.plan.words import conclusion
from peelwise.tasks.plan.run import BASE_BYTES
from peelwise.tasks.plan.shapes import Decoder
from tiny_llama import tiny_llama

SECONDS = re.compile(r"\d\.\d s\b")
LLAMA_7B = Decoder(4096, 11008, 32, 32, 32, 32_000)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return the config of a model without weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().config.save_pretrained(folder)
    return folder / "config.json"


def test_a_config_alone_gives_a_verdict_and_every_stage(run, config):
    code, out, error = run("plan", config, "--memory", "1GB", "--speed", "50G", "--disk", "1GB")
    assert code == 0
    assert error == ""
    words = " ".join(out.split())
    every = "check --no-text, check, audit, compare, quantise, quantcheck and anatomy"
    assert f"In 1.0 GB: {every} fit with weights in float32." in words
    for stage in ("signals of the weights", "statistics of all blocks", "re-fitting the output head", "self-checks"):
        assert stage in words
    assert SECONDS.search(out)
    assert "not measured" in words


def test_without_a_speed_there_are_no_seconds(run, config):
    _, out, _ = run("plan", config, "--memory", "1GB")
    assert not SECONDS.search(out)


def test_json_holds_shape_and_stages(run, config):
    code, out, _ = run("plan", config, "--memory", "1GB", "--tokens", "300", "--json")
    assert code == 0
    found = json.loads(out)
    assert {"kind", "schema_version", "shape", "memory_bytes", "processes", "plans"} <= found.keys()
    assert found["kind"] == "plan"
    assert found["memory_bytes"] == 1e9
    plan = next(each for each in found["plans"] if each["task"] == "audit" and each["way"] == "float32")
    assert plan["tokens"] == 300
    assert set(plan["stages"][0]) == {"stage", "operations", "read_bytes", "peak_bytes", "seconds"}
    record = PlanRecord.model_validate_json(out)
    assert record.fitting("audit").way == "float32"
    assert {each.way for each in record.ways("check")} == {"float32", "stream", "bfloat16"}
    assert record.operations_per_second is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere not found: expected a folder, a .gguf file or smollm2"),
        (["CONFIG", "--tokens", "-3"], "tokens: expected at least 1, got -3"),
        (["CONFIG", "--processes", "0"], "processes: expected at least 1, got 0"),
        (["CONFIG", "--memory", "much"], "memory: expected a positive amount like 80GB, 16GiB or 50G, got 'much'"),
        (["CONFIG", "--memory", "0GB"], "memory: expected a positive amount"),
        (["CONFIG", "--memory", "1GB", "--speed", "-1"], "speed: expected a positive amount"),
        (["FOREIGN"], "no causal language model for model_type 'nonsense'"),
    ],
)
def test_bad_input_is_said_in_one_or_two_lines(run, config, tmp_path, arguments, message):
    foreign = tmp_path / "config.json"
    foreign.write_text(json.dumps({"model_type": "nonsense"}))
    names = {"CONFIG": config, "FOREIGN": foreign, "nowhere": tmp_path / "nowhere"}
    code, out, error = run("plan", *(names.get(each, each) for each in arguments))
    assert code == 2
    assert out == ""
    assert message in " ".join(error.split())
    assert len(error.splitlines()) <= 2
    assert "Traceback" not in error


def test_python_says_the_same(config):
    report = peelwise.plan(config, peelwise.PlanSettings(memory="1GB"))
    assert "fit with weights in float32" in " ".join(str(report).split())
    assert report.conclusion == conclusion(report.record)
    assert "compare" in report._repr_html_()
    rows = report.to_frame()
    assert set(rows["task"]) == set(get_args(Task))
    assert rows.query("task == 'audit' and way == 'float32'")["operations"].sum() > 0
    with pytest.raises(OptionError, match="tokens: expected at least 1, got -1"):
        peelwise.PlanSettings(tokens=-1)


def fitting(memory, **options):
    record = peelwise.plan(LLAMA_7B.shape("7b"), peelwise.PlanSettings(memory=memory, **options)).record
    return {task: found and found.way for task in record.tasks for found in [record.fitting(task)]}, record


def test_the_verdict_follows_the_memory():
    """7 B parameters are 27 GB in float32 and 13.5 in half precision; an audit's changes take more than any of it."""
    assert fitting("1e15")[0] == dict.fromkeys(get_args(Task), "float32")
    assert fitting("20GB")[0]["check-weights"] == "bfloat16"
    assert fitting("6GB")[0]["check-weights"] == "stream"
    found, record = fitting("1GB")
    assert set(found.values()) == {None}
    assert conclusion(record).startswith("In 1.0 GB: check --no-text does not fit, because its stage ")
    assert fitting("80GB")[0]["audit"] == "stream"  # its changes lie on disk then
    assert fitting("16GB")[0]["audit"] == "stream"  # and sums of one layer are there at a time
    assert fitting("8GB")[0]["audit"] is None  # which is too much


def test_processes_share_the_text_and_the_solves_of_an_audit_and_hold_a_model_each():
    alone, many = (fitting("80GB", processes=count)[1] for count in (1, 8))
    assert many.tasks == ("audit",)
    first, second = (record.ways("audit")[0] for record in (alone, many))
    for shared in ("losses", "proposals", "weight-signals", "leave-one-out"):
        whole, part = (next(s for s in plan.stages if s.stage == shared) for plan in (first, second))
        assert part.operations == pytest.approx(whole.operations / 8), shared
    weights = 4 * alone.shape.parameters
    assert all(plan.stages[0].peak_bytes > weights + BASE_BYTES for plan in (first, second))
    assert second.read_bytes == alone.shape.stored_bytes
    assert "stream" not in {plan.way for plan in many.plans}


def test_seconds_are_operations_over_speed_and_bytes_over_disk():
    record = fitting("80GB", speed="1T", disk="1GB")[1]
    stream = next(plan for plan in record.ways("check") if plan.way == "stream")
    assert stream.seconds == pytest.approx(stream.operations / 1e12 + stream.read_bytes / 1e9)
    # Weights that stay in their files go through once for every micro-batch.
    assert stream.read_bytes > 10 * record.shape.stored_bytes
    assert record.ways("check")[0].read_bytes == record.shape.stored_bytes


def test_options_are_those_of_the_settings():
    command = typer.main.get_command(app).commands["plan"]
    found = {parameter.name: parameter for parameter in command.params}
    doc = " ".join(inspect.getdoc(peelwise.PlanSettings).split())
    for name, one in options_of(peelwise.PlanSettings).items():
        assert found[name].help.startswith(one.help)
        assert found[name].default == one.default
        assert f"{name}: {one.sentence}" in doc


@pytest.mark.parametrize(
    ("text", "value"),
    [("80GB", 80e9), ("16GiB", 16 * 2**30), ("50g", 50e9), ("2.5e12", 2.5e12), (7, 7.0), ("1 KB", 1e3), ("3B", 3.0)],
)
def test_amounts(text, value):
    assert parse_amount("memory", text) == value


@pytest.mark.parametrize("text", ["", "GB", "80XB", "-1", "1e999", "nan", "5i"])
def test_what_is_no_amount(text):
    with pytest.raises(OptionError, match="memory: expected a positive amount"):
        parse_amount("memory", text)
