"""Runs of the ops outside attention: quantisers, products, norms, router, experts, hyper-connections, weights."""

from typing import Any

import torch

from v4quant.kernels.act_quant_fp4 import act_quant_fp4, act_quant_fp4_torch, act_round_fp4, act_round_fp4_torch
from v4quant.kernels.act_quant_fp8 import act_quant_fp8, act_quant_fp8_torch, act_round_fp8, act_round_fp8_torch
from v4quant.kernels.dequantize import dequantize_fp4, dequantize_fp4_torch, dequantize_fp8, dequantize_fp8_torch
from v4quant.kernels.expert_order import sort_by_expert
from v4quant.kernels.fp4_expert_gemm import ExpertWeights, fp4_expert_gemm, fp4_expert_gemm_torch
from v4quant.kernels.fp8_gemm import fp8_gemm, fp8_gemm_torch
from v4quant.kernels.hadamard import hadamard, hadamard_torch
from v4quant.kernels.hyper_mix import (
    hyper_collapse,
    hyper_collapse_torch,
    hyper_combine,
    hyper_combine_torch,
    hyper_mix,
    hyper_mix_torch,
)
from v4quant.kernels.rms_norm import rms_norm, rms_norm_torch
from v4quant.kernels.route import route, route_by_hash, route_by_hash_torch, route_torch
from v4quant.testing.op_run import OpRun, Sizes, bf16, bits, float32, nearly_all_bits, normal, run_of, within
from v4quant.testing.quantized import Device, activations, experts, fp4_weight, fp8_weight, picks

# FP8 matrix instructions of Hopper keep about 14 bits of a sum; then a few BF16 results, and codes of h, round apart.
_FP8_PRODUCT = within(5e-3)
_FP4_PRODUCT = within(1e-3)
_EPS: dict[str, Any] = {"norm_eps": 1e-6, "eps": 1e-6}


