"""Everything that touches an ``nn.Module``, and no mathematics."""
