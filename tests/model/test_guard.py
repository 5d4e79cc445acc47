"""After a measurement nothing of the model or the process has changed."""

import contextlib
import copy
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audits import Snapshot
from peelwise.model.capture import captured
from peelwise.model.guard import untouched
from peelwise.model.layers import linear_layers
from peelwise.model.splice import spliced
from zoo import ZOO, sample_ids


def flags():
    """Every precision flag as it reads, or the kind of error that reading it gives."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    readers = (
        torch.get_float32_matmul_precision,
        lambda: cuda.matmul.allow_tf32,
        lambda: cudnn.allow_tf32,
        lambda: cudnn.benchmark,
        lambda: cudnn.deterministic,
        *(
            lambda owner=owner: owner.fp32_precision
            for owner in (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
        ),
    )

    def read(reader):
        try:
            return reader()
        except RuntimeError:
            return "mixed"

    return [read(reader) for reader in readers]


# The older and the newer way of asking for reduced precision, which must not be mixed.
ASKED = {
    "nothing": "pass",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "allow_tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
    "no cudnn tf32": "torch.backends.cudnn.allow_tf32 = False",
    "cudnn": "torch.backends.cudnn.benchmark = True; torch.backends.cudnn.deterministic = False",
    "newer matmul": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "newer conv": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "newer mkldnn": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
}


@pytest.fixture
def flags_put_back():
    with untouched(nn.Linear(1, 1)):
        yield


@pytest.mark.parametrize("asked", ASKED)
def test_precision_flags(asked, flags_put_back):
    exec(ASKED[asked])
    before = flags()
    with untouched(nn.Linear(1, 1)):
        assert flags()[:5] == ["highest", False, False, False, True]
        assert set(flags()[5:]) == {"ieee"}
    assert flags() == before


def mixed_model():
    """Return a model with some modules training, some parameters frozen and some with gradients."""
    model = ZOO["gpt2"]().train()
    model.transformer.h[1].eval()
    model.transformer.wpe.weight.requires_grad_(False)
    model.transformer.h[0].attn.c_attn.weight.grad = torch.ones_like(model.transformer.h[0].attn.c_attn.weight)
    return model


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_restored(error):
    model = mixed_model()
    before = Snapshot.of(model)
    try:
        with untouched(model):
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
            with pytest.raises(AssertionError):
                before.assert_unchanged(model)  # the control
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    before.assert_unchanged(model)


class Interrupt:
    """Raises KeyboardInterrupt at the ``at``-th call of Python or return from C, where Python looks for signals."""

    def __init__(self, at):
        self.left = at

    def __call__(self, frame, event, argument):
        if event in ("call", "c_return"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


def measured(model, changes, at):
    """Hang in everything that measurements hang in; return whether an interrupt came in between."""
    interrupt = Interrupt(at)
    stack = contextlib.suppress(KeyboardInterrupt)
    with stack, interrupt, untouched(model), spliced(changes), captured(list(changes)), torch.no_grad():
        model(torch.ones(1, 3))
    return interrupt.left <= 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # within a generator that ends anyway
def test_an_interrupt_at_any_moment_leaves_everything_as_it_was():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3).bfloat16()

        def forward(self, x):
            return self.down(self.up(x).bfloat16())

    model = Tiny()
    model.up.eval()
    model.up.weight.requires_grad_(False)
    changes = {linear: torch.ones_like(linear.weight()) for linear in linear_layers(model, "")}
    changes = {linear: F.pad(change.float(), (0, 1)) for linear, change in changes.items()}
    before, at = (Snapshot.of(model), process_flags()), 1
    while measured(model, changes, at):
        before[0].assert_unchanged(model)
        assert process_flags() == before[1], at
        at += 1
    assert at > 500  # the control: interrupts came


def process_flags():
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(),
        flags(),
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_autocast_is_off_inside_and_on_again_outside(device):
    x = torch.ones(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        with untouched(nn.Linear(1, 1, device=device)):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_autocast_inside_of_a_forward_is_off_inside_too():
    """Trainer with bf16=True: accelerate puts autocast into the model's forward, where no context of ours reaches."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # what a Trainer of another test left
    ids, plain = sample_ids(), ZOO["gpt2"]()
    exact = plain(ids).logits
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(copy.deepcopy(plain))
    wrapped = model.__dict__["forward"]
    assert not torch.equal(model(ids).logits, exact)  # the control
    with untouched(model):
        assert torch.equal(model(ids).logits, exact)
    assert model.__dict__["forward"] is wrapped
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(1))])
def test_random_numbers_go_on_as_if_nothing_had_been_drawn(draw):
    with untouched(nn.Linear(1, 1)):
        inside = draw()
    assert draw() == inside


def test_dropout_is_off_inside_and_on_again_outside():
    model, ids = ZOO["gpt2"]().train(), sample_ids()
    expected = copy.deepcopy(model).eval()(ids).logits
    with untouched(model):
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert (model(ids).logits - expected).abs().max() > 0.01
