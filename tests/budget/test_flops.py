"""FLOPs by part: the printed figures, sums over positions against counting, and matrices against the inventory."""

from collections import Counter

import pytest

from tests.budget.configs import MILLION, released, tiny
from v4quant.budget import baselines, flops
from v4quant.budget.flops import FP8_EQUIVALENT, decode_flops, fp8_equivalents, prefill_flops
from v4quant.inventory import logical_tensors
from v4quant.names import Role, parse_name

PARTS = {
    "pro": {
        "fp8_linears": "37.21",
        "routed_experts": "48.36",
        "output_groups": "8.19",
        "router": "0.34",
        "hyper_connections": "0.17",
        "compressors": "1.58",
        "head": "1.85",
        "core_attention": "76.67",
        "indexer_scores": "128.85",
    },
    "flash": {
        "fp8_linears": "8.83",
        "routed_experts": "12.99",
        "output_groups": "2.89",
        "router": "0.09",
        "hyper_connections": "0.07",
        "compressors": "0.62",
        "head": "1.06",
        "core_attention": "23.61",
        "indexer_scores": "90.19",
    },
}


@pytest.mark.parametrize(("name", "total"), [("pro", "303.2"), ("flash", "140.3")])
def test_parts_of_a_decode_step_at_a_million(name: str, total: str) -> None:
    found = decode_flops(released(name), MILLION)
    assert {part: f"{count / 1e9:.2f}" for part, count in found.items()} == PARTS[name]
    assert f"{sum(found.values()) / 1e9:.1f}" == total


def test_parts_of_v32() -> None:
    found = baselines.v32_decode_flops(MILLION)
    assert {part: f"{count / 1e9:.2f}" for part, count in found.items()} == {
        "fp8_linears": "70.78",
        "kv_up_projection": "2.05",
        "router": "0.27",
        "head": "1.85",
        "core_attention": "34.80",
        "indexer_scores": "1047.97",
    }
    assert f"{sum(found.values()) / 1e9:.1f}" == "1157.7"


@pytest.mark.parametrize(("name", "low", "high"), [("pro", 0.26, 0.28), ("flash", 0.095, 0.105)])
@pytest.mark.parametrize("million", [MILLION, 1_000_000])
def test_published_shares_of_v32(name: str, low: float, high: float, million: int) -> None:
    """27 % and 10 %: the report gives no formula, so that ranges are all that can be asserted."""
    v32 = baselines.v32_fp8_equivalents(baselines.v32_decode_flops(million))
    assert low < fp8_equivalents(decode_flops(released(name), million)) / v32 < high


def test_weights_that_would_miss_the_published_shares() -> None:
    """Core attention at FP8 speed, or the indexer at FP8 and not FP4, is not what was published."""
    for part, weight in (("core_attention", 1), ("indexer_scores", 1)):
        weights = {**FP8_EQUIVALENT, part: weight}
        v32 = baselines.v32_decode_flops(MILLION)
        whole = sum(
            {**baselines.V32_FP8_EQUIVALENT, "core_attention": weights["core_attention"]}[p] * v32[p] for p in v32
        )
        pro = sum(weights[p] * count for p, count in decode_flops(released("pro"), MILLION).items())
        assert not 0.26 < pro / whole < 0.28


def test_where_the_work_is() -> None:
    """Most of V3.2's FLOPs at a million tokens are indexer scores, and active parameters a third of V4-Pro's."""
    v32 = baselines.v32_decode_flops(MILLION)
    assert 0.87 < v32["indexer_scores"] / baselines.v32_fp8_equivalents(v32) < 0.91
    pro = decode_flops(released("pro"), MILLION)
    assert 0.29 < 2 * 48_852_402_019 / fp8_equivalents(pro) < 0.33


@pytest.mark.parametrize("name", ["pro", "flash", "pro-0813"])
def test_matrices_are_those_of_the_inventory(name: str) -> None:
    """Every matrix of the trunk is in one part, with two FLOPs a weight."""
    config = released(name)
    found: Counter[str] = Counter()
    for tensor in logical_tensors(config):
        parts = parse_name(tensor.name)
        assert parts is not None
        if (
            parts.block == "mtp"
            or len(tensor.shape) < 2
            or parts.leaf in ("ape", "tid2eid")
            or tensor.name == "embed.weight"
        ):
            continue
        part = {
            Role.ROUTED_EXPERTS: "routed_experts",
            Role.ROUTER: "router",
            Role.HYPER_CONNECTIONS: "hyper_connections" if parts.block else "head",
            Role.COMPRESSOR: "compressors",
            Role.HEAD: "head",
        }.get(parts.role, "fp8_linears" if tensor.kind == "dense" else "compressors")
        part = "output_groups" if parts.module == "attn.wo_a" else part
        found[part] += 2 * tensor.shape[0] * tensor.shape[1]
    found["routed_experts"] = found["routed_experts"] * config.num_experts_per_tok // config.n_routed_experts
    expected = decode_flops(config, 1)
    assert found == {
        part: count for part, count in expected.items() if part not in ("core_attention", "indexer_scores")
    }


@pytest.mark.parametrize("context", [1, 3, 4, 31, 32, 63, 64, 67, 68, 127, 128, 255, 300, 1000])
def test_a_prompt_is_the_sum_of_its_positions(context: int) -> None:
    config = tiny()
    assert (config.sliding_window, config.index_topk) == (32, 16)
    steps = [decode_flops(config, position) for position in range(1, context + 1)]
    whole = prefill_flops(config, context)
    for part, count in whole.items():
        if part == "head":
            assert count == pytest.approx(steps[0]["head"] / context)
        else:
            assert count == pytest.approx(sum(step[part] for step in steps) / context), part


def test_the_last_token_sees_itself() -> None:
    config = tiny()
    per_key = 2 * 2 * config.num_attention_heads * config.head_dim
    assert decode_flops(config, 1)["core_attention"] == per_key * config.num_hidden_layers
    assert flops.decode_flops(config, 3)["indexer_scores"] == 0


def test_dense_attention_with_gqa8() -> None:
    config = released("pro")
    one, two = (baselines.gqa8_decode_flops(config, n, others=5.0) for n in (1, 2))
    assert two - one == 2 * 61 * 128 * 256
    assert one - (two - one) == 5.0
