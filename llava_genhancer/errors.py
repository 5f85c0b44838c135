"""The one exception a user is meant to read, and the words it takes from others."""


class InputError(ValueError):
    """Something the user gave us cannot be used.

    The message is a single line that says what is wrong, where, and what to do about it. The command line prints it
    and exits with status 2; as a library, catch it like any ``ValueError``.
    """


def reason(error: BaseException) -> str:
    """What another library's exception says, as part of our one line: its first line, or its type if it is mute."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
