"""`peelwise.check` in Python: what it looks at, what it returns, and what it leaves in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peelwise
from audits import tiny_probe
from peelwise.api.files import write_report
from peelwise.errors import ModelError, OptionError, OutputError, ProbeError
from peelwise.model.fingerprint import fingerprint
from peelwise.records.check import CheckRecord
from peelwise.tasks.check.settings import CHECK_TOKENS
from stages import stage_folder

BLOCKS, LOUD = 6, 4
NO_WITNESSES = peelwise.CheckSettings(most_witnesses=0)


@pytest.fixture(scope="module")
def model() -> Any:
    """A random Llama of six blocks, one of which has an MLP that writes fifty times as much."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": BLOCKS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        made.model.layers[LOUD].mlp.down_proj.weight.mul_(50)
    return made


@pytest.fixture(scope="module")
def report(model: Any) -> peelwise.CheckReport:
    return peelwise.check(model, tiny_probe(), NO_WITNESSES)


def test_the_block_that_differs_is_named_in_words_and_the_model_is_left_alone(model: Any) -> None:
    before = fingerprint(model)
    report = peelwise.check(model, tiny_probe(), NO_WITNESSES)
    assert fingerprint(model) == before
    assert report.record.unlike is not None
    assert LOUD in [each.block for each in report.record.unlike]
    assert "unlike" in report.conclusion
    assert report.conclusion[:30] in str(report)
    assert max(map(len, str(report).splitlines())) <= 110


def test_frames_have_blocks_and_matrices_as_rows(report: peelwise.CheckReport) -> None:
    pytest.importorskip("pandas")
    blocks, matrices = report.to_frame(), report.to_frame("matrices")
    record = report.record
    assert blocks.index.tolist() == list(range(BLOCKS))
    assert blocks["score"].tolist() == [block.score for block in record.blocks]
    column = blocks["weight_rms.mlp.down_proj"]
    assert column.tolist() == [block.signals["weight_rms.mlp.down_proj"] for block in record.blocks]
    assert column.idxmax() == LOUD
    assert matrices.index.tolist() == [matrix.name for matrix in record.matrices]
    assert matrices.loc[f"model.layers.{LOUD}.mlp.down_proj", "weight_rms"] == column[LOUD]
    assert set(matrices["block"]) == set(range(BLOCKS))
    with pytest.raises(OptionError, match='expected "blocks" or "matrices"'):
        report.to_frame("columns")  # type: ignore[arg-type]


def test_a_saved_report_is_read_again_and_not_replaced_unasked(report: peelwise.CheckReport, tmp_path: Path) -> None:
    folder = report.save(tmp_path / "out")
    files = {file.name for file in folder.iterdir()}
    assert {"certificate.json", "report.html", "witness.safetensors"} <= files
    saved = CheckRecord.model_validate_json((folder / "certificate.json").read_text())
    assert saved.digest == saved.computed_digest()
    assert saved.blocks == report.record.blocks
    assert saved.kind == "check"
    assert write_report(folder) == folder / "report.html"
    assert (folder / "report.html").read_text() == report.to_html()
    with pytest.raises(OutputError, match="--force"):
        report.save(folder)
    assert report.save(folder, force=True) == folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"holds no certificate\.json"):
        report.save(tmp_path / "mine", force=True)


def test_a_module_without_probe_and_tokenizer_is_checked_by_its_weights(model: Any) -> None:
    record = peelwise.check(model).record
    assert record.probe is None
    assert "weight_rms.mlp.down_proj" in record.blocks[0].signals
    assert not any(key.startswith("gain_slope") for key in record.blocks[0].signals)
    assert record.model_dump(exclude={"created", "cost"}) == peelwise.check(model, text=False).record.model_dump(
        exclude={"created", "cost"}
    )


@pytest.mark.filterwarnings("ignore:Only 6 sequences")  # a little text is enough for the signals
def test_with_a_tokenizer_the_default_is_a_little_reference_prose() -> None:
    few = peelwise.CheckSettings(("gain_slope",), most_witnesses=0)
    record = peelwise.check(stage_folder("early"), settings=few).record
    assert record.probe is not None
    assert record.probe.source.startswith("Python reference prose")
    drawn = record.probe.fit_tokens + record.probe.select_tokens + record.probe.report_tokens
    assert CHECK_TOKENS - 128 <= drawn <= CHECK_TOKENS
    assert peelwise.check(stage_folder("early"), text=False, settings=few).record.probe is None


def test_bad_input_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(OptionError, match="exclude each other"):
        peelwise.check("no/such/model", tiny_probe(), text=False)
    with pytest.raises(OutputError, match="--force"):
        peelwise.check("no/such/model", out=tmp_path)
    with pytest.raises(ProbeError, match=r"none\.txt"):
        peelwise.check("no/such/model", peelwise.ProbeOptions(["none.txt"]))
    with pytest.raises(ModelError, match="no/such/model"):
        peelwise.check("no/such/model", text=False)
    with pytest.raises(OptionError, match="no signal 'nonsense'"):
        peelwise.CheckSettings(("nonsense",))
