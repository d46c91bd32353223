"""Where a run computes."""

import torch

from v4quant.errors import UsageError

Device = torch.device


def device_named(name: str, local_rank: int | None = None) -> torch.device:
    """The device that a user named, "cpu" or "cuda".

    Args:
        local_rank: number of this process among those of its machine, each of which has a GPU of its own; None for a
            process by itself.

    Raises:
        UsageError: if it is another, or there is no GPU.
    """
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device is {name!r}, expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device is cuda, but torch finds no GPU", hint="Run it with: --device cpu")
    if name == "cpu" or local_rank is None:
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"--device is cuda, and process {local_rank} of this machine finds {torch.cuda.device_count()} GPUs",
            hint="Start as many processes on a machine as it has GPUs.",
        )
    torch.cuda.set_device(local_rank)
    return torch.device(name, local_rank)
