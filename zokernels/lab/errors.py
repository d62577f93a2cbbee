"""What a run tells its user when it cannot go on."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do."""


class RunError(RuntimeError):
    """A run that began well had to stop; the message is one sentence that says why."""


# Of a value of the user's: enough to find it by.
_MOST = 120


def shown(value: object) -> str:
    """A value of the user's as an error has it: as Python writes it, and no longer than a line."""
    return cut(repr(value))


def cut(text: str) -> str:
    """A text as an error has it."""
    return text if len(text) <= _MOST else f"{text[:_MOST]}… ({len(text):,} characters)"
