"""Models that predict no next tokens, small and real, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peelwise.engine.sweep import block_moments
from peelwise.model.runner import Runner
from peelwise.model.trace import Trace

IDS, CLASSES = 60, 10


def words(examples: int = 24, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Return ids with padding behind most of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IDS, (examples, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (examples, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def masked(examples: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Return ids of which every fourth is asked for."""
    batch = words(examples, seed=seed)
    asked = batch["attention_mask"].bool() & (torch.arange(12) % 4 == 0)
    return batch | {"labels": batch["input_ids"].where(asked, -100)}


def classified(examples: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Return ids with one class for each row."""
    return (batch := words(examples, seed=seed)) | {"labels": batch["input_ids"][:, 0] % CLASSES}


def pairs(examples: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Return rows and shorter rows that are to be made of them, some of them padded."""
    batch = words(examples, seed=seed)
    labels = batch["input_ids"][:, :7].flip(1).clone()
    labels[::3, 5:] = -100
    return batch | {"labels": labels}


def images(examples: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Return 8 x 8 images of noise and a class for each."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(examples, 1, 8, 8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (examples,), generator=generator)}


def bert(kind: str = "BertForMaskedLM", layers: int = 5) -> nn.Module:
    """Return a BERT of random weights, in eval mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=IDS, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, num_labels=CLASSES, initializer_range=0.1,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, kind)(config).eval()
    return model


def bert_classifier() -> nn.Module:
    """Return a BERT with a head for classes."""
    return bert("BertForSequenceClassification")


def vit(layers: int = 6) -> nn.Module:
    """Return a vision transformer of random weights, in eval mode."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=64, num_labels=CLASSES, initializer_range=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def t5(encoder: int = 2, decoder: int = 5) -> nn.Module:
    """Return an encoder-decoder of random weights with so many blocks each, in eval mode."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=IDS, d_model=32, d_kv=16, d_ff=48, num_layers=encoder, num_decoder_layers=decoder, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def swin() -> nn.Module:
    """Return a vision transformer in two stages of two resolutions, in eval mode."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    config = SwinConfig(
        image_size=16, patch_size=2, num_channels=1, embed_dim=16, depths=[2, 5], num_heads=[2, 2], window_size=2,
        mlp_ratio=2.0, num_labels=CLASSES, initializer_range=0.1,
    )  # fmt: skip
    return SwinForImageClassification(config).eval()


def larger_images(examples: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Return 16 x 16 images of noise and a class for each."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(examples, 1, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (examples,), generator=generator)}


class DiffusionBlock(nn.Module):
    """A block of a diffusion transformer: what conditions it scales, shifts and gates both branches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn_qkv, self.attn_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp_up, self.mlp_down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        q, k, v = (part[:, None] for part in self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, dim=-1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        x = x + gate1 * self.attn_out(seen)
        inside = nn.functional.gelu(self.mlp_up(self.norm2(x) * (1 + scale2) + shift2))
        return x + gate2 * self.mlp_down(inside)


class Diffusion(nn.Module):
    """A diffusion transformer (DiT) of one's own: noise is predicted of noisy images, a time and a class."""

    def __init__(self, layers: int = 5, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.places = nn.Conv2d(1, width, 2, 2), nn.Parameter(torch.randn(16, width) / 4)
        self.times, self.classes = nn.Linear(1, width), nn.Embedding(CLASSES, width)
        self.blocks = nn.ModuleList(DiffusionBlock(width) for _ in range(layers))
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the noise ``[b, 16, 4]`` of each patch."""
        hidden = self.patches(x).flatten(2).mT + self.places
        c = self.times(t[:, None]) + self.classes(y)
        for block in self.blocks:
            hidden = block(hidden, c)
        return self.out(hidden)


def noisy(examples: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """Return what a diffusion transformer is called with, and the noise that its loss alone is given."""
    generator = torch.Generator().manual_seed(seed)
    noise, t = torch.randn(examples, 1, 8, 8, generator=generator), torch.rand(examples, generator=generator)
    x = t[:, None, None, None] * noise
    patches = nn.functional.unfold(noise, 2, stride=2).mT
    return {"x": x, "t": t, "y": torch.randint(CLASSES, (examples,), generator=generator), "noise": patches}


KINDS: dict[str, tuple[Any, Any]] = {
    "masked": (bert, masked),
    "classifier": (bert_classifier, classified),
    "images": (vit, images),
    "encoder-decoder": (t5, pairs),
}


def digits() -> tuple[Tensor, Tensor]:
    """Return the images ``[1797, 1, 8, 8]`` of scikit-learn's digits, shuffled, and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.images).float()[order, None] / 16, torch.tensor(found.target).long()[order]


def trained_vit(steps: int = 200) -> nn.Module:
    """Return a vision transformer trained on the first 1,200 digits, some four seconds on one core."""
    pixels, labels = digits()
    model = vit().train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(1200, (64,), generator=generator)
        model(pixel_values=pixels[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def same_as_autograd(runner: Runner, trace: Trace) -> int:
    """Compare the sums of gradients of every layer with those that autograd has left; return of how many layers."""
    above = runner.tail_gradients(trace)
    compared = 0
    for block in reversed(runner.blocks):
        (moments,), (above,) = block_moments(runner, block, trace, [above], keep=True, with_F=False)
        for linear, found in moments.items():
            weight = linear.module.weight.grad.double()  # type: ignore[union-attr, operator]
            C = found.C[:, : weight.shape[1]]
            assert torch.allclose(C, weight, atol=1e-6 * float(weight.abs().max()) + 1e-8), linear.name
            compared += 1
    return compared
