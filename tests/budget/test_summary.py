"""Parameters, checkpoint bytes and what fits on GPUs."""

import math

import pytest

from tests.budget.configs import MILLION, released, tiny
from v4quant.budget import Load, budget, gpu_budget
from v4quant.budget.baselines import v32_parameters
from v4quant.budget.gpu import GPU_MEMORY_MIB, USABLE_SHARE, fits, usable_bytes
from v4quant.budget.kv_cache import compressor_state_bytes, kv_bytes, served_layout
from v4quant.encodings import NATIVE_SCHEME, SCHEMES, Scheme
from v4quant.errors import UsageError
from v4quant.inventory import bytes_by_group, stored_tensors

ONE = Load(context=MILLION, batch=1)


@pytest.mark.parametrize(
    ("name", "total", "active", "with_mtp", "with_embedding", "printed"),
    [
        ("flash", 284_332_240_471, 13_270_101_591, 290_942_289_362, 13_799_632_471, ("284B", "13B")),
        ("pro", 1_572_997_201_763, 48_852_402_019, 1_598_837_347_742, 49_779_081_059, ("1.6T", "49B")),
    ],
)
def test_parameters(
    name: str, total: int, active: int, with_mtp: int, with_embedding: int, printed: tuple[str, str]
) -> None:
    found = budget(released(name), NATIVE_SCHEME, ONE)["parameters"]
    assert (found["total"], found["active"]) == (total, active)
    assert (found["total_with_mtp"], found["active_with_embedding"]) == (with_mtp, with_embedding)
    whole = f"{total / 1e12:.1f}T" if total > 1e12 else f"{total / 1e9:.0f}B"
    assert (whole, f"{active / 1e9:.0f}B") == printed
    routed = {"flash": 277_025_390_592, "pro": 1_547_396_186_112}[name]
    assert (found["routed_experts"], found["embedding"]) == (routed, {"flash": 529_530_880, "pro": 926_679_040}[name])


def test_parameters_of_v32() -> None:
    assert v32_parameters() == (671_876_907_008, 37_476_106_240)


@pytest.mark.parametrize(
    ("name", "bytes_of"),
    [
        (
            "flash",
            {"native": 159_609_485_896, "fp8": 292_502_338_120, "base": 294_673_469_000, "bf16": 581_975_531_080},
        ),
        (
            "pro",
            {
                "native": 864_704_792_696,
                "fp8": 1_602_033_600_632,
                "base": 1_606_032_540_792,
                "bf16": 3_197_868_864_632,
            },
        ),
        ("flash-0731", {"native": 166_878_536_440}),
        ("pro-0813", {"native": 892_727_580_904}),
    ],
)
def test_checkpoint_bytes(name: str, bytes_of: dict[str, int]) -> None:
    found = budget(released(name), NATIVE_SCHEME, ONE)
    assert {fmt: found["checkpoints"][fmt]["bytes"] for fmt in bytes_of} == bytes_of
    assert found["checkpoint_bytes"] == bytes_of["native"]
    assert all(sum(of["by_role"].values()) == of["bytes"] for of in found["checkpoints"].values())


@pytest.mark.parametrize(("name", "expected"), [("flash", 156_015_698_140), ("pro", 850_748_205_004)])
def test_bytes_without_mtp(name: str, expected: int) -> None:
    native = budget(released(name), NATIVE_SCHEME, ONE)["checkpoints"]["native"]
    assert native["bytes_without_mtp"] == expected
    assert native["bytes"] - expected == {"flash": 3_593_787_756, "pro": 13_956_587_692}[name]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_groups_are_those_of_the_stored_tensors(scheme: Scheme) -> None:
    for config in (tiny("flash"), tiny("flash-0731")):
        listed: dict[str, int] = {}
        for tensor in stored_tensors(config, scheme):
            listed[tensor.group] = listed.get(tensor.group, 0) + tensor.bytes
        assert bytes_by_group(config, scheme) == listed


