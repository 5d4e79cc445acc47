"""What a user is told when something cannot be opened."""

from __future__ import annotations

import pytest

from peelwise.errors import ModelError
from peelwise.model.checkpoints import open_model


def refused(source, *parts, **options):
    """Open, and return the one line that says why it cannot be."""
    with pytest.raises(ModelError) as caught:
        open_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    assert "Traceback" not in message
    for part in parts:
        assert part in message
    return message
