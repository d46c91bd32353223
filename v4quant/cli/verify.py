"""Placeholder until the command lands."""


def verify() -> None:
    """Not built yet."""
