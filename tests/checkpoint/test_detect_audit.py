"""Format and model are told from headers; every way in which tensors, config and index can differ is a problem by name.

All on header entries alone: no file is read. What a whole folder gives is in test_reader.py.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from v4quant.checkpoint.audit import Problem, audit_config, audit_index, audit_tensors, summarise
from v4quant.checkpoint.detect import detect_scheme, stored_config, stored_dimensions
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.index import INDEX_NAME, Index
from v4quant.checkpoint.layout import lay_out
from v4quant.config import V4Config
from v4quant.dtypes import payload_bytes
from v4quant.encodings import SCHEMES
from v4quant.errors import CheckpointError
from v4quant.formats import FORMATS
from v4quant.inventory import stored_tensors
from v4quant.names import TensorName, parse_name
from v4quant.testing.releases import synth_config

Entries = dict[str, TensorEntry]
LIKES = ("flash", "pro", "flash-0731")
FILE = "model-00001-of-00001.safetensors"


@cache
def _stored(like: str, form: str, layers: int | None, experts: int | None, mtp: bool) -> tuple[dict[str, Any], Entries]:
    config_json, _ = synth_config(like, tiny=True, layers=layers, experts=experts, mtp=mtp)
    config_json = FORMATS[form].config_json(config_json)
    tensors = stored_tensors(V4Config.from_json(config_json, "config.json"), SCHEMES[form])
    shards = lay_out((((tensor.name, tensor.dtype, tensor.storage_shape),) for tensor in tensors), sys.maxsize)
    return config_json, {name: entry for shard in shards for name, entry in shard.entries.items()}


def stored(
    like: str = "flash",
    form: str = "native",
    *,
    layers: int | None = None,
    experts: int | None = None,
    mtp: bool = True,
) -> tuple[dict[str, Any], Entries]:
    """config.json and header entries of a tiny checkpoint in one of the four formats; the caller may change both."""
    config_json, entries = _stored(like, form, layers, experts, mtp)
    return dict(config_json), dict(entries)


def small(form: str = "native") -> tuple[dict[str, Any], Entries]:
    """The same with one layer, two experts and no MTP block."""
    return stored("flash", form, layers=1, experts=2, mtp=False)


DIMENSIONS = (
    *("vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("n_routed_experts", "num_experts_per_tok", "q_lora_rank", "o_lora_rank", "o_groups", "head_dim"),
    *("index_n_heads", "index_head_dim", "hc_mult", "dspark_markov_rank"),
)


def entry(name: str, dtype: str, *shape: int, file: str = FILE) -> TensorEntry:
    return TensorEntry(name, dtype, shape, file, 0, payload_bytes(dtype, shape))


def parsed(entries: Entries) -> Mapping[str, TensorName]:
    return {name: parts for name in entries if (parts := parse_name(name))}


def problems(config_json: dict[str, Any], entries: Entries, form: str = "") -> list[str]:
    """What the audit finds; the format is detected unless a test says it."""
    config = V4Config.from_json(config_json, "config.json")
    scheme = SCHEMES[form] if form else detect_scheme(entries, parsed(entries), "here")
    found = [
        *audit_config(config, scheme, entries, parsed(entries)),
        *audit_tensors(config, scheme, entries, parsed(entries)),
    ]
    return [str(problem) for problem in found]


# Format.


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("like", LIKES)
def test_each_format_is_told_and_sound(like: str, form: str) -> None:
    config_json, entries = stored(like, form)
    assert detect_scheme(entries, parsed(entries), "here") == SCHEMES[form]
    assert problems(config_json, entries) == []


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_most_tensors_decide_and_strays_are_problems(other: str, form: str) -> None:
    """A few tensors of another format do not change the verdict, with their scales or without."""
    config_json, entries = stored("flash", form)
    for module in ("layers.0.ffn.experts.0.w1", "layers.0.attn.wq_a"):
        for leaf in ("weight", "scale"):
            entries.pop(f"{module}.{leaf}", None)
            if f"{module}.{leaf}" in stored("flash", other)[1]:
                entries[f"{module}.{leaf}"] = stored("flash", other)[1][f"{module}.{leaf}"]
            assert detect_scheme(entries, parsed(entries), "here") == SCHEMES[form]
    assert bool(problems(config_json, entries)) == (form != other)


@pytest.mark.parametrize("form", FORMATS)
def test_weights_without_any_scale_still_tell_their_format(form: str) -> None:
    """So that the audit can list what is missing; FP8 of which no scale is left is taken for E8M0."""
    _, entries = stored("flash", form)
    left = {name: entry for name, entry in entries.items() if not name.endswith(".scale")}
    assert detect_scheme(left, parsed(left), "here").name == {"base": "fp8"}.get(form, form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("role", ["experts", "dense"])
def test_half_of_a_checkpoint_tells_its_format(role: str, form: str) -> None:
    """Only routed experts, or only the other matrices, are there: the first format that fits."""
    _, entries = stored("flash", form)
    left = {name: entry for name, entry in entries.items() if (".ffn.experts." in name) == (role == "experts")}
    found = detect_scheme(left, parsed(left), "here")
    assert found.encoding("expert" if role == "experts" else "dense") == SCHEMES[form].encoding(
        "expert" if role == "experts" else "dense"
    )


@pytest.mark.parametrize(
    ("expert", "dense", "says"),
    [
        (("U8", "F8_E4M3"), ("F8_E4M3", "F8_E8M0"), "stores routed experts as U8 with F8_E4M3 scales"),
        (("I8", "F32"), ("F8_E4M3", "F8_E8M0"), "stores routed experts as I8 with F32 scales"),
        (("F8_E4M3", "F32"), ("F8_E4M3", "F8_E8M0"), "as F8_E4M3 with F32 scales and other matrices as F8_E4M3"),
        (("BF16", ""), ("F8_E4M3", "F8_E8M0"), "as BF16 with no scales and other matrices as F8_E4M3"),
        (("I8", "F8_E8M0"), ("BF16", ""), "other matrices as BF16 with no scales"),
        (("F32", ""), ("F32", ""), "stores routed experts as F32 with no scales"),
        (("F16", ""), ("F16", ""), "stores routed experts as F16 with no scales"),
        (("", "F8_E8M0"), ("BF16", ""), "stores routed experts as nothing with F8_E8M0 scales"),
    ],
)
def test_other_forms_are_refused_with_the_known_ones(
    expert: tuple[str, str], dense: tuple[str, str], says: str
) -> None:
    entries: Entries = {}
    for module, dtypes in (("layers.0.ffn.experts.0.w1", expert), ("layers.0.attn.wq_a", dense)):
        for leaf, dtype in zip(("weight", "scale"), dtypes, strict=True):
            if dtype:
                entries[f"{module}.{leaf}"] = entry(f"{module}.{leaf}", dtype, 128, 128)
    with pytest.raises(CheckpointError) as caught:
        detect_scheme(entries, parsed(entries), "the folder")
    assert str(caught.value).startswith("the folder: ")
    assert says in str(caught.value)
    assert all(f"{form} (" in str(caught.value) for form in FORMATS)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "x", "embed.weight", "layers.0.hc_attn_fn"])
def test_no_v4_matrix_at_all(name: str) -> None:
    entries = {name: entry(name, "BF16", 8, 8)}
    with pytest.raises(CheckpointError, match="no tensor has the name of a DeepSeek-V4 matrix") as caught:
        detect_scheme(entries, parsed(entries), "here")
    assert "transformers" in caught.value.hint


# Dimensions.


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("like", LIKES)
def test_the_model_is_told_from_shapes_alone(like: str, form: str) -> None:
    """With another release's config.json to fill in what no shape tells."""
    config_json, entries = stored(like, form)
    for other in LIKES:
        foreign = {key: value for key, value in stored(other, form)[0].items() if key != "num_hash_layers"}
        model = stored_config(foreign | {"num_hash_layers": config_json["num_hash_layers"]}, entries, parsed(entries))
        assert model is not None
        for key in ("compress_ratios", "is_dspark", "mtp_blocks", *DIMENSIONS):
            expected = getattr(V4Config.from_json(config_json, "config.json"), key)
            assert getattr(model, key) == expected, key
        assert list(audit_tensors(model, SCHEMES[form], entries, parsed(entries))) == []