def _run_act_quant_fp8(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    x = normal(device, tokens, sizes.hidden)
    return run_of(act_quant_fp8, act_quant_fp8_torch, (x, 128), bits, bits, result_bytes=x.numel() + x.numel() // 128)


def _run_act_round_fp8(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    x = normal(device, tokens, sizes.hidden)
    return run_of(act_round_fp8, act_round_fp8_torch, (x, 128), bits, result_bytes=x.nbytes)


def _run_act_quant_fp4(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    x = normal(device, tokens * sizes.index_heads, 128)
    written = x.numel() // 2 + x.numel() // 32
    return run_of(act_quant_fp4, act_quant_fp4_torch, (x,), bits, bits, result_bytes=written)


def _run_act_round_fp4(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    x = normal(device, tokens * sizes.index_heads, 128)
    return run_of(act_round_fp4, act_round_fp4_torch, (x,), bits, result_bytes=x.nbytes)


def _run_hadamard(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    x = normal(device, tokens * sizes.index_heads, 128)
    return run_of(hadamard, hadamard_torch, (x,), bits, result_bytes=x.nbytes)


def _run_fp8_gemm(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    """The product of wq_b."""
    columns, depth = sizes.heads * 512, sizes.query_rank
    arguments = (*activations(tokens, depth, device=device), *fp8_weight((columns, depth), torch.uint8, device=device))
    return run_of(
        fp8_gemm,
        fp8_gemm_torch,
        arguments,
        _FP8_PRODUCT,
        result_bytes=tokens * columns * 2,
        flops=2 * tokens * columns * depth,
    )


def _run_fp8_gemm_base(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    """The product of wkv in a Base release, with float32 scales."""
    weight = fp8_weight((512, sizes.hidden), torch.float32, device=device)
    arguments = (*activations(tokens, sizes.hidden, device=device), *weight)
    return run_of(
        fp8_gemm,
        fp8_gemm_torch,
        arguments,
        _FP8_PRODUCT,
        result_bytes=tokens * 512 * 2,
        flops=2 * tokens * 512 * sizes.hidden,
    )


def _run_fp4_experts(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    return _experts("fp4", sizes, tokens, device)


def _run_fp8_experts(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    return _experts("fp8 float32 scales", sizes, tokens, device)


def _experts(kind: str, sizes: Sizes, tokens: int, device: Device) -> OpRun:
    weights = ExpertWeights(*experts(kind, sizes.experts, sizes.width, sizes.hidden, device))
    codes, scale = activations(tokens, sizes.hidden, device=device)
    indices, router = picks(tokens, sizes.slots, sizes.experts, device=device)
    arguments = (codes, scale, sort_by_expert(indices, router, sizes.experts), weights, 10.0)
    # Experts that nobody picked are not read.
    picked = int((torch.bincount(indices.flatten(), minlength=sizes.experts) > 0).sum())
    weight_bytes = sum(matrix.nbytes for matrix in weights.matrices) // sizes.experts * picked
    return OpRun(
        lambda: fp4_expert_gemm(*arguments),
        lambda: fp4_expert_gemm_torch(*arguments),
        (_FP4_PRODUCT if kind == "fp4" else _FP8_PRODUCT,),
        weight_bytes + codes.nbytes + scale.nbytes + tokens * sizes.hidden * 4,
        6 * tokens * sizes.slots * sizes.hidden * sizes.width,
    )


def _run_dequantize_fp4(sizes: Sizes, _tokens: int, device: Device) -> OpRun:
    """One matrix of an expert, whatever the tokens."""
    arguments = fp4_weight((sizes.width, sizes.hidden), device=device)
    written = sizes.width * sizes.hidden * 2
    return run_of(dequantize_fp4, dequantize_fp4_torch, arguments, bits, result_bytes=written)


def _run_dequantize_fp8(sizes: Sizes, _tokens: int, device: Device) -> OpRun:
    """wq_b, whatever the tokens."""
    arguments = fp8_weight((sizes.heads * 512, sizes.query_rank), torch.uint8, device=device)
    written = sizes.heads * 512 * sizes.query_rank * 2
    return run_of(dequantize_fp8, dequantize_fp8_torch, arguments, bits, result_bytes=written)


def _run_rms_norm(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    x, weight = normal(device, tokens, sizes.hidden), normal(device, sizes.hidden, seed=6)
    return run_of(rms_norm, rms_norm_torch, (x, weight, 1e-6), bf16, result_bytes=x.nbytes)


def _run_route(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    logits, bias = normal(device, tokens, sizes.experts).float() * 3, normal(device, sizes.experts, seed=6).float()
    written = tokens * sizes.slots * (8 + 4)
    return run_of(route, route_torch, (logits, bias, sizes.slots, 1.5), bits, float32, result_bytes=written)


def _run_route_by_hash(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    logits = normal(device, tokens, sizes.experts).float()
    random = torch.Generator(device).manual_seed(7)
    ids = torch.randint(0, 1000, (tokens,), generator=random, device=device)
    table = torch.rand(1000, sizes.experts, generator=random, device=device).topk(sizes.slots).indices
    arguments = (logits, ids, table, 1.5)
    return OpRun(
        lambda: route_by_hash(*arguments),
        lambda: route_by_hash_torch(*arguments),
        (bits, float32),
        tokens * (8 + sizes.slots * (8 + 4 + 8 + 4)),  # of logits only those of the experts are read
    )


def _run_hyper_mix(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    x = normal(device, tokens, 4, sizes.hidden)
    arguments = (x, *_mixer(24, 3, sizes, device))
    return run_of(
        hyper_mix,
        hyper_mix_torch,
        arguments,
        _bf16_or_close,
        float32,
        float32,
        result_bytes=tokens * (sizes.hidden * 2 + (4 + 16) * 4),
        flops=2 * tokens * 24 * 4 * sizes.hidden,
        **_EPS,
        iterations=20,
    )


def _run_hyper_collapse(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    x = normal(device, tokens, 4, sizes.hidden)
    return run_of(
        hyper_collapse,
        hyper_collapse_torch,
        (x, *_mixer(4, 1, sizes, device)),
        _bf16_or_close,
        result_bytes=tokens * sizes.hidden * 2,
        flops=2 * tokens * 4 * 4 * sizes.hidden,
        **_EPS,
    )


def _run_hyper_combine(sizes: Sizes, tokens: int, device: Device) -> OpRun:
    x, f = normal(device, tokens, 4, sizes.hidden), normal(device, tokens, sizes.hidden, seed=6)
    post, comb = normal(device, tokens, 4, seed=7).float(), normal(device, tokens, 4, 4, seed=8).float()
    return run_of(hyper_combine, hyper_combine_torch, (f, x, post, comb), nearly_all_bits, result_bytes=x.nbytes)


def _mixer(rows: int, scales: int, sizes: Sizes, device: Device) -> tuple[torch.Tensor, ...]:
    """fn, scale and base."""
    fn = normal(device, rows, 4 * sizes.hidden, seed=9).float() * (4 * sizes.hidden) ** -0.5
    return fn, torch.full((scales,), 0.8, device=device), normal(device, rows, seed=10).float()


def _bf16_or_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Require one BF16 step, or where large terms cancel a few FP32 roundings of them."""
    torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-5)


DENSE_RUNS = {
    "act_quant_fp8": _run_act_quant_fp8,
    "act_round_fp8": _run_act_round_fp8,
    "act_quant_fp4": _run_act_quant_fp4,
    "act_round_fp4": _run_act_round_fp4,
    "hadamard": _run_hadamard,
    "fp8_gemm": _run_fp8_gemm,
    "fp8_gemm Base": _run_fp8_gemm_base,
    "fp4_expert_gemm": _run_fp4_experts,
    "fp4_expert_gemm FP8": _run_fp8_experts,
    "dequantize_fp4": _run_dequantize_fp4,
    "dequantize_fp8": _run_dequantize_fp8,
    "rms_norm": _run_rms_norm,
    "route": _run_route,
    "route_by_hash": _run_route_by_hash,
    "hyper_mix": _run_hyper_mix,
    "hyper_collapse": _run_hyper_collapse,
    "hyper_combine": _run_hyper_combine,
}
