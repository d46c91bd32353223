"""Which implementation an op takes, and checks that all ops share."""

import os
from collections.abc import Sequence

import torch

from v4quant.errors import UsageError

VARIABLE = "V4QUANT_KERNELS"


def use_triton(x: torch.Tensor) -> bool:
    """True where an op shall launch its Triton kernel: for CUDA tensors, unless V4QUANT_KERNELS forces one way.

    Raises:
        UsageError: if the variable has another value than torch or triton.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "torch", "triton"):
        raise UsageError(f"{VARIABLE} is {forced!r}, expected torch or triton", hint="Unset it to let each op choose.")
    if forced == "triton" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(f"{VARIABLE} is triton, but tensors are on the CPU", hint="Unset it, or choose a GPU.")
    return forced == "triton" or (forced == "" and x.is_cuda)


def require(name: str, x: torch.Tensor, dtype: torch.dtype, shape: Sequence[int | None]) -> None:
    """Check a tensor argument.

    Args:
        name: the argument's name, for the error.
        shape: sizes that it must have; None takes any.

    Raises:
        TypeError: if the dtype is another.
        ValueError: if the shape is another, or the tensor is not contiguous.
    """
    if x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}, expected {dtype}")
    if len(x.shape) != len(shape) or any(
        want is not None and want != have for want, have in zip(shape, x.shape, strict=True)
    ):
        wanted = [size if size is not None else "any" for size in shape]
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {wanted}")
    if not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")
