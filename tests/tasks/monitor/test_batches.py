"""What a training's own batch would cost under other labels, against the same losses computed one by one."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from peelwise.probe.texts import reference_prose
from peelwise.tasks.monitor.batches import BatchWatch
from peelwise.tasks.monitor.padding import NONE, PaddingWatch, runs_of
from zoo import ZOO, sample_ids


def looked_at(model, *calls):
    watch = BatchWatch(model)
    watch.before()
    for args, kwargs in calls:
        model(*args, **kwargs)
    return watch.after()


@pytest.mark.parametrize("name", ["plain", "llama"])
def test_each_loss_is_the_mean_over_its_own_targets(name):
    model, ids = ZOO[name]().train(), sample_ids(seed=3)
    facts = looked_at(model, ((ids[:2],), {}), ((ids[2:],), {}))
    out = model(ids)
    logits = getattr(out, "logits", out).detach()
    for found, ahead in ((facts.next, 1), (facts.twice, 2), (facts.same, 0)):
        pairs = [(logits[b, t], ids[b, t + ahead]) for b in range(len(ids)) for t in range(ids.shape[1] - ahead)]
        assert found == pytest.approx(sum(float(cross_entropy(x, y)) for x, y in pairs) / len(pairs), rel=1e-4)
    assert facts.unpadded == facts.next


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_found_at_either_end_and_left_out(side):
    model, ids = ZOO["plain"]().train(), sample_ids(batch=12, seed=3).clone()
    where = slice(-9, None) if side == "right" else slice(None, 9)
    ids[1:, where] = 7
    facts = looked_at(model, ((ids[:5],), {}), ((ids[5:],), {}))
    logits = model(ids).detach()
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1:, where] = False
    assert facts.padding == pytest.approx(1 - float(real[:, 1:].float().mean()), abs=0.02)
    assert facts.unpadded == pytest.approx(float(losses[real[:, 1:]].mean()), rel=2e-2)
    others = torch.ones_like(losses, dtype=torch.bool)
    others[:, -9] = side == "left"  # the first padded target of a row, where it is at the end
    others[0] = True
    assert facts.labelled_first == pytest.approx(float(losses[others].mean()), rel=1e-4)


def test_rows_cut_from_a_text_with_rules_and_indentation_are_not_padded():
    stream = torch.tensor(list("\n\n".join(reference_prose()).encode()))
    watch, generator = BatchWatch(nn.Embedding(256, 256).train()), torch.Generator().manual_seed(0)
    shares, edges = [], []
    for _ in range(100):
        ids = stream[torch.randint(len(stream) - 65, (16, 1), generator=generator) + torch.arange(64)]
        runs = runs_of(ids)
        edges.append(float((runs.last | runs.first).float().mean()))
        watch.before()
        watch._model(ids)
        shares.append(watch.after().padding)
    assert sum(edge > 0.05 for edge in edges) > 15  # every fifth batch looks padded by itself
    assert shares == [0.0] * 100


@pytest.mark.parametrize(("rows", "padding"), [(7, False), (8, True)])
def test_a_token_that_fills_up_many_rows_and_is_never_repeated_inside_is_padding(rows, padding):
    ids = torch.arange(32 * 10).view(32, 10)
    ids[:rows, 6:] = 1
    watch = PaddingWatch()
    add(watch, ids)
    assert watch.token == (1 if padding else None)
    ids[:, 3:5] = 1
    add(watch, ids)
    assert watch.token is None


def add(watch, ids):
    runs = runs_of(ids)
    sides = [
        torch.stack([torch.where(run.any(dim=1), ids[:, at], NONE), run.sum(dim=1)], dim=1)
        for run, at in ((runs.last, -1), (runs.first, 0))
    ]
    watch.add(torch.stack(sides, dim=1), ids[runs.inside])


def test_every_token_of_a_run_belongs_to_one_place():
    runs = runs_of(
        torch.tensor([[1, 1, 2, 3, 3, 3, 4, 5, 5], [6, 6, 6, 6, 6, 6, 6, 6, 6], [1, 2, 1, 2, 2, 1, 2, 1, 1]])
    )
    assert runs.first.int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 0], [0] * 9, [0] * 9]
    assert runs.inside.int().tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0], [0] * 9, [0, 0, 0, 1, 1, 0, 0, 0, 0]]
    assert runs.last.int().tolist() == [[0] * 7 + [1, 1], [1] * 9, [0] * 7 + [1, 1]]


def test_labels_that_the_model_is_given_say_what_counts():
    model, ids = ZOO["llama"]().train(), sample_ids(seed=3)
    labels = ids.clone()
    labels[:, :10] = -100
    facts = looked_at(model, ((), {"input_ids": ids, "labels": labels}))
    assert facts.next == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)


def test_sequences_that_were_seen_before_are_counted():
    model = ZOO["plain"]().train()
    watch, repeated = BatchWatch(model), []
    for seed in (1, 2, 1, 1):
        watch.before()
        model(sample_ids(seed=seed))
        facts = watch.after()
        repeated.append((facts.rows, facts.repeated, facts.distinct))
    rows = len(sample_ids())
    assert repeated == [
        (rows, 0, rows),
        (2 * rows, 0, 2 * rows),
        (3 * rows, rows, 2 * rows),
        (4 * rows, 2 * rows, 2 * rows),
    ]


def test_only_training_is_looked_at_and_only_while_it_is_asked_for():
    model = ZOO["plain"]()
    assert looked_at(model.eval(), ((sample_ids(),), {})) is None
    with torch.no_grad():
        assert looked_at(model.train(), ((sample_ids(),), {})) is None
    assert not model._forward_hooks


def test_copies_of_a_model_that_is_looked_at_are_free_of_it():
    model = ZOO["plain"]().train()
    watch = BatchWatch(model)
    watch.before()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(sample_ids())
    assert watch.after() is None


def test_a_model_that_answers_otherwise_is_left_alone():
    model = torch.nn.Linear(4, 4).train()
    assert looked_at(model, ((torch.zeros(2, 4),), {})) is None
