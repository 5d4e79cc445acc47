"""Certificates of comparisons: OLD is the witness, put back into NEW again; forged ones are found out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peelwise
from audits import slow_losses, tiny_probe
from peelwise.certificate.compare import mended_model, verify_compare
from peelwise.errors import CertificateError, ModelError
from peelwise.evidence.compare import conclusion
from peelwise.records.base import ModelRecord
from peelwise.records.compare import CompareRecord
from peelwise.records.files import RECORD_FILE, WITNESS_FILE, read_any_record, sha256
from peelwise.tasks.compare.settings import CompareSettings
from zoo import ZOO

BROKEN = 2


def damaged(old: nn.Module, factor: float = -4.0) -> nn.Module:
    """Return a copy whose block 2 adds something else, and whose block 0 moved a little."""
    new = copy.deepcopy(old)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            new.model.layers[BROKEN].get_submodule(name).weight.mul_(factor)
        generator = torch.Generator().manual_seed(0)
        weight = new.model.layers[0].mlp.up_proj.weight
        weight.add_(1e-3 * torch.randn(weight.shape, generator=generator))
    return new


def learned(seed: int = 0) -> nn.Module:
    """Return a tiny model whose blocks matter: fitted to the probe for a moment."""
    model = ZOO["llama"](seed) if seed else ZOO["llama"]()
    rows = tiny_probe().report
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        logits = model(rows.ids[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows.ids[:, 1:].flatten())
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    old = learned()
    return old, damaged(old)


@pytest.fixture(scope="module")
def original(models: tuple[nn.Module, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "out"
    settings = CompareSettings(layers_of=1)
    report = peelwise.compare(*models, tiny_probe(), settings, out=folder)
    assert report.record.conclusion.hurt == (BROKEN,)
    return folder


def _record(folder: Path) -> CompareRecord:
    record = read_any_record(folder)
    assert isinstance(record, CompareRecord)
    return record


def _mean(model: nn.Module) -> float:
    rows = tiny_probe().report.rows()
    return float(slow_losses(model, rows).sum()) / sum(len(row) - 1 for row in rows)


def test_it_holds_and_says_what_was_opened(original: Path, models: tuple[nn.Module, nn.Module]) -> None:
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    result = peelwise.verify(original, models[1], old=models[0])
    assert result.status == "holds", result.reason
    names = {check.name for check in result.checks}
    assert {"loss.old", "loss.new", "loss.damage.mean", "model.layers.2 repairs.low", "mended.loss"} <= names
    assert "model.layers.2.mlp.down_proj repairs.mean" in names
    assert not any(name.startswith("model.layers.1 ") for name in names)  # the same in both
    assert "OLD is LlamaForCausalLM" in (result.model or "")
    for state, model in zip(before, models, strict=True):
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_in_full_everything_is_found_again(original: Path, models: tuple[nn.Module, nn.Module]) -> None:
    result = peelwise.verify(original, models[1], old=models[0], full=True)
    assert result.status == "holds", result.reason
    assert {"model.layers.1 breaks.mean", "head path_from_last.high"} <= {check.name for check in result.checks}


def test_apply_writes_old_where_it_repairs_and_new_elsewhere(
    original: Path, models: tuple[nn.Module, nn.Module]
) -> None:
    old, new = models
    record = _record(original)
    mended = mended_model(original, record, old, new)
    assert record.mended is not None
    assert (record.mended.blocks, record.mended.ends) == ((BROKEN,), ())
    assert _mean(mended) == pytest.approx(record.mended.loss, abs=1e-5)
    assert record.mended.gain.mean == pytest.approx(record.loss.new - record.mended.loss, abs=1e-9)
    for name, tensor in mended.state_dict().items():
        source = old if name.startswith(f"model.layers.{BROKEN}.") else new
        assert torch.equal(tensor, source.state_dict()[name])


@pytest.mark.parametrize("swap", ["old", "new", "both"])
def test_other_models_are_told(swap: str, original: Path, models: tuple[nn.Module, nn.Module]) -> None:
    old, new = models
    other = copy.deepcopy(old)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    given = {"old": (other, new), "new": (old, other), "both": (new, old)}[swap]
    result = peelwise.verify(original, given[1], old=given[0])
    assert result.status == "not the same model or data"
    assert result.reason.startswith("OLD: " if swap == "old" else "NEW: ")
    if swap == "old":
        assert "model.layers.1" in result.reason
        assert "model.layers.2" not in result.reason
    with pytest.raises(CertificateError, match="does not hold"):
        mended_model(original, _record(original), *given)
    with pytest.raises(ModelError, match="same module"):
        peelwise.verify(original, new, old=new)


Content = dict[str, Any]


def _set(path: str, value: object) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        *outer, last = path.split(".")
        where: Any = content
        for key in outer:
            where = where[int(key) if isinstance(where, list) else key]
        where[last] = value(where[last]) if callable(value) else value

    return change


def _moved(path: str, by: float) -> Callable[[Content], None]:
    return lambda c: [_set(f"{path}.{end}", lambda v: v + by)(c) for end in ("mean", "low", "high")] and None


def _both(*changes: Callable[[Content], None]) -> Callable[[Content], None]:
    return lambda content: [change(content) for change in changes] and None


TAMPERINGS: dict[str, Callable[[Content], None]] = {
    "loss of NEW": _both(_set("loss.new", lambda v: v + 0.01), _moved("loss.damage", 0.01)),
    "loss of OLD": _both(_set("loss.old", lambda v: v - 0.01), _moved("loss.damage", 0.01)),
    "damage alone": _moved("loss.damage", 0.01),
    "a repair": _both(_moved("blocks.2.repairs_nats", 0.01), _set("loss.interaction", lambda v: v - 0.01)),
    "a repair and no sum": _moved("blocks.2.repairs_nats", 0.01),
    "a repair of the same": _moved("blocks.1.repairs_nats", 0.01),
    "a narrow interval": _set("blocks.2.repairs_nats.low", lambda v: v + 0.01),
    "a layer": _moved("blocks.2.tensors.3.repairs_nats", 0.01),
    "another block is blamed": _set("conclusion.hurt", [1]),
    "nobody is blamed": _set("conclusion.hurt", []),
    "the head is blamed": _set("conclusion.hurt_ends", ["head"]),
    "better, not worse": _set("conclusion.case", "better"),
    "the margin": _set("margin_nats", 0.9),
    "the margin of the settings": _set("settings.margin", 0.5),
    "what is mended together": _set("mended.blocks", [0]),
    "more is mended": _set("mended.blocks", [0, 2]),
    "an end is mended": _set("mended.ends", ["norm"]),
    "nothing is mended": _set("mended", None),
    "loss when mended": _set("mended.loss", lambda v: v - 0.01),
    "gain when mended": _moved("mended.gain", 0.01),
    "OLD's tensors of a block": _set("blocks.1.old_sha256", "0" * 64),
    "OLD's tensors of the head": _set("ends.2.old_sha256", None),
    "OLD's fingerprint": _set("old.fingerprint", "0" * 64),
    "NEW's fingerprint": _set("model.fingerprint", "0" * 64),
    "a step": _moved("blocks.2.path_from_first_nats", 0.01),
    "an interaction": _set("blocks.2.interaction_nats", 0.5),
    "a changed block said to be the same": _set("blocks.0.kind_of_change", "unchanged"),
    "other code": _set("blocks.2.same_code", False),
    "a block less": lambda content: content["blocks"].pop(),
    "an end less": lambda content: content["ends"].pop(),
    "a block's name": _set("blocks.2.name", "model.layers.1"),
}
ONLY_IN_FULL: dict[str, Callable[[Content], None]] = {
    "what it breaks": _moved("blocks.2.breaks_nats", 0.01),
    "kind": _set("blocks.2.kind_of_change", "noise"),
    "kind of a tensor": _set("blocks.2.tensors.3.kind_of_change", "noise"),
    "distance": _set("blocks.2.relative_distance", 0.01),
    "distance of outputs": _set("blocks.0.output_distance", 0.5),
    "first difference": _set("first_difference.block", 1),
    "cause": _set("first_difference.cause", "config-or-code"),
}


def _forged(original: Path, folder: Path, change: Callable[[Content], object]) -> Path:
    """Write a changed certificate and seal it again with peelwise's own code."""
    content = json.loads((original / RECORD_FILE).read_text())
    change(content)
    folder.mkdir()
    for file in original.glob("*.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / RECORD_FILE).write_text(CompareRecord.model_validate(content).sealed().to_json())
    return folder


def test_the_untouched_one_holds_sealed_again(
    original: Path, models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    """The control of all others."""
    folder = _forged(original, tmp_path / "same", lambda content: None)
    assert verify_compare(folder, _record(folder), *models, full=True).status == "holds"


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampering_is_found(name: str, original: Path, models: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    folder = _forged(original, tmp_path / "forged", TAMPERINGS[name])
    result = verify_compare(folder, _record(folder), *models)
    assert not result.holds
    assert "changed after it was written" not in result.reason


@pytest.mark.parametrize("name", ONLY_IN_FULL)
def test_what_is_not_rechecked_at_once_is_found_in_full(
    name: str, original: Path, models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    folder = _forged(original, tmp_path / "forged", ONLY_IN_FULL[name])
    assert not verify_compare(folder, _record(folder), *models, full=True).holds


def _whitewashed(*parts: int, end: int | None = None) -> Callable[[Content], None]:
    """Let a record say, without a contradiction, that parts are the same in both models and nothing hurt."""

    def change(content: Content) -> None:
        nothing = copy.deepcopy(content["blocks"][1])
        assert nothing["kind_of_change"] == "unchanged"
        every = [*content["blocks"], *content["ends"]]
        for part in [content["blocks"][i] for i in parts] + ([] if end is None else [content["ends"][end]]):
            kept = {key: part[key] for key in ("index", "name", "unit", "old_sha256") if key in part}
            part.update(nothing | kept)
        for part in every:
            part |= dict.fromkeys(("path_from_first_nats", "path_from_last_nats", "interaction_nats"))
        repairs = sum(part["repairs_nats"]["mean"] for part in every)
        content["loss"]["interaction"] = content["loss"]["damage"]["mean"] - repairs
        content["mended"] = content["first_difference"] = None
        record = CompareRecord.model_validate(content)
        found = conclusion(record.loss, record.blocks, record.ends, record.margin_nats)
        content["conclusion"] = found.model_dump(mode="json")

    return change


def test_a_part_that_hurts_cannot_be_said_to_be_the_same(
    original: Path, models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    folder = _forged(original, tmp_path / "block", _whitewashed(BROKEN))
    assert not _record(folder).conclusion.hurt
    assert verify_compare(folder, _record(folder), *models).reason == (
        "model.layers.2 is said to be the same in both models, and its outputs differ."
    )
    old, new = models[0], copy.deepcopy(models[0])
    with torch.no_grad():
        new.model.norm.weight.mul_(-1)
    peelwise.compare(old, new, tiny_probe(), CompareSettings(layers_of=0, path=False), out=tmp_path / "norm")
    folder = _forged(tmp_path / "norm", tmp_path / "end", _whitewashed(end=1))
    assert verify_compare(folder, _record(folder), old, new).reason.startswith("norm is said to be the same")


@pytest.mark.parametrize(("key", "value"), [("standard_error", 50.0), ("skewness", -60.0), ("sequences", 2)])
def test_evidence_cannot_be_taken_away_behind_an_interval(
    key: str, value: float, original: Path, models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    """Verdicts follow from what an interval was made of, which must therefore give the interval."""

    def change(content: Content) -> None:
        content["blocks"][BROKEN]["repairs_nats"][key] = value
        content["mended"] = None
        record = CompareRecord.model_validate(content)
        found = conclusion(record.loss, record.blocks, record.ends, record.margin_nats)
        content["conclusion"] = found.model_dump(mode="json")

    folder = _forged(original, tmp_path / "forged", change)
    result = verify_compare(folder, _record(folder), *models)
    assert "does not follow from its standard error" in result.reason, result.reason


def test_a_changed_file_is_found_before_anything_is_opened(original: Path, tmp_path: Path) -> None:
    folder = _forged(original, tmp_path / "forged", lambda content: None)
    content = json.loads((folder / RECORD_FILE).read_text())
    content["mended"]["loss"] -= 1
    (folder / RECORD_FILE).write_text(json.dumps(content))
    assert "digest" in peelwise.verify(folder).reason


def test_a_witness_with_tensors_is_no_comparison(
    original: Path, models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    folder = _forged(original, tmp_path / "forged", lambda content: None)
    path = folder / WITNESS_FILE
    save_file({"x": torch.zeros(3)}, path)
    record = _record(folder)
    assert record.witness is not None
    told = record.witness.model_copy(update={"bytes": path.stat().st_size, "sha256": sha256(path)})
    record = record.model_copy(update={"witness": told}).sealed()
    (folder / RECORD_FILE).write_text(record.to_json())
    assert "OLD itself" in verify_compare(folder, record, *models).reason


def test_nothing_to_put_back_is_said(models: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    old, new = models
    peelwise.compare(new, old, tiny_probe(), CompareSettings(layers_of=0, path=False), out=tmp_path / "out")
    record = _record(tmp_path / "out")
    assert record.mended is None
    assert peelwise.verify(tmp_path / "out", old, old=new).status == "holds"
    with pytest.raises(CertificateError, match="no part hurts"):
        mended_model(tmp_path / "out", record, new, old)


def test_a_tied_embedding_is_put_back_with_the_head(tmp_path: Path) -> None:
    old = ZOO["llama-tied"]()
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.get_input_embeddings().weight.mul_(8.0)
    report = peelwise.compare(old, new, tiny_probe(), CompareSettings(path=False), out=tmp_path / "out")
    assert report.record.conclusion.hurt_ends
    assert report.record.mended is not None
    assert report.record.mended.ends == ("embedding", "head")
    mended = mended_model(tmp_path / "out", _record(tmp_path / "out"), old, new)
    assert _mean(mended) == pytest.approx(report.record.mended.loss, abs=1e-5)
    assert peelwise.verify(tmp_path / "out", new, old=old).status == "holds"


def test_other_code_cannot_be_put_back_as_tensors(tmp_path: Path) -> None:
    old = learned()
    new = copy.deepcopy(old)
    new.model.layers[BROKEN].post_attention_layernorm.variance_epsilon = 1e4
    report = peelwise.compare(old, new, tiny_probe(), CompareSettings(path=False, margin=0.0005), out=tmp_path / "out")
    assert report.record.blocks[BROKEN].kind_of_change == "config-or-code"
    assert report.record.mended is None
    assert report.record.conclusion.hurt == (BROKEN,)
    with pytest.raises(CertificateError, match="OLD's code differs"):
        mended_model(tmp_path / "out", _record(tmp_path / "out"), old, new)


def test_a_model_record_of_old_is_part_of_it(original: Path) -> None:
    assert isinstance(_record(original).old, ModelRecord)
    assert all(len(part.old_sha256 or "") == 64 for part in (*_record(original).blocks, *_record(original).ends))


@pytest.mark.parametrize("own", ["same", "short"])
def test_text_that_is_no_new_text_is_refused(
    own: str, original: Path, models: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    """Its sequences are in the certificate's probe, or it has none."""
    from peelwise.certificate.base import read_probe
    from peelwise.certificate.own_text import Text
    from peelwise.errors import ProbeError

    class Numbers:
        """Reads token ids that are written as numbers."""

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

        def encode(self, text: str, **_: Any) -> list[int]:
            return [int(word) for word in text.split()]

    record = _record(original)
    rows = read_probe(original, record).report.rows()
    said = {"same": [" ".join(map(str, row)) for row in rows], "short": ["5"]}[own]
    with pytest.raises(ProbeError):
        verify_compare(original, record, *models, text=Text(said, Numbers(), None, "numbers"))


def test_of_a_quantised_copy_nothing_is_put_back_but_all_is_found_again(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    old = learned()
    new = damaged(old)
    torchao.quantize_(new, torchao.Int8WeightOnlyConfig())  # the head too
    report = peelwise.compare(old, new, tiny_probe(), CompareSettings(path=False), out=tmp_path / "out")
    assert report.record.conclusion.hurt == (BROKEN,)
    assert {tensor.kind_of_change for tensor in report.record.ends[2].tensors} == {"lattice"}
    assert report.record.mended is None
    assert peelwise.verify(tmp_path / "out", new, old=old).status == "holds"
    with pytest.raises(CertificateError, match="do not fit NEW"):
        mended_model(tmp_path / "out", _record(tmp_path / "out"), old, new)