@pytest.mark.parametrize("key", DIMENSIONS)
def test_a_dimension_that_the_config_gets_wrong_is_a_problem(key: str) -> None:
    config_json, entries = stored("flash-0731")
    _, name = stored_dimensions(entries, parsed(entries))[key]
    right = config_json[key]
    wrong = {"num_experts_per_tok": 5, "o_groups": 4}.get(key, right + 32)
    config_json[key] = wrong
    if key == "num_hidden_layers":
        config_json["compress_ratios"] = [4] * 32 + config_json["compress_ratios"]
    config = V4Config.from_json(config_json, "config.json")
    (problem,) = audit_config(config, SCHEMES["native"], entries, parsed(entries))
    assert problem.where == "config.json"
    assert problem.what == f"says {key} {wrong:,}, but {right:,} is stored ({name} {list(entries[name].shape)})"
    right_config = V4Config.from_json(stored("flash-0731")[0], "config.json")
    assert stored_config(config_json, entries, parsed(entries)) == right_config


def test_most_shapes_decide() -> None:
    """One tensor of a wrong shape is that tensor's problem, not the config's."""
    config_json, entries = stored("flash")
    name = "layers.0.attn.wq_a.weight"
    entries[name] = replace(entries[name], shape=(64, 256))
    assert problems(config_json, entries) == [f"{name}: has shape [64, 256], expected [128, 256]"]


