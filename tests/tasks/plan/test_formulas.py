"""Formulas of costs against what PyTorch counts, and against the bytes of what is really kept."""

import warnings
import weakref
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from audits import runner_of, tiny_probe
from peelwise.engine.depth.table import block_weights
from peelwise.engine.depth.weights import Matrix
from peelwise.engine.in_order import Walk
from peelwise.engine.permute import shuffled_targets
from peelwise.engine.sweep import block_moments, sums_in_parts, sweep
from peelwise.formats import parse_format
from peelwise.model.experts import experts_called
from peelwise.model.parts import parts_of
from peelwise.model.shape import shape_of
from peelwise.model.spill import Spill
from peelwise.model.splice import spliced
from peelwise.probe.probe import Probe
from peelwise.references import quantized
from peelwise.references.asymmetric import InputSums, Target, coded, targets
from peelwise.references.head import fit_head
from peelwise.references.quantized import solve
from peelwise.references.weighed import weighed_descent
from peelwise.references.whitened import InputWhitened, two_sided
from peelwise.stats.gram import CrossSum, GramSum, Moments
from peelwise.tasks.plan import codes, work
from peelwise.tasks.plan.memory import Memory
from peelwise.tasks.plan.shapes import Decoder
from peelwise.tasks.plan.work import CHOLESKY, EIGENVECTORS, Part
from zoo import ZOO


