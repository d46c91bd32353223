"""The catalogue of broken inputs: what was done to a sound checkpoint, and what each command has to say to it.

Sound is the smallest synthetic checkpoint: embedding, one layer with two experts, and the tail, one shard each.
"""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4quant.checkpoint.files import MAX_FOLDERS_DEEP
from v4quant.checkpoint.header import TensorEntry, build_header, read_header
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.reader import JOURNAL_NAME
from v4quant.config import CONFIG_NAME

FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
DATA = Path(__file__).parents[1] / "data"
Fields = dict[str, Any]
Edit = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One broken input.

    Attributes:
        name: what is wrong, in words.
        break_it: does it to a copy of the sound checkpoint.
        exit_code: of `convert`.
        names: what the message must name: a file, a tensor, a key.
        inspect: exit code of `inspect`, where it is another: headers do not tell everything.
        form: format of the sound checkpoint.
    """

    name: str
    break_it: Edit
    exit_code: int
    names: str
    inspect: int | None = None
    form: str = "native"


# How things are broken.


def rewrite(path: Path, edit: Callable[[Fields], object]) -> None:
    """Replace a shard's header by the JSON that `edit` makes of the parsed one, or by its bytes; the data stays."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    edited = edit(json.loads(content[8 : 8 + length]))
    text = edited if isinstance(edited, bytes) else json.dumps(edited).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def entries_of(path: Path) -> dict[str, TensorEntry]:
    content = path.read_bytes()
    return read_header(path.name, len(content), lambda start, stop: content[start:stop])[1]


def change_entry(tensor: str, file: str = SECOND, **keys: Any) -> Edit:
    """Change fields of one header entry."""
    return lambda folder: rewrite(folder / file, lambda fields: {**fields, tensor: fields[tensor] | keys})


def rename_tensor(old: str, new: str, file: str = SECOND) -> Edit:
    """Give a tensor another name, in the header and in the index."""

    def edit(folder: Path) -> None:
        rewrite(folder / file, lambda fields: {new if name == old else name: of for name, of in fields.items()})
        edit_json(folder / INDEX_NAME, lambda index: index["weight_map"].update({new: index["weight_map"].pop(old)}))

    return edit


def without(*tensors: str, file: str = SECOND) -> Edit:
    """Write a shard anew without some of its tensors; the index fits."""

    def edit(folder: Path) -> None:
        path, content = folder / file, (folder / file).read_bytes()
        found = entries_of(path)
        kept = {name: entry for name, entry in found.items() if name not in tensors}
        header, entries = build_header([(e.name, e.dtype, e.shape) for e in kept.values()], file=file)
        path.write_bytes(header + b"".join(content[kept[e.name].start : kept[e.name].stop] for e in entries))

        def drop(index: Fields) -> None:
            for tensor in tensors:
                del index["weight_map"][tensor]
            index["metadata"]["total_size"] -= sum(found[tensor].bytes for tensor in tensors)

        edit_json(folder / INDEX_NAME, drop)

    return edit


def add_file(name: str, *tensors: tuple[str, str, tuple[int, ...]]) -> Edit:
    """Add a sound safetensors file."""

    def edit(folder: Path) -> None:
        header, entries = build_header(tensors, file=name)
        (folder / name).write_bytes(header + bytes(sum(entry.bytes for entry in entries)))

    return edit


def poke(tensor: str, offset: int, data: bytes) -> Edit:
    """Overwrite bytes of the data of a tensor in the second shard."""

    def edit(folder: Path) -> None:
        path, content = folder / SECOND, (folder / SECOND).read_bytes()
        at = entries_of(path)[tensor].start + offset
        path.write_bytes(content[:at] + data + content[at + len(data) :])

    return edit


