"""Our docstrings say ``Example:``; the parser of Google-style docstrings knows the section as ``Examples:``."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class OneExample(Extension):
    """Read ``Example:`` as the section it is, so that its ``>>>`` lines are shown as code."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
