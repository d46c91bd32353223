"""The whole budget of a model: parameters, checkpoint bytes, cache and FLOPs, and what they are against others.

Conventions that the published figures follow: MTP blocks left out; of the parameters, "active" counts the head, the
shared expert and the routed experts of one token, and not the input embedding.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from v4quant.budget import baselines, flops, kv_cache
from v4quant.budget.gpu import GPU_MEMORY_MIB, Load, fits, usable_bytes
from v4quant.budget.layers import LayerKind, layers_by_kind
from v4quant.config import V4Config
from v4quant.encodings import SCHEMES, Scheme
from v4quant.errors import UsageError
from v4quant.inventory import bytes_by_group, parameters, release_name

_CONVENTION = "MTP left out; active: head, shared expert and one token's routed experts counted, embedding not"


def budget(config: V4Config, scheme: Scheme, load: Load) -> dict[str, Any]:
    """Work out everything about a model at a context length; the JSON of `v4quant budget`.

    Args:
        config: the model.
        scheme: how its checkpoint is stored.
        load: `context` tokens of each of `batch` sequences.

    Raises:
        UsageError: if the model does not take such a context.
    """
    if not 1 <= load.context <= config.max_position_embeddings:
        raise UsageError(
            f"a context of {load.context:,} tokens, expected 1 to the {config.max_position_embeddings:,} of "
            "max_position_embeddings"
        )
    by_role = {name: bytes_by_group(config, stored) for name, stored in SCHEMES.items()}
    cache = _cache(config, load)
    work = _work(config, load.context)
    return {
        "release": release_name(config, scheme),
        "format": scheme.name,
        "context": load.context,
        "batch": load.batch,
        "parameters": _parameters(config),
        "checkpoint_bytes": sum(by_role[scheme.name].values()),
        "checkpoints": {
            name: {
                "bytes": sum(roles.values()),
                "bytes_without_mtp": sum(size for role, size in roles.items() if not role.startswith("mtp.")),
                "by_role": roles,
            }
            for name, roles in by_role.items()
        },
        "kv_bytes": cache["bytes_per_sequence"] * load.batch,
        "kv_bytes_per_token": cache["bytes_per_token"],
        "kv": cache,
        "flops_per_token": work["decode"]["total"],
        "flops": work,
        "baselines": _baselines(config, load),
        "ratios": _ratios(config, load, cache, work),
    }


def gpu_budget(config: V4Config, report: Mapping[str, Any], gpu: str, gpus: int) -> dict[str, Any]:
    """Which formats fit on so many GPUs; the `gpu` part of the JSON.

    Args:
        report: what `budget` gave.

    Raises:
        UsageError: if the GPU is none that is known.
    """
    load = Load(report["context"], report["batch"])
    usable = usable_bytes(gpu)
    formats = {
        name: {way: asdict(fit) for way, fit in fits(config, found["by_role"], load, gpu, gpus).items()}
        for name, found in report["checkpoints"].items()
    }
    memory = GPU_MEMORY_MIB[gpu.lower()] * 2**20
    return {"name": gpu.lower(), "gpus": gpus, "memory_bytes": memory, "usable_bytes": usable, "formats": formats}


def _parameters(config: V4Config) -> dict[str, Any]:
    total = parameters(config, mtp=False)
    matrices = 3 * config.hidden_size * config.moe_intermediate_size
    routed = config.num_hidden_layers * config.n_routed_experts * matrices
    idle = config.num_hidden_layers * (config.n_routed_experts - config.num_experts_per_tok) * matrices
    embedding = config.vocab_size * config.hidden_size
    return {
        "total": total,
        "active": total - idle - embedding,
        "convention": _CONVENTION,
        "total_with_mtp": parameters(config),
        "active_with_embedding": total - idle,
        "routed_experts": routed,
        "embedding": embedding,
    }


def _cache(config: V4Config, load: Load) -> dict[str, Any]:
    layout = kv_cache.served_layout(config)
    layers = layers_by_kind(config)
    each = {kind: kv_cache.layer_bytes(config, kind, load.context, layout) for kind in LayerKind}
    return {
        "entry_bytes": layout.entry_bytes,
        "index_key_bytes": layout.index_key_bytes,
        "bytes_per_sequence": kv_cache.kv_bytes(config, load.context, layout),
        "bytes_per_token": kv_cache.kv_bytes_per_token(config, layout),
        "by_layer_kind": {
            str(kind): {"layers": layers[kind], "bytes_per_layer": each[kind], "bytes": layers[kind] * each[kind]}
            for kind in LayerKind
        },
        "mtp_bytes": config.mtp_blocks * each[LayerKind.SWA],
        "compressor_state_bytes": kv_cache.compressor_state_bytes(config),
        "all_bf16_bytes": kv_cache.kv_bytes(config, load.context, kv_cache.bf16_layout(config)),
        "full_windows_times_larger": kv_cache.window_saving(config, layout, index_keys=False),
        "full_windows_times_larger_with_index_keys": kv_cache.window_saving(config, layout, index_keys=True),
    }


def _work(config: V4Config, context: int) -> dict[str, Any]:
    return {
        step: {"total": sum(parts.values()), "fp8_equivalents": flops.fp8_equivalents(parts), "parts": parts}
        for step, parts in (
            ("decode", flops.decode_flops(config, context)),
            ("prefill", flops.prefill_flops(config, context)),
        )
    }


def _baselines(config: V4Config, load: Load) -> dict[str, Any]:
    total, active = baselines.v32_parameters()
    parts = baselines.v32_decode_flops(load.context)
    return {
        "v3.2": {
            "parameters": {"total": total, "active": active},
            "kv_bytes": load.batch * baselines.v32_kv_bytes(load.context),
            "kv_bytes_per_token": baselines.v32_kv_bytes(1),
            "all_bf16_bytes": baselines.v32_kv_bytes(
                load.context, baselines.V32_BF16_ENTRY_BYTES, baselines.V32_BF16_INDEX_KEY_BYTES
            ),
            "flops_per_token": sum(parts.values()),
            "fp8_equivalents": baselines.v32_fp8_equivalents(parts),
            "parts": parts,
        },
        "gqa8": {
            "layers": config.num_hidden_layers,
            "kv_bytes": load.batch * baselines.gqa8_kv_bytes(config, load.context),
            "kv_bytes_per_token": baselines.gqa8_kv_bytes(config, 1),
        },
    }


def _ratios(config: V4Config, load: Load, cache: Mapping[str, Any], work: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of the baselines, and how many times smaller that is."""
    v32_cache = baselines.v32_kv_bytes(load.context)
    gqa8_cache = baselines.gqa8_kv_bytes(config, load.context)
    v32_work = baselines.v32_fp8_equivalents(baselines.v32_decode_flops(load.context))
    own_cache, own_work = cache["bytes_per_sequence"], work["decode"]["fp8_equivalents"]
    return {
        "v3.2": {
            "kv_share": own_cache / v32_cache,
            "kv_times_smaller": v32_cache / own_cache,
            "flops_share": own_work / v32_work,
            "flops_times_fewer": v32_work / own_work,
        },
        "gqa8": {"kv_share": own_cache / gqa8_cache, "kv_times_smaller": gqa8_cache / own_cache},
    }
