"""Every name of every release parses to its parts; everything else, however close, is no V4 name."""

import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from v4quant.names import (
    Role,
    TensorName,
    block_prefix,
    expert_name,
    in_block,
    of_expert,
    other_spelling,
    parse_name,
    scale_name,
)

# Name, block, index, module, expert, leaf, role: at least one of every row of the releases' inventories.
Row = tuple[str, str, int, str, int, str, str]
NAMES: list[Row] = [
    ("embed.weight", "", -1, "embed", -1, "weight", "embedding"),
    ("head.weight", "", -1, "head", -1, "weight", "head"),
    ("norm.weight", "", -1, "norm", -1, "weight", "final_norm"),
    ("hc_head_fn", "", -1, "", -1, "hc_head_fn", "hyper_connections"),
    ("hc_head_base", "", -1, "", -1, "hc_head_base", "hyper_connections"),
    ("hc_head_scale", "", -1, "", -1, "hc_head_scale", "hyper_connections"),
    ("layers.0.attn_norm.weight", "layers", 0, "attn_norm", -1, "weight", "norm"),
    ("layers.60.ffn_norm.weight", "layers", 60, "ffn_norm", -1, "weight", "norm"),
    ("layers.7.attn.q_norm.weight", "layers", 7, "attn.q_norm", -1, "weight", "norm"),
    ("layers.7.attn.kv_norm.weight", "layers", 7, "attn.kv_norm", -1, "weight", "norm"),
    ("layers.7.attn.attn_sink", "layers", 7, "attn", -1, "attn_sink", "attention"),
    ("layers.42.attn.wq_a.weight", "layers", 42, "attn.wq_a", -1, "weight", "attention"),
    ("layers.42.attn.wq_a.scale", "layers", 42, "attn.wq_a", -1, "scale", "attention"),
    ("layers.1023.attn.wo_b.scale", "layers", 1023, "attn.wo_b", -1, "scale", "attention"),
    ("layers.2.attn.compressor.ape", "layers", 2, "attn.compressor", -1, "ape", "compressor"),
    ("layers.2.attn.compressor.norm.weight", "layers", 2, "attn.compressor.norm", -1, "weight", "compressor"),
    ("layers.2.attn.compressor.wkv.weight", "layers", 2, "attn.compressor.wkv", -1, "weight", "compressor"),
    ("layers.2.attn.indexer.wq_b.scale", "layers", 2, "attn.indexer.wq_b", -1, "scale", "indexer"),
    ("layers.2.attn.indexer.weights_proj.weight", "layers", 2, "attn.indexer.weights_proj", -1, "weight", "indexer"),
    ("layers.2.attn.indexer.compressor.ape", "layers", 2, "attn.indexer.compressor", -1, "ape", "indexer"),
    ("layers.9.hc_attn_scale", "layers", 9, "", -1, "hc_attn_scale", "hyper_connections"),
    ("layers.9.hc_ffn_fn", "layers", 9, "", -1, "hc_ffn_fn", "hyper_connections"),
    ("layers.9.ffn.gate.weight", "layers", 9, "ffn.gate", -1, "weight", "router"),
    ("layers.9.ffn.gate.bias", "layers", 9, "ffn.gate", -1, "bias", "router"),
    ("layers.1.ffn.gate.tid2eid", "layers", 1, "ffn.gate", -1, "tid2eid", "hash_table"),
    ("layers.1.ffn.shared_experts.w2.scale", "layers", 1, "ffn.shared_experts.w2", -1, "scale", "shared_experts"),
    ("layers.1.ffn.experts.0.w1.weight", "layers", 1, "ffn.experts.w1", 0, "weight", "routed_experts"),
    ("layers.1.ffn.experts.383.w3.scale", "layers", 1, "ffn.experts.w3", 383, "scale", "routed_experts"),
    ("mtp.0.attn.wkv.weight", "mtp", 0, "attn.wkv", -1, "weight", "attention"),
    ("mtp.2.ffn.experts.10.w2.scale", "mtp", 2, "ffn.experts.w2", 10, "scale", "routed_experts"),
    ("mtp.0.e_proj.weight", "mtp", 0, "e_proj", -1, "weight", "mtp_projection"),
    ("mtp.0.h_proj.scale", "mtp", 0, "h_proj", -1, "scale", "mtp_projection"),
    ("mtp.0.enorm.weight", "mtp", 0, "enorm", -1, "weight", "mtp_projection"),
    ("mtp.0.hnorm.weight", "mtp", 0, "hnorm", -1, "weight", "mtp_projection"),
    ("mtp.0.main_proj.scale", "mtp", 0, "main_proj", -1, "scale", "mtp_projection"),
    ("mtp.0.main_norm.weight", "mtp", 0, "main_norm", -1, "weight", "mtp_projection"),
    ("mtp.0.norm.weight", "mtp", 0, "norm", -1, "weight", "final_norm"),
    ("mtp.2.hc_head_scale", "mtp", 2, "", -1, "hc_head_scale", "hyper_connections"),
    ("mtp.2.markov_head.markov_w1.weight", "mtp", 2, "markov_head.markov_w1", -1, "weight", "markov_head"),
    ("mtp.2.markov_head.markov_w2.weight", "mtp", 2, "markov_head.markov_w2", -1, "weight", "markov_head"),
    ("mtp.2.markov_head.embed.weight", "mtp", 2, "markov_head.embed", -1, "weight", "markov_head"),
    ("mtp.2.markov_head.head.weight", "mtp", 2, "markov_head.head", -1, "weight", "markov_head"),
    ("mtp.2.confidence_head.proj.weight", "mtp", 2, "confidence_head.proj", -1, "weight", "confidence_head"),
    *(
        (f"mtp.0.{module}.weight", "mtp", 0, module, -1, "weight", "mtp_embedding")
        for module in ("emb.tok_emb", "emb", "embed")
    ),
    *(
        (f"mtp.0.{module}.weight", "mtp", 0, module, -1, "weight", "mtp_head")
        for module in ("head", "lm_head", "shared_head.head")
    ),
]

