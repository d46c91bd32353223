"""From a config alone: every tensor of a V4 checkpoint, with name, role, logical shape, stored dtype and bytes.

Blocks differ only in a few ways (compression ratio, hash routing, first or last MTP block), so each kind of block is
written down once, under local names, and repeated under the prefix of every block of that kind.

Source of names, shapes and dtypes: the headers of the April 2026, 0731 and 0813 releases, and DeepSeek's
`inference/model.py`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from v4quant.config import V4Config
from v4quant.dtypes import payload_bytes
from v4quant.encodings import BASE_SCHEME, Scheme, Shape
from v4quant.names import Role, TensorName, block_prefix, expert_name, parse_name, scale_name

Kind = Literal["plain", "dense", "expert"]


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor of the model, whatever form it is stored in.

    Attributes:
        name: name of the stored weight: "layers.0.attn.wq_a.weight".
        shape: logical shape; [out, in] for matrices.
        dtype: stored dtype of a tensor that no release quantises; "" where the scheme decides.
        kind: "plain" never quantised, "expert" a routed expert's matrix, "dense" every other quantised matrix.
        optional: True where some checkpoints of the same config lack it.
    """

    name: str
    shape: Shape
    dtype: str
    kind: Kind
    optional: bool = False


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it stands in a safetensors header.

    Attributes:
        name: its name.
        role: what it is for; a scale has its weight's role.
        group: the role, with "mtp." before it in MTP blocks.
        shape: logical shape; for a scale that of the scales themselves.
        storage_shape: shape in the header.
        dtype: dtype in the header.
        optional: True where some checkpoints of the same config and scheme lack it.
    """

    name: str
    role: Role
    group: str
    shape: Shape
    storage_shape: Shape
    dtype: str
    optional: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the tensor's data."""
        return payload_bytes(self.dtype, self.storage_shape)


@dataclass(frozen=True, slots=True)
class _BlockKind:
    """What decides which tensors a block holds.

    Attributes:
        part: "embedding", "layers", "tail" (final norm and head) or "mtp".
        ratio: compression ratio; 0 is sliding window only.
        is_hashed: experts are picked by a table of token ids.
        is_first: the first MTP block.
        is_last: the last MTP block.
    """

    part: Literal["embedding", "layers", "tail", "mtp"]
    ratio: int = 0
    is_hashed: bool = False
    is_first: bool = False
    is_last: bool = False


def logical_tensors(config: V4Config) -> list[LogicalTensor]:
    """Every tensor of the model, in the order of the released files: embedding, layers, final norm and head, MTP."""
    blocks = _blocks(config)
    local = {kind: list(_tensors(config, kind)) for _, kind in blocks}
    return [
        LogicalTensor(prefix + tensor.name, tensor.shape, tensor.dtype, tensor.kind)
        for prefix, kind in blocks
        for tensor in local[kind]
    ]


def stored_tensors(config: V4Config, scheme: Scheme) -> list[StoredTensor]:
    """Every tensor of a checkpoint stored under a scheme, each scale after its weight.

    For the Base scheme the MTP block's own embedding and head are listed as well, as optional: the published total of
    Flash-Base includes them, other Base checkpoints lack them.
    """
    blocks = _blocks(config)
    local = {kind: list(_local_stored(config, kind, prefix, scheme)) for prefix, kind in blocks}
    return [
        StoredTensor(prefix + t.name, t.role, t.group, t.shape, t.storage_shape, t.dtype, t.optional)
        for prefix, kind in blocks
        for t in local[kind]
    ]


def inventory(config: V4Config) -> list[StoredTensor]:
    """Every stored tensor of the release that a config describes; FP8 experts are taken for a Base release."""
    return stored_tensors(config, config.declared_scheme or BASE_SCHEME)


def bytes_by_group(config: V4Config, scheme: Scheme) -> dict[str, int]:
    """Bytes of a checkpoint by group: the sums over `stored_tensors`, optional ones included, without listing them."""
    blocks = _blocks(config)
    local: dict[_BlockKind, Counter[str]] = {}
    for prefix, kind in blocks:
        if kind not in local:
            local[kind] = Counter()
            for tensor in _local_stored(config, kind, prefix, scheme):
                local[kind][tensor.group] += tensor.bytes
    total: Counter[str] = Counter()
    for _, kind in blocks:
        total.update(local[kind])
    return dict(total)