class Counting(TorchDispatchMode):
    """Adds up what PyTorch counts of products; decompositions, solves and fused attention are not among them.

    Its own counter keeps books of modules, which ``torch.autograd.grad`` does not go with.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        packet = torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def counted(action):
    """Return the operations of an action."""
    with Counting() as counting:
        action()
    return counting.total


def shape(name, **changes):
    return shape_of(ZOO[name](), name, 4.0).model_copy(update=changes)


def traced(name, **options):
    runner = runner_of(ZOO[name](), **options)
    trace = runner.trace(tiny_probe().fit)
    batch = trace.batches[0]
    positions = sum(each.inputs.numel() for each in trace.batches)
    return runner, trace, Part(positions, batch.inputs.shape[1], runner.micro_batch_tokens)


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2"])
def test_a_pass_forward_takes_two_operations_per_weight_and_token(name):
    runner, trace, part = traced(name)
    own = shape(name, attention_width=0)  # fused attention is not counted
    rotary = 1.01 if name == "qwen2" else 1.0  # angles are a small product
    expected = work.forward(own, part).operations
    assert expected <= counted(lambda: [runner.own_logits(batch) for batch in trace.batches]) <= rotary * expected
    own_blocks = work.forward(own, part, share=1 / 3, heads=0.0).operations
    block, batch = runner.blocks[1], trace.batches[0]
    assert counted(lambda: runner.run_block(block, batch.stations[1], batch)) == own_blocks


def test_attention_takes_two_products_per_head_of_all_pairs():
    """Without fused kernels PyTorch counts them."""
    model = ZOO["gpt2"]()
    model.set_attn_implementation("eager")
    runner = runner_of(model)
    trace = runner.trace(tiny_probe().fit)
    part = Part(sum(b.inputs.numel() for b in trace.batches), trace.batches[0].inputs.shape[1], 1_024)
    found = counted(lambda: [runner.own_logits(batch) for batch in trace.batches])
    assert found == work.forward(shape("gpt2"), part).operations
    assert found > work.forward(shape("gpt2", attention_width=0), part).operations


def test_a_token_goes_through_chosen_experts_alone():
    runner, trace, part = traced("mixtral")
    own = shape("mixtral", attention_width=0)
    with experts_called(runner.model):
        found = counted(lambda: [runner.own_logits(batch) for batch in trace.batches])
    assert found == pytest.approx(work.forward(own, part).operations, rel=0.01)
    assert own.active_weights < 0.8 * own.linear_weights


@pytest.mark.parametrize("targets", [1, 2])
def test_a_pass_back_takes_as_much_as_one_forward_for_each_set_of_targets(targets):
    runner, trace, part = traced("gpt2")
    own = shape("gpt2", attention_width=0)
    above = runner.tail_gradients(trace)
    found = counted(
        lambda: [
            runner.block_gradients(block, batch, [gradient] * targets)
            for block in runner.blocks
            for batch, gradient in zip(trace.batches, above, strict=True)
        ]
    )
    assert found == work.block_gradients(own, part, targets).operations
    head = counted(lambda: runner.tail_gradients(trace))
    assert head == work.head_gradients(own, part).operations


@pytest.mark.parametrize("d", [40, 256, 300, 600])
def test_symmetric_sums_leave_one_triangle_out(d):
    """Exact up to a last tile that is not full."""
    x = torch.randn(64, d)
    found = counted(lambda: GramSum().update(x))
    assert found == pytest.approx(work.gram(64, d), rel=0.12 if d % 256 else 0)
    assert found <= 2 * 64 * d * d


@pytest.mark.parametrize("with_F", [False, True])
def test_sums_of_a_sweep(with_F):
    runner, trace, part = traced("llama")
    own = shape("llama", attention_width=0)
    above = [runner.tail_gradients(trace)]
    found = counted(
        lambda: [block_moments(runner, b, trace, above, keep=True, with_F=with_F) for b in reversed(runner.blocks)]
    )
    passes = work.block_gradients(own, part).operations
    assert found - passes == work.sums(own, part, 1, with_F).operations


@pytest.mark.parametrize(("d", "o"), [(24, 40), (40, 24)])
def test_replacement_weights_take_as_many_products_per_layer(d, o):
    def moments():
        x, g = torch.randn(500, d), torch.randn(500, o)
        S, C, F = GramSum(), CrossSum(), GramSum()
        S.update(x), C.update(g + x @ torch.ones(d, o) / 20, x), F.update(g)  # all want the same change
        return Moments(500, S.mean(), C.mean(), F.mean())

    torch.manual_seed(0)
    fit, select = moments(), moments()

    def propose():
        reference = InputWhitened(fit.S, select.S)
        rotated, other = reference.rotate(fit.C), reference.rotate(select.C)
        whitened = reference.propose(fit.C, select.C, rotated=rotated, rotated_select=other)
        assert whitened.weight > 0
        two_sided(fit, select, whitened, name="test")

    one = shape("llama").model_copy(update={"groups": (_group(d, o),)})
    not_products = EIGENVECTORS * d**3 + CHOLESKY * o**3 + 2 * o * o * d
    # Each damping that is tried takes a vector's product with a matrix besides, which is left out.
    tried = (counted(propose) - (work.proposals(one).operations - not_products)) / (2 * d * d)
    assert tried == pytest.approx(round(tried))
    assert 3 <= tried < 20


def _group(d, o):
    from peelwise.records.plan import InputGroup

    return InputGroup(inputs=d, outputs=(o,), count=1)


def test_a_spectrum_takes_the_product_of_the_smaller_side():
    one = shape("llama").model_copy(update={"groups": (_group(30, 50),)})
    found = counted(lambda: Matrix(torch.randn(50, 30)).singular_values)
    assert found == work.spectra(one).operations - work.EIGENVALUES * 30**3


@pytest.mark.parametrize("blank", [False, True])
def test_a_fit_of_the_head(blank):
    torch.manual_seed(0)
    d, v, n, m = 24, 90, 300, 60
    head = torch.randn(v, d) / 10
    x, y, select = torch.randn(n, d), torch.randint(v, (n,)), (torch.randn(m, d), torch.randint(v, (m,)))

    def logits(rows):
        return rows.new_zeros(len(rows), v) if blank else rows @ head.T

    steps = 3
    found = counted(lambda: fit_head((x, y), select, logits, max_steps=steps, gap=0.0))
    own = shape("llama", width=d, vocabulary=v)
    parts = [Part(tokens, 16, 1_024) for tokens in (n, m, 0)]
    expected = work.head_fit(own, *parts, steps, blank).operations
    once = 2 * (n + m) * v * d  # the head's inputs are found before
    one_row = 0 if blank else 2 * v * d  # logits of a row tell how wide they are
    assert found == pytest.approx(expected - once - EIGENVECTORS * d**3 + one_row, rel=0.01)


# -- codes -------------------------------------------------------------------------------------------------------


def problem(o, d):
    """Return weights, and sums of what a layer is given on two parts."""
    torch.manual_seed(0)
    x = torch.randn(600, d)
    z = x + 0.1 * torch.randn(600, d)
    lost = (x - z).T @ z / 600
    return torch.randn(o, d) / d**0.5, InputSums(z.T @ z / 600, lost), InputSums(z.T @ z / 600, lost.clone())


@pytest.mark.parametrize("starts", [0, 1])
@pytest.mark.parametrize("feedback", [True, False])
def test_a_search_for_codes_takes_products_of_the_sums(starts, feedback):
    """Factors and solves are not among what PyTorch counts."""
    o, d = 96, 192
    W, sums, _ = problem(o, d)
    form = parse_format("int4:group=64,symmetric")
    own = [form.encode(0.9 * W)] * starts
    without = counted(lambda: solve(sums.zz, W, form, starts=own, feedback=feedback, max_sweeps=0))
    not_products = (codes._INVERSE_ROOT * d**3) * feedback
    assert without == codes.solved(o, d, starts, feedback=feedback) - not_products
    two = counted(lambda: solve(sums.zz, W, form, starts=own, feedback=feedback, max_sweeps=2, tolerance=-1.0))
    sweeps = (two - without) / (codes.solved(o, d, starts, 1.0) - codes.solved(o, d, starts))
    assert sweeps == 2 * (1 + starts)


@pytest.mark.parametrize(("o", "d"), [(128, 64), (96, 192)])
def test_a_descent_of_weighed_errors_walks_whole_tiles(o, d):
    W, sums, _ = problem(o, d)
    form = parse_format("int3:group=32,symmetric")
    M = torch.eye(o) + 0.001
    start = form.encode(0.8 * W)  # so that codes move, and no sweep has to be taken back
    found = counted(lambda: weighed_descent(M, sums.zz, W, form, start, max_sweeps=1, tolerance=-1.0))
    begun = 2 * o * d * (o + d)
    assert found == begun + (codes.weighed_sweeps(o, d) - begun) / codes._WEIGHED_SWEEPS


@pytest.mark.parametrize("weighed", [False, True])
def test_codes_of_a_layer(weighed):
    o, d = 96, 192
    W, fit, select = problem(o, d)
    form = parse_format("int4:group=64,symmetric")
    target = Target(W)
    F = (torch.eye(o) + 0.05) if weighed else None
    histories = []

    def search(*args, **options):
        histories.append(descended(*args, **options))
        return histories[-1]

    descended = quantized._descend
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quantized, "_descend", search)
        found = counted(lambda: coded(W, target, fit, select, form, curvature=F, tolerance=1e-9, max_sweeps=2))
    sweeps = sum(len(history) - 1 for history in histories)
    expected = codes.coded(o, d, 0, sweeps, weighed=weighed) - 3 * codes._INVERSE_ROOT * d**3
    assert sweeps > 2
    assert found == pytest.approx(expected, rel=0.01)


def test_targets_of_layers_that_share_their_input():
    o, d = 96, 192
    W, fit, select = problem(o, d)
    group = _group(d, o).model_copy(update={"outputs": (o, o)})
    found = counted(lambda: targets([W, W], fit, select))
    assert found == codes.targets(group) - 3 * (CHOLESKY * d**3 + 2 * 2 * o * d * d)  # factors and solves


def test_a_walk_runs_each_block_as_far_as_its_layers_are_asked_for():
    runner, trace, part = traced("llama")
    own = shape("llama", attention_width=0)
    every = {linear: linear for block in runner.blocks for linear in block.linears}

    def walk():
        found = Walk(runner, runner, every, [trace], [trace])
        for block in runner.blocks:
            for _ in found.groups(block):
                pass
            found.leave(block)

    assert counted(walk) == pytest.approx(codes.walked(own, part, hooked=False).operations, rel=0.02)


def test_micro_batches_are_whole_sequences():
    _, trace, part = traced("llama", micro_batch_tokens=50)  # three sequences of 16
    assert part.batches == len(trace.batches) > 1
    assert work.forward(shape("llama"), part).blocks == len(trace.batches)


# -- memory ------------------------------------------------------------------------------------------------------


def peak(action):
    """Return the most bytes of tensors that an action has alive at a time, beside those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        action()
    found = profiled.profiler.kineto_results.events()
    events = sorted((e for e in found if e.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def llama(**sizes):
    """Return a random Llama of two blocks, larger than what lies beside its tensors, and its runner."""
    import transformers

    torch.manual_seed(0)
    same = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**same, **sizes)).eval()
    return model, runner_of(model)


