"""Models that break an assumption, beside healthy ones of the same kind: what self-checks are tried on.

``RIGHT`` are measured as they are, ``REFUSED`` with what the refusal names. The zoo holds what people train.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import VOCABULARY

WIDTH = 32
Block = Callable[[Tensor], Tensor]


class Mlp(nn.Module):
    """The healthy block that every other is compared with."""

    def __init__(self, d_in: int = WIDTH, d_out: int = WIDTH) -> None:
        super().__init__()
        self.n, self.up, self.down = nn.LayerNorm(d_in), nn.Linear(d_in, 64), nn.Linear(64, d_out)
        self.across = nn.Linear(d_in, d_out) if d_in != d_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.across(x) + self.down(F.gelu(self.up(self.n(x))))


class ReadsWeight(Mlp):
    """One of its layers is called, and its weight is read once more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(self.n(x), self.up.weight)[..., :WIDTH]


class NeverCalls(Mlp):
    """Uses the weight of a layer without calling it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(F.linear(self.n(x), self.up.weight, self.up.bias)))


class Attention(Mlp):
    """PyTorch's own attention: causal or not, or causal but for what ``seen [t, t]`` lets positions see besides."""

    def __init__(self, *, causal: bool = True, seen: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.mha, self.causal, self.seen = nn.MultiheadAttention(WIDTH, 4, batch_first=True), causal, seen

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        if mask is not None and self.seen is not None:
            mask = mask.masked_fill(self.seen(torch.arange(x.shape[1])), 0.0)
        return super().forward(x + self.mha(x, x, x, attn_mask=mask, need_weights=False)[0])


class Wrapped(Mlp):
    """Returns its hidden state in a container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        y = super().forward(x)
        return [y, None] if self.kind == "list" else {"x": y}


class Lm(nn.Module):
    """An embedding, blocks and a head; ``call`` says how blocks are called and what is taken of what they return."""

    def __init__(self, *blocks: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] = lambda b, x: b(x)) -> None:
        super().__init__()
        self.wte, self.h, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.ModuleList(blocks),
            nn.Linear(WIDTH, VOCABULARY),
        )
        self.call = call

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = self.call(block, x)
        return self.head(x)


class Shortcut(Lm):
    """What the first block's layer computes is read by the others too, from a mapping that all are given."""

    def forward(self, ids: Tensor) -> Tensor:
        x, kept = self.wte(ids), {}
        for block in self.h:
            x = block(x, kept)
        return self.head(x)


class Sharing(Mlp):
    """Keeps what it computes for the blocks behind it, as shared keys and values are."""

    def forward(self, x: Tensor, kept: dict[str, Tensor]) -> Tensor:
        inner = F.gelu(self.up(self.n(x)))
        return x + self.down(inner + kept.setdefault("inner", inner))


class Relay(Lm):
    """Every block returns what its layer computes, and the next one is given it beside the hidden state."""

    def forward(self, ids: Tensor) -> Tensor:
        x, inner = self.wte(ids), None
        for block in self.h:
            x, inner = block(x, inner)
        return self.head(x)


class Relaying(Mlp):
    """One of its blocks."""

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inner = F.gelu(self.up(self.n(x)))
        return x + self.down(inner if before is None else inner + before), inner


class Aside(Mlp):
    """Reads what the first block has kept where no call shows it."""

    def __init__(self, kept: dict[str, Tensor], *, keeps: bool = False) -> None:
        super().__init__()
        self.kept, self.keeps = kept, keeps

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(self.n(x)))
        if self.keeps:
            self.kept["inner"] = inner
        return x + self.down(inner + self.kept["inner"])


def aside() -> nn.Module:
    kept: dict[str, Tensor] = {}
    return Lm(Aside(kept, keeps=True), Aside(kept), Aside(kept))


class LastPosition(Lm):
    """nanoGPT: logits of the last position only, unless there are targets."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = super().forward(ids)
        return logits if targets is not None else logits[:, [-1]]


class AlwaysLast(Lm):
    """The same without a way out."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids)[:, [-1]]