def mtp_copies(config: V4Config, names: Iterable[TensorName]) -> list[LogicalTensor]:
    """The embeddings and heads that MTP blocks hold of their own, among these names, whatever they are called.

    The Base releases have them (see _base_mtp_copies), and so have re-exports for loaders that want them.
    """
    return [
        LogicalTensor(parts.name, (config.vocab_size, config.hidden_size), "BF16", "plain", optional=True)
        for parts in names
        if parts.role in (Role.MTP_EMBEDDING, Role.MTP_HEAD) and parts.index < config.mtp_blocks
    ]


def parameters(config: V4Config, *, mtp: bool = True) -> int:
    """Number of logical parameters: FP4 counted unpacked, block scales and hash tables not counted.

    Args:
        config: the model.
        mtp: count the MTP blocks too; the "284B" and "1.6T" of the model cards leave them out.
    """
    blocks = _blocks(config)
    counts = {
        kind: sum(math.prod(tensor.shape) for tensor in _tensors(config, kind) if tensor.dtype != "I64")
        for _, kind in blocks
    }
    return sum(counts[kind] for _, kind in blocks if mtp or kind.part != "mtp")


def _blocks(config: V4Config) -> list[tuple[str, _BlockKind]]:
    """Name prefix and kind of every block, in release order."""
    layers = [
        (block_prefix("layers", layer), _BlockKind("layers", ratio, is_hashed=layer < config.num_hash_layers))
        for layer, ratio in enumerate(config.compress_ratios[: config.num_hidden_layers])
    ]
    last = config.mtp_blocks - 1
    mtp = [
        (block_prefix("mtp", stage), _BlockKind("mtp", is_first=stage == 0, is_last=stage == last))
        for stage in range(config.mtp_blocks)
    ]
    return [("", _BlockKind("embedding")), *layers, ("", _BlockKind("tail")), *mtp]


def _local_stored(config: V4Config, kind: _BlockKind, prefix: str, scheme: Scheme) -> Iterator[StoredTensor]:
    """The stored tensors of a kind of block under local names; `prefix` is that of any block of the kind."""
    logical = list(_tensors(config, kind))
    if scheme == BASE_SCHEME and kind.part == "mtp" and kind.is_first and not config.is_dspark:
        logical += _base_mtp_copies(config)
    for tensor in logical:
        parsed = parse_name(prefix + tensor.name)
        assert parsed is not None, f"{prefix}{tensor.name} is not in the grammar of names.py"
        role, group = parsed.role, parsed.group
        if tensor.kind == "plain":
            yield StoredTensor(tensor.name, role, group, tensor.shape, tensor.shape, tensor.dtype, tensor.optional)
            continue
        encoding = scheme.encoding(tensor.kind)
        storage_shape = encoding.storage_shape(tensor.shape)
        yield StoredTensor(tensor.name, role, group, tensor.shape, storage_shape, encoding.weight_dtype)
        if encoding.block is not None:
            shape = encoding.scale_shape(tensor.shape)
            yield StoredTensor(scale_name(tensor.name), role, group, shape, shape, encoding.scale_dtype)


def _tensors(config: V4Config, kind: _BlockKind) -> Iterator[LogicalTensor]:
    """The tensors of a kind of block, under local names."""
    hidden, vocab = config.hidden_size, config.vocab_size
    if kind.part == "embedding":
        yield _plain("embed.weight", "BF16", vocab, hidden)
    elif kind.part == "tail":
        yield _plain("norm.weight", "BF16", hidden)
        yield _plain("head.weight", "BF16", vocab, hidden)
        yield from _head_hyper_connections(config)
    else:
        yield from _hyper_connections(config)
        yield _plain("attn_norm.weight", "BF16", hidden)
        yield from _attention(config)
        if kind.ratio:
            yield from _compressor("attn.compressor", config, kind.ratio, config.head_dim)
        if kind.ratio == 4:
            yield from _indexer(config, kind.ratio)
        yield _plain("ffn_norm.weight", "BF16", hidden)
        yield from _experts(config, is_hashed=kind.is_hashed)
    if kind.part == "mtp":
        yield from _dspark_stage(config, kind) if config.is_dspark else _mtp_ends(config)


