import json
import math
import time

import pytest
from pydantic import ValidationError

from peelwise.errors import CertificateError
from peelwise.records.audit import AuditRecord, BlockRecord
from peelwise.records.base import SCHEMA_VERSION, Interval
from peelwise.records.files import RECORD_FILE, read_record
from show.sample import hostile, partial, unmeasured, whole

RECORDS = {"whole": whole(3, low_bit=True), "partial": partial(), "unmeasured": unmeasured(), "hostile": hostile()}
EACH_RECORD = pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)

# METHOD.md, section 8: what others rely on.
PROMISED = {
    "": ("schema", "settings", "seed", "versions"),
    "model": ("name", "fingerprint", "parameters"),
    "probe": ("fingerprint", "fit_tokens", "select_tokens", "report_tokens"),
    "loss": ("current", "composed", "head_control", "shuffled", "untrained"),
    "blocks.0": ("index", "name", "verdict", "rounds"),
    "blocks.0.recoverable_nats": ("mean", "low", "high"),
    "blocks.0.unique_nats": ("mean", "low", "high"),
    "blocks.0.matrices.0": ("name", "share"),
    "blocks.0.split": ("irreducible", "price_of_precision", "left_on_the_table"),
    "cost": ("forward_equivalents", "wall_seconds", "peak_bytes"),
}


def plain(record):
    return json.loads(record.to_json())


def leaves(tree, path=()):
    """Every value of nested JSON that is neither a list nor an object, with the path to it."""
    if not isinstance(tree, dict | list):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from leaves(value, (*path, key))


def changed(tree, path, value):
    copy = json.loads(json.dumps(tree))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


@pytest.fixture
def folder(tmp_path):
    """A certificate folder; calling it writes the text."""

    def write(text):
        (tmp_path / RECORD_FILE).write_text(text, encoding="utf-8")
        return tmp_path

    return write


@EACH_RECORD
def test_what_is_written_is_read_again(record, folder):
    sealed = record.sealed()
    again = read_record(folder(sealed.to_json()))

    assert again == sealed
    assert again.to_json() == sealed.to_json()
    assert again.computed_digest() == again.digest == sealed.digest


def test_settings_keep_their_types(folder):
    settings = {"flag": True, "count": 1, "ratio": 1.0, "word": "1", "none": None, "small": 1e-300}
    again = read_record(folder(whole(2).model_copy(update={"settings": settings}).to_json())).settings

    assert again == settings
    assert {key: type(value) for key, value in again.items()} == {key: type(v) for key, v in settings.items()}


@pytest.mark.parametrize(("place", "keys"), PROMISED.items())
def test_the_promised_keys_are_there(place, keys):
    tree = plain(RECORDS["whole"])
    for part in filter(None, place.split(".")):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]

    assert [key for key in keys if tree.get(key) is None] == []


def test_the_schema_stands_under_its_key():
    assert plain(RECORDS["whole"])["schema"] == SCHEMA_VERSION == RECORDS["whole"].schema_version
    assert "schema_version" not in plain(RECORDS["whole"])


@pytest.mark.parametrize("colour", ["red", "yellow", "green", "grey"])
def test_the_four_colours_are_verdicts(colour):
    assert BlockRecord(index=0, name="a", verdict=colour).verdict == colour


@pytest.mark.parametrize("colour", ["blue", "Red", "optimal", ""])
def test_nothing_else_is(colour):
    with pytest.raises(ValidationError):
        BlockRecord(index=0, name="a", verdict=colour)


@pytest.mark.parametrize(("owner", "field"), [("", "seed"), ("loss", "current"), ("model", "name")])
def test_records_are_frozen(owner, field):
    record = RECORDS["whole"]
    with pytest.raises(ValidationError, match="frozen"):
        setattr(getattr(record, owner) if owner else record, field, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value):
    with pytest.raises(ValidationError, match="finite"):
        Interval(mean=value, low=0, high=0, standard_error=0, sequences=2, method="student-t")


def test_keys_of_a_newer_writer_are_kept_and_sealed(folder):
    tree = plain(RECORDS["whole"])
    for place in (tree, tree["loss"], tree["blocks"][1], tree["blocks"][1]["matrices"][0]):
        place["new_in_the_future"] = {"value": 1.5}
    again = read_record(folder(json.dumps(tree)))

    assert plain(again) == tree
    other = json.dumps(tree).replace('"value": 1.5', '"value": 2.5', 1)
    assert read_record(folder(other)).computed_digest() != again.computed_digest()


