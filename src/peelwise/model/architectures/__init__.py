"""What is known of architectures: where the blocks of a model are; a file each, and one table."""

from peelwise.model.architectures.decoder import find_head, refuse_text
from peelwise.model.architectures.stacks import in_decoder, inner_lists, is_encoder_decoder, other_stacks, stack_of
from peelwise.model.architectures.table import ARCHITECTURES, find_blocks

__all__ = [
    "ARCHITECTURES",
    "find_blocks",
    "find_head",
    "in_decoder",
    "inner_lists",
    "is_encoder_decoder",
    "other_stacks",
    "refuse_text",
    "stack_of",
]
