"""Which GPU a kernel is launched for, by the names that launch choices and offline compilation share."""

import torch


def target_of(device: torch.device) -> str:
    """ "sm_90", "gfx942"; "interpreter" for a CPU, where Triton bodies only ever run interpreted."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def capability(target: str) -> int:
    """90 for "sm_90"; 0 for what is not NVIDIA's."""
    return int(target.removeprefix("sm_")) if target.startswith("sm_") else 0


def has_fp8_mma(target: str) -> bool:
    """Whether E4M3 operands have a matrix instruction. gfx942 multiplies another E4M3, without a negative zero."""
    return capability(target) >= 89


def has_block_scaled_mma(target: str) -> bool:
    """Whether tl.dot_scaled becomes tcgen05 with block scales; sm_120 has none that Triton uses, and upcasts."""
    return 100 <= capability(target) < 110
