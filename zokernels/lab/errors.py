"""What a run tells its user when it cannot go on."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do."""


class RunError(RuntimeError):
    """A run that began well had to stop; the message is one sentence that says why."""