def test_mtp_blocks_that_the_config_gets_wrong() -> None:
    april, dspark = stored("flash"), stored("flash-0731")
    assert problems(dspark[0], april[1])[:2] == [
        "config.json: has compress_ratios for 3 MTP blocks, but 1 are stored",
        "config.json: has dspark_markov_rank, but the MTP blocks that are stored are no DSpark stages",
    ]
    assert problems(april[0], dspark[1])[:2] == [
        "config.json: has no dspark_markov_rank, but 64 is stored (mtp.2.markov_head.markov_w1.weight [512, 64])",
        "config.json: has compress_ratios for 1 MTP blocks, but 3 are stored",
    ]
    without = {name: e for name, e in april[1].items() if not name.startswith("mtp.")}
    assert problems(april[0], without)[0] == "config.json: has compress_ratios for 1 MTP blocks, but 0 are stored"


@pytest.mark.parametrize(("like", "blocks"), [("flash", "1 MTP block is"), ("flash-0731", "3 MTP blocks are")])
def test_mtp_blocks_that_the_config_does_not_announce(like: str, blocks: str) -> None:
    """Loaders go by num_nextn_predict_layers, and leave the blocks out in silence."""
    config_json, entries = stored(like)
    for announced in (1, 3):
        assert problems({**config_json, "num_nextn_predict_layers": announced}, entries) == []
    config_json["num_nextn_predict_layers"] = 0
    expected = f"config.json: says num_nextn_predict_layers 0, but {blocks} stored; loaders would leave them out"
    assert problems(config_json, entries) == [expected]
    assert problems(*stored(like, mtp=False)) == []


@pytest.mark.parametrize(
    "hostile",
    [
        entry("layers.9999.attn_norm.weight", "BF16", 0),
        entry("layers.7.attn.compressor.ape", "F32", 5, 1),
        entry("layers.4.attn.compressor.ape", "F32"),
        entry("embed.weight", "BF16", 0, 256),
        entry("layers.0.ffn.gate.weight", "BF16", 2**40, 0),
        entry("layers.0.ffn.experts.0.w1.weight", "I8", 33, 0),
        entry("mtp.9.enorm.weight", "BF16", 0),
    ],
    ids=lambda hostile: hostile.name,
)
def test_hostile_shapes_make_no_model_and_no_crash(hostile: TensorEntry) -> None:
    config_json, entries = stored()
    entries = {hostile.name: hostile} | {name: e for name, e in entries.items() if name != hostile.name}
    found = stored_config(config_json, entries, parsed(entries))
    assert found is None or found.mtp_blocks <= 8
    assert problems(config_json, entries)


