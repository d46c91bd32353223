"""The inventory of each release equals what was published of it, and the headers of the reference checkpoints."""

import json
import struct
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from v4quant.config import V4Config
from v4quant.encodings import BASE_SCHEME, BF16_SCHEME, FP8_SCHEME, NATIVE_SCHEME, SCHEMES, Scheme
from v4quant.inventory import (
    CUSTOM_RELEASE,
    StoredTensor,
    inventory,
    logical_tensors,
    parameters,
    release_name,
    stored_tensors,
)
from v4quant.names import parse_name, scale_name

DATA = Path(__file__).parent / "data"
REFERENCES = sorted((DATA / "reference").iterdir())
# Only on machines that have the whole set of reference checkpoints beside the repository.
REFERENCES += [path for path in [DATA.parents[2] / "shared" / "reference" / "tiny-pro"] if path.exists()]


@cache
def config(name: str) -> V4Config:
    path = DATA / "configs" / f"{name}.json"
    return V4Config.load(path.read_bytes(), path.name)


@cache
def stored(name: str, scheme: str) -> list[StoredTensor]:
    return stored_tensors(config(name), SCHEMES[scheme])


# Published tensor counts, total bytes, and dtype: (tensors, bytes). Sources: the releases' model.safetensors.index.json
# and headers. Pro-Base is computed: nothing of it is published.
CENSUS: dict[tuple[str, str], tuple[int, int, dict[str, tuple[int, int]]]] = {
    ("flash", "native"): (
        69_187,
        159_609_485_896,
        {
            "BF16": (433, 2_830_518_528),
            "F32": (417, 144_672_072),
            "F8_E4M3": (375, 6_023_020_544),
            "F8_E8M0": (34_167, 8_858_737_664),
            "I64": (3, 18_616_320),
            "I8": (33_792, 141_733_920_768),
        },
    ),
    ("pro", "native"): (
        145_116,
        864_704_792_696,
        {
            "BF16": (619, 5_633_798_656),
            "F32": (590, 351_105_656),
            "F8_E4M3": (528, 23_169_335_296),
            "F8_E8M0": (71_952, 49_150_268_416),
            "I64": (3, 18_616_320),
            "I8": (71_424, 786_381_668_352),
        },
    ),
    ("flash-0731", "native"): (
        72_317,
        166_878_536_440,
        {
            "BF16": (445, 2_967_134_976),
            "F32": (433, 150_966_520),
            "F8_E4M3": (390, 6_304_038_912),
            "F8_E8M0": (35_718, 9_261_408_000),
            "I64": (3, 18_616_320),
            "I8": (35_328, 148_176_371_712),
        },
    ),
    ("pro-0813", "native"): (
        149_782,
        892_727_580_904,
        {
            "BF16": (631, 5_909_640_704),
            "F32": (606, 362_120_232),
            "F8_E4M3": (543, 23_952_621_568),
            "F8_E8M0": (74_271, 50_735_763_136),
            "I64": (3, 18_616_320),
            "I8": (73_728, 811_748_818_944),
        },
    ),
    ("flash", "base"): (
        69_189,
        294_673_469_000,
        {
            "BF16": (435, 4_948_642_048),
            "F32": (34_584, 215_348_552),
            "F8_E4M3": (34_167, 289_490_862_080),
            "I64": (3, 18_616_320),
        },
    ),
    ("pro", "base"): (
        145_118,
        1_606_032_540_792,
        {
            "BF16": (621, 9_340_514_816),
            "F32": (72_542, 740_737_656),
            "F8_E4M3": (71_952, 1_595_932_672_000),
            "I64": (3, 18_616_320),
        },
    ),
}


@pytest.mark.parametrize(("release", "scheme"), CENSUS)
def test_released_census(release: str, scheme: str) -> None:
    tensors = stored(release, scheme)
    count, total, by_dtype = CENSUS[release, scheme]
    found: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        before = found.get(tensor.dtype, (0, 0))
        found[tensor.dtype] = (before[0] + 1, before[1] + tensor.bytes)
    assert found == by_dtype
    assert len(tensors) == len({tensor.name for tensor in tensors}) == count
    assert sum(tensor.bytes for tensor in tensors) == total


@pytest.mark.parametrize(
    ("release", "scheme", "count", "total"),
    [
        ("flash", "fp8", 69_187, 292_502_338_120),
        ("pro", "fp8", 145_116, 1_602_033_600_632),
        ("flash", "bf16", 35_020, 581_975_531_080),
        ("pro", "bf16", 73_164, 3_197_868_864_632),
    ],
)
def test_converted_checkpoints(release: str, scheme: str, count: int, total: int) -> None:
    tensors = stored(release, scheme)
    assert (len(tensors), sum(tensor.bytes for tensor in tensors)) == (count, total)


