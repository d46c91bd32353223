"""What the tests of `shard` and `merge` share: checkpoints that many numbers of ranks divide, and one-call runs."""

from pathlib import Path

from v4quant.checkpoint.reader import open_checkpoint
from v4quant.checkpoint.sharding.folder import open_sharded
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.merge import MergePlan, apply_merge
from v4quant.checkpoint.sharding.rules import Layout
from v4quant.checkpoint.sharding.shard import ShardReport, apply_shard, plan_shard
from v4quant.testing.releases import synth_config
from v4quant.testing.synth import write_checkpoint

# Eight heads, groups, experts and indexer heads, each with whole scale blocks: 1, 2, 4 and 8 ranks work.
_WIDE = {
    "num_attention_heads": 8,
    "o_groups": 8,
    "o_lora_rank": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "index_n_heads": 8,
}


def write_wide(folder: Path, like: str = "flash", *, layers: int = 3, seed: int = 0, **changes: int) -> Path:
    """Write a small checkpoint that 1, 2, 4 and 8 ranks divide; three layers have all features."""
    config_json, scheme = synth_config(like, tiny=True, layers=layers)
    write_checkpoint(folder, config_json | _WIDE | changes, scheme, seed)
    if "base" not in like:
        (folder / "encoding").mkdir()
        (folder / "encoding" / "encoding.py").write_text("# carried along\n")
        (folder / "empty.txt").write_text("")
    return folder


def shard(source: Path, out: Path, ranks: int, *, fp8_experts: bool = False, workers: int = 2) -> ShardReport:
    """Plan and apply."""
    return apply_shard(plan_shard(open_checkpoint(source), Grid(ranks), fp8_experts=fp8_experts), out, workers=workers)


def split(source: Path, out: Path, grid: Grid, *, workers: int = 2, max_shard_bytes: int = 10**9) -> ShardReport:
    """Plan and apply, a folder a rank."""
    plan = plan_shard(open_checkpoint(source), grid, Layout.RANKS, max_shard_bytes=max_shard_bytes)
    return apply_shard(plan, out, workers=workers)


def merge(source: Path, out: Path, *, workers: int = 2) -> int:
    """Plan and apply."""
    return apply_merge(MergePlan(open_sharded(source)), out, workers=workers)
