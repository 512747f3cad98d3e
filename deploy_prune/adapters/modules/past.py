"""The key/value cache as a module is handed it: its argument has had two names."""

from __future__ import annotations

from typing import Any

NAMES = ("cache", "past_key_values")  # transformers from 5.24 on, and before


def taken_past(arguments: dict[str, Any]) -> Any:
    """The cache among a module's keyword arguments, taken out of them under whichever name; None without one."""
    found = [arguments.pop(name, None) for name in NAMES]
    return next((past for past in found if past is not None), None)
