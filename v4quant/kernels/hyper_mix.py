"""Manifold-constrained hyper-connections: what a sublayer reads of the residual streams, and how its output returns.

    mix  = (fn flat(x)) * rsqrt(mean(flat(x) ** 2) + norm_eps)                        [T, 2 S + S S], no learned gain
    pre  = sigmoid(mix[:S] scale_0 + base[:S]) + eps
    post = 2 sigmoid(mix[S:2S] scale_1 + base[S:2S])
    comb = Sinkhorn(mix[2S:] scale_2 + base[2S:]): softmax of rows + eps, columns / (sum + eps), then (iterations - 1)
           times rows / (sum + eps), columns / (sum + eps)

    hyper_mix:      y     = sum_j pre_j x_j
    hyper_combine:  out_k = post_k f + sum_j comb[j, k] x_j                   (the first index of comb is summed)
    hyper_collapse: y     = sum_j pre_j x_j, with mix and pre only, S rows of fn: before the final norm

T tokens, S = 4 streams of D dims, f the sublayer's output. FP32 inside, streams BF16; 20 iterations, both eps 1e-6.
Source: `Block.hc_pre`, `Block.hc_post`, `hc_head` of DeepSeek's released inference code.
"""

from collections.abc import Iterator

import torch

from v4quant.kernels._backend import require, use_triton

STREAMS = (2, 4, 8)
# Tokens at a time in the references: float32 copies of their streams stay in a CPU's cache.
_PIECE = 64


def hyper_mix_torch(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference for hyper_mix: same arguments, any device; equal up to the order of FP32 sums and exp's last bit."""
    streams = x.shape[1]
    mix = _mix(x, fn, norm_eps)  # [T, 2 S + S S]
    pre = torch.sigmoid(mix[:, :streams] * scale[0] + base[:streams]) + eps  # [T, S]
    post = 2 * torch.sigmoid(mix[:, streams : 2 * streams] * scale[1] + base[streams : 2 * streams])
    comb = mix[:, 2 * streams :] * scale[2] + base[2 * streams :]
    comb = _sinkhorn(comb.reshape(x.shape[0], streams, streams), eps, iterations)  # [T, S, S]
    return _weighted_sum(x, pre), post, comb


def hyper_combine_torch(f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Reference for hyper_combine: same arguments, same bits, any device."""
    out = torch.empty_like(x)
    for piece in _pieces(x):
        sublayer, streams = f[piece].float(), x[piece].float()  # [t, D], [t, S, D]
        for k in range(x.shape[1]):
            y = post[piece, k, None] * sublayer
            for j in range(x.shape[1]):
                y += comb[piece, j, k, None] * streams[:, j]
            out[piece, k] = y
    return out


def hyper_collapse_torch(
    x: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, *, norm_eps: float, eps: float
) -> torch.Tensor:
    """Reference for hyper_collapse: same arguments, any device; equal up to the order of FP32 sums."""
    return _weighted_sum(x, torch.sigmoid(_mix(x, fn, norm_eps) * scale + base) + eps)


def _pieces(x: torch.Tensor) -> Iterator[slice]:
    return (slice(first, first + _PIECE) for first in range(0, x.shape[0], _PIECE))


def _mix(x: torch.Tensor, fn: torch.Tensor, norm_eps: float) -> torch.Tensor:
    mix = torch.empty(x.shape[0], fn.shape[0], dtype=torch.float32, device=x.device)
    for piece in _pieces(x):
        flat = x[piece].flatten(1).float()  # [t, S D]
        mix[piece] = (flat @ fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return mix


def _weighted_sum(x: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], x.shape[2], dtype=x.dtype, device=x.device)  # [T, D]
    for piece in _pieces(x):
        y = pre[piece, 0, None] * x[piece, 0].float()
        for j in range(1, x.shape[1]):
            y += pre[piece, j, None] * x[piece, j].float()
        out[piece] = y
    return out


def _sinkhorn(comb: torch.Tensor, eps: float, iterations: int) -> torch.Tensor:
    comb = comb.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def hyper_mix(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the streams into a sublayer's input, and work out how its output will return.

    Args:
        x: bfloat16 [T, S, D], contiguous; S is 2, 4 or 8, D a multiple of 16.
        fn: float32 [2 S + S S, S D].
        scale: float32 [3], for pre, post and comb.
        base: float32 [2 S + S S].
        norm_eps: rms_norm_eps.
        eps: hc_eps.
        iterations: hc_sinkhorn_iters, 1 or more.

    Returns:
        y bfloat16 [T, D], post float32 [T, S], comb float32 [T, S, S].

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    rows = 2 * x.shape[1] + x.shape[1] ** 2 if x.dim() == 3 else 0
    _require_mix(x, fn, scale, base, rows, scales=3)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected 1 or more")
    if not use_triton(x):
        return hyper_mix_torch(x, fn, scale, base, norm_eps=norm_eps, eps=eps, iterations=iterations)
    from v4quant.kernels._hyper_mix_triton import launch_mix

    return launch_mix(x, fn, scale, base, norm_eps, eps, iterations)


def hyper_combine(f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Return a sublayer's output to the streams.

    Args:
        f: bfloat16 [T, D], contiguous.
        x: bfloat16 [T, S, D], the streams that hyper_mix read.
        post: float32 [T, S] of hyper_mix.
        comb: float32 [T, S, S] of hyper_mix.

    Returns:
        bfloat16 [T, S, D].

    Raises:
        TypeError, ValueError: as hyper_mix.
    """
    _require_streams(x)
    tokens, streams, dims = x.shape
    require("f", f, torch.bfloat16, (tokens, dims))
    require("post", post, torch.float32, (tokens, streams))
    require("comb", comb, torch.float32, (tokens, streams, streams))
    if not use_triton(x):
        return hyper_combine_torch(f, x, post, comb)
    from v4quant.kernels._hyper_streams_triton import launch_combine

    return launch_combine(f, x, post, comb)


def hyper_collapse(
    x: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, *, norm_eps: float, eps: float
) -> torch.Tensor:
    """Collapse the streams after the last block.

    Args:
        x: bfloat16 [T, S, D], as for hyper_mix.
        fn: float32 [S, S D].
        scale: float32 [1].
        base: float32 [S].
        norm_eps: rms_norm_eps.
        eps: hc_eps.

    Returns:
        bfloat16 [T, D].

    Raises:
        TypeError, ValueError: as hyper_mix.
    """
    _require_mix(x, fn, scale, base, x.shape[1] if x.dim() == 3 else 0, scales=1)
    if not use_triton(x):
        return hyper_collapse_torch(x, fn, scale, base, norm_eps=norm_eps, eps=eps)
    from v4quant.kernels._hyper_mix_triton import launch_collapse

    return launch_collapse(x, fn, scale, base, norm_eps, eps)


def _require_streams(x: torch.Tensor) -> None:
    require("x", x, torch.bfloat16, (None, None, None))
    if x.shape[1] not in STREAMS or x.shape[2] % 16 or x.shape[2] == 0:
        raise ValueError(f"x has {x.shape[1]} streams of {x.shape[2]} dims, expected 2, 4 or 8 of a multiple of 16")


def _require_mix(
    x: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, rows: int, *, scales: int
) -> None:
    _require_streams(x)
    require("fn", fn, torch.float32, (rows, x.shape[1] * x.shape[2]))
    require("scale", scale, torch.float32, (scales,))
    require("base", base, torch.float32, (rows,))