@pytest.mark.parametrize("vocabulary", [2_000, 9_000])
def test_logits_and_their_gradients(vocabulary):
    """One piece of losses, and more than two of them."""
    model, runner = llama(vocab_size=vocabulary, hidden_size=16, intermediate_size=32)
    probe = Probe.from_tokens(torch.randint(vocabulary, (64, 33)))
    kept = memory(shape_of(model, "llama", 4.0), probe.fit.tokens)
    trace = runner.trace(probe.fit)
    assert peak(lambda: runner.trace(probe.fit)) == pytest.approx(kept.logits(probe.fit.tokens), rel=0.05)
    assert peak(lambda: runner.tail_gradients(trace)) == pytest.approx(kept.logits_back(probe.fit.tokens), rel=0.05)


def test_spectra():
    model, runner = llama(vocab_size=60, hidden_size=384, intermediate_size=1_056)
    parts = parts_of(runner.blocks[0])
    kept = memory(shape_of(model, "llama", 4.0), 0)
    assert peak(lambda: block_weights(parts, 384)) == pytest.approx(kept.spectrum(), rel=0.15)


def test_sums_of_a_block_and_changes_in_place():
    model, runner = llama(vocab_size=60, hidden_size=256, intermediate_size=704)
    probe = Probe.from_tokens(torch.randint(60, (30, 9)))
    fit, select = runner.trace(probe.fit), runner.trace(probe.select)
    kept = memory(shape_of(model, "llama", 4.0), probe.fit.tokens)
    changes = {linear: torch.zeros_like(linear.weight()) for block in runner.blocks for linear in block.linears}

    def evaluate():
        with spliced(changes):
            runner.losses_from(select, 0)

    assert peak(evaluate) == pytest.approx(kept.splice() + kept.logits(probe.select.tokens), rel=0.15)
    null = shuffled_targets(fit, 0, shift_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peak(lambda: sweep(runner, fit, select, targets=[None, null]))
    assert found == pytest.approx(kept.sums(2) + kept.proposals(4), rel=0.15)


class Private(TorchDispatchMode):
    """The most bytes of tensors that are alive at a time and in no file, beside those of a model."""

    def __init__(self, model):
        super().__init__()
        self.others = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(found):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            where = storage.data_ptr()
            if function is torch.ops.aten.from_file.default:
                self.others.add(where)
                weakref.finalize(storage, self.others.discard, where)
            elif where not in self.others and where not in self.alive:
                self.alive[where] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, where, None)
        self.most = max(self.most, sum(self.alive.values()))
        return found


