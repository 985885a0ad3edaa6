"""The error behind all errors that the pack raises on purpose."""


class RidfrError(ValueError):
    """Something that a user gave cannot be used; the message is one sentence: what, which one, what to do."""


def in_one_line(error: BaseException) -> str:
    """What an error says, for a sentence of ours: the messages of other packages often have several lines."""
    return " ".join(str(error).split())
