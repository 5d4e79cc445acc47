"""Which linear layers are asked about: what training can change, adapters alone, or all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peelwise
from audits import tiny_probe
from peelwise.errors import OptionError
from peelwise.formats import parse_format
from peelwise.model.architectures import find_blocks
from peelwise.model.layers import Block
from peelwise.model.refined import chosen, frozen_note, stepped_by
from peelwise.records.audit import AuditRecord
from peelwise.records.base import Note
from peelwise.show.audit.terminal import render
from peelwise.show.views import render_html
from zoo import BLOCKS, LORA, ZOO, with_lora

pytestmark = pytest.mark.slow


def asked(blocks: tuple[Block, ...]) -> list[list[str]]:
    return [[m.name.removeprefix(f"{block.name}.") for m in block.linears] for block in blocks]


def every(blocks: tuple[Block, ...]) -> set[str]:
    return {m.name for block in blocks for m in (*block.linears, *block.frozen)}


ADAPTER = ["self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B"]


@pytest.mark.parametrize("refine", ["trainable", "adapters"])
def test_of_a_model_with_adapters_they_are_asked_about(refine: str) -> None:
    found = find_blocks(LORA())
    blocks = chosen(found, refine)
    assert asked(blocks) == [ADAPTER, [], ADAPTER]
    assert every(blocks) == every(found)
    assert chosen(found, "all") == found


def test_of_a_model_that_trains_whole_everything_is_asked_about() -> None:
    found = find_blocks(ZOO["llama"]())
    assert asked(chosen(found, "trainable")) == asked(found)
    assert list(frozen_note(chosen(found, "trainable"))) == []


def test_a_model_that_is_merely_open_is_asked_about_whole() -> None:
    found = find_blocks(ZOO["llama"]().requires_grad_(False))
    assert asked(chosen(found, "trainable")) == asked(found)


def test_what_the_optimiser_does_not_have_is_not_in_training() -> None:
    """Adapters written by hand: the base asks for gradients, and nobody steps it."""
    model = LORA().requires_grad_(True)
    found = find_blocks(model)
    adapters = [p for name, p in model.named_parameters() if "lora" in name]
    assert asked(chosen(found, "trainable", stepped_by(torch.optim.SGD(adapters, lr=0.1)))) == [ADAPTER, [], ADAPTER]
    everything = stepped_by(torch.optim.SGD(model.parameters(), lr=0.1))
    assert asked(chosen(found, "trainable", everything)) == asked(found)
    copies = stepped_by(torch.optim.SGD([p.detach().clone() for p in model.parameters()], lr=0.1))
    assert asked(chosen(found, "trainable", copies)) == asked(found)  # of another precision: it does not tell
    forgotten = [p for name, p in model.named_parameters() if "layers.1." not in name]
    most = stepped_by(torch.optim.SGD(forgotten, lr=0.1))
    assert asked(chosen(found, "trainable", most)) == asked(found)  # a mistake, which is worth seeing
    assert stepped_by(None) is None


def test_only_weights_count_and_not_biases() -> None:
    model = ZOO["gpt2"]().requires_grad_(False)
    model.transformer.h[1].mlp.c_fc.weight.requires_grad_(True)
    model.transformer.h[0].mlp.c_fc.bias.requires_grad_(True)
    assert asked(chosen(find_blocks(model), "trainable")) == [[], ["mlp.c_fc"], []]


class Codes(nn.Module):
    """A linear layer that holds codes and nothing else, as packed checkpoints do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.format = parse_format("ternary")
        self.register_buffer("effective", self.format.decode(self.format.encode(linear.weight.detach())))
        self.bias = None
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def effective_weight(self) -> Tensor:
        return self.effective

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective)


def test_codes_are_a_frozen_base_only_beside_adapters() -> None:
    """Codes have no gradient; that is by design only where something else trains."""
    model = ZOO["llama"]()
    for layer in model.model.layers:
        layer.mlp.up_proj = Codes(layer.mlp.up_proj)
    found = find_blocks(model)
    assert asked(chosen(found, "trainable")) == asked(found)
    assert asked(chosen(find_blocks(with_lora(model, "q_proj")), "trainable")) == [ADAPTER] * BLOCKS


def test_adapters_that_are_not_there_are_refused() -> None:
    with pytest.raises(OptionError, match="got none"):
        chosen(find_blocks(ZOO["llama"]()), "adapters")


