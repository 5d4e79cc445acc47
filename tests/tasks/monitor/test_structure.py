"""A model whose layers change while it trains: what is asked about, and that measurements go on."""

import copy

import pytest
import torch
from torch import nn

import peelwise
from audits import tiny_probe
from peelwise.distributed.processes import Processes
from peelwise.model.architectures import find_blocks
from peelwise.model.refined import chosen, names_of
from peelwise.tasks.monitor.follower import Follower, MonitorSettings
from peelwise.tasks.monitor.structure import changed_layers, looked_at_again, other_blocks
from zoo import BLOCKS, LORA, ZOO, Lora, with_lora

ADAPTERS = 2 * 2  # A and B, in two of three blocks


def monitor_of(model, **options):
    return peelwise.Monitor(
        model, tiny_probe(in_distribution=True), budget=None, schedule=peelwise.every(1), store=None, **options
    )


def kinds(monitor):
    return [event.kind for event in monitor.events]


def merged(model):
    """Write adapters into the layers that they stand beside, as PEFT's merge_and_unload does."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Lora):
            with torch.no_grad():
                module.base_layer.weight += module.lora_B.weight @ module.lora_A.weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)


def test_the_same_blocks_are_the_same_objects():
    model = LORA()
    before = chosen(find_blocks(model), "trainable")
    assert looked_at_again(model, before, "trainable") is before
    assert other_blocks(model, before) == ()


def test_what_was_asked_about_stays_so_when_it_is_frozen_and_what_thaws_is_asked_about():
    model = LORA()
    before = chosen(find_blocks(model), "trainable")
    assert len(names_of(before)) == ADAPTERS
    model.model.layers[0].requires_grad_(False)
    assert looked_at_again(model, before, "trainable") is before  # it may be a mistake
    thawed = model.model.layers[1].mlp.up_proj.requires_grad_(True)
    now = looked_at_again(model, before, "trainable")
    assert names_of(now) - names_of(before) == {"model.layers.1.mlp.up_proj"}
    assert changed_layers(before, now) == (0, ADAPTERS + 1, 7 * BLOCKS + ADAPTERS)
    assert looked_at_again(model, before, "adapters") is before
    thawed.requires_grad_(False)
    assert looked_at_again(model, now, "trainable") is now


def test_a_frozen_block_has_a_letter_and_no_colour_until_it_thaws():
    model = LORA().train()
    with monitor_of(model) as monitor:
        row = monitor.step(0, loss=4.6)
        assert [letter == "F" for letter in row.letters] == [False, True, False]
        assert {s.block for s in row.statistics if s.name == "natural_energy"} == {0, 2}
        assert kinds(monitor).count("frozen-layers") == 1
        model.model.layers[1].requires_grad_(True)
        row = monitor.step(1, loss=4.6)
        assert "F" not in row.letters
    assert kinds(monitor).count("layers-changed") == 1
    assert "not-measured" not in kinds(monitor)


def test_blocks_that_the_optimiser_does_not_have_have_a_letter_until_they_are_added():
    model = ZOO["llama"]().train()
    lower = [*model.model.layers[0].parameters(), *model.model.layers[1].parameters()]
    upper = [p for p in model.parameters() if not any(p is one for one in lower)]
    optimizer = torch.optim.SGD(upper, lr=1e-6)
    with monitor_of(model, optimizer=optimizer) as monitor:
        assert [letter == "F" for letter in monitor.step(0, loss=4.6).letters] == [True, True, False]
        assert [letter == "F" for letter in monitor.step(1, loss=4.6).letters] == [True, True, False]
        optimizer.add_param_group({"params": lower})
        assert "F" not in monitor.step(2, loss=4.6).letters


def test_a_block_that_was_forgotten_is_asked_about():
    model = ZOO["llama"]().train()
    others = [p for name, p in model.named_parameters() if "layers.1." not in name]
    with monitor_of(model, optimizer=torch.optim.SGD(others, lr=1e-6)) as monitor:
        assert "F" not in monitor.step(0, loss=4.6).letters
        assert "not-optimised" in kinds(monitor)


def test_without_frozen_layers_nothing_is_said():
    with monitor_of(ZOO["llama"]().train()) as monitor:
        row = monitor.step(0, loss=4.6)
        monitor.step(1, loss=4.6)
    assert "F" not in row.letters
    assert not {"frozen-layers", "layers-changed", "blocks-changed"} & set(kinds(monitor))


def test_a_history_with_frozen_blocks_is_written_and_read(tmp_path):
    from peelwise.store.reader import RunReader

    monitor = peelwise.Monitor(LORA(), tiny_probe(), budget=None, schedule=peelwise.every(1), store=tmp_path / "run.db")
    with monitor:
        monitor.step(0, loss=4.6)
        assert monitor.recorded
    with RunReader(tmp_path / "run.db") as reader:
        (row,) = reader.probes(1)
        assert row["letters"][1] == "F"
        assert reader.latest().info.settings["refine"] == "trainable"


def test_merged_adapters_are_no_end_of_measuring():
    model = LORA().train()
    with monitor_of(model) as monitor:
        monitor.step(0, loss=4.6)
        merged(model)
        row = monitor.step(1, loss=4.6)
        assert row is not None
        assert "F" not in row.letters  # nothing trains, so that all is asked about
        expected = peelwise.Monitor(copy.deepcopy(model), tiny_probe(in_distribution=True), store=None)
        assert names_of(monitor._follower.blocks) == names_of(expected._follower.blocks)
    assert kinds(monitor).count("layers-changed") == 1
    assert "not-measured" not in kinds(monitor)


def test_layers_that_fail_their_self_checks_are_never_measured():
    """New layers are checked at every measurement until they pass, not only at the first."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) + nn.functional.linear(x, self.weight)

    model = ZOO["plain"]().train()
    with monitor_of(model) as monitor:
        assert monitor.step(0, loss=4.6) is not None
        own, doubled = model.blocks[1].attention.out, Doubled(48, 48)
        model.blocks[1].attention.out = doubled
        assert monitor.step(1, loss=4.6) is None
        assert monitor.step(2, loss=4.6) is None
        model.blocks[1].attention.out = own
        assert monitor.step(3, loss=4.6) is not None
    (event,) = [event for event in monitor.events if event.kind == "not-measured"]
    assert "hooked into blocks.1.attention.out does not" in event.text


