"""Plausible results of parity runs, as the engine hands them to the report; numbers from a fixed seed."""

import random
from typing import Any

VERDICTS = ("identical", "indistinguishable", "different")
MARGIN = 3.0
IN_WORDS = {
    "identical": "Every logit of the candidate has the reference's bits.",
    "indistinguishable": "No figure lies beyond 3 times what the reference differs from itself when only the order of "
    "summation or the chunking changes.",
    "different": "Layer 3 departs first: fed the same input it differs by 0.12, 48 times what the reference differs "
    "from itself. The experts explain all of it.",
}


def make_result(
    verdict: str = "indistinguishable",
    *,
    layers: int = 6,
    lengths: tuple[int, ...] = (220, 80),
    compressed: bool = True,
    zero: bool | None = None,
) -> dict[str, Any]:
    """A result with every part filled in.

    Args:
        verdict: one of VERDICTS.
        layers: how many; the one at half the way departs where the verdict is "different".
        lengths: tokens of each prompt.
        compressed: False for a model without CSA and HCA layers, so without an indexer.
        zero: True for errors that are all exactly 0; by default those of "identical".
    """
    rng = random.Random(f"{verdict} {layers} {lengths}")
    zero = verdict == "identical" if zero is None else zero
    departing = layers // 2 if verdict == "different" else layers
    logits = _logits(rng, sum(lengths), 0.0 if zero else 40.0 if verdict == "different" else 0.8)
    floors = {"other summation order": 1.0, "other chunking": 0.0 if zero else 0.4}
    variants = {
        name: {"logits": _logits(rng, sum(lengths), scale), "mtp_logits": _logits(rng, sum(lengths), scale)}
        for name, scale in floors.items()
    }
    return {
        "tool_version": "0.1.0",
        "verdict": verdict,
        "in_words": IN_WORDS[verdict],
        "departures": _departures(departing, logits) if verdict == "different" else [],
        "gates": [
            {"name": "--max-kl", "limit": 0.01, "found": logits["kl"]["mean"], "passed": verdict != "different"},
            {"name": "--min-top1", "limit": 0.95, "found": logits["top1"], "passed": True},
        ],
        "kl_mean": logits["kl"]["mean"],
        "kl_max": logits["kl"]["max"],
        "top1": logits["top1"],
        "noise_floor": {
            "kl_mean": max(of["logits"]["kl"]["mean"] for of in variants.values()),
            "kl_max": max(of["logits"]["kl"]["max"] for of in variants.values()),
            "top1": min(of["logits"]["top1"] for of in variants.values()),
            "margin": MARGIN,
            "of": "reference",
            "variants": variants,
        },
        "logits": logits,
        "mtp_logits": _logits(rng, sum(lengths), 0.0 if zero else 0.9),
        "layers": [
            _layer(rng, layer, departing, compressed=compressed, zero=zero, tokens=sum(lengths))
            for layer in range(layers)
        ],
        "conversations": _conversations(logits) if verdict == "different" else None,
        "attribution": _attribution(departing) if verdict == "different" else None,
        "coverage": _coverage(layers, lengths),
        "bytes_by_role": _bytes_by_role(),
        "config_differences": [{"key": "rope_theta", "reference": 10000, "candidate": 1000000}]
        if verdict == "different"
        else [],
        "evidence": _evidence(rng, layers, lengths),
    }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean": sum(values) / len(values),
        "median": ordered[len(values) // 2],
        "p99": ordered[int(0.99 * (len(values) - 1))],
        "max": ordered[-1],
    }


def _logits(rng: random.Random, tokens: int, scale: float) -> dict[str, Any]:
    """Divergences spread as they are in life: lognormal, a share of them exactly 0."""
    kl = [0.0 if not scale or rng.random() < 0.05 else scale * rng.lognormvariate(-10, 1.4) for _ in range(tokens)]
    return {
        "tokens": tokens,
        "bit_equal": sum(value == 0 for value in kl) / tokens,
        "kl": _spread(kl),
        "kl_reverse": _spread([1.02 * value for value in kl]),
        "top1": 1 - 0.004 * scale / (1 + 0.1 * scale),
        "top5_overlap": 1 - 0.002 * scale / (1 + 0.1 * scale),
        "perplexity": {"reference": 12.34, "candidate": 12.34 * (1 + 0.0005 * scale)},
        "kl_by_token": kl,
    }


