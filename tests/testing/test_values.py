"""Synthetic values look like trained, quantised weights: no NaN, block maxima as quantisers leave them, sane spread."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from v4quant.config import V4Config
from v4quant.encodings import BASE_SCHEME, NATIVE_SCHEME, Scheme
from v4quant.inventory import StoredTensor, stored_tensors
from v4quant.testing import values as values_module
from v4quant.testing.asserts import assert_bitwise_equal
from v4quant.testing.releases import synth_config
from v4quant.testing.values import Values

FP4 = "layers.3.ffn.experts.1.w1"  # [256, 4096]
FP8 = "layers.3.attn.wq_b"  # [8192, 1024]


def stored(
    scheme: Scheme = NATIVE_SCHEME, changes: Mapping[str, int] | None = None
) -> tuple[V4Config, dict[str, StoredTensor]]:
    """A few layers with real row lengths and few rows."""
    small = {"vocab_size": 1000, "moe_intermediate_size": 256, "num_attention_heads": 16} | dict(changes or {})
    config = V4Config.from_json(synth_config("flash", layers=4, experts=8)[0] | small, "test")
    return config, {tensor.name: tensor for tensor in stored_tensors(config, scheme)}


def make_bytes(
    name: str, scheme: Scheme = NATIVE_SCHEME, seed: int = 0, changes: Mapping[str, int] | None = None
) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor, made as the writer makes them."""
    config, tensors = stored(scheme, changes)
    weight = tensors[name.removesuffix("scale") + "weight"] if name.endswith(".scale") else tensors[name]
    return np.concatenate(list(Values(config, seed).pieces(tensors[name], weight)))


def make(
    name: str, dtype: npt.DTypeLike, scheme: Scheme = NATIVE_SCHEME, changes: Mapping[str, int] | None = None
) -> npt.NDArray[Any]:
    """The tensor as an array of this dtype in its header shape."""
    shape = stored(scheme, changes)[1][name].storage_shape
    return make_bytes(name, scheme, changes=changes).view(dtype).reshape(shape)


def fp4_groups(name: str) -> npt.NDArray[np.float64]:
    """E2M1 numbers of an FP4 weight, [rows, groups, 32]."""
    packed = make(f"{name}.weight", np.uint8)
    codes = np.stack([packed & 0xF, packed >> 4], axis=-1)
    numbers = codes.reshape(len(packed), -1, 32).view(ml_dtypes.float4_e2m1fn)
    return np.asarray(numbers, np.float64)


