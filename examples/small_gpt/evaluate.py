"""Text to windows of token ids, and the mean loss of a causal language model on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def token_stream(tokenizer: Any, documents: list[str]) -> Tensor:
    """Return ``[n]`` token ids of all documents, each one opened by the end-of-text token."""
    opening = tokenizer.eos_token_id
    ids: list[int] = []
    for document in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        ids += [opening, *document]
    return torch.tensor(ids)


def windows(stream: Tensor, context: int = 128) -> Tensor:
    """Cut ``[n]`` tokens into ``[w, context + 1]``; neighbours share one token, so each is predicted once."""
    return stream.unfold(0, context + 1, context)


def token_losses(model: nn.Module, batch: Tensor) -> Tensor:
    """Return ``[w * context]`` next-token losses in nats for windows ``[w, context + 1]``.

    Works with models that return logits and with those that return an object that holds them.
    """
    output = model(batch[:, :-1])
    logits = getattr(output, "logits", output)  # [w, context, vocabulary]
    return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def mean_loss(model: nn.Module, batch: Tensor, at_once: int = 32) -> float:
    """Return the mean loss in nats per token; the model keeps the mode it came in."""
    training = model.training
    model.eval()
    total = sum(float(token_losses(model, part).double().sum()) for part in batch.split(at_once))
    model.train(training)
    return total / batch[:, 1:].numel()
