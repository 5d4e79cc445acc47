"""Linear layers that train inside a weight format, and the swap that puts them into a model."""

from peelwise.nn.files import save_pretrained
from peelwise.nn.linear import BinaryLinear, IntLinear, QuantizedLinear, TernaryLinear
from peelwise.nn.swap import dense_, quantize_, share_scale_

__all__ = [
    "BinaryLinear",
    "IntLinear",
    "QuantizedLinear",
    "TernaryLinear",
    "dense_",
    "quantize_",
    "save_pretrained",
    "share_scale_",
]