def least_change(value):
    """Another value of the same type; of numbers, the next one that can be told apart."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return math.nextafter(value, math.inf)
    return value + (" " if isinstance(value, str) else 1)


def test_the_digest_changes_with_every_single_value():
    sealed = RECORDS["whole"].sealed()
    tree = plain(sealed)
    free = [
        (path, value)
        for path, value in leaves(tree)
        if value is not None and path[-1] not in ("digest", "kind", "verdict", "reason_code", "method")
    ]
    same = [
        path
        for path, value in free
        if AuditRecord.model_validate(changed(tree, path, least_change(value))).computed_digest() == sealed.digest
    ]

    assert same == []
    assert sum(isinstance(value, int | float) for _, value in free) > 100
    assert AuditRecord.model_validate(tree).computed_digest() == sealed.digest  # the control: nothing changed


def test_the_digest_does_not_depend_on_the_order_of_keys_or_on_itself():
    sealed = RECORDS["whole"].sealed()
    tree = plain(sealed)
    tree["settings"] = dict(reversed(tree["settings"].items()))

    assert AuditRecord.model_validate(dict(reversed(tree.items()))).computed_digest() == sealed.digest
    assert sealed.sealed() == sealed


def without(key):
    return {name: value for name, value in plain(RECORDS["whole"]).items() if name != key}


def with_schema(schema, **changes):
    return {**plain(RECORDS["whole"]), "schema": schema, **changes}


BROKEN = {
    "empty": ("", "not a valid certificate: the whole file"),
    "not JSON": ("no certificate", "not a valid certificate: the whole file"),
    "cut short": (RECORDS["whole"].to_json()[:-200], "not a valid certificate: the whole file"),
    "another kind of JSON": ("[1, 2]", "not a valid certificate: the whole file"),
    "another kind of record": (json.dumps({**plain(RECORDS["whole"]), "kind": "history"}), "kind"),
    "no blocks": (json.dumps(without("blocks")), "blocks: Field required"),
    "no loss": (json.dumps(without("loss")), "loss: Field required"),
    "a word for a number": (RECORDS["whole"].to_json().replace("2.8741", '"low"'), r"loss\.current"),
    "not a number": (RECORDS["whole"].to_json().replace("2.8741", "NaN"), r"loss\.current"),
    "no schema": (json.dumps(without("schema")), "does not say which schema"),
    "schema zero": (json.dumps(with_schema(0)), "has schema 0; this version reads up to 1"),
    "schema in words": (json.dumps(with_schema("one")), "schema"),
    "newer": (json.dumps(with_schema(SCHEMA_VERSION + 1)), "reads up to 1. Update peelwise"),
    "newer and different": (
        json.dumps(with_schema(SCHEMA_VERSION + 1, blocks="elsewhere")),
        f"schema {SCHEMA_VERSION + 1}; this version reads up to {SCHEMA_VERSION}",
    ),
}


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_certificate_is_refused_with_the_place(text, words, folder):
    with pytest.raises(CertificateError, match=words) as caught:
        read_record(folder(text))

    assert RECORD_FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_certificate_is_told(tmp_path):
    with pytest.raises(CertificateError, match=r"No certificate at .*: No such file"):
        read_record(tmp_path)
    with pytest.raises(CertificateError, match="No certificate"):
        read_record(tmp_path / "nowhere")


def test_bytes_that_are_no_text_are_told(tmp_path):
    (tmp_path / RECORD_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CertificateError, match="No certificate at"):
        read_record(tmp_path)


def test_seals_survive_fields_that_a_later_version_adds():
    class Later(AuditRecord):
        measured_later: float | None = None

    sealed = RECORDS["whole"].sealed()
    again = Later.model_validate(plain(sealed))
    assert again.computed_digest() == sealed.digest
    assert again.model_copy(update={"measured_later": 1.0}).computed_digest() != sealed.digest


@pytest.mark.parametrize(
    ("key", "value"), [("notes", [{"code": "x"}] * 150_000), ("further", {str(i): [[1]] for i in range(400_000)})]
)
def test_more_than_any_model_has_is_refused_soon(key, value, tmp_path):
    """Checking three million remarks took a minute and three gigabytes."""
    content = plain(whole(3)) | {key: value}
    (tmp_path / RECORD_FILE).write_text(json.dumps(content))
    began = time.monotonic()
    with pytest.raises(CertificateError, match=r"a list of 150000|more than 1000000 values"):
        read_record(tmp_path)
    assert time.monotonic() - began < 5