def edit_json(path: Path, edit: Callable[[Fields], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def index(edit: Callable[[Fields], object]) -> Edit:
    return lambda folder: edit_json(folder / INDEX_NAME, edit)


def moved(tensor: str, file: Any) -> Edit:
    """Have the index put a tensor into another file."""
    return index(lambda data: data["weight_map"].update({tensor: file}))


def config(**keys: Any) -> Edit:
    return lambda folder: edit_json(folder / CONFIG_NAME, lambda data: data.update(keys))


def no_config_key(key: str) -> Edit:
    return lambda folder: edit_json(folder / CONFIG_NAME, lambda data: data.pop(key))


def quantization(**keys: Any) -> Edit:
    return lambda folder: edit_json(folder / CONFIG_NAME, lambda data: data["quantization_config"].update(keys))


def released_config(name: str) -> Edit:
    return text(CONFIG_NAME, (DATA / "configs" / f"{name}.json").read_text())


def text(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content)


def append(name: str, data: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + data)


def cut(name: str, size: int) -> Edit:
    """Keep the first bytes of a file, or with a negative size all but the last."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def remove(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return edit


def remove_all_but(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for path in folder.iterdir():
            if path.is_file() and path.name not in names:
                path.unlink()

    return edit


def steps(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for step in edits:
            step(folder)

    return edit


def out_of_the_folder(name: str) -> Edit:
    """Move a file beside the checkpoint, and leave a link to it."""

    def edit(folder: Path) -> None:
        (folder / name).rename(folder.parent / "moved")
        (folder / name).symlink_to("../moved")

    return edit


def link(name: str, target: str) -> Edit:
    return lambda folder: (folder / name).symlink_to(target)


def turned_into_a_file(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("not a folder")


def pipe(folder: Path) -> None:
    (folder / SECOND).unlink()
    os.mkfifo(folder / SECOND)


def doubled_name(fields: Fields) -> bytes:
    return json.dumps(fields).replace('"layers.0.attn.wkv.scale"', '"layers.0.attn.wq_a.scale"').encode()


NAN_BYTE, NAN_BF16, INFINITY_BF16 = b"\xff", b"\xc0\x7f", b"\x80\x7f"
NAN_F32, INFINITY_F32 = struct.pack("<f", float("nan")), struct.pack("<f", float("-inf"))
WQ_A, EXPERT = "layers.0.attn.wq_a", "layers.0.ffn.experts.1.w2"
SIZES = {"dtype": "F8_E4M3", "shape": [128, 256], "data_offsets": [0, 32_768]}
V3_KEYS = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
HOSTILE_NAME = "layers.0.\x1b[2J\nerror: forged"

FOLDERS = [
    Case("no folder", lambda folder: folder.rename(folder.with_name("elsewhere")), 3, "checkpoint: no such folder"),
    Case("a file where the folder should be", turned_into_a_file, 3, "checkpoint: is a file"),
    Case("an empty folder", remove_all_but(), 3, "holds no *.safetensors file"),
    Case("nothing but config.json", remove_all_but(CONFIG_NAME), 3, "holds no *.safetensors file"),
    Case(
        "pickle files",
        steps(remove_all_but(CONFIG_NAME), text("pytorch_model.bin", "\x80\x02.")),
        3,
        "pickle files (pytorch_model.bin)",
    ),
    Case("a pickle under the name of a shard", text(SECOND, "\x80\x02ctorch\n"), 3, SECOND),
    Case("tensor-parallel shards", add_file("model0-mp2.safetensors", ("a", "I8", (1,))), 3, "model0-mp2.safetensors"),
    Case("pointers of Git LFS", text(SECOND, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), 3, SECOND),
    Case(
        "an unfinished conversion", steps(text(JOURNAL_NAME, "{}\n"), remove(CONFIG_NAME)), 3, "checkpoint: is an unf"
    ),
    Case("a shard that is missing", remove(FIRST), 3, FIRST),
    Case("a shard that is a pipe", pipe, 3, SECOND),
    Case("a shard linked from outside", out_of_the_folder(SECOND), 3, SECOND),
    Case("a config linked from outside", out_of_the_folder(CONFIG_NAME), 3, CONFIG_NAME),
    Case("a tokenizer linked from outside", link("tokenizer.json", "/etc/passwd"), 3, "tokenizer.json"),
    Case("a folder linked from outside", link("encoding", ".."), 3, "encoding"),
    Case("a link to nothing", link("tokenizer.json", "nowhere"), 3, "tokenizer.json"),
    Case("a link to itself", link("tokenizer.json", "tokenizer.json"), 3, "tokenizer.json"),
    Case(
        "a name with control characters",
        text("LICENSE\x1b[2J\nerror: forged", ""),
        3,
        "LICENSE\\x1b[2J\\nerror: forged",
    ),
    Case(
        "folders without end",
        lambda folder: (folder / "/".join("d" * (MAX_FOLDERS_DEEP + 1))).mkdir(parents=True),
        3,
        "checkpoint: holds folders in folders",
    ),
]

SHARDS = [
    Case("a shard that lacks its last byte", cut(SECOND, -1), 3, f"{SECOND}: is truncated"),
    Case("a shard that ends in its header", cut(SECOND, 1000), 3, f"{SECOND}: claims a header"),
    Case("a shard of five bytes", cut(SECOND, 5), 3, f"{SECOND}: has 5 bytes"),
    Case("a shard of no bytes", cut(SECOND, 0), 3, f"{SECOND}: has 0 bytes"),
    Case("bytes after the last tensor", append(THIRD, b"more"), 3, f"{THIRD}: has 4 bytes after"),
    Case("a header length of 2^63", text(SECOND, "\x00" * 7 + "\x7f" + "{}"), 3, f"{SECOND}: claims a header"),
    Case(
        "a header that is no JSON", lambda folder: rewrite(folder / SECOND, lambda _: b"{'a'}"), 3, f"{SECOND}: header"
    ),
    Case("a header that is an array", lambda folder: rewrite(folder / SECOND, lambda _: b"[]"), 3, f"{SECOND}: header"),
    Case(
        "a header nested deeply",
        lambda folder: rewrite(folder / SECOND, lambda _: b'{"a":' * 100_000),
        3,
        f"{SECOND}: header",
    ),
    Case(
        "a name twice in a header", lambda folder: rewrite(folder / SECOND, doubled_name), 3, "layers.0.attn.wq_a.scale"
    ),
    Case(
        "a tensor instead of __metadata__",
        lambda folder: rewrite(folder / SECOND, lambda fields: fields | {"__metadata__": SIZES}),
        3,
        f"{SECOND}: __metadata__",
    ),
    Case("an unknown dtype", change_entry(f"{WQ_A}.weight", dtype="F8_E3M4"), 3, f"{WQ_A}.weight"),
    Case("true for a size", change_entry(f"{WQ_A}.weight", shape=[True, 32_768]), 3, f"{WQ_A}.weight"),
    Case("a negative size", change_entry(f"{WQ_A}.weight", shape=[-128, -256]), 3, f"{WQ_A}.weight"),
    Case("a size of 10^19", change_entry(f"{WQ_A}.weight", shape=[10**19]), 3, f"{WQ_A}.weight"),
    Case("offsets that are not the shape's", change_entry(f"{WQ_A}.weight", data_offsets=[0, 9]), 3, f"{WQ_A}.weight"),
    Case("offsets that overlap", change_entry(f"{WQ_A}.scale", data_offsets=[0, 2]), 3, f"{WQ_A}.scale"),
    Case("offsets far away", change_entry("norm.weight", THIRD, data_offsets=[10**18, 10**18 + 512]), 3, THIRD),
    Case(
        "a gap in the data",
        lambda folder: rewrite(folder / THIRD, lambda fields: {k: v for k, v in fields.items() if k != "norm.weight"}),
        3,
        THIRD,
    ),
]

TENSORS = [
    Case("a scale that is missing", without(f"{WQ_A}.scale"), 3, f"{WQ_A}.scale: is missing"),
    Case("a weight that is missing", without(f"{WQ_A}.weight"), 3, f"though its scale {WQ_A}.scale is there"),
    Case("an expert's scale that is missing", without(f"{EXPERT}.scale"), 3, f"{EXPERT}.scale: is missing"),
    Case("an expert's weight that is missing", without(f"{EXPERT}.weight"), 3, f"though its scale {EXPERT}.scale is"),
    Case(
        "an expert that is missing", without(f"{EXPERT}.weight", f"{EXPERT}.scale"), 3, f"{EXPERT}.weight: is missing"
    ),
    Case("a norm that is missing", without("norm.weight", file=THIRD), 3, "norm.weight: is missing"),
    Case("a hash table that is missing", without("layers.0.ffn.gate.tid2eid"), 3, "layers.0.ffn.gate.tid2eid: is mis"),
    Case("a weight of another dtype", change_entry(f"{WQ_A}.weight", dtype="I8"), 3, f"{WQ_A}.weight: is stored as I8"),
    Case("a scale of another dtype", change_entry(f"{WQ_A}.scale", dtype="U8"), 3, f"{WQ_A}.scale: is stored as U8"),
    Case(
        "F4 for packed experts", change_entry(f"{EXPERT}.weight", dtype="F4", shape=[256, 256]), 3, f"{EXPERT}.weight"
    ),
    Case("a weight turned round", change_entry(f"{WQ_A}.weight", shape=[256, 128]), 3, f"{WQ_A}.weight: has shape"),
    Case("a scale turned round", change_entry(f"{WQ_A}.scale", shape=[2, 1]), 3, f"{WQ_A}.scale: has shape [2, 1]"),
    Case(
        "a weight without dimensions", change_entry("hc_head_scale", THIRD, shape=[]), 3, "hc_head_scale: has shape []"
    ),
    Case(
        "a name of no release", rename_tensor("layers.0.attn_norm.weight", "layers.0.norm.weight"), 3, "layers.0.norm"
    ),
    Case("a name in another spelling", rename_tensor(f"{WQ_A}.weight", "layers.00.attn.wq_a.weight"), 3, "layers.00"),
    Case("a name with control characters in it", rename_tensor("layers.0.attn_norm.weight", HOSTILE_NAME), 3, "forged"),
    Case(
        "a tensor more than the model has",
        add_file("x.safetensors", ("layers.7.attn.attn_sink", "F32", (4,))),
        3,
        "layers.7",
    ),
    Case(
        "a tensor stored twice", add_file("x.safetensors", ("norm.weight", "BF16", (256,))), 3, "norm.weight: is stored"
    ),
    Case(
        "names of transformers",
        steps(
            remove(FIRST, SECOND, THIRD, INDEX_NAME),
            add_file("model.safetensors", ("model.layers.0.self_attn.q_proj.weight", "BF16", (8, 8))),
        ),
        3,
        "layers.0.attn.wq_a.weight",
    ),
    Case(
        "experts in a form of others",
        lambda folder: rewrite(
            folder / SECOND,
            lambda fields: {k: v | {"dtype": "U8"} if ".experts." in k else v for k, v in fields.items()},
        ),
        3,
        "routed experts as U8",
    ),
]

INDEXES = [
    Case("no index beside several shards", remove(INDEX_NAME), 3, f"{INDEX_NAME}: is missing"),
    Case("an index that is no JSON", cut(INDEX_NAME, -2), 3, f"{INDEX_NAME}: not valid JSON"),
    Case("an index without weight_map", index(lambda data: data.pop("weight_map")), 3, f"{INDEX_NAME}: weight_map"),
    Case("an index of numbers", moved("norm.weight", 3), 3, f"{INDEX_NAME}: weight_map"),
    Case("an index that lists too much", moved("layers.0.extra", SECOND), 3, "layers.0.extra: is listed"),
    Case(
        "an index that lists too little",
        index(lambda data: data["weight_map"].pop("norm.weight")),
        3,
        "norm.weight: is",
    ),
    Case(
        "an index that confuses shards",
        moved("norm.weight", FIRST),
        3,
        f"norm.weight: is listed by the index in {FIRST}",
    ),
    Case(
        "an index that names another file", moved("norm.weight", "model-00009.safetensors"), 3, "'model-00009.safetens"
    ),
    Case(
        "an index that leaves the folder",
        moved("norm.weight", "../x.safetensors"),
        3,
        "'../x.safetensors', which is no",
    ),
    Case("an index with an absolute path", moved("norm.weight", "/etc/passwd"), 3, "'/etc/passwd', which is no file"),
    Case("an index into a folder", moved("norm.weight", "a/b.safetensors"), 3, "'a/b.safetensors', which is no file"),
    Case("a file name that steers", moved("norm.weight", "\x1b[2J\nerror: x"), 3, "'\\x1b[2J\\nerror: x'"),
    Case("a wrong total_size", index(lambda data: data["metadata"].update(total_size=7)), 3, "total_size is 7"),
    Case("no total_size", index(lambda data: data.pop("metadata")), 3, f"{INDEX_NAME}: has no metadata.total_size"),
    Case(
        "a total_size in words", index(lambda data: data["metadata"].update(total_size="7")), 3, "total_size is 7, exp"
    ),
]

CONFIGS = [
    Case("no config", remove(CONFIG_NAME), 3, "checkpoint: has no config.json"),
    Case("a config of two megabytes", append(CONFIG_NAME, b" " * 2_000_000), 3, f"{CONFIG_NAME}: has 2,0"),
    Case("a config that is no JSON", cut(CONFIG_NAME, -3), 2, f"{CONFIG_NAME} is not valid JSON"),
    Case("a config that is no text", lambda folder: (folder / CONFIG_NAME).write_bytes(b"\xff\xfe"), 2, CONFIG_NAME),
    Case("a config that is an array", text(CONFIG_NAME, "[]"), 2, f"{CONFIG_NAME} holds"),
    Case("a config nested without end", text(CONFIG_NAME, "[" * 200_000), 2, CONFIG_NAME),
    Case("a config nested deeply", config(extra=json.loads("[" * 80 + "]" * 80)), 2, "nested too deeply"),
    Case("a key twice in a config", text(CONFIG_NAME, '{"model_type": 1, "model_type": 2}'), 2, "'model_type' appears"),
    Case("NaN in a config", config(swiglu_limit=float("nan")), 2, "'NaN' is not a finite number"),
    Case("DeepSeek-V4.1", released_config("v4.1-flash"), 2, "DeepSeek-V4.1"),
    Case("DeepSeek-V3", config(**V3_KEYS), 2, "model_type is 'deepseek_v3'"),
    Case("the vision release", config(vision_n_layers=32), 2, "DeepSeek-V4-Flash-Vision-Exp"),
    Case("the config of the inference code", released_config("flash-inference"), 2, "inference code"),
    Case("no model_type", no_config_key("model_type"), 2, "model_type is missing"),
    Case("a key that is missing", no_config_key("moe_intermediate_size"), 2, "moe_intermediate_size is missing"),
    Case("a number in quotes", config(hidden_size="256"), 2, "hidden_size is '256'"),
    Case("true for a number", config(hc_mult=True), 2, "hc_mult is true"),
    Case("a number out of range", config(n_routed_experts=10**9), 2, "n_routed_experts is 1000000000"),
    Case("an impossible compression ratio", config(compress_ratios=[3]), 2, "compress_ratios"),
    Case("too many compression ratios", config(compress_ratios=[0] * 30), 2, "compress_ratios has 30 elements"),
    Case("an unknown expert_dtype", config(expert_dtype="int4"), 2, "expert_dtype is 'int4'"),
    Case("an expert_dtype that steers", config(expert_dtype="\x1b[2J\nerror: x"), 2, "'\\x1b[2J\\nerror: x'"),
    Case("NVFP4", quantization(quant_algo="MIXED_PRECISION", moe_quant_algo="NVFP4"), 2, "moe_quant_algo is 'NVFP4'"),
    Case("compressed-tensors", quantization(quant_method="compressed-tensors"), 2, "quant_method is 'compressed-t"),
    Case("blocks of 32x32", quantization(weight_block_size=[32, 32]), 2, "weight_block_size is [32, 32]"),
    Case("two expert_dtypes", quantization(expert_dtype="fp8"), 2, "quantization_config.expert_dtype is 'fp8'"),
    Case("a config of FP8 experts on FP4", config(expert_dtype="fp8"), 3, f"{CONFIG_NAME}: says expert_dtype fp8"),
    Case(
        "a config of BF16 on FP4",
        steps(no_config_key("quantization_config"), no_config_key("expert_dtype")),
        3,
        f"{CONFIG_NAME}: has no quantization_config",
    ),
    Case("a config of more layers", config(num_hidden_layers=2, compress_ratios=[0, 0]), 3, "says num_hidden_layers 2"),
    Case("a config of another width", config(hidden_size=512), 3, f"{CONFIG_NAME}: says hidden_size 512, but 256"),
    Case("a config of another release", released_config("pro"), 3, f"{CONFIG_NAME}: says hidden_size 7,168"),
    Case(
        "a config of an MTP block", config(compress_ratios=[0, 0]), 3, f"{CONFIG_NAME}: has compress_ratios for 1 MTP"
    ),
]

# What headers do not tell: `inspect` finds nothing, `convert` says where.
NUMBERS = [
    Case("NaN for an expert's scale", poke(f"{EXPERT}.scale", 3 * 8 + 5, NAN_BYTE), 3, f"{EXPERT}.scale[3, 5] is", 0),
    Case("NaN for a scale", poke(f"{WQ_A}.scale", 1, NAN_BYTE), 3, f"{SECOND}: {WQ_A}.scale[0, 1] is", 0),
    Case("NaN for a weight", poke(f"{WQ_A}.weight", 127 * 256 + 9, b"\x7f"), 3, f"{WQ_A}.weight[127, 9] is", 0),
    Case("-NaN for a weight", poke(f"{WQ_A}.weight", 0, NAN_BYTE), 3, f"{WQ_A}.weight[0, 0] is", 0),
    Case("NaN for a scale of Base", poke(f"{EXPERT}.scale", 3 * 4, NAN_F32), 3, f"{EXPERT}.scale[1, 1] is", 0, "base"),
    Case("an infinite scale of Base", poke(f"{WQ_A}.scale", 4, INFINITY_F32), 3, f"{WQ_A}.scale[0, 1] is", 0, "base"),
    Case(
        "NaN for a weight of Base", poke(f"{EXPERT}.weight", 300, b"\x7f"), 3, f"{EXPERT}.weight[1, 44] is", 0, "base"
    ),
    Case(
        "NaN for a BF16 weight",
        poke(f"{EXPERT}.weight", 2 * 700, NAN_BF16),
        3,
        f"{EXPERT}.weight[2, 188] is",
        0,
        "bf16",
    ),
    Case(
        "an infinite BF16 weight", poke(f"{WQ_A}.weight", 2 * 5, INFINITY_BF16), 3, f"{WQ_A}.weight[0, 5] is", 0, "bf16"
    ),
    Case("an inference config that is no object", text("inference/config.json", "[]"), 3, "inference/config.json", 0),
]

CASES = [*FOLDERS, *SHARDS, *TENSORS, *INDEXES, *CONFIGS, *NUMBERS]