@pytest.mark.parametrize("how", ["dtype", "parameters"])
def test_parameters_replaced_in_the_middle(how):
    model = ZOO["plain"]().train()
    optimizer = torch.optim.AdamW(model.parameters())
    with monitor_of(model, optimizer=optimizer) as monitor:
        monitor.step(0, loss=4.6)
        if how == "dtype":
            model.to(torch.bfloat16)
        else:
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.detach().clone()))
        assert monitor.step(1, loss=4.6) is not None
    assert "not-measured" not in kinds(monitor)
    # New parameters are none of the optimiser's: that is seen, and only there.
    assert ("not-optimised" in kinds(monitor)) == (how == "parameters")


def test_a_block_that_is_added_later_is_told_and_ends_no_training():
    model = ZOO["plain"]().train()
    with monitor_of(model) as monitor:
        assert monitor.step(0, loss=4.6) is not None
        model.blocks.append(copy.deepcopy(model.blocks[0]))
        assert monitor.step(1, loss=4.6) is None
        assert monitor.step(2, loss=4.6) is None
        del model.blocks[-1]
        assert monitor.step(3, loss=4.6) is not None
    (event,) = [event for event in monitor.events if event.kind == "blocks-changed"]
    assert "(blocks.3 came or went)" in event.text


def test_steps_that_jump_back_are_told_and_what_was_behind_them_is_forgotten():
    with monitor_of(ZOO["plain"]().train()) as monitor:
        for step in (100, 101, 102, 50, 51, 50):
            assert monitor.step(step, loss=4.6) is not None
        assert monitor._follower._chronicle._probe_losses.steps == [50]
    told = [event.text for event in monitor.events if event.kind == "stepped-back"]
    assert [text.split(";")[0] for text in told] == ["steps went back from 102 to 50", "steps went back from 51 to 50"]


def test_adapters_that_are_asked_for_and_not_there_are_refused():
    with pytest.raises(peelwise.errors.OptionError, match="expected LoRA"):
        monitor_of(ZOO["plain"](), refine="adapters")
    with pytest.raises(peelwise.errors.OptionError, match="expected one of trainable, all, adapters"):
        monitor_of(ZOO["plain"](), refine="most")
    with monitor_of(with_lora(ZOO["llama"](), "v_proj"), refine="adapters") as monitor:
        assert all(".lora_" in name for name in names_of(monitor._follower.blocks))


class Watched(Processes):
    """One process that knows whether it has agreed with the others on what happens if one fails."""

    inside = False
    lonely = ()

    def agreeing(self):
        return self

    def __enter__(self):
        self.inside = True

    def __exit__(self, *_):
        self.inside = False

    def all_sum(self, numbers):
        self.lonely = (*self.lonely, not self.inside)
        return list(numbers)


class Rows:
    step = measurement = event = lambda self, row: None


def test_checks_without_a_probe_add_up_only_where_a_failure_reaches_all():
    """A process that fails outside of it would leave the others waiting for it."""
    model, processes = ZOO["plain"](), Watched()
    follower = Follower(model, tiny_probe(), MonitorSettings(), Rows(), processes=processes)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    follower.step(1, loss=4.6)
    assert processes.lonely
    assert not any(processes.lonely)
