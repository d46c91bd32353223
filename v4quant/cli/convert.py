"""Placeholder until the command lands."""


def convert() -> None:
    """Not built yet."""