def blocks(matrix: npt.NDArray[Any], rows: int, columns: int) -> npt.NDArray[Any]:
    """[out, in] -> [out / rows * in / columns, rows * columns]."""
    out, in_ = matrix.shape
    cut = matrix.reshape(out // rows, rows, in_ // columns, columns).swapaxes(1, 2)
    return cut.reshape(-1, rows * columns)


def test_fp4_groups_obey_the_ceil_rule() -> None:
    groups = fp4_groups(FP4)
    largest = np.abs(groups).max(axis=-1)
    assert set(np.unique(largest)) == {0.0, 4.0, 6.0}
    # One 128x128 block in 64 and one group in 1,024 are zeros.
    assert 0.005 < (largest == 0).mean() < 0.06
    assert (blocks(largest, 128, 4).max(axis=1) == 0).any()
    assert ((blocks(largest, 128, 4) == 0).sum(axis=1) == 1).any()


def test_fp4_codes_are_gaussian_with_both_zeros() -> None:
    numbers = fp4_groups(FP4)
    share = {magnitude: float((np.abs(numbers) == magnitude).mean()) for magnitude in (0, 0.5, 1, 1.5, 2, 3, 4, 6)}
    assert share[0.5] > share[1] > share[1.5] > share[4] > share[6]
    assert 0.05 < share[4] < 0.1
    assert 0.002 < share[6] < 0.02
    zeros = numbers == 0
    assert 0.45 < np.signbit(numbers[zeros]).mean() < 0.55
    in_zero_groups = numbers[np.abs(numbers).max(axis=-1) == 0]
    assert 0.45 < np.signbit(in_zero_groups).mean() < 0.55
    assert abs(numbers.mean()) < 0.01


def test_fp4_scales_vary_within_and_between_blocks() -> None:
    scale = make(f"{FP4}.scale", np.uint8).astype(np.int64)
    is_zero = np.abs(fp4_groups(FP4)).max(axis=-1) == 0
    assert (scale[is_zero] == 1).all()  # the byte that DeepSeek's quantiser floors to
    live = np.ma.MaskedArray(blocks(scale, 128, 4), blocks(is_zero, 128, 4))
    spread = (live.max(axis=1) - live.min(axis=1)).compressed()
    assert spread.min() >= 3
    assert spread.max() <= 6
    assert np.ptp(np.round(live.mean(axis=1).compressed())) >= 1


@pytest.mark.parametrize("scheme", [NATIVE_SCHEME, BASE_SCHEME], ids=lambda scheme: scheme.name)
def test_fp8_blocks_obey_the_ceil_rule(scheme: Scheme) -> None:
    codes = make(f"{FP8}.weight", np.uint8, scheme)
    assert not np.isin(codes, [0x7F, 0xFF]).any()
    numbers = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    largest = np.abs(blocks(numbers, 128, 128)).max(axis=1)
    is_zero = largest == 0
    assert is_zero.any()
    assert is_zero.mean() < 0.05
    assert (largest[~is_zero] > 224).all()
    assert np.signbit(numbers[numbers == 0]).any()
    if scheme is BASE_SCHEME:
        scale = make(f"{FP8}.scale", np.float32, scheme)
        mantissa, exponent = np.frexp(scale.astype(np.float64))
        assert (mantissa == 0.5).all()
        exponent = exponent - 1
    else:
        exponent = make(f"{FP8}.scale", np.uint8).astype(np.int64) - 127
    assert (exponent.reshape(-1)[is_zero] == math.ceil(math.log2(1e-4 / 448))).all()
    assert np.ptp(exponent.reshape(-1)[~is_zero]) == 2


def test_decoded_weights_keep_activations_near_one() -> None:
    fp4 = fp4_groups(FP4) * np.exp2(make(f"{FP4}.scale", np.uint8).astype(np.float64) - 127)[..., None]
    fp8 = make(f"{FP8}.weight", ml_dtypes.float8_e4m3fn).astype(np.float64)
    fp8 *= np.exp2(make(f"{FP8}.scale", np.uint8).astype(np.float64) - 127).repeat(128, 0).repeat(128, 1)
    bf16 = make("layers.3.ffn.gate.weight", ml_dtypes.bfloat16).astype(np.float64)
    for matrix, inputs in ((fp4, 4096), (fp8, 1024), (bf16, 4096)):
        assert 0.7 < matrix.std() * math.sqrt(inputs) < 1.42


def test_bf16_matrices_have_outliers_and_both_zeros() -> None:
    head = make("head.weight", ml_dtypes.bfloat16).astype(np.float64)
    assert np.abs(head).max() > 6 * head.std()
    assert np.isfinite(head).all()
    zeros = head[head == 0]
    assert 0 < np.signbit(zeros).mean() < 1
    norm = make("layers.0.attn_norm.weight", ml_dtypes.bfloat16).astype(np.float64)
    assert abs(norm.mean() - 1) < 0.02
    assert 0.05 < norm.std() < 0.2


def test_f32_tables_are_sane() -> None:
    assert (make("layers.0.hc_attn_scale", np.float32) > 0).all()
    assert np.abs(make("layers.3.ffn.gate.bias", np.float32)).max() < 0.3
    mixing = make("layers.0.hc_ffn_fn", np.float32)
    assert 0.9 < mixing.std() * math.sqrt(4 * 4096) < 1.1
    assert 0.3 < make("layers.2.attn.compressor.ape", np.float32).std() < 0.7


@pytest.mark.parametrize(("experts", "top_k"), [(256, 6), (8, 6), (6, 6), (1, 1)])
def test_expert_ids_are_distinct_and_uniform(experts: int, top_k: int) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    changes = {"n_routed_experts": experts, "num_experts_per_tok": top_k, "vocab_size": 20_000}
    ids = make(name, np.int64, changes=changes)
    assert ids.shape == (20_000, top_k)
    assert all(len(set(row)) == top_k for row in ids[:500].tolist())
    counts = np.bincount(ids.reshape(-1), minlength=experts)
    assert counts.size == experts
    assert counts.min() > 0.7 * counts.mean()


@pytest.mark.parametrize("name", [f"{FP4}.weight", f"{FP8}.weight", "head.weight"])
def test_bytes_do_not_depend_on_the_cut_into_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_bytes(name)
    for size in (128 * 3, 128 * 1001):
        monkeypatch.setattr(values_module, "PIECE_BYTES", size)
        assert_bitwise_equal(make_bytes(name), whole)


def test_pieces_are_small() -> None:
    config, tensors = stored()
    for name in (f"{FP4}.weight", f"{FP8}.weight", "head.weight"):
        assert tensors[name].bytes > values_module.PIECE_BYTES
        pieces = Values(config, 0).pieces(tensors[name], tensors[name])
        assert max(piece.nbytes for piece in pieces) == values_module.PIECE_BYTES


@pytest.mark.parametrize("name", [f"{FP4}.weight", f"{FP4}.scale", f"{FP8}.weight", f"{FP8}.scale", "hc_head_fn"])
def test_seed_and_name_decide(name: str) -> None:
    first = make_bytes(name)
    assert_bitwise_equal(make_bytes(name), first)
    assert (make_bytes(name, seed=1) != first).any()


def test_tensors_of_one_shape_differ() -> None:
    other = FP4.replace("experts.1", "experts.2")
    assert (make_bytes(f"{FP4}.weight") != make_bytes(f"{other}.weight")).mean() > 0.9


def test_odd_shapes_are_filled_too() -> None:
    # 160 or 5,001 rows of 1,024 + 32 columns: neither fills its 128x128 blocks.
    odd = {"hidden_size": 1056, "moe_intermediate_size": 160, "q_lora_rank": 5001}
    assert make(f"{FP4}.weight", np.uint8, changes=odd).shape == (160, 528)
    assert make(f"{FP4}.scale", np.uint8, changes=odd).shape == (160, 33)
    assert make("layers.3.attn.wq_a.weight", np.uint8, changes=odd).shape == (5001, 1056)
    scale = make("layers.3.attn.wq_a.scale", np.uint8, changes=odd)
    assert scale.shape == (40, 9)
    assert np.ptp(scale) == 2  # no block was called zero, since none was made zero


def test_bytes_are_the_same_on_every_machine() -> None:
    names = (f"{FP4}.weight", f"{FP4}.scale", f"{FP8}.weight", f"{FP8}.scale", "head.weight", "hc_head_fn")
    digest = hashlib.sha256()
    for name in (*names, "layers.0.ffn.gate.tid2eid", "layers.0.attn_norm.weight"):
        digest.update(make_bytes(name).tobytes())
    assert digest.hexdigest() == "3ffd2cf06aaa612a38927314a5105865d51502c3f874985c847f07a6cab27b16"