def _streams(error: float, tokens: int) -> dict[str, Any]:
    return {
        "rel_err": error,
        "median_rel_err": 0.6 * error,
        "max_abs": 8 * error,
        "cosine": 1 - error * error / 2,
        "bit_equal": 1.0 if error == 0 else 0.25,
        "worst_token": tokens // 3,
        "worst_token_rel_err": 4 * error,
    }


def _layer(
    rng: random.Random, layer: int, departing: int, *, compressed: bool, zero: bool, tokens: int
) -> dict[str, Any]:
    kind = ("window", "window", "csa", "hca")[layer % 4] if compressed else "window"
    floor = 0.0 if layer == 0 or zero else 4e-4 * rng.uniform(0.7, 1.4)
    isolated = 0.12 if layer == departing else floor * rng.uniform(0.3, 1.2)
    accumulated_floor = floor * (1 + layer) ** 0.7
    accumulated = accumulated_floor * rng.uniform(0.4, 1.3) + (0.15 if layer >= departing else 0.0)
    agreement = 1.0 if layer < 2 or not isolated else 1 - min(isolated, 0.3) * rng.uniform(2, 4)
    routing = {"agreement": agreement, "swapped_mass": 0.4 * (1 - agreement)}
    overlap = (1.0 if zero else 1 - isolated * 1.5) if kind == "csa" else None
    floor_overlap = (1.0 if zero else 1 - floor * 2) if kind == "csa" else None
    return {
        "layer": layer,
        "kind": kind,
        "routing": "hash" if layer < 2 else "score",
        "isolated_rel_err": isolated,
        "accumulated_rel_err": accumulated,
        "cosine": 1 - isolated * isolated / 2,
        "expert_agreement": agreement,
        "indexer_overlap": overlap,
        "isolated": _streams(isolated, tokens),
        "accumulated": _streams(accumulated, tokens),
        "isolated_routing": routing,
        "accumulated_routing": {"agreement": agreement - (0 if zero else 0.002), "swapped_mass": 0.001},
        "accumulated_indexer_overlap": None if overlap is None else overlap - (0 if zero else 0.003),
        "floor": {
            "isolated_rel_err": floor,
            "accumulated_rel_err": accumulated_floor,
            "expert_agreement": 1.0 if layer < 2 else 1 - floor * 3,
            "indexer_overlap": floor_overlap,
        },
        "limit": {"isolated_rel_err": 0.0012, "accumulated_rel_err": max(0.0012, MARGIN * accumulated_floor)},
        "departs": layer == departing,
    }


def _departures(layer: int, logits: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"figure": "isolated_rel_err", "where": f"layer {layer}", "found": 0.12, "limit": 0.0012},
        {"figure": "kl_mean", "where": "logits", "found": logits["kl"]["mean"], "limit": 0.0004},
        {"figure": "1 - expert_agreement", "where": f"layer {layer}", "found": 0.38, "limit": 0.004},
    ]


def _attribution(layer: int) -> dict[str, Any]:
    return {
        "layer": layer,
        "module": "experts",
        "blocks": [
            {
                "block": f"layers.{layer}",
                "error": 0.12,
                "swapped": [
                    {"module": "experts", "error": 0.0, "explains": 1.0},
                    {"module": "attention projections", "error": 0.1193, "explains": 0.006},
                    {"module": "router", "error": 0.12, "explains": 0.0},
                ],
            }
        ],
        "tensors": [
            {
                "tensor": f"layers.{layer}.ffn.experts.0.w1.weight",
                "reason": "12 of 3,145,728 values differ, first at [0, 3]: found 0.5, expected 0.25",
            }
        ],
        "tensors_from": f"value comparison of layers.{layer}",
    }