class TakesDict(Lm):
    """Its forward wants a dictionary."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch["input_ids"])


def tied() -> nn.Module:
    model = Lm(Mlp(), Mlp(), Mlp())
    model.h[2].up.weight = model.h[0].up.weight
    return model


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, norm_first=True, batch_first=True)
    model = Lm()
    model.h = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return model.head(model.h(model.wte(ids), mask=mask, is_causal=True))

    model.forward = forward
    return model


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def gpt1() -> nn.Module:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4))


def granite(experts: int = 0) -> nn.Module:
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "shared_intermediate_size": 48, "num_hidden_layers": 3}
    config = GraniteMoeHybridConfig(
        vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2, num_local_experts=experts,
        num_experts_per_tok=min(experts, 2), layer_types=["full_attention"] * 3, position_embedding_type="rope",
        max_position_embeddings=64, mamba_n_heads=8, **sizes,
    )  # fmt: skip
    return GraniteMoeHybridForCausalLM(config)


def gemma4() -> nn.Module:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, hidden_size=32, intermediate_size=48,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8,
        hidden_size_per_layer_input=8, num_kv_shared_layers=2, sliding_window=16, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model = Gemma4ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def packed() -> nn.Module:
    model = Lm(Mlp(), Mlp())
    model.h[1].up.weight = nn.Parameter(torch.zeros(64, WIDTH, dtype=torch.uint8), requires_grad=False)
    return model


def float8() -> nn.Module:
    model = Lm(Mlp(), Mlp())
    model.h[1].up.weight = nn.Parameter(model.h[1].up.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=28, patch_size=14, **sizes))


class Mixed(Lm):
    """Computes in half precision by itself, wherever it is called."""

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(ids)


def chunks(size: int) -> nn.Module:
    """Tokens see all of their own chunk, as in models that write several tokens at a time by diffusion."""
    return Lm(Attention(seen=lambda at: at[:, None] // size == at // size), Attention())


def prefix(length: int) -> nn.Module:
    """The first tokens see each other, as in a prefix language model."""
    return Lm(Attention(seen=lambda at: (at[:, None] < length) & (at < length)), Attention())


def own_class() -> nn.Module:
    """A model of transformers' base class that says nothing of its cache, its embedding or its head."""
    from transformers import PreTrainedConfig, PreTrainedModel

    class Own(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.inner = Lm(Mlp(), Mlp())

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids)

    return Own(PreTrainedConfig(tie_word_embeddings=True))


# Models that are measured as they are, each beside a member of its kind below that is refused.
RIGHT: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Lm(Mlp(), Mlp(), Mlp()),
    "widths": lambda: Lm(Mlp(WIDTH, 24), Mlp(24, 48), Mlp(48, WIDTH)),
    "lists": lambda: Lm(Wrapped("list"), Wrapped("list"), call=lambda b, x: b(x)[0]),
    "keyword x": lambda: Lm(Mlp(), Mlp(), call=lambda b, x: b(x=x)),
    "last position only": lambda: LastPosition(Mlp(), Mlp()),
    "TransformerEncoder": encoder,
    "MultiheadAttention": lambda: Lm(Attention(), Attention()),
    "GPT-1": gpt1,
    "own class of transformers": own_class,
    "autocast inside": lambda: Mixed(Mlp(), Mlp(), Mlp()),
    "Granite without experts": granite,
    "Granite with experts": lambda: granite(4),
    "weight shared between blocks": tied,
    "keys and values shared": gemma4,
    "shared in a dictionary": lambda: Shortcut(Sharing(), Sharing(), Sharing()),
    "returned for the next block": lambda: Relay(Relaying(), Relaying(), Relaying()),
}
# Models that are refused, and what the refusal names.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BERT": (bert, "BertForMaskedLM is not causal"),
    "attention without a mask": (lambda: Lm(Attention(causal=False), Attention()), "Lm is not causal"),
    **{f"chunks of {n}": (lambda n=n: chunks(n), "Lm is not causal") for n in (2, 3, 4, 8, 12)},
    **{f"prefix of {n}": (lambda n=n: prefix(n), "Lm is not causal") for n in (2, 4, 20)},
    "weights read beside calls": (lambda: Lm(ReadsWeight(), ReadsWeight()), r"hooked into h\.0\.up does not"),
    "shared out of sight": (aside, r"gradient at h\.0\.up"),
    "dictionaries": (lambda: Lm(Wrapped("dict"), Wrapped("dict"), call=lambda b, x: b(x)["x"]), "block returns dict"),
    "takes a dictionary": (lambda: TakesDict(Mlp(), Mlp()), "TakesDict could not be run on token ids"),
    "always the last position": (lambda: AlwaysLast(Mlp(), Mlp()), "logits of 1 positions for"),
    "ViT": (vit, "ViTForImageClassification could not be run"),
    "nn.Transformer": (lambda: nn.Transformer(WIDTH, 4, 2, 2, 64), "Transformer could not be run"),
    "packed bytes": (packed, r"h\.1\.up: Linear keeps its weights packed, weight as uint8"),
    "float8": (float8, r"h\.1\.up: Linear keeps its weights packed, weight as float8_e4m3fn"),
}