def test_flash_base_without_its_own_mtp_embedding_and_head() -> None:
    tensors = stored("flash", "base")
    optional = [(t.name, t.role, t.dtype, t.shape) for t in tensors if t.optional]
    assert optional == [
        ("mtp.0.emb.tok_emb.weight", "mtp_embedding", "BF16", (129_280, 4096)),
        ("mtp.0.head.weight", "mtp_head", "BF16", (129_280, 4096)),
    ]
    required = [t for t in tensors if not t.optional]
    assert (len(required), sum(t.bytes for t in required)) == (69_187, 292_555_345_480)


def test_optional_tensors_are_those_of_base_only() -> None:
    assert not any(t.optional for scheme in ("native", "fp8", "bf16") for t in stored("flash", scheme))
    assert not any(t.optional for t in logical_tensors(config("flash")))
    assert not any(t.optional for t in stored_tensors(config("flash-0731"), BASE_SCHEME))


def test_flash_by_groups() -> None:
    """The split that another project published of Flash: 1,199 direct, 365 block scales, 66,048 expert parts, MTP."""
    counts: Counter[str] = Counter()
    for tensor in stored("flash", "native"):
        name = parse_name(tensor.name)
        assert name is not None
        if name.block == "mtp":
            counts["mtp"] += 1
        elif name.expert >= 0:
            counts["expert"] += 1
        else:
            counts["scale" if name.is_scale else "direct"] += 1
    assert counts == {"direct": 1_199, "scale": 365, "expert": 66_048, "mtp": 1_575}


@pytest.mark.parametrize(
    ("release", "with_mtp", "without_mtp", "rounded"),
    [
        ("flash", 290_942_289_362, 284_332_240_471, "284B"),
        ("pro", 1_598_837_347_742, 1_572_997_201_763, "1573B"),
        # Published with the hash tables counted: 3 tables of 129,280 tokens by 6 experts.
        ("flash-0731", 304_180_418_494 - 3 * 129_280 * 6, 284_332_240_471, "284B"),
        ("pro-0813", 1_650_497_936_906 - 3 * 129_280 * 6, 1_572_997_201_763, "1573B"),
    ],
)
def test_parameters(release: str, with_mtp: int, without_mtp: int, rounded: str) -> None:
    assert parameters(config(release)) == with_mtp
    assert parameters(config(release), mtp=False) == without_mtp
    assert f"{without_mtp / 1e9:.0f}B" == rounded


SHARDS = json.loads((DATA / "configs" / "shards.json").read_bytes())


@pytest.mark.parametrize(
    ("release", "config_name"),
    [
        ("DeepSeek-V4-Flash", "flash"),
        ("DeepSeek-V4-Pro", "pro"),
        ("DeepSeek-V4-Flash-0731", "flash-0731"),
        ("DeepSeek-V4-Pro-0813", "pro-0813"),
    ],
)
def test_every_block_fills_its_released_shard(release: str, config_name: str) -> None:
    """One block a shard, in order: tensors and payload of each are known from the released files."""
    tensors: Counter[tuple[str, int]] = Counter()
    payload: Counter[tuple[str, int]] = Counter()
    for tensor in stored(config_name, "native"):
        name = parse_name(tensor.name)
        assert name is not None
        block = ("embed", 0) if tensor.name == "embed.weight" else (name.block, name.index)
        tensors[block] += 1
        payload[block] += tensor.bytes
    released = [(count, file_bytes - header) for file_bytes, header, count in SHARDS[release]["files"].values()]
    assert [(tensors[block], payload[block]) for block in tensors] == released


def read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


@pytest.mark.parametrize("folder", REFERENCES, ids=lambda folder: folder.name)
def test_reference_checkpoints_hold_exactly_the_inventory(folder: Path) -> None:
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        for name, entry in read_header(path).items():
            found[name] = (entry["dtype"], tuple(entry["shape"]))
    tensors = inventory(V4Config.load((folder / "config.json").read_bytes(), folder.name))
    expected = {t.name: (t.dtype, t.storage_shape) for t in tensors if not t.optional}
    assert len(found) > 300
    assert found == expected


@pytest.mark.parametrize(
    ("name", "scheme"), [("flash", "native"), ("flash", "base"), ("flash-0731", "native"), ("flash", "bf16")]
)
def test_every_name_parses_to_the_role_it_was_given(name: str, scheme: str) -> None:
    for tensor in stored(name, scheme):
        parsed = parse_name(tensor.name)
        assert parsed is not None, tensor.name
        assert (parsed.role, parsed.group) == (tensor.role, tensor.group), tensor.name


def tiny_config() -> V4Config:
    return V4Config.load((DATA / "reference" / "tiny-flash" / "config.json").read_bytes(), "tiny-flash")


