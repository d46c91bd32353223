"""An op of kernels/ at the sizes of a model, beside its torch reference: GPU tests compare them, a benchmark times."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from v4quant.testing.closeness import assert_bf16_close
from v4quant.testing.quantized import Device

Compare = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model as far as ops see them.

    Attributes:
        context: tokens before those of a call.
        experts: routed; with fewer than the model has, weights fit into smaller memories.
        width: of an expert.
        picks: index_topk.
    """

    name: str
    context: int
    hidden: int
    heads: int
    query_rank: int
    experts: int
    width: int
    picks: int
    index_heads: int = 64
    slots: int = 6


FLASH = Sizes("Flash", 16384, hidden=4096, heads=64, query_rank=1024, experts=256, width=2048, picks=512)
PRO = Sizes("Pro", 16384, hidden=7168, heads=128, query_rank=1536, experts=384, width=3072, picks=1024)
TINY = Sizes("tiny", 512, hidden=256, heads=4, query_rank=128, experts=8, width=128, picks=16, index_heads=8)


@dataclass(frozen=True)
class OpRun:
    """Calls of an op and of its reference on equal tensors.

    Attributes:
        op: the public op; its results, or what it changed in place.
        reference: the same of the torch reference.
        compare: of each pair of results, found and expected.
        moved_bytes: with every operand read once and the result written once.
        flops: of its matrix products; 0 without.
    """

    op: Callable[[], Any]
    reference: Callable[[], Any]
    compare: tuple[Compare, ...]
    moved_bytes: int
    flops: int = 0

    def check(self) -> None:
        """Require the op's results to compare with the reference's."""
        found, expected = tensors(self.op()), tensors(self.reference())
        for compare, one, other in zip(self.compare, found, expected, strict=True):
            assert one.shape == other.shape, f"{list(one.shape)}, expected {list(other.shape)}"
            compare(one, other)


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, an argument or a dataclass of them."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [tensor for part in result for tensor in tensors(part)]
    if is_dataclass(result):
        return [tensor for field in fields(result) for tensor in tensors(getattr(result, field.name))]
    return []


def run_of(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: tuple[Any, ...],
    *compare: Compare,
    result_bytes: int,
    flops: int = 0,
    **options: Any,
) -> OpRun:
    """An OpRun that reads all its arguments."""
    read_bytes = sum(tensor.nbytes for tensor in tensors(arguments))
    return OpRun(
        lambda: op(*arguments, **options),
        lambda: reference(*arguments, **options),
        compare,
        read_bytes + result_bytes,
        flops,
    )


def normal(device: Device, *shape: int, seed: int = 5) -> torch.Tensor:
    """Normally distributed bfloat16."""
    random = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=random, device=device).to(torch.bfloat16)


def bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Require equal bytes."""
    differing = int((found.view(torch.uint8) != expected.view(torch.uint8)).sum())
    assert differing == 0, f"{differing} of {found.nbytes} bytes differ"


def nearly_all_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Require equal bytes but for 0.2 %: sums in another order turn a few roundings."""
    differing = int((found.view(torch.uint8) != expected.view(torch.uint8)).sum())
    assert differing <= 0.002 * max(found.nbytes, 1000), f"{differing} of {found.nbytes} bytes differ"


def bf16(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Require neighbouring BF16 numbers, equal but for 1 %."""
    assert_bf16_close(found, expected, 0.01)


def float32(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Require FP32 results of the same sums in another order."""
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def within(share: float) -> Compare:
    """Require the norm of the difference to be at most this share of the norm."""

    def compare(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert bool(found.isfinite().all())
        distance, norm = float((found.float() - expected.float()).norm()), float(expected.float().norm())
        assert distance <= share * norm, f"off by {distance / norm:.1e} of the norm, expected at most {share:.1e}"

    return compare