def test_the_note_counts_layers_and_their_share() -> None:
    model = LORA()
    (said,) = frozen_note(chosen(find_blocks(model), "trainable"))
    layers = [m for block in model.model.layers for m in block.modules() if isinstance(m, nn.Linear)]
    frozen = [m for m in layers if not m.weight.requires_grad]
    total = sum(p.numel() for block in model.model.layers for p in block.parameters())
    assert said.values["layers"] == len(frozen) == 7 * BLOCKS
    assert said.values["share"] == pytest.approx(sum(m.weight.numel() for m in frozen) / total)
    assert said.values["blocks"] == 1


# -- audits -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited() -> peelwise.AuditReport:
    return peelwise.audit(LORA(), tiny_probe(in_distribution=True), budget="60s")


def test_an_audit_asks_about_adapters_and_gives_frozen_blocks_a_letter(audited: peelwise.AuditReport) -> None:
    record = audited.record
    assert record.complete
    assert audited.witness
    assert all(".lora_" in name for name in audited.witness)
    middle = record.blocks[1]
    assert (middle.verdict, middle.reason_code, middle.frozen) == ("frozen", "frozen", True)
    assert middle.recoverable_nats is middle.unique_nats is None
    assert middle.removal_nats is not None
    assert all(block.verdict != "frozen" and block.recoverable_nats for block in record.blocks[::2])
    assert [n.code for n in record.notes if isinstance(n, Note)].count("frozen-layers") == 1


def test_the_control_asks_about_all(audited: peelwise.AuditReport) -> None:
    report = peelwise.audit(
        LORA(), tiny_probe(in_distribution=True), peelwise.AuditSettings("60s", refine="all", controls=False)
    )
    assert not any(block.frozen or block.verdict == "frozen" for block in report.record.blocks)
    assert any("base_layer" in name for name in report.witness)
    assert "frozen-layers" not in [n.code for n in report.record.notes if isinstance(n, Note)]
    # Random text: whatever may change adapts to its frequencies, and more of it adapts better.
    assert report.record.loss.composed < audited.record.loss.composed


def test_the_letter_is_shown_without_a_colour(audited: peelwise.AuditReport) -> None:
    from rich.console import Console

    console = Console(width=120, force_terminal=True, color_system="truecolor")
    with console.capture() as captured:
        console.print(render(audited.record))
    line = next(row for row in captured.get().splitlines() if "F frozen, not asked about" in row)
    assert not any(code in line for code in ("\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[1;31m"))
    assert "Block 1 is frozen and was not asked about." in " ".join(captured.get().split())
    page = render_html(audited.record)
    assert '<b class="tile frozen">F</b>' in page
    assert "F" not in [
        row.split()[1] for row in captured.get().splitlines() if row.lstrip()[:1] in "02" and row.strip()
    ]


def test_verify_finds_frozen_blocks_again(audited: peelwise.AuditReport, tmp_path) -> None:
    audited.save(tmp_path / "c")
    found = peelwise.verify(tmp_path / "c", LORA(), full=True)
    assert found.status == "holds", found.reason


def forged(record: AuditRecord, index: int, **changes: object) -> AuditRecord:
    blocks = tuple(b.model_copy(update=changes) if b.index == index else b for b in record.blocks)
    return record.model_copy(update={"blocks": blocks})


def test_a_block_cannot_be_called_frozen_to_hide_what_was_found(audited: peelwise.AuditReport) -> None:
    from peelwise.evidence.audit import contradictions

    record = audited.record
    assert not list(contradictions(record, 1e-3))
    hidden = forged(record, 0, frozen=True, verdict="frozen", reason_code="frozen")
    assert any("it is said to be frozen" in said for said in contradictions(hidden, 1e-3))
    awake = forged(record, 1, frozen=False)
    assert list(contradictions(awake, 1e-3))
    for value, words in (("all", "settings.refine says that all"), ("some", "no value of it"), (3, "no value of it")):
        settings = record.model_copy(update={"settings": record.settings | {"refine": value}})
        assert any(words in said for said in contradictions(settings, 1e-3))


def test_gradients_that_are_zero_at_the_start_are_no_obstacle() -> None:
    """At step 0 of a LoRA run B is zero, so that nothing reaches A."""
    model = LORA()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    record = peelwise.audit(model, tiny_probe(in_distribution=True), budget="60s").record
    assert record.complete
    assert record.loss.composed is None or record.loss.composed < record.loss.current
