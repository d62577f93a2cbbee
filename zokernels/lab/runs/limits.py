"""What values a setting may have, and how that is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

# What a counter of 64 bits holds, and a pass in binary32.
_MOST, _LARGEST = 2**63 - 1, 3e38


class Limit(Protocol):
    """What values a setting may have."""

    def refusal(self, value: Any) -> str | None:
        """What is wrong with a value, to follow the option's name; None where it is allowed."""


@dataclass(frozen=True)
class OneOf:
    """One of some words, or of the values of a table's keys; None may be among them."""

    allowed: tuple[Any, ...]

    def refusal(self, value: Any) -> str | None:
        """As of any limit."""
        if value in self.allowed:
            return None
        return f"must be one of {', '.join(a for a in self.allowed if a)}, got '{value}'."


@dataclass(frozen=True)
class Count:
    """A whole number from ``least`` on."""

    least: int

    def refusal(self, value: Any) -> str | None:
        """As of any limit."""
        if value is None or self.least <= value <= _MOST:
            return None
        bound = f"least {self.least}" if value < self.least else f"most {_MOST}"
        return f"must be at {bound}, got {value}."


@dataclass(frozen=True)
class Rate:
    """A number from 0 on that binary32 holds."""

    def refusal(self, value: Any) -> str | None:
        """As of any limit."""
        if value is None or 0 <= value <= _LARGEST:
            return None
        return f"must be a number from 0 up to {_LARGEST:g}, got {value}."


@dataclass(frozen=True)
class Scale:
    """A number above 0 that binary32 can be multiplied with and divided by."""

    def refusal(self, value: Any) -> str | None:
        """As of any limit."""
        if value is None or 1 / _LARGEST <= value <= _LARGEST:
            return None
        return f"must be a number above 0, from {1 / _LARGEST:.0e} to {_LARGEST:g}, got {value}."


@dataclass(frozen=True)
class Share:
    """A number between 0 and 1, and perhaps 0 itself."""

    with_zero: bool = False

    def refusal(self, value: Any) -> str | None:
        """As of any limit."""
        if value is None or 0 < value < 1 or (self.with_zero and value == 0):
            return None
        return f"must lie between 0 and 1, got {value}."


@dataclass(frozen=True)
class CountOrAll:
    """A whole number from ``least`` on, or "all"."""

    least: int

    def refusal(self, value: Any) -> str | None:
        """As of any limit."""
        if value == "all" or (type(value) is int and value >= self.least):
            return None
        return f"must be a number from {self.least} on, or all, got '{value}'."
