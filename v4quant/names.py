"""Tensor names of DeepSeek-V4 checkpoints: parsed and built here and nowhere else, never matched by substrings.

A name is an optional block ("layers.7." or "mtp.0."), then a name local to that block; routed experts carry their
number inside it: "layers.7.ffn.experts.12.w1.weight". Source of the names: the headers of the April 2026, 0731 and
0813 releases; spellings that only re-exports use are marked.
"""

import re
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a tensor is for. A block scale has the role of its weight."""

    EMBEDDING = "embedding"
    HEAD = "head"
    FINAL_NORM = "final_norm"
    NORM = "norm"
    ATTENTION = "attention"
    COMPRESSOR = "compressor"
    INDEXER = "indexer"
    HYPER_CONNECTIONS = "hyper_connections"
    ROUTER = "router"
    HASH_TABLE = "hash_table"
    SHARED_EXPERTS = "shared_experts"
    ROUTED_EXPERTS = "routed_experts"
    MTP_PROJECTION = "mtp_projection"
    MTP_EMBEDDING = "mtp_embedding"
    MTP_HEAD = "mtp_head"
    MARKOV_HEAD = "markov_head"
    CONFIDENCE_HEAD = "confidence_head"


@dataclass(frozen=True, slots=True)
class TensorName:
    """A tensor name, taken apart.

    Attributes:
        name: the whole name.
        block: "layers", "mtp", or "" outside the blocks.
        index: number of the block; -1 outside the blocks.
        module: path inside the block without expert number and leaf: "attn.wq_a", "ffn.experts.w1", "embed", "".
        expert: number of the routed expert; -1 for every other tensor.
        leaf: last component: "weight", "scale", "bias", "ape", "hc_attn_fn".
        role: what the tensor is for.
        is_quantised: True for matrices that some release stores under block scales, and for these scales.
    """

    name: str
    block: str
    index: int
    module: str
    expert: int
    leaf: str
    role: Role
    is_quantised: bool

    @property
    def is_scale(self) -> bool:
        """True for block scales; `hc_*_scale` are parameters and no scales."""
        return self.leaf == "scale"

    @property
    def group(self) -> str:
        """The role, with "mtp." before it in MTP blocks: a line of the table that `inspect` prints."""
        return f"mtp.{self.role}" if self.block == "mtp" else str(self.role)


# Local names by role. A name that ends in "." is a matrix that some release quantises: it has a weight and a scale.
_OUTSIDE: dict[Role, tuple[str, ...]] = {
    Role.EMBEDDING: ("embed.weight",),
    Role.HEAD: ("head.weight",),
    Role.FINAL_NORM: ("norm.weight",),
    Role.HYPER_CONNECTIONS: ("hc_head_fn", "hc_head_base", "hc_head_scale"),
}
_BLOCK: dict[Role, tuple[str, ...]] = {
    Role.NORM: ("attn_norm.weight", "ffn_norm.weight", "attn.q_norm.weight", "attn.kv_norm.weight"),
    Role.ATTENTION: ("attn.attn_sink", "attn.wq_a.", "attn.wq_b.", "attn.wkv.", "attn.wo_a.", "attn.wo_b."),
    Role.HYPER_CONNECTIONS: (
        *("hc_attn_fn", "hc_attn_base", "hc_attn_scale"),
        *("hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale"),
    ),
    Role.ROUTER: ("ffn.gate.weight", "ffn.gate.bias"),
    Role.SHARED_EXPERTS: ("ffn.shared_experts.w1.", "ffn.shared_experts.w2.", "ffn.shared_experts.w3."),
    Role.ROUTED_EXPERTS: ("ffn.experts.w1.", "ffn.experts.w2.", "ffn.experts.w3."),
}
_LAYERS: dict[Role, tuple[str, ...]] = {
    Role.COMPRESSOR: (
        "attn.compressor.ape",
        "attn.compressor.norm.weight",
        "attn.compressor.wkv.weight",
        "attn.compressor.wgate.weight",
    ),
    Role.INDEXER: (
        "attn.indexer.wq_b.",
        "attn.indexer.weights_proj.weight",
        "attn.indexer.compressor.ape",
        "attn.indexer.compressor.norm.weight",
        "attn.indexer.compressor.wkv.weight",
        "attn.indexer.compressor.wgate.weight",
    ),
    Role.HASH_TABLE: ("ffn.gate.tid2eid",),
}
_MTP: dict[Role, tuple[str, ...]] = {
    Role.MTP_PROJECTION: ("e_proj.", "h_proj.", "enorm.weight", "hnorm.weight", "main_proj.", "main_norm.weight"),
    Role.FINAL_NORM: ("norm.weight",),
    Role.HYPER_CONNECTIONS: ("hc_head_fn", "hc_head_base", "hc_head_scale"),
    # Copies that the Base releases hold; their headers were not seen, so every spelling in use elsewhere counts.
    Role.MTP_EMBEDDING: ("emb.tok_emb.weight", "emb.weight", "embed.weight", "embed_tokens.weight"),
    Role.MTP_HEAD: ("head.weight", "lm_head.weight", "shared_head.head.weight"),
    Role.MARKOV_HEAD: (
        *("markov_head.markov_w1.weight", "markov_head.markov_w2.weight"),
        *("markov_head.embed.weight", "markov_head.head.weight"),  # the V4.1 spelling, in some V4 re-exports
    ),
    Role.CONFIDENCE_HEAD: ("confidence_head.proj.weight",),
}

_Parts = tuple[str, str, Role, bool]  # module, leaf, role, is_quantised


def _grammar(*tables: dict[Role, tuple[str, ...]]) -> dict[str, _Parts]:
    """Local name -> its parts."""
    parts: dict[str, _Parts] = {}
    for table in tables:
        for role, local_names in table.items():
            for local in local_names:
                is_quantised = local.endswith(".")
                for full in (f"{local}weight", f"{local}scale") if is_quantised else (local,):
                    module, _, leaf = full.rpartition(".")
                    parts[full] = (module, leaf, role, is_quantised)
    return parts


_GRAMMARS = {"": _grammar(_OUTSIDE), "layers": _grammar(_BLOCK, _LAYERS), "mtp": _grammar(_BLOCK, _MTP)}

# Numbers have no leading zeros, and no more digits than the bounds of config.py let them have.
_NAME = re.compile(
    r"(?:(?:(layers)\.(0|[1-9][0-9]{0,3})|(mtp)\.([0-9]))\.)?"  # block and its number
    r"(?:(ffn\.experts\.)(0|[1-9][0-9]{0,4})\.)?"  # routed expert
    r"([a-z][a-z0-9_.]{0,63})"  # the rest, looked up in the grammar
)


def parse_name(name: str) -> TensorName | None:
    """Take a tensor name apart; None where it names no tensor of any V4 release."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layers, layer, mtp, mtp_number, experts, expert, rest = match.groups()
    block = layers or mtp or ""
    parts = _GRAMMARS[block].get(experts + rest if experts else rest)
    if parts is None:
        return None
    module, leaf, role, is_quantised = parts
    if (expert is None) == (role is Role.ROUTED_EXPERTS):
        return None
    index = int(layer or mtp_number) if block else -1
    number = int(expert) if expert else -1
    return TensorName(name, block, index, module, number, leaf, role, is_quantised)


