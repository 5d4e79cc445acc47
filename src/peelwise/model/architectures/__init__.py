"""What is known of architectures: where the blocks of a model are; a file each, and one table."""

from peelwise.model.architectures.decoder import find_head, is_encoder_decoder, other_stacks, refuse_text
from peelwise.model.architectures.table import ARCHITECTURES, find_blocks

__all__ = ["ARCHITECTURES", "find_blocks", "find_head", "is_encoder_decoder", "other_stacks", "refuse_text"]
