"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Something the user gave us cannot be used.

    The message is a single line that says what is wrong, where, and what to do about it. The command line prints it
    and exits with status 2; as a library, catch it like any ``ValueError``.
    """
