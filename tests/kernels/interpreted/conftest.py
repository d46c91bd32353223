"""Poison for memory that a kernel must write."""

from typing import Any

import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh tensors with bytes 0xFF, NaN in every float format: what a kernel leaves out fails."""

    def poisoned(make: Any) -> Any:
        def fresh(*args: Any, **kwargs: Any) -> torch.Tensor:
            made: torch.Tensor = make(*args, **kwargs)
            made.flatten().view(torch.uint8).fill_(255)
            return made

        return fresh

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
