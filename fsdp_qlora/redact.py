"""Secrets out of everything that is written or printed: those of the environment, and what looks like a hub token."""

from __future__ import annotations

import os
import re

MASK = "[secret]"

_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_SHORTEST = 8
"""Shorter values of such variables ('1', 'auto') are no secrets, and masking them would spoil texts."""


def redact(text: str) -> str:
    """Return the text with every secret replaced by a mask."""
    values = {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    return _TOKENS.sub(MASK, text)