# Config against bytes.

DECLARATIONS: dict[str, dict[str, Any]] = {
    form: {
        key: value
        for key in ("expert_dtype", "quantization_config")
        if (value := FORMATS[form].config_json(synth_config("flash", tiny=True)[0]).get(key))
    }
    for form in FORMATS
}
# Declared form -> stored form -> the claim that is wrong; FP8 experts may have either kind of scale.
CLAIMS = {
    "native": dict.fromkeys(("fp8", "base"), "says expert_dtype fp4") | {"bf16": "has a quantization_config"},
    "fp8": {"native": "says expert_dtype fp8", "bf16": "has a quantization_config"},
    "base": {"native": "says expert_dtype fp8", "bf16": "has a quantization_config"},
    "bf16": dict.fromkeys(("native", "fp8", "base"), "has no quantization_config"),
}


@pytest.mark.parametrize("declared", FORMATS)
@pytest.mark.parametrize("form", FORMATS)
def test_what_the_config_says_of_storage(form: str, declared: str) -> None:
    config_json, entries = small(form)
    for key in ("expert_dtype", "quantization_config"):
        config_json.pop(key, None)
    found = problems(config_json | DECLARATIONS[declared], entries)
    claim = CLAIMS[declared].get(form)
    if claim is None:
        assert found == []
    else:
        (problem,) = found
        assert problem.startswith(f"config.json: {claim}, but the tensors are stored as ")
        assert problem.endswith(f" ({form})")


def test_a_config_without_expert_dtype_fits_every_quantised_form() -> None:
    """The first V4-Pro config lacked the key, and FP8 repacks delete it."""
    for form in ("native", "fp8", "base"):
        config_json, entries = small(form)
        del config_json["expert_dtype"]
        assert problems(config_json, entries) == []


# Tensors.

ONE_BY_ONE = [
    (form, name)
    for form in FORMATS
    for name in small(form)[1]
    if form in ("native", "bf16") or ".ffn.experts.0.w1" in name or ".wq_a." in name
]


def partner(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return {"weight": f"{module}.scale", "scale": f"{module}.weight"}.get(leaf, "")


@pytest.mark.parametrize(("form", "name"), ONE_BY_ONE)
def test_each_missing_tensor_is_one_problem(form: str, name: str) -> None:
    config_json, entries = small(form)
    gone = entries.pop(name)
    (problem,) = problems(config_json, entries, form)
    assert problem.startswith(f"{name}: is missing, expected {gone.dtype} {list(gone.shape)}")
    half = {"weight": "weight", "scale": "scale"}.get(partner(name).rpartition(".")[2], "")
    beside = f", though its {half} {partner(name)} is there" if partner(name) in entries else ""
    assert problem.endswith(f"{list(gone.shape)}{beside}")


@pytest.mark.parametrize(("form", "name"), ONE_BY_ONE)
def test_each_tensor_of_another_dtype_is_one_problem(form: str, name: str) -> None:
    config_json, entries = small(form)
    right = entries[name]
    entries[name] = replace(right, dtype="U8")
    (problem,) = problems(config_json, entries, form)
    shape = list(right.shape)
    assert problem == f"{name}: is stored as U8 {shape}, expected {right.dtype} {shape}"


@pytest.mark.parametrize(("form", "name"), ONE_BY_ONE)
def test_each_tensor_of_another_shape_is_a_problem(form: str, name: str) -> None:
    config_json, entries = small(form)
    right = entries[name]
    for shape in ((*right.shape, 1), (right.shape[0] + 1, *right.shape[1:]), right.shape[:-1]):
        entries[name] = replace(right, shape=shape)
        config = V4Config.from_json(config_json, "config.json")
        (problem,) = audit_tensors(config, SCHEMES[form], entries, parsed(entries))
        assert str(problem) == f"{name}: has shape {list(shape)}, expected {list(right.shape)}"


def test_a_matrix_of_which_both_halves_are_missing_is_two_problems() -> None:
    config_json, entries = small()
    for leaf in ("weight", "scale"):
        del entries[f"layers.0.attn.wkv.{leaf}"]
    assert problems(config_json, entries) == [
        "layers.0.attn.wkv.weight: is missing, expected F8_E4M3 [128, 256]",
        "layers.0.attn.wkv.scale: is missing, expected F8_E8M0 [1, 2]",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "layers.1.attn_norm.weight",
        "layers.0.ffn.experts.2.w1.weight",
        "layers.0.ffn.gate.bias",  # layer 0 is hash-routed
        "layers.0.attn.compressor.ape",  # layer 0 has ratio 0
        "mtp.0.enorm.weight",
        "mtp.0.head.weight",  # there is no MTP block to have a head
        "embed.scale",
        "norm.scale",
        "layers.0.attn.q_norm.scale",
        "layers.00.attn_norm.weight",
        "model.embed.weight",
        "",
        "evil\nname",
    ],
)
def test_an_unexpected_tensor_is_one_problem(name: str) -> None:
    config_json, entries = small()
    entries[name] = entry(name, "F32", 3, file="other.safetensors")
    config = V4Config.from_json(config_json, "config.json")
    (problem,) = audit_tensors(config, SCHEMES["native"], entries, parsed(entries))
    assert problem == Problem(name, "is unexpected (F32 [3] in other.safetensors)")
    assert "\n" not in str(problem)


