"""Where a run computes."""

import torch

from v4quant.errors import UsageError


def device_named(name: str) -> torch.device:
    """The device that a user named, "cpu" or "cuda".

    Raises:
        UsageError: if it is another, or there is no GPU.
    """
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device is {name!r}, expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is cuda, but torch finds no GPU", hint="Run it with: --device cpu")
    return torch.device(name)
