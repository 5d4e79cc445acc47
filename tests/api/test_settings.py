"""Settings objects, and functions that open the model, draw the probe and save the report themselves."""

import json
import subprocess
import sys

import pytest

import peelwise
from audits import ONE_ROUND, numbers, tiny_probe
from peelwise.errors import FormatError, MapError, ModelError, OptionError, OutputError, PeelwiseError, ProbeError
from peelwise.formats.table import parse_format
from peelwise.nn import quantize_
from peelwise.probe.texts import reference_prose
from stages import stage_folder
from zoo import ZOO

QUICK = peelwise.AuditSettings("2s", joint_rounds=0, solo_rounds=0, controls=False)
FEW = {"tokens": 1_200, "sequence_length": 32}


def test_settings_come_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import peelwise as p; "
        "print(p.AuditSettings('5m').budget_seconds, p.PeelSettings(), p.QuantcheckSettings(), p.CheckSettings(), "
        "p.OpenOptions(), p.ProbeOptions())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("300.0 ")


def test_keys_of_the_record_are_those_of_files_that_people_have():
    assert peelwise.AuditSettings("90s", 1, 2, 0.5, False).plain() == {
        "budget_seconds": 90.0,
        "joint_rounds": 1,
        "alone_rounds": 2,
        "margin_nats": 0.5,
        "controls": False,
        "micro_batch_tokens": 1024,
        "refine": "trainable",
    }
    assert list(peelwise.PeelSettings().plain("")) == [
        *("budget_seconds", "maps", "start", "weighted", "rounds", "steps", "dense_references", "beam_width"),
        *("controls", "margin_nats", "micro_batch_tokens", "reference_formats"),
    ]
    assert peelwise.PeelSettings(maps="3,3,3 1,2,3").plain("int2")["maps"] == "[[3, 3, 3], [1, 2, 3]]"
    assert peelwise.QuantcheckSettings(10, "int3:group=32").plain() == {
        "budget_seconds": 10.0,
        "form": "int3:group=32,symmetric",
        "max_sweeps": 5,
        "tolerance": 0.01,
    }
    assert peelwise.QuantcheckSettings(format=parse_format("int2")).plain()["form"] == parse_format("int2").name


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: peelwise.AuditSettings("soon"), OptionError, "A budget is"),
        (lambda: peelwise.AuditSettings(joint_rounds=-1), OptionError, "joint_rounds: expected at least 0"),
        (
            lambda: peelwise.AuditSettings(refine="most"),
            OptionError,
            "refine: expected one of trainable, all, adapters",
        ),
        (lambda: peelwise.AuditSettings(margin=float("nan")), OptionError, "margin: expected 0.0005 to 1"),
        (lambda: peelwise.PeelSettings(micro_batch_tokens=0), OptionError, "micro_batch_tokens: expected at least 1"),
        (lambda: peelwise.PeelSettings(maps="3;x"), MapError, "maps: expected"),
        (lambda: peelwise.QuantcheckSettings(format="int99"), FormatError, "int99"),
        (lambda: peelwise.QuantcheckSettings(max_sweeps=0), OptionError, "max_sweeps"),
        (lambda: peelwise.ProbeOptions(tokens=0), ProbeError, "number of tokens"),
    ],
)
def test_bad_settings_are_refused_where_they_are_made(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_text_is_read_with_the_tokenizer_of_the_folder_and_the_report_saved(tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text("\n\n".join(reference_prose())[:40_000], encoding="utf-8")
    options = peelwise.ProbeOptions([text], **FEW)
    report = peelwise.audit(stage_folder("early"), options, QUICK, out=tmp_path / "out", name="mine")
    assert report.record.probe.source == "prose.txt"
    assert json.loads((tmp_path / "out" / "certificate.json").read_text())["model"]["name"] == "mine"
    assert report.record.settings["alone_rounds"] == 0


def test_a_taken_folder_and_a_mistyped_text_are_refused_before_the_model_is_opened(tmp_path):
    (tmp_path / "thesis.tex").touch()
    for work in (peelwise.audit, peelwise.peel):
        with pytest.raises(OutputError, match="--force"):
            work("no/such/model", out=tmp_path)
        with pytest.raises(ProbeError, match=r"none\.txt"):
            work("no/such/model", peelwise.ProbeOptions(["none.txt"]))
    (tmp_path / "thesis.json").touch()
    (tmp_path / "folder.json").mkdir()
    for out, words in (("thesis.tex", "is a file"), ("thesis.json", "exists"), ("folder.json", "is a folder")):
        with pytest.raises(OutputError, match=words):
            peelwise.quantcheck("no/such/model", "nor/this", out=tmp_path / out)
    with pytest.raises(OutputError, match=r"holds no quantcheck\.json"):
        peelwise.quantcheck("no/such/model", "nor/this", out=tmp_path, force=True)


def test_a_module_needs_a_tokenizer_for_text(small_gpt):
    model, _ = small_gpt("early")
    with pytest.raises(ModelError, match=r"OpenOptions\(tokenizer"):
        peelwise.audit(model, peelwise.ProbeOptions(**FEW), QUICK)
    opening = peelwise.OpenOptions(tokenizer=stage_folder("early"))
    report = peelwise.audit(model, peelwise.ProbeOptions(**FEW), QUICK, opening=opening)
    assert report.record.probe.source.startswith("Python reference prose")


def test_opening_options_reach_the_model():
    with pytest.raises(PeelwiseError, match="Unknown device"):
        peelwise.audit(stage_folder("early"), tiny_probe(), opening=peelwise.OpenOptions(device="abacus"))
    report = peelwise.audit(
        stage_folder("early"), tiny_probe(), QUICK, opening=peelwise.OpenOptions(dtype="bfloat16", device="cpu")
    )
    assert report.record.model.dtype == "bfloat16"


def test_budget_is_a_shorthand():
    short = peelwise.audit(ZOO["plain"](), tiny_probe(), ONE_ROUND, budget="10m").record
    assert short.settings["budget_seconds"] == 600.0
    assert numbers(short) == numbers(peelwise.audit(ZOO["plain"](), tiny_probe(), ONE_ROUND).record)


@pytest.fixture(scope="module")
def compared():
    parent, quantised = ZOO["llama"](), ZOO["llama"]()
    quantize_(quantised, "int3")
    return peelwise.quantcheck(quantised, parent, tiny_probe(), peelwise.QuantcheckSettings("10m", max_sweeps=1))


def test_quantcheck_returns_a_report(compared, tmp_path):
    text = str(compared)
    assert compared.conclusion[:30] in text
    assert max(map(len, text.splitlines())) <= 110
    file = compared.save(tmp_path / "check.json")
    assert json.loads(file.read_text()) == json.loads(compared.to_json())
    with pytest.raises(OutputError, match="--force"):
        compared.save(file)
    assert compared.save(file, force=True) == file


def test_quantcheck_as_frame(compared):
    pytest.importorskip("pandas")
    frame, layers = compared.to_frame(), compared.record.layers
    assert frame.index.tolist() == [layer.name for layer in layers]
    assert frame["left_on_the_table"].tolist() == [layer.split.left_on_the_table for layer in layers]
    assert frame["error"].tolist() == [layer.error for layer in layers]