def test_a_block_scale_in_a_bf16_checkpoint_is_a_problem() -> None:
    config_json, entries = small("bf16")
    name = "layers.0.attn.wq_a.scale"
    entries[name] = entry(name, "F8_E8M0", 1, 2)
    assert problems(config_json, entries) == [f"{name}: is a block scale, but bf16 weights have none"]


# Tensors that may be there under several names, or not at all.

MTP_EMBEDDINGS = ("emb.tok_emb.weight", "emb.weight", "embed.weight", "embed_tokens.weight")
MTP_HEADS = ("head.weight", "lm_head.weight", "shared_head.head.weight")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("embedding", [*MTP_EMBEDDINGS, ""])
@pytest.mark.parametrize("head", [*MTP_HEADS, ""])
def test_an_mtp_block_may_have_its_own_embedding_and_head(form: str, embedding: str, head: str) -> None:
    config_json, entries = stored("flash", form, layers=1, experts=2)
    for name in ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"):
        entries.pop(name, None)
    for local in filter(None, (embedding, head)):
        entries[f"mtp.0.{local}"] = replace(entries["embed.weight"], name=f"mtp.0.{local}")
    assert problems(config_json, entries) == []


def test_an_mtp_copy_is_checked_like_any_other_tensor() -> None:
    config_json, entries = stored("flash", "base", layers=1, experts=2)
    right = entries["mtp.0.head.weight"]
    entries["mtp.0.head.weight"] = replace(right, dtype="F16")
    entries["mtp.0.emb.tok_emb.weight"] = replace(right, name="mtp.0.emb.tok_emb.weight", shape=(256, 512))
    entries["mtp.1.head.weight"] = replace(right, name="mtp.1.head.weight")
    assert problems(config_json, entries) == [
        "mtp.0.emb.tok_emb.weight: has shape [256, 512], expected [512, 256]",
        "mtp.0.head.weight: is stored as F16 [512, 256], expected BF16 [512, 256]",
        f"mtp.1.head.weight: is unexpected (BF16 [512, 256] in {right.file})",
    ]


@pytest.mark.parametrize("renamed", [("markov_w1",), ("markov_w2",), ("markov_w1", "markov_w2")])
def test_the_markov_tables_may_have_the_names_of_v41(renamed: tuple[str, ...]) -> None:
    config_json, entries = stored("flash-0731", layers=1, experts=2)
    other = {"markov_w1": "embed", "markov_w2": "head"}
    for table in renamed:
        old = entries.pop(f"mtp.2.markov_head.{table}.weight")
        name = f"mtp.2.markov_head.{other[table]}.weight"
        entries[name] = replace(old, name=name)
    assert problems(config_json, entries) == []
    entries[name] = replace(entries[name], shape=(1, 1))
    assert problems(config_json, entries) == [f"{name}: has shape [1, 1], expected [512, 64]"]


