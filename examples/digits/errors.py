"""What the example cannot do without, said in words."""

from __future__ import annotations

import importlib
from typing import Any


class DigitsError(Exception):
    """Something that the example needs is missing or does not work; the message says what to do."""


def needed(module: str, package: str) -> Any:
    """A module of the `examples` extra; raises DigitsError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DigitsError(
            f"{package} is not installed ({error}): pip install 'mempool[examples]', or {package} alone"
        ) from error
