"""Features as text, for records in JSON Lines."""

from __future__ import annotations

import base64

import numpy as np

__all__ = ["from_text", "to_text"]


def to_text(features) -> str:
    """A float32 vector (array or tensor) in printable characters, bit by bit."""
    return base64.b64encode(np.asarray(features, dtype="<f4").tobytes()).decode()


def from_text(text: str) -> np.ndarray:
    """The float32 vector that `to_text` wrote. Raises ValueError if it did not."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
