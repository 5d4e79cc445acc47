"""Fragments for notebooks: escaped, self-contained, complete, and readable in light and dark."""

from html.parser import HTMLParser

import pytest

from peelwise.api.yes import YesBounds
from peelwise.records.base import CostRecord, Note, SplitRecord
from peelwise.records.quantcheck import LayerCheck, QuantcheckConclusion, QuantcheckRecord, QuantLosses
from peelwise.records.run import WHOLE_MODEL, Event, Measurement, Statistic
from peelwise.records.yes import YesPart
from peelwise.show.audit.words import conclusion
from peelwise.show.fragments import MOST_ROWS, strip
from peelwise.show.notebook import bounds_html, measurement_html, nothing_html, record_html
from peelwise.show.peel.words import conclusion as peel_conclusion
from peelwise.show.quantcheck.words import NOT_KEPT
from peelwise.show.yes import text
from show.peel_sample import hostile_record, peel_record, unmeasured_record
from show.sample import HOSTILE, hostile, interval, partial, unmeasured, whole

VOID = {"meta", "br"}


class Tree(HTMLParser):
    """Checks that elements are closed in order, and keeps what a browser would run, load or show."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def tree(fragment):
    found = Tree()
    found.feed(fragment)
    found.close()
    assert found.open == []
    assert not set(found.tags) & {"script", "style", "link", "img", "iframe", "object"}
    for name, value in found.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href")
        assert "url(" not in (value or "")
    assert found.tags[0] == "div"
    assert dict(found.attributes)["class"] == "peelwise"
    return found


def quantcheck_record(layers=3, name="int3", **changes):
    base = whole(3)
    split = SplitRecord(irreducible=0.0, price_of_precision=0.01, left_on_the_table=0.004)
    return QuantcheckRecord(
        created=base.created,
        conclusion=QuantcheckConclusion(case="recoverable"),
        complete=True,
        quantised=base.model.model_copy(update={"name": name}),
        parent=base.model.model_copy(update={"name": "full"}),
        probe=base.probe,
        loss=QuantLosses(
            parent=2.8,
            quantised=2.85,
            best=2.83,
            damage=interval(0.05, 0.01),
            left=interval(0.02, 0.01),
            price=interval(0.03, 0.01),
            split=SplitRecord(irreducible=2.8, price_of_precision=0.03, left_on_the_table=0.02),
            kept=True,
        ),
        layers=tuple(
            LayerCheck(
                name=f"{name}.{index}.up",
                block=index,
                format="int3:group=32",
                bits_per_weight=3.5,
                error=0.014,
                split=split if index else None,
            )
            for index in range(layers)
        ),
        cost=CostRecord(forward_equivalents=3.0, wall_seconds=4.0, peak_bytes=10),
        settings={},
        seed=0,
        versions={},
        **changes,
    )


def measurement(text="something happened", **changes):
    values = {
        "step": 1_200,
        "kind": "joint",
        "probe_loss": 2.5,
        "seconds": 3.0,
        "share": 0.021,
        "letters": "RYG?",
        "slope": -1e-4,
        "statistics": (
            Statistic("recoverable", 0, 0.06, 0.05, 0.07),
            Statistic("natural_energy", 1, 0.0123),
            Statistic("composed", WHOLE_MODEL, 0.1, 0.09, 0.11),
        ),
        "events": (Event(1_200, "alert", "red", text, 0),),
    }
    return Measurement(**(values | changes))


@pytest.mark.parametrize("record", [whole(), whole(6, low_bit=True), partial(), unmeasured()])
def test_an_audit_tells_verdicts_losses_and_proof(record):
    found = tree(record_html(record))
    assert conclusion(record) in found.text
    assert "Loss on report" in found.text
    assert "A witness proves; none found proves nothing." in found.text
    assert found.text.count("not measured") >= sum(block.removal_nats is None for block in record.blocks)
    assert found.tags.count("rect") == len(record.blocks)
    assert all(header in found.text for header in ("solo gain", "marginal gain", "ablation"))
    assert ("open", None) in found.attributes or len(record.blocks) > MOST_ROWS


@pytest.mark.parametrize("record", [peel_record(), peel_record(30), unmeasured_record()])
def test_a_peel_tells_maps_and_controls(record):
    found = tree(record_html(record))
    assert peel_conclusion(record) in found.text
    assert "head control: what a map has to beat" in found.text
    assert ("* with the model's own head" in found.text) == any(one.loss is None for one in record.maps)


def test_a_comparison_tells_the_three_parts_and_what_was_not_reached():
    found = tree(record_html(quantcheck_record()))
    assert "int3 against full" in found.text
    assert "Quantising costs 0.0500 nats per token. Of these, 0.0200 (40 % of the damage) are recoverable" in found.text
    assert NOT_KEPT not in found.text
    assert "+0.0200 [0.0100, 0.0300]" in found.text
    assert "1 more layers: not measured within the budget." in found.text
    record = quantcheck_record()
    assert (
        NOT_KEPT
        in tree(record_html(record.model_copy(update={"loss": record.loss.model_copy(update={"kept": False})}))).text
    )
    many = tree(record_html(quantcheck_record(MOST_ROWS + 5)))
    assert f"({MOST_ROWS} of {MOST_ROWS + 4})" in many.text


def test_a_measurement_tells_what_it_measured_and_no_more():
    found = tree(measurement_html(measurement(), ["first"]))
    assert "Step 1,200" in found.text
    assert "+0.0600 [0.0500, 0.0700]" in found.text
    assert "natural-gradient score" in found.text
    assert "marginal gain" not in found.text  # none was measured
    assert "something happened" in found.text
    assert "first" in found.text
    assert "No measurement yet" in tree(nothing_html()).text


def test_bounds_are_shown_with_their_cloud():
    found = tree(bounds_html(bounds()))
    assert "YES bounds (default), squared error per sample, 40 samples of report" in found.text
    assert "network 0.5: yellow; 2 of 2 maps" in found.text
    assert "cloud: yellow" in found.text
    assert "+0.2 [+0.1, +0.3]" in found.text
    assert "controls: not run" in found.text
    assert str(bounds()) == text(bounds())
    assert text(bounds()).splitlines() == [
        "YES bounds (default), squared error per sample, 40 samples of report",
        "network 0.5: yellow; 2 of 2 maps",
        "       bound  on fit  bound - network (95 %)  map",
        "YES-0  0.7    0.6     +0.2 [+0.1, +0.3]       [2, 2]  uninformative",
        "YES-1  0.4    0.3                             [1, 2]",
        "controls: not run, so nothing is known about what these bounds are worth",
    ]


def bounds(**changes):
    """Made-up bounds of two layers."""
    fit, report = YesPart(100, 0.45, (0.6, 0.3)), YesPart(40, 0.5, (0.7, 0.4))
    measured = {"mode": "default", "objective": "squared", "loss": 0.5, "yes_0": 0.7, "yes_k": {1: 0.4}} | changes
    return YesBounds(
        **measured, cloud="yellow", best_map={0: (2, 2), 1: (1, 2)}, maps_visited=2, maps_total=2, beam_width=None,
        fit=fit, report=report, gap={0: interval(0.2, 0.1)}, controls=None, informative={0: False},
    )  # fmt: skip


@pytest.mark.parametrize(
    "fragment",
    [
        lambda: record_html(hostile()),
        lambda: record_html(hostile_record()),
        lambda: record_html(quantcheck_record(name=HOSTILE, notes=(Note(code=HOSTILE),))),
        lambda: measurement_html(measurement(HOSTILE), [HOSTILE]),
        lambda: bounds_html(bounds(mode=HOSTILE)),
    ],
)
def test_hostile_names_stay_text(fragment):
    found = tree(fragment())
    assert "<script>alert('x')</script>" in found.text
    assert "\x1b" not in found.text
    assert "\u202e" not in found.text


def test_nothing_has_a_colour_that_only_one_background_can_bear():
    """Text is the notebook's own, or white on a tile; what is drawn is a verdict's colour or grey."""
    fragment = record_html(whole())
    for colour in ("#000", "#171a21", "black", "background:#fff", "background:white"):
        assert colour not in fragment


def test_a_long_audit_folds_its_table_and_shows_the_blocks_to_look_at():
    found = tree(record_html(whole()))
    assert "Recoverable blocks (3)" in found.text
    assert "All blocks (30)" in found.text
    assert found.attributes.count(("open", None)) == 1


def test_a_strip_has_a_tile_for_every_block_in_lines():
    assert strip([]) == ""
    drawn = strip(["green"] * 30)
    assert drawn.count("<rect") == 30
    assert 'aria-label="Verdicts of 30 blocks: ' in drawn