def tiny_dspark_config() -> V4Config:
    """tiny-flash with three DSpark stages in place of its MTP block."""
    tiny = tiny_config()
    return replace(
        tiny,
        compress_ratios=(*tiny.compress_ratios, 0, 0),
        dspark_markov_rank=64,
        dspark_target_layer_ids=(2, 3, 4),
    )


@pytest.mark.parametrize("tiny", [tiny_config(), tiny_dspark_config()], ids=["april", "dspark"])
def test_stored_and_logical_tensors_agree(tiny: V4Config) -> None:
    """Weights in the same order, each quantised one followed by its scale, never-quantised ones of the same dtype."""
    for scheme in SCHEMES.values():
        tensors = iter(t for t in stored_tensors(tiny, scheme) if not t.optional)
        for logical in logical_tensors(tiny):
            weight = next(tensors)
            assert (weight.name, weight.shape) == (logical.name, logical.shape)
            if logical.kind == "plain":
                assert (weight.dtype, weight.storage_shape) == (logical.dtype, logical.shape)
                continue
            assert logical.dtype == ""
            encoding = scheme.expert if logical.kind == "expert" else scheme.dense
            assert weight.dtype == encoding.weight_dtype
            assert encoding.logical_shape(weight.storage_shape) == logical.shape
            if encoding.block is not None:
                scale = next(tensors)
                assert scale.name == scale_name(weight.name)
                assert (scale.role, scale.group, scale.dtype) == (weight.role, weight.group, encoding.scale_dtype)
                assert scale.storage_shape == scale.shape == encoding.scale_shape(logical.shape)
        assert next(tensors, None) is None


@pytest.mark.parametrize(
    ("name", "scheme", "expected"),
    [
        ("flash", NATIVE_SCHEME, "DeepSeek-V4-Flash"),
        ("flash", FP8_SCHEME, "DeepSeek-V4-Flash"),
        ("flash", BF16_SCHEME, "DeepSeek-V4-Flash"),
        ("flash", BASE_SCHEME, "DeepSeek-V4-Flash-Base"),
        ("pro", NATIVE_SCHEME, "DeepSeek-V4-Pro"),
        ("pro", BASE_SCHEME, "DeepSeek-V4-Pro-Base"),
        ("flash-0731", NATIVE_SCHEME, "DeepSeek-V4-Flash (DSpark, 0731)"),
        ("pro-0813", NATIVE_SCHEME, "DeepSeek-V4-Pro (DSpark, 0813)"),
    ],
)
def test_release_name(name: str, scheme: Scheme, expected: str) -> None:
    assert release_name(config(name), scheme) == expected


def test_other_dimensions_are_no_release() -> None:
    flash, dspark = config("flash"), config("flash-0731")
    others = [
        replace(flash, n_routed_experts=128),
        replace(flash, num_hidden_layers=42, compress_ratios=flash.compress_ratios[1:]),
        replace(flash, compress_ratios=(*flash.compress_ratios, 0)),
        replace(flash, compress_ratios=flash.compress_ratios[:-1]),
        replace(dspark, dspark_markov_rank=512),
        replace(dspark, compress_ratios=dspark.compress_ratios[:-1]),
    ]
    assert {release_name(other, NATIVE_SCHEME) for other in others} == {CUSTOM_RELEASE}


def test_inventory_follows_the_config() -> None:
    tiny = tiny_config()
    assert inventory(tiny) == stored_tensors(tiny, NATIVE_SCHEME)
    base = replace(tiny, expert_dtype="fp8")
    assert inventory(base) == inventory(replace(tiny, expert_dtype=None)) == stored_tensors(base, BASE_SCHEME)
    plain = replace(tiny, expert_dtype=None, quantization_config=None)
    assert inventory(plain) == stored_tensors(plain, BF16_SCHEME)


def test_edge_blocks_count_as_whole_scales() -> None:
    """Dimensions that are no multiple of 128 leave part of a block, which still has a scale."""
    odd = replace(tiny_config(), hidden_size=256 + 32, moe_intermediate_size=128 - 32)
    shapes = {t.name: t.storage_shape for t in stored_tensors(odd, NATIVE_SCHEME)}
    assert shapes["layers.0.ffn.shared_experts.w1.weight"] == (96, 288)
    assert shapes["layers.0.ffn.shared_experts.w1.scale"] == (1, 3)
    assert shapes["layers.0.ffn.experts.0.w2.weight"] == (288, 48)
    assert shapes["layers.0.ffn.experts.0.w2.scale"] == (288, 3)


def test_dspark_with_one_stage_has_both_ends() -> None:
    dspark = tiny_dspark_config()
    one = replace(dspark, compress_ratios=dspark.compress_ratios[:-2])
    names = {t.name for t in stored_tensors(one, NATIVE_SCHEME)}
    assert {"mtp.0.main_proj.scale", "mtp.0.main_norm.weight", "mtp.0.markov_head.markov_w2.weight"} <= names
    assert not any(name.startswith("mtp.1.") for name in names)