def test_sums_of_a_stream_are_of_some_layers_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("peelwise.engine.sweep.MOST_SUMS", 13_000_000)
    monkeypatch.setattr("peelwise.tasks.plan.memory.MOST_SUMS", 13_000_000)
    model, runner = llama(vocab_size=60, hidden_size=256, intermediate_size=704)
    runner.spill = Spill(tmp_path)
    probe = Probe.from_tokens(torch.randint(60, (30, 9)))
    fit, select = runner.trace(probe.fit), runner.trace(probe.select)
    own = shape_of(model, "llama", 4.0)
    whole, parts = (memory(own, probe.fit.tokens, streamed=streamed) for streamed in (False, True))
    planned = parts.parts_of_sums(2)
    assert [len(each) for each in sums_in_parts(runner, runner.blocks[0], 2, True)] == [4, 1, 1, 1]
    assert len(planned) == 4
    targets = [None, shuffled_targets(fit, 0, shift_first=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Private(model) as private:
            sweep(runner, fit, select, targets=targets)
    assert private.most == pytest.approx(parts.sums(2), rel=0.15)
    assert parts.sums(2) < 0.6 * whole.sums(2)


def memory(own, tokens, **options):
    return Memory(own, tokens, 1_024, **{"bytes_per_weight": 4, "streamed": False, "base": 0.0} | options)


def size(tensors):
    """Return the bytes of different tensors."""
    return sum({id(each): each.nbytes for each in tensors}.values())


def test_weights_and_stations_are_what_a_model_keeps():
    runner, trace, part = traced("llama")
    kept = memory(shape("llama"), part.tokens)
    assert kept.weights == size(runner.model.parameters())
    assert kept.stations == size(station for batch in trace.batches for station in batch.stations)
    assert memory(shape("llama"), part.tokens, models=2).held == 2 * kept.held


def test_a_stream_keeps_one_block_however_deep_the_model_is():
    few, many = (Decoder(64, 128, depth, 4, 2, 100).shape() for depth in (2, 200))
    options = {"streamed": True, "bytes_per_weight": 2}
    assert memory(few, 0, **options).weights == memory(many, 0, **options).weights == 2 * few.linear_weights / 2
    assert memory(many, 0).weights > 50 * memory(few, 0).weights
    deep = memory(many, 10_000, changes_on_disk=True, **options)
    shallow = memory(few, 10_000, changes_on_disk=True, **options)
    for kept in ("stations", "proposals", "changes", "splice", "curvatures_kept"):
        both = (value() if callable(value := getattr(each, kept)) else value for each in (deep, shallow))
        assert next(both) == pytest.approx(next(both))
    assert memory(many, 0, **options).changes() == 4 * many.linear_weights  # of other tasks they are in memory
    wide = Decoder(64, 128, 2, 4, 2, 10_000).shape()
    assert memory(wide, 0, **options).weights == 2 * wide.head_weights


def test_sums_and_proposals_are_the_bytes_of_a_sweep():
    runner = runner_of(ZOO["llama"]())
    probe = tiny_probe()
    fit, select = runner.trace(probe.fit), runner.trace(probe.select)
    kept = memory(shape("llama"), probe.fit.tokens)
    (moments,), _ = block_moments(runner, runner.blocks[-1], fit, [runner.tail_gradients(fit)], keep=True, with_F=True)
    tensors = [t for each in moments.values() for t in (each.S, each.C, each.F)]
    assert size(tensors) == 8 * sum(kept.numbers_in_sums)
    null = shuffled_targets(fit, 0, shift_first=True)
    found = sweep(runner, fit, select, targets=[None, null])
    changes = [p.change for made in found for b in made.values() for d in b.changes.values() for p in d.values()]
    assert size(changes) <= kept.proposals(4)
    one = [p.change for b in found[0].values() for p in b.changes["input-whitened"].values()]
    assert size(one) == kept.proposals(1) == 2 * shape("llama").linear_weights
