"""What another library's error says, in one line."""


def reason(error: Exception) -> str:
    """The first line of the message, or the error's kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
