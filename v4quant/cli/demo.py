"""Placeholder until the command lands."""


def demo() -> None:
    """Not built yet."""
