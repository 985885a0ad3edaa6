"""The error behind all errors that the pack raises on purpose."""


class RidfrError(ValueError):
    """Something that a user gave cannot be used; the message is one sentence: what, which one, what to do."""
