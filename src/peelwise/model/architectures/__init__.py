"""What is known of architectures: where the blocks of a model are, and what cannot be measured."""