def _conversations(logits: dict[str, Any]) -> dict[str, Any]:
    """Two conversations; the answers to one part, so that one side calls a tool and the other is cut short."""

    def figures(tokens: int, factor: float) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "kl_mean": factor * logits["kl"]["mean"],
            "kl_max": factor * logits["kl"]["max"],
            "top1": 1 - 0.01 * factor,
        }

    call = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    called = {"tokens": 31, "finish": "stop", "text": "Let me see.", "calls": [call], "problem": None}
    cut = {"tokens": 64, "finish": "length", "text": "It may be", "calls": None, "problem": "it was cut off"}
    noise = {"kl_mean": 1e-5, "kl_max": 3e-4, "top1": 0.999}
    return {
        "assistant": figures(90, 1.1) | {"noise": noise},
        "tool_calls": figures(40, 1.4) | {"noise": noise},
        "each": [
            {"name": "line 1", "tokens": 220, "assistant": figures(70, 1.2), "tool_calls": figures(40, 1.4)},
            {"name": "line 3", "tokens": 80, "assistant": figures(20, 0.8), "tool_calls": None},
        ],
        "continuations": {
            "max_tokens": 64,
            "skipped": None,
            "written": 2,
            "alike": 0,
            "calls": {"same": 1, "different": 0, "none": 0, "unknown": 1},
            "each": [
                {"name": "line 1", "parts_at": 2, "margin": 0.01, "calls": "same"}
                | {"reference": called, "candidate": dict(called)},
                {"name": "line 3", "parts_at": 5, "margin": 0.25, "calls": "unknown"}
                | {"reference": called, "candidate": cut},
            ],
        },
    }


def _coverage(layers: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    tokens = sum(lengths)
    return {
        "tokens": tokens,
        "prompts": len(lengths),
        "decode_steps": 8,
        "paths": [
            {
                "path": "window slides",
                "fired": tokens - 32,
                "of": tokens,
                "unit": "tokens",
                "needs": "prompt longer than sliding_window 32",
            },
            {
                "path": "compressed entries read",
                "fired": tokens // 2,
                "of": tokens,
                "unit": "tokens",
                "needs": "prompt longer than the compression ratio 4",
            },
            {
                "path": "indexer has to choose",
                "fired": 0,
                "of": tokens,
                "unit": "tokens",
                "needs": "prompt longer than index_topk 512 x compression ratio 4",
            },
        ],
        "experts": [{"layer": layer, "seen": 15 if layer == 1 else 16, "of": 16} for layer in range(layers)],
        "experts_seen": 16 * layers - (layers > 1),
        "executed": [
            {"what": "attention", "counted": tokens * layers, "expected": tokens * layers},
            {"what": "expert products", "counted": 6 * tokens * layers, "expected": 6 * tokens * layers},
        ],
        "silent": ["indexer has to choose"],
    }


def _bytes_by_role() -> dict[str, Any]:
    reference = {
        "routed_experts": 147_169_738_752,
        "attention": 5_153_960_755,
        "shared_experts": 1_092_616_192,
        "embedding": 1_058_930_688,
        "head": 1_058_930_688,
        "norms": 704_512,
    }
    return {
        "reference": reference,
        "candidate": reference | {"routed_experts": 277_025_390_592, "attention": 5_153_960_755},
    }


def _evidence(rng: random.Random, layers: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    def side(name: str, form: str, certified: bool) -> dict[str, Any]:
        return {
            "path": name,
            "release": "DeepSeek-V4-Flash",
            "format": form,
            "source_id": f"{rng.getrandbits(256):064x}",
            "index_sha256": f"{rng.getrandbits(256):064x}",
            "config_sha256": f"{rng.getrandbits(256):064x}",
            "certificate_sha256": f"{rng.getrandbits(256):064x}" if certified else None,
            "bytes": 155_534_881_587 if form == "native" else 285_390_533_427,
            "ranks": None,
        }

    return {
        "reference": side("DeepSeek-V4-Flash", "native", certified=False),
        "candidate": side("DeepSeek-V4-Flash-FP8", "fp8", certified=True),
        "reference_outputs": {"path": "reference.safetensors", "sha256": f"{rng.getrandbits(256):064x}"},
        "arithmetic": {"activations": "release", "products": "decoded"},
        "device": "cpu",
        "prompts": [[rng.randrange(129280) for _ in range(length)] for length in lengths],
        "chunks": [[max(1, length - 4)] + [1] * min(4, length - 1) for length in lengths],
        "tokens_from": "built for this config",
        "versions": {"v4quant": "0.1.0", "torch": "2.13.0", "triton": "3.9.0", "python": "3.11.7"},
        "threads": 2,
        "cpu": "AMD EPYC 9654 96-Core Processor",
        "seconds": 4312.3,
        "bytes_read": 440_925_415_014,
        "peak_memory_bytes": 1_590_000_000,
        "layer_seconds": [round(rng.uniform(60, 80), 2) for _ in range(layers)],
    }
