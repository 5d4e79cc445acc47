"""Linear layers whose forward pass uses weights of a format, while a latent full-precision weight is trained.

    y = x Q(W)^T + b        d loss / d W := d loss / d Q(W)        (straight-through estimator, arXiv:1308.3432)

Structural zeros of a mask get no gradient.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peelwise.errors import FormatError
from peelwise.formats.base import Encoded, Format
from peelwise.formats.binary import Binary
from peelwise.formats.integer import Integer
from peelwise.formats.masked import Masked
from peelwise.formats.membership import check_member, same_support, scaled_part
from peelwise.formats.scaled import Scaled
from peelwise.formats.superblock import SuperBlock
from peelwise.formats.table import parse_format
from peelwise.formats.ternary import Ternary
from peelwise.formats.uneven import Uneven


class _StraightThrough(torch.autograd.Function):
    """Hands out the quantised weight, and its gradient to the latent one."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, quantized: Tensor, support: Tensor | None) -> Tensor:
        ctx.support = support
        # A diverged weight must not look healthy.
        return torch.where(latent.isnan(), latent, quantized.to(latent.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = grad_outputs
        return (gradient if ctx.support is None else gradient * ctx.support), None, None


class QuantizedLinear(nn.Linear):
    """A linear layer that computes with weights of a format; ``weight`` is the latent one that is trained.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        form: the format or its name, such as ``"int4:group=32"``.

    Attributes:
        format: the format that `effective_weight` obeys.
        support: where the format has structural zeros, ``[out_features, in_features]`` bool, false there; fixed when
            the layer is made.
        scales, zeros: ``None`` while they follow from the latent weight by the format's own rule; after `hold_` the
            ones that stay, after `share_scale_` those of the whole model.

    Raises:
        FormatError: If the format does not go with the shape.
    """

    families: tuple[type[Format], ...] = (Scaled,)
    _turned_from: type[nn.Module] | None = None  # transformers' Conv1D, where the weight is kept as that has it
    support: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        form: Format | str = "ternary",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.format = parse_format(form) if isinstance(form, str) else form
        inner = self.format.inner if isinstance(self.format, Masked) else self.format
        if not isinstance(inner, self.families):
            raise FormatError(f"{type(self).__name__} cannot train {self.format.name}: it is of another family.")
        for name in ("support", "scales", "zeros"):
            self.register_buffer(name, None)
        self._fix_support()

    @classmethod
    def from_linear(cls, linear: nn.Module, form: Format | str) -> Self:
        """Return a layer that trains the very parameters of ``linear``, so that optimizers keep their grip on them.

        Args:
            linear: an ``nn.Linear``, or transformers' Conv1D, whose weight stays ``[in_features, out_features]``.
            form: the format.
        """
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, nn.Parameter)
        turned = not isinstance(linear, nn.Linear)
        d_out, d_in = weight.shape[::-1] if turned else weight.shape
        layer = cls(d_in, d_out, bias is not None, form, device="meta")
        layer._turned_from = type(linear) if turned else None
        layer.weight = weight
        layer.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        layer._fix_support()
        return layer.train(linear.training)

    @property
    def latent(self) -> Tensor:
        """The latent weight as ``[out_features, in_features]``, whichever way the parameter has it."""
        return self.weight if self._turned_from is None else self.weight.T

    def plain(self) -> nn.Module:
        """Return an ordinary layer of the kind that this one was made from, with the effective weight."""
        weight = self.effective_weight().detach()
        if self._turned_from is None:
            made: nn.Module = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        else:
            made, weight = self._turned_from(self.out_features, self.in_features), weight.T.contiguous()
        made.weight = nn.Parameter(weight.clone(), requires_grad=self.weight.requires_grad)
        made.register_parameter("bias", self.bias)
        return made.train(self.training)

    def _fix_support(self) -> None:
        if not self.weight.is_meta:
            encoded = self.format.encode(self.latent.detach())  # refuses a shape that does not go with the format
            self.support = encoded.support

    def encoded(self) -> Encoded:
        """Return codes, scales and zero points of the effective weight."""
        if self.scales is None:
            return self.format.rounded(self.latent.detach(), self.support)
        return self._inner.quantized(self.latent.detach(), self.scales, self.zeros, self.support)

    @property
    def _inner(self) -> Scaled:
        inner = scaled_part(self.format)
        assert inner is not None
        return inner

    @torch.no_grad()
    def hold_(self, encoded: Encoded) -> None:
        """Compute with these codes from now on, and with these scales for good; in place.

        A format's rule reaches only some of its scales, so the ones given are kept beside the latent weight, which
        becomes what the codes stand for. Training goes on from there: codes flip, scales stay.

        Args:
            encoded: codes, scales and offsets of the format, on the support of this layer.

        Raises:
            FormatError: If they are none of the format, or the latent weight is too coarse a number for its codes.
        """
        check_member(encoded, self.format, (self.out_features, self.in_features))
        if not same_support(encoded.support, self.support):
            raise FormatError(f"{self.format.name}: the codes have another support than the layer. Make a new layer.")
        assert encoded.scales is not None
        device = self.weight.device
        decoded = self.format.decode(encoded).to(device)
        self.latent.copy_(decoded)
        self.scales = encoded.scales.detach().to(device, copy=True)
        self.zeros = None if encoded.zeros is None else encoded.zeros.detach().to(device, copy=True)
        if not torch.equal(self.format.decode(self.encoded()), decoded):
            dtype = str(self.weight.dtype).removeprefix("torch.")
            raise FormatError(
                f"{self.format.name}: {dtype} cannot tell its levels apart. Make the layer float32 first."
            )

    def effective_weight(self) -> Tensor:
        """Return the weight that the forward pass uses; its gradient goes to the latent weight."""
        decoded = self.format.decode(self.encoded())
        quantized: Tensor = _StraightThrough.apply(self.latent, decoded, self.support)  # type: ignore[no-untyped-call]
        return quantized

    def forward(self, input: Tensor) -> Tensor:
        """Return ``x Q(W)^T + b``."""
        return F.linear(input, self.effective_weight(), self.bias)

    def extra_repr(self) -> str:
        """Return the arguments of ``nn.Linear`` and the format."""
        return f"{super().extra_repr()}, format={self.format.name}"


class BinaryLinear(QuantizedLinear):
    """A linear layer with one bit per weight; by default a scale per output channel (arXiv:1603.05279)."""

    families = (Binary,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        form: Format | str = "binary",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, form, device, dtype)


class TernaryLinear(QuantizedLinear):
    """A linear layer with weights in {-s, 0, s}; by default one scale, the mean of ``|W|`` (arXiv:2402.17764)."""

    families = (Ternary,)


class IntLinear(QuantizedLinear):
    """A linear layer with integer weights of 2 to 8 bits; by default 4, symmetric, a scale per output channel."""

    families = (Integer, SuperBlock)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        form: Format | str = "int4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, form, device, dtype)


class TableLinear(QuantizedLinear):
    """A linear layer whose weights are from a table, such as nf4 or eight-bit floating-point numbers, times a scale."""

    families = (Uneven,)


LAYER_OF: dict[type[Format], type[QuantizedLinear]] = {
    Binary: BinaryLinear,
    Ternary: TernaryLinear,
    Integer: IntLinear,
    SuperBlock: IntLinear,
    Uneven: TableLinear,
}