def test_batches() -> None:
    one, four = (budget(released("flash"), NATIVE_SCHEME, Load(1000, batch)) for batch in (1, 4))
    assert four["kv_bytes"] == 4 * one["kv_bytes"] == 4 * four["kv"]["bytes_per_sequence"]
    assert four["ratios"] == one["ratios"]
    assert four["baselines"]["gqa8"]["kv_bytes"] == 4 * one["baselines"]["gqa8"]["kv_bytes"]
    assert four["flops_per_token"] == one["flops_per_token"]


@pytest.mark.parametrize("context", [0, -1, MILLION + 1])
def test_contexts_that_the_model_does_not_take(context: int) -> None:
    with pytest.raises(UsageError, match=r"expected 1 to the 1,048,576 of max_position_embeddings"):
        budget(released("flash"), NATIVE_SCHEME, Load(context, 1))


# GPUs.


def per_sequence(name: str, context: int) -> int:
    config = released(name)
    return kv_bytes(config, context, served_layout(config)) + compressor_state_bytes(config)


def test_memory_of_gpus() -> None:
    assert usable_bytes("H200") == int(0.9 * 143_771 * 2**20)
    with pytest.raises(UsageError, match="expected one of: a100, h100, h20, h200, b200, b300"):
        usable_bytes("rtx")
    assert USABLE_SHARE * min(GPU_MEMORY_MIB.values()) * 2**20 > 75e9


def test_tensor_parallel_keeps_every_cache_on_each_gpu() -> None:
    config, groups = released("flash"), bytes_by_group(released("flash"), NATIVE_SCHEME)
    load = Load(131_072, 32)
    found = fits(config, groups, load, "h200", 8)["tensor_parallel"]
    assert found.weight_bytes == math.ceil(159_609_485_896 / 8)
    left = usable_bytes("h200") - found.weight_bytes
    assert found.sequences == left // per_sequence("flash", 131_072)
    assert found.fits
    assert 32 * per_sequence("flash", found.max_context) <= left < 32 * per_sequence("flash", found.max_context + 128)
    assert found.max_context % 128 == 0


def test_expert_parallel_shares_out_sequences() -> None:
    config, groups = released("flash"), bytes_by_group(released("flash"), NATIVE_SCHEME)
    found = fits(config, groups, Load(MILLION, 9), "h200", 8)["expert_parallel"]
    experts = groups["routed_experts"] + groups["mtp.routed_experts"]
    assert found.weight_bytes == sum(groups.values()) - experts + math.ceil(experts / 8)
    left = usable_bytes("h200") - found.weight_bytes
    assert found.sequences == 8 * (left // per_sequence("flash", MILLION))
    assert found.max_context == MILLION, "9 sequences on 8 GPUs are 2 on one"
    assert 2 * per_sequence("flash", MILLION) <= left


def test_one_gpu_is_the_same_in_both_ways() -> None:
    config, groups = released("flash"), bytes_by_group(released("flash"), NATIVE_SCHEME)
    ways = fits(config, groups, Load(4096, 3), "b300", 1)
    assert ways["tensor_parallel"] == ways["expert_parallel"]


def test_what_does_not_fit() -> None:
    report = budget(released("pro"), NATIVE_SCHEME, ONE)
    found = gpu_budget(released("pro"), report, "h200", 8)["formats"]
    native = found["native"]
    assert native["tensor_parallel"]["fits"]
    assert native["tensor_parallel"]["max_context"] == MILLION
    # 1.8 GB are left on each GPU: less than a million tokens, more than nothing.
    assert not native["expert_parallel"]["fits"]
    assert 0 < native["expert_parallel"]["max_context"] < MILLION
    for name in ("fp8", "base", "bf16"):
        assert found[name]["tensor_parallel"] == {
            "weight_bytes": math.ceil(report["checkpoints"][name]["bytes"] / 8),
            "max_context": 0,
            "sequences": 0,
            "fits": False,
        }