# The V4.1 spelling of the Markov tables; some V4 re-exports have it, and loaders take both.
_OTHER_SPELLINGS = {
    "markov_w1.weight": "embed.weight",
    "markov_w2.weight": "head.weight",
}


def other_spelling(name: str) -> str:
    """The other name that a tensor of an MTP block may have; its own name where there is no other."""
    prefix, table, local = name.partition(".markov_head.")
    return prefix + table + _OTHER_SPELLINGS.get(local, local)


def released_spelling(name: str) -> str:
    """The name that the release gives a tensor; its own but for the Markov tables of some re-exports."""
    prefix, table, local = name.partition(".markov_head.")
    released = {other: own for own, other in _OTHER_SPELLINGS.items()}
    return prefix + table + released.get(local, local)


def block_prefix(block: str, index: int) -> str:
    """What every tensor name of a block begins with: block_prefix("layers", 7) is "layers.7."."""
    return f"{block}.{index}."


def in_block(parts: TensorName, index: int) -> str:
    """The name that a block's tensor has in another block of its kind: "layers.7.attn_norm.weight" -> "layers.2..."."""
    return block_prefix(parts.block, index) + parts.name.removeprefix(block_prefix(parts.block, parts.index))


def of_expert(parts: TensorName, expert: int) -> str:
    """The name that a routed expert's tensor has for another expert of its block."""
    return (
        f"{block_prefix(parts.block, parts.index)}ffn.experts.{expert}.{parts.module.rpartition('.')[2]}.{parts.leaf}"
    )


def expert_name(expert: int, matrix: str) -> str:
    """Local name of a routed expert's weight: expert_name(12, "w1") is "ffn.experts.12.w1.weight"."""
    return f"ffn.experts.{expert}.{matrix}.weight"


def scale_name(weight_name: str) -> str:
    """Name of the block scale that belongs to a weight: "X.weight" -> "X.scale".

    Raises:
        ValueError: if the name does not end in ".weight"; such a tensor has no scale.
    """
    module, dot, leaf = weight_name.rpartition(".")
    if not dot or leaf != "weight":
        raise ValueError(f"{weight_name!r} names no weight, so it has no scale")
    return f"{module}.scale"
