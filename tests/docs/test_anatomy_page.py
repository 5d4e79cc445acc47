"""The tables of docs/anatomy.md are those that benchmarks/anatomy_claims.py makes from its result files."""

import importlib.util
import sys
from pathlib import Path

import pytest

from peelwise.records.anatomy import AnatomyRecord

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("anatomy_claims", ROOT / "benchmarks" / "anatomy_claims.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


@pytest.fixture(scope="module")
def records(script):
    return [AnatomyRecord.model_validate(script.recorded(name)) for name in ("smollm2", "small_gpt")]


def test_the_page_is_made_from_the_result_files(script, records):
    page = script.PAGE.read_text()
    assert script.filled(page, *records) == page
    smollm2, small = records
    first = smollm2.blocks[0].model_copy(update={"predicted": smollm2.blocks[1].predicted})
    changed = smollm2.model_copy(update={"blocks": (first, *smollm2.blocks[1:])})
    assert script.filled(page, changed, small) != page


def test_a_record_is_gone_on_from_as_it_stands(script, records, tmp_path):
    smollm2, small = records
    for record in records:
        pieces = [script._fields(block) for block in record.blocks]
        assert all(set(each) <= {"ablation", "predicted", "bent", "best_scale", "recovery"} for each in pieces)
        begun = script.Unfinished(tmp_path / record.model.name, script.about(record), pieces, [*record.predictability])
        begun.write()
        again = script.Unfinished.opened(begun.folder, script.about(record), len(record.blocks))
        assert again.blocks == pieces
        assert again.predictability == list(record.predictability)
    assert script._has_all(small, ("ablation", "bending", "recovery"))
    assert not script._has_all(smollm2, ("recovery",))


def test_what_ten_sentences_say_is_in_words(script):
    blocks = [{"block": i, "mean": mean, "low": mean - 0.01, "high": mean + 0.01, "ten_low": mean - 0.2,
               "ten_high": mean + 0.2, "ten_better_without": 0.25, "ten_most_important": 0.0}
              for i, mean in enumerate([6.0, 3.0, *[0.1] * 6, 1.0, 0.9, 0.8, 2.0, *[0.2] * 16, 1.5, 2.5])]  # fmt: skip
    blocks[14]["mean"], blocks[14]["low"], blocks[14]["high"] = -0.02, -0.03, -0.01
    found = {"blocks": blocks, "tokens_in_all": 2_000, "core_among_inner_four": 2.5, "any_better_without": 0.4,
             "both_better_without": 0.1}  # fmt: skip
    rows = {row[0]: row for row in script.sentences_rows(found)}
    assert rows["core in blocks 8 to 11 (neighbours, 2,000 tokens)"][2:] == [
        "places 6, 7, 8, 4 of 30",
        "of the four costliest without the two at each end, 4 are of the core; at random 0.6; of ten sentences 2.5",
        "agrees",
    ]
    assert rows["better without block 14 (neighbours, 2,000 tokens)"][-1] == "agrees"
    assert rows["better without block 17 (neighbours, 2,000 tokens)"][-1] == "does not"
    assert rows["range of importance (neighbours, 2,000 tokens)"][-1] == "wide too; the least is below 0"
    assert rows["ten sentences find a block that is better left out"][-1] == "too few to tell"