def _plain(name: str, dtype: str, *shape: int) -> LogicalTensor:
    return LogicalTensor(name, shape, dtype, "plain")


def _dense(module: str, out: int, in_: int) -> LogicalTensor:
    return LogicalTensor(f"{module}.weight", (out, in_), "", "dense")


def _hyper_connections(config: V4Config) -> Iterator[LogicalTensor]:
    """Mixing of the residual streams around attention and experts: pre, post and a square matrix, 2 + hc rows of hc."""
    rows = (2 + config.hc_mult) * config.hc_mult
    for sublayer in ("attn", "ffn"):
        yield _plain(f"hc_{sublayer}_fn", "F32", rows, config.hc_mult * config.hidden_size)
        yield _plain(f"hc_{sublayer}_base", "F32", rows)
        yield _plain(f"hc_{sublayer}_scale", "F32", 3)


def _head_hyper_connections(config: V4Config) -> Iterator[LogicalTensor]:
    """The final collapse of the residual streams into one."""
    yield _plain("hc_head_fn", "F32", config.hc_mult, config.hc_mult * config.hidden_size)
    yield _plain("hc_head_base", "F32", config.hc_mult)
    yield _plain("hc_head_scale", "F32", 1)


def _attention(config: V4Config) -> Iterator[LogicalTensor]:
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    grouped = config.o_groups * config.o_lora_rank
    yield _plain("attn.attn_sink", "F32", config.num_attention_heads)
    yield _dense("attn.wq_a", config.q_lora_rank, hidden)
    yield _plain("attn.q_norm.weight", "BF16", config.q_lora_rank)
    yield _dense("attn.wq_b", queries, config.q_lora_rank)
    yield _dense("attn.wkv", config.head_dim, hidden)
    yield _plain("attn.kv_norm.weight", "BF16", config.head_dim)
    yield _dense("attn.wo_a", grouped, queries // config.o_groups)  # one [rank, in] matrix a group, stacked
    yield _dense("attn.wo_b", hidden, grouped)


def _compressor(module: str, config: V4Config, ratio: int, width: int) -> Iterator[LogicalTensor]:
    """Weights that average `ratio` tokens into one entry; at ratio 4 windows overlap, so each token has two sets."""
    columns = 2 * width if ratio == 4 else width
    yield _plain(f"{module}.ape", "F32", ratio, columns)
    yield _plain(f"{module}.wkv.weight", "BF16", columns, config.hidden_size)
    yield _plain(f"{module}.wgate.weight", "BF16", columns, config.hidden_size)
    yield _plain(f"{module}.norm.weight", "BF16", width)


def _indexer(config: V4Config, ratio: int) -> Iterator[LogicalTensor]:
    yield _dense("attn.indexer.wq_b", config.index_n_heads * config.index_head_dim, config.q_lora_rank)
    yield _plain("attn.indexer.weights_proj.weight", "BF16", config.index_n_heads, config.hidden_size)
    yield from _compressor("attn.indexer.compressor", config, ratio, config.index_head_dim)


def _experts(config: V4Config, *, is_hashed: bool) -> Iterator[LogicalTensor]:
    """The router, the shared expert and the routed ones; a hash-routed layer has a table where others have a bias."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    yield _plain("ffn.gate.weight", "BF16", config.n_routed_experts, hidden)
    if is_hashed:
        yield _plain("ffn.gate.tid2eid", "I64", config.vocab_size, config.num_experts_per_tok)
    else:
        yield _plain("ffn.gate.bias", "F32", config.n_routed_experts)
    matrices = (("w1", (width, hidden)), ("w2", (hidden, width)), ("w3", (width, hidden)))
    for matrix, (out, in_) in matrices:
        yield _dense(f"ffn.shared_experts.{matrix}", out, in_)
    for expert in range(config.n_routed_experts):
        for matrix, shape in matrices:
            yield LogicalTensor(expert_name(expert, matrix), shape, "", "expert")


def _mtp_ends(config: V4Config) -> Iterator[LogicalTensor]:
    """What an MTP block of April 2026 has besides a block: projections of embedding and hidden state, and its exit."""
    hidden = config.hidden_size
    yield _dense("e_proj", hidden, hidden)
    yield _dense("h_proj", hidden, hidden)
    for norm in ("enorm", "hnorm", "norm"):
        yield _plain(f"{norm}.weight", "BF16", hidden)
    yield from _head_hyper_connections(config)


def _dspark_stage(config: V4Config, kind: _BlockKind) -> Iterator[LogicalTensor]:
    """What the first DSpark stage has at its entry and the last at its exit."""
    assert config.dspark_markov_rank is not None
    hidden, vocab, rank = config.hidden_size, config.vocab_size, config.dspark_markov_rank
    if kind.is_first:
        yield _dense("main_proj", hidden, len(config.dspark_target_layer_ids) * hidden)
        yield _plain("main_norm.weight", "BF16", hidden)
    if kind.is_last:
        yield _plain("norm.weight", "BF16", hidden)
        yield from _head_hyper_connections(config)
        yield _plain("markov_head.markov_w1.weight", "BF16", vocab, rank)
        yield _plain("markov_head.markov_w2.weight", "BF16", vocab, rank)
        yield _plain("confidence_head.proj.weight", "BF16", 1, hidden + rank)


def _base_mtp_copies(config: V4Config) -> list[LogicalTensor]:
    """The MTP block's own embedding and head in the Base releases, under the names that re-exports and vLLM use.

    The published bytes and count of Flash-Base hold exactly two tensors of this shape; their names were not seen.
    """
    shape = (config.vocab_size, config.hidden_size)
    names = ("emb.tok_emb.weight", "head.weight")
    return [LogicalTensor(name, shape, "BF16", "plain", optional=True) for name in names]


@dataclass(frozen=True)
class _Release:
    """A released model, and the DSpark release that followed it.

    Attributes:
        name: repository name of the model.
        dimensions: values of config.json that tell it from other models.
        layer_ratios: compress_ratios without those of the MTP blocks.
        dspark_date: as the DSpark release is called.
        dspark_markov_rank: rank of its Markov tables.
    """

    name: str
    dimensions: Mapping[str, int]
    layer_ratios: tuple[int, ...]
    dspark_date: str
    dspark_markov_rank: int


_DIMENSIONS_OF_BOTH = {
    "vocab_size": 129_280,
    "num_hash_layers": 3,
    "num_experts_per_tok": 6,
    "o_lora_rank": 1024,
    "head_dim": 512,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "hc_mult": 4,
}
_FLASH = {
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 64,
    "n_routed_experts": 256,
    "q_lora_rank": 1024,
    "o_groups": 8,
    **_DIMENSIONS_OF_BOTH,
}
_PRO = {
    "hidden_size": 7168,
    "moe_intermediate_size": 3072,
    "num_attention_heads": 128,
    "n_routed_experts": 384,
    "q_lora_rank": 1536,
    "o_groups": 16,
    **_DIMENSIONS_OF_BOTH,
}
_RELEASES = (
    _Release("DeepSeek-V4-Flash", _FLASH, (0, 0, *(4, 128) * 20, 4), "0731", 256),
    _Release("DeepSeek-V4-Pro", _PRO, (128, 128, *(4, 128) * 29, 4), "0813", 512),
)
_DSPARK_STAGES = 3
CUSTOM_RELEASE = "DeepSeek-V4 (custom dimensions)"


def release_name(config: V4Config, scheme: Scheme) -> str:
    """Name of the release that has these dimensions and is stored so; CUSTOM_RELEASE where there is none."""
    for release in _RELEASES:
        if config.compress_ratios[: config.num_hidden_layers] != release.layer_ratios:
            continue
        if any(getattr(config, key) != value for key, value in release.dimensions.items()):
            continue
        if (config.dspark_markov_rank, config.mtp_blocks) == (release.dspark_markov_rank, _DSPARK_STAGES):
            return f"{release.name} (DSpark, {release.dspark_date})"
        if (config.dspark_markov_rank, config.mtp_blocks) == (None, 1):
            return f"{release.name}-Base" if scheme == BASE_SCHEME else release.name
    return CUSTOM_RELEASE