# Modules with block scales in some release.
QUANTISED = {
    *(f"attn.{matrix}" for matrix in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")),
    *(f"ffn.{experts}.{matrix}" for experts in ("experts", "shared_experts") for matrix in ("w1", "w2", "w3")),
    *("e_proj", "h_proj", "main_proj"),
}

NOT_V4 = [
    "",
    ".",
    "weight",
    "embed",
    "embed.scale",  # the embedding is never quantised
    "model.embed.weight",
    "norm.weight\n",
    " norm.weight",
    "norm.weight\0",
    "Norm.weight",
    "hc_head_scale.weight",
    "layers.0.hc_attn.scale",
    "layers.norm.weight",
    "layers.0.",
    "layers.0",
    "layers.0.norm.weight",  # the final norm is of no layer
    "layers.0.embed.weight",
    "layers.0.e_proj.weight",
    "layers.00.attn_norm.weight",
    "layers.01.attn_norm.weight",
    "layers.-1.attn_norm.weight",
    "layers.+1.attn_norm.weight",
    "layers.1e1.attn_norm.weight",
    "layers.1_0.attn_norm.weight",
    "layers.٣.attn_norm.weight",  # a digit, but no ASCII one
    "layers.10000.attn_norm.weight",
    f"layers.{'9' * 5000}.attn_norm.weight",
    "mtp.10.attn_norm.weight",
    "mtp.0.ffn.gate.tid2eid",
    "mtp.0.attn.compressor.ape",
    "mtp.0.attn.indexer.wq_b.weight",
    "layers.0.layers.0.attn_norm.weight",
    "layers.0.ffn.experts.w1.weight",
    "layers.0.ffn.experts.01.w1.weight",
    "layers.0.ffn.experts.100000.w1.weight",
    "layers.0.ffn.experts.0.w4.weight",
    "layers.0.ffn.experts.0.w1",
    "layers.0.ffn.experts.0.gate.weight",
    "layers.0.ffn.experts.0.attn_norm.weight",
    "layers.0.ffn.experts.0.ffn.experts.1.w1.weight",
    "ffn.experts.0.w1.weight",
    "layers.0.ffn.gate.bias_vl",  # Vision-Exp
    "layers.0.ffn.gate.scale",
    "layers.0.attn.attn_sink.weight",
    "layers.0.attn.wq_a.weight_scale_inv",  # transformers
    "layers.0.self_attn.q_a_proj.weight",
    "layers.0.attn.wq_a.weight.scale",
    "layers.1.engram.embed.weight",  # V4.1
    "vision.norm.weight",
]


@pytest.mark.parametrize("expected", NAMES, ids=lambda row: row[0])
def test_release_names_parse_to_their_parts(expected: Row) -> None:
    name, block, index, module, expert, leaf, role = expected
    parsed = parse_name(name)
    assert parsed == TensorName(name, block, index, module, expert, leaf, Role(role), module in QUANTISED)
    assert parsed.group == (f"mtp.{role}" if name.startswith("mtp.") else role)
    assert type(parsed.group) is str


def test_every_role_is_covered() -> None:
    assert {row[6] for row in NAMES} == set(Role)


@pytest.mark.parametrize("name", NOT_V4, ids=ascii)
def test_other_names_are_refused(name: str) -> None:
    assert parse_name(name) is None


def test_only_a_scale_is_a_scale() -> None:
    scales = {row[0] for row in NAMES if (parsed := parse_name(row[0])) is not None and parsed.is_scale}
    assert scales == {row[0] for row in NAMES if row[0].endswith(".scale")}
    assert not any("hc_" in name for name in scales)


def test_other_spelling() -> None:
    assert other_spelling("mtp.2.markov_head.markov_w1.weight") == "mtp.2.markov_head.embed.weight"
    assert other_spelling("mtp.2.markov_head.markov_w2.weight") == "mtp.2.markov_head.head.weight"
    assert other_spelling("mtp.0.head.weight") == "mtp.0.head.weight"


def test_scale_name() -> None:
    for row in NAMES:
        parsed = parse_name(row[0])
        if parsed is not None and parsed.is_scale:
            assert scale_name(row[0].removesuffix("scale") + "weight") == row[0]


@pytest.mark.parametrize("name", ["weight", "hc_head_fn", "a.scale", "layers.0.attn.attn_sink", "", "a.weight_"])
def test_scale_name_of_what_has_none(name: str) -> None:
    with pytest.raises(ValueError, match="names no weight"):
        scale_name(name)


def test_built_names_parse_back() -> None:
    parsed = parse_name(block_prefix("mtp", 2) + expert_name(255, "w2"))
    assert parsed is not None
    assert (parsed.block, parsed.index, parsed.expert, parsed.module) == ("mtp", 2, 255, "ffn.experts.w2")


@given(st.integers(0, 20_000), st.integers(0, 200_000))
def test_numbers_survive(layer: int, expert: int) -> None:
    parsed = parse_name(block_prefix("layers", layer) + expert_name(expert, "w1"))
    if layer < 10_000 and expert < 100_000:
        assert parsed is not None
        assert (parsed.index, parsed.expert) == (layer, expert)
    else:
        assert parsed is None


def rebuilt(parsed: TensorName) -> str:
    """The name that a parsed name's parts spell."""
    module = parsed.module.split(".") if parsed.module else []
    if parsed.expert >= 0:
        module.insert(2, str(parsed.expert))
    block = [parsed.block, str(parsed.index)] if parsed.block else []
    return ".".join([*block, *module, parsed.leaf])


def test_parts_spell_the_name() -> None:
    for name in (row[0] for row in NAMES):
        parsed = parse_name(name)
        assert parsed is not None
        assert rebuilt(parsed) == parsed.name == name


@given(st.text() | st.text(alphabet="layersmtp.0123456789fnxw_", max_size=60))
@example("layers." * 10_000)
@example("a" * sys.getrecursionlimit() * 100)
@example("\ud800")
def test_any_text_is_a_name_or_none(text: str) -> None:
    parsed = parse_name(text)
    if parsed is not None:
        assert rebuilt(parsed) == text


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("layers.7.attn_norm.weight", "layers.12.attn_norm.weight"),
        ("layers.0.ffn.experts.7.w1.scale", "layers.12.ffn.experts.7.w1.scale"),
        ("mtp.0.hc_head_scale", "mtp.12.hc_head_scale"),
    ],
)
def test_in_block(name: str, moved: str) -> None:
    parts = parse_name(name)
    assert parts is not None
    assert in_block(parts, 12) == moved


@pytest.mark.parametrize("leaf", ["weight", "scale"])
def test_of_expert(leaf: str) -> None:
    parts = parse_name(f"mtp.1.ffn.experts.12.w3.{leaf}")
    assert parts is not None
    assert of_expert(parts, 345) == f"mtp.1.ffn.experts.345.w3.{leaf}"
