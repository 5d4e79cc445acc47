"""Whatever stands in a certificate or in the header of a model file: one line, or an answer. Never a traceback."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from typing import Any

import pytest

import peelwise
from audits import ONE_ROUND, tiny_probe
from gguf_files import llama_of_whole_blocks, write_llama_gguf
from peelwise.errors import PeelwiseError
from peelwise.model.checkpoints import open_model
from peelwise.records.audit import AuditRecord
from peelwise.records.files import PROBE_FILE, RECORD_FILE, WITNESS_FILE
from zoo import ZOO

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
EXAMPLES = int(os.environ.get("PEELWISE_FUZZ_EXAMPLES", "1000"))
MANY = hypothesis.settings(
    max_examples=EXAMPLES, deadline=10_000, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    model = ZOO["llama"]()
    report = peelwise.audit(model, tiny_probe(), ONE_ROUND)
    return report.save(tmp_path_factory.mktemp("fuzz") / "certificate"), model


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of every value in JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, one in inner for found in places(one, (*path, key))]


def answered(act) -> None:
    """Fail unless this ends by itself, or in an error of one line."""
    reason = ""
    try:
        act()
    except PeelwiseError as error:
        reason = str(error)
    assert "\n" not in reason


@MANY
@hypothesis.given(data=st.data())
def test_records(certificate, data):
    folder, model = certificate
    original = (folder / RECORD_FILE).read_text()
    content = json.loads(original)
    *outer, last = data.draw(st.sampled_from(places(content)))
    where = content
    for key in outer:
        where = where[key]
    where[last] = data.draw(JSON)
    text = json.dumps(content)
    with contextlib.suppress(ValueError):
        text = AuditRecord.model_validate_json(text).sealed().to_json()
    try:
        (folder / RECORD_FILE).write_text(text)
        answered(lambda: peelwise.verify(folder, model, full=True))
    finally:
        (folder / RECORD_FILE).write_text(original)


@pytest.mark.parametrize("file", [WITNESS_FILE, PROBE_FILE])
@MANY
@hypothesis.given(data=st.data())
def test_tensors(certificate, file, data):
    from peelwise.certificate.audit import read_certificate

    folder, _ = certificate
    original = (folder / file).read_bytes()
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    where, key = data.draw(st.sampled_from([(header, name), *((header[name], key) for key in header[name])]))
    where[key] = data.draw(JSON)
    head = json.dumps(header).encode()
    try:
        (folder / file).write_bytes(len(head).to_bytes(8, "little") + head + original[8 + length :])
        answered(lambda: read_certificate(folder))
    finally:
        (folder / file).write_bytes(original)


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
@MANY
@hypothesis.given(data=st.data())
def test_model_files(kind, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / f"fuzz-{kind}"
    source = next(iter((tmp_path_factory.getbasetemp()).glob(f"whole-{kind}")), None)
    if source is None:
        source = tmp_path_factory.getbasetemp() / f"whole-{kind}"
        source.mkdir()
        if kind == "gguf":
            write_llama_gguf(llama_of_whole_blocks(), source / "model.gguf", "Q8_0")
        else:
            ZOO["llama"]().save_pretrained(source)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path = next(folder.glob(f"*.{kind}"))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 4_000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    answered(lambda: open_model(path if kind == "gguf" else folder, with_tokenizer=False))
