"""Count what a run executes, and compare with what the config says it has to: a module that never ran proves nothing.

Counts are rows and multiply-adds that really went through the operations. What is expected follows from the config and
the lengths of the prompts alone, by the formulas of the model, not from anything that the run says of itself. Where
ranks share a model, it is what all of them execute together: what each does is counted as often as there are ranks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from v4quant.checkpoint.sharding.grid import Grid
from v4quant.config import V4Config
from v4quant.errors import CheckFailedError
from v4quant.model.streaming import Schedule

CSA, HCA = 4, 128
ONE = Grid(1)


@dataclass(frozen=True)
class Executed:
    """How often something ran.

    Attributes:
        what: a module, and the unit of its counts.
        counted: what went through.
        expected: what has to, by the config.
    """

    what: str
    counted: int
    expected: int


_UNITS = {
    "products": "multiply-adds of BF16 products",
    "FP32 products": "multiply-adds of FP32 products",
    "experts": "tokens in experts, the shared one included",
    "compressed entries": "compressed entries, the indexer's included",
    "indexer": "tokens that the indexer picks for",
    "attention": "tokens that attend",
    "attended entries": "entries attended to",
    "hyper-connections": "tokens through hyper-connections",
}


def executed_by(
    counts: Counter[str], config: V4Config, ratio: int, schedule: Schedule, grid: Grid = ONE
) -> list[Executed]:
    """What a block executed, beside what the config says.

    Args:
        counts: of the block alone.
        ratio: its compression.
        schedule: of the run that was counted.
        grid: how ranks share the model, of whose stage counts are sums.
    """
    expected = _expected(config, ratio, schedule, grid)
    return [Executed(_UNITS[what], counts[what], wanted) for what, wanted in expected.items()]


def require_executed(executed: Sequence[Executed], where: str) -> None:
    """Refuse to compare with a reference of which a part did not run.

    Args:
        where: name of the block, for the message.

    Raises:
        CheckFailedError: if any count is another than expected.
    """
    wrong = [item for item in executed if item.counted != item.expected]
    if wrong:
        raise CheckFailedError(
            f"{where}: {wrong[0].what}: {wrong[0].counted:,} ran, expected {wrong[0].expected:,}: parts of the "
            "reference did not run, so nothing can be compared with it",
            hint="This is a defect of v4quant; please report it.",
        )


def require_finite(streams: torch.Tensor, where: str) -> None:
    """Refuse to compare with a reference that computes no numbers.

    Args:
        streams: activations [T, S, d] after a block.
        where: name of the block, for the message.

    Raises:
        CheckFailedError: if any is NaN or infinite.
    """
    wrong = int((~streams.isfinite()).flatten(1).any(1).sum())
    if wrong:
        raise CheckFailedError(
            f"{where}: what the reference makes of {wrong:,} of {len(streams):,} tokens is NaN or infinite: nothing "
            "can be compared with it",
            hint="Look at the weights of this block of the reference.",
        )


def _expected(config: V4Config, ratio: int, schedule: Schedule, grid: Grid) -> dict[str, int]:
    positions = torch.cat([chunk.positions for chunk in schedule.chunks]).long()
    tokens = len(positions)
    visible = (positions + 1) // ratio if ratio else torch.zeros_like(positions)
    entries = sum(length // ratio for length in _lengths(schedule)) if ratio else 0
    attended = (positions + 1).clamp(max=config.sliding_window)
    attended = attended + (visible.clamp(max=config.index_topk) if ratio == CSA else visible)
    a_token, wide_a_token = _multiply_adds(config, ratio, grid)
    ranks = grid.expert_shares  # of a stage
    expected = {
        "attention": ranks * tokens,
        "attended entries": ranks * int(attended.sum()),
        "hyper-connections": ranks * 4 * tokens,
        "experts": tokens * (ranks + config.num_experts_per_tok),
        "products": tokens * a_token,
        "FP32 products": tokens * wide_a_token,
    }
    if ratio:
        expected["compressed entries"] = ranks * entries * (2 if ratio == CSA else 1)
    if ratio == CSA:
        expected["indexer"] = ranks * int((visible > 0).sum())
    return expected


def _lengths(schedule: Schedule) -> list[int]:
    """Tokens of each prompt."""
    lengths = [0] * schedule.sequences
    for chunk in schedule.chunks:
        for run in chunk.runs:
            lengths[run.sequence] = run.end
    return lengths


def _multiply_adds(config: V4Config, ratio: int, grid: Grid) -> tuple[int, int]:
    """Multiply-adds of a token in a block: of BF16 products, and of FP32 products outside hyper-connections.

    Of cut matrices there is a copy for each of `ep`, of routed experts one, of all else one a rank.
    """
    d, rank, heads, dim = config.hidden_size, config.q_lora_rank, config.num_attention_heads, config.head_dim
    width, groups, o_rank = heads * dim, config.o_groups, config.o_lora_rank
    attention = rank * width + width * o_rank + groups * o_rank * d
    whole = d * rank + d * dim
    expert = 3 * d * config.moe_intermediate_size
    wide = d * config.n_routed_experts
    index = 0
    if ratio:
        overlap = 2 if ratio == CSA else 1
        wide += 2 * d * overlap * dim
    if ratio == CSA:
        index = rank * config.index_n_heads * config.index_head_dim + d * config.index_n_heads
        wide += 2 * d * 2 * config.index_head_dim
    ranks = grid.expert_shares
    a_token = grid.ep * (attention + index) + ranks * (whole + expert) + config.num_experts_per_tok * expert
    return a_token, ranks * wide


def total(blocks: Sequence[Sequence[Executed]]) -> list[Executed]:
    """Counts of all blocks together."""
    counted: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    for block in blocks:
        for item in block:
            counted[item.what] += item.counted
            expected[item.what] += item.expected
    return [Executed(what, counted[what], wanted) for what, wanted in expected.items()]
