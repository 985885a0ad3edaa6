"""The error behind all errors that the pack raises on purpose."""


class RidfrError(ValueError):
    """Something that a user gave cannot be used; the message is one sentence: what, which one, what to do."""


def in_one_line(error: BaseException) -> str:
    """What an error says, for a sentence of ours: the messages of other packages often have several lines."""
    return " ".join(str(error).split())


def first_line(error: BaseException) -> str:
    """The same where the first line says what is wrong, and the others are advice for programmers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".:")