def test_both_names_of_a_markov_table_are_one_too_many() -> None:
    config_json, entries = stored("flash-0731", layers=1, experts=2)
    name = "mtp.2.markov_head.embed.weight"
    entries[name] = replace(entries["mtp.2.markov_head.markov_w1.weight"], name=name)
    (problem,) = problems(config_json, entries)
    assert problem.startswith(f"{name}: is unexpected")


# Index against headers.


def index_problems(entries: Entries, **change: Any) -> list[str]:
    """What a right index of these entries, changed, gives; a file of None takes a name out."""
    weight_map = {name: e.file for name, e in entries.items()} | change.get("weight_map", {})
    total = change.get("total_size", sum(e.bytes for e in entries.values()))
    index = Index(total, {name: file for name, file in weight_map.items() if file is not None})
    return [str(problem) for problem in audit_index(index, entries, {e.file for e in entries.values()})]


def test_the_index_both_ways() -> None:
    _, entries = small()
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    assert index_problems(entries) == []
    assert index_problems(entries, weight_map={"norm.weight": None}) == [
        "norm.weight: is stored in model-00003-of-00003.safetensors, but the index does not list it"
    ]
    assert index_problems(entries, weight_map={"layers.0.attn.wo_a.bias": second}) == [
        f"layers.0.attn.wo_a.bias: is listed by the index in {second}, which does not hold it"
    ]
    assert index_problems(entries, weight_map={"embed.weight": second}) == [
        f"embed.weight: is listed by the index in {second}, but stored in {first}"
    ]
    assert index_problems(entries, weight_map={"embed.weight": "model-00009.safetensors"}) == [
        f"{INDEX_NAME}: puts 1 tensors into 'model-00009.safetensors', which is missing or could not be read"
    ]
    missing = {f"layers.1.ffn.experts.{expert}.w1.weight": "model-00009.safetensors" for expert in range(1000)}
    assert index_problems(entries, weight_map=missing) == [
        f"{INDEX_NAME}: puts 1,000 tensors into 'model-00009.safetensors', which is missing or could not be read"
    ]


@pytest.mark.parametrize("total_size", [0, -1, 1_416_471, 2 * 1_416_472, 10**300])
def test_a_wrong_total_size(total_size: int) -> None:
    _, entries = small()
    assert index_problems(entries, total_size=total_size) == [
        f"{INDEX_NAME}: metadata.total_size is {total_size:,}, but the tensors have 1,416,472 bytes"
    ]


def test_no_total_size() -> None:
    _, entries = small()
    assert index_problems(entries, total_size=None) == [f"{INDEX_NAME}: has no metadata.total_size, expected 1,416,472"]


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "../model-00001-of-00003.x"])
def test_paths_in_the_index_are_told_and_not_followed(path: str) -> None:
    _, entries = small()
    (problem,) = index_problems(entries, weight_map={"embed.weight": path})
    assert problem == (
        f"{INDEX_NAME}: puts 1 tensors into {path!r}, which is no file name; nothing outside the folder is read"
    )


# For people.


def test_problems_that_differ_in_numbers_are_one_group() -> None:
    found = [Problem(f"layers.{n}.ffn.experts.{n * n}.w1.scale", f"has shape [{n}]") for n in range(1, 100)]
    found.insert(50, Problem("norm.weight", "is missing"))
    assert summarise(found, 10) == [
        ("layers.1.ffn.experts.1.w1.scale: has shape [1]", 99),
        ("norm.weight: is missing", 1),
    ]
    assert summarise(found, 1) == [("layers.1.ffn.experts.1.w1.scale: has shape [1]", 99)]


def test_a_problem_is_one_short_line_whatever_the_name() -> None:
    text = str(Problem("x\n" * 5_000, "is unexpected (I8 [0] in a\nb)"))
    assert "\n" not in text
    assert len(text) < 600
