"""Any split of the tokens, any company of other sequences: the same results, within the floor of FP32 sums."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.rounded_once import query_norm_rounded_once
from tests.model.references import final_streams, mean_kl, named, streamed, top1
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.errors import UsageError
from v4quant.kernels import query_norm
from v4quant.model.arithmetic import Products
from v4quant.model.chunk import Chunk, split
from v4quant.model.streaming import run_block
from v4quant.model.transformer import Transformer

FLASH = named("tiny-flash")
TOKENS = 200  # windows of 32, 50 CSA entries of which 16 are picked, one HCA entry


@pytest.fixture(autouse=True, scope="module")
def roots_rounded_once() -> Iterator[None]:
    """torch rounds the root of leftover heads twice (see query_norm): 4 heads leave some, 64 and 128 none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query_norm, "query_norm_torch_", lambda q, eps, _: q.copy_(query_norm_rounded_once(q, eps)))
        yield


def logits(prompts: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    with torch.inference_mode(), streamed(FLASH.folder, Products.DECODED) as model:
        return model.head().logits(final_streams(model, model.schedule(prompts, sizes)))


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return logits([FLASH.ids[:TOKENS]], [])


@pytest.mark.parametrize("sizes", [[64], [1], [7, 50, 3], [130, 1], [199, 1], [127, 2]])
def test_any_split_gives_the_same(sizes: list[int], whole: torch.Tensor) -> None:
    floor = FLASH.floor["other_fp32_accumulation_order"]
    found = logits([FLASH.ids[:TOKENS]], sizes)
    assert mean_kl(whole, found) <= 2 * floor["kl_mean"]
    assert 1 - top1(whole, found) <= 2 * (1 - floor["top1"])


def test_splits_are_bit_equal_layer_by_layer_where_no_sum_changes() -> None:
    """Fed the same streams, most tokens of a layer do not depend on the split at all."""
    with torch.inference_mode(), streamed(FLASH.folder) as model:
        one, many = (model.schedule([FLASH.ids[:TOKENS]], sizes) for sizes in ([TOKENS], [33]))
        for layer, block in enumerate(model.blocks(0, model.config.num_hidden_layers)):
            streams = FLASH.input_of(layer, model)[:TOKENS]
            a, b = run_block(block, streams, one), run_block(block, streams, many)
            equal = (a.streams == b.streams).flatten(1).all(1)
            assert float(equal.float().mean()) > 0.8, layer


def test_sequences_of_different_lengths_together(whole: torch.Tensor) -> None:
    prompts = [FLASH.ids[100:131], FLASH.ids[:TOKENS], FLASH.ids[50:52], FLASH.ids[290:291]]
    together = logits(prompts, [40, 30, 1, 70])
    alone = [logits([prompt], []) for prompt in prompts]
    parts = torch.split(together, [len(prompt) for prompt in prompts])
    floor = FLASH.floor["other_fp32_accumulation_order"]
    for found, expected in zip(parts, alone, strict=True):
        assert mean_kl(expected, found) <= 2 * floor["kl_mean"]
    assert torch.equal(alone[1], whole)


def test_whole_model_equals_streaming_bit_for_bit() -> None:
    ids = FLASH.ids[:140]
    model = Transformer(open_checkpoint(FLASH.folder))
    caches = model.cache(1)
    with torch.inference_mode():
        parts = []
        for chunk in split([ids], [130, 1]):
            parts.append(model.streams(chunk, caches))
        streams = torch.cat(parts)
        with streamed(FLASH.folder, Products.DECODED) as other:
            schedule = other.schedule([ids], [130, 1])
            expected = final_streams(other, schedule)
            prefill = streams[:130] == expected[:130]
            assert float(prefill.flatten(1).all(1).float().mean()) > 0.5  # experts see fewer rows at a time
            assert mean_kl(other.head().logits(expected), model.logits(streams)) < 0.01


def test_a_sequence_begins_anew_after_reset() -> None:
    model = Transformer(open_checkpoint(FLASH.folder))
    caches = model.cache(2)
    ids = FLASH.ids
    with torch.inference_mode():
        first = model.streams(Chunk.of([(0, 0, ids[:90]), (1, 0, ids[150:280])]), caches)
        for cache in caches:
            cache.reset(0)
        model.streams(Chunk.of([(0, 0, ids[200:270])]), caches)  # other tokens in the pages that were given back
        for cache in caches:
            cache.reset(0)
        again = model.streams(Chunk.of([(0, 0, ids[:90])]), caches)
        # Sequence 1 still stands where it was.
        model.streams(Chunk.of([(1, 130, ids[280:281])]), caches)
    equal = (first[:90] == again).flatten(1).all(1)
    assert float(equal.float().mean()) > 0.5


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "holds no prompt"),
        ([torch.tensor([], dtype=torch.int64)], "has 0 tokens, expected 1 to 1,048,576"),
        ([torch.tensor([3, 512])], "token 1 is 512, expected 0 to 511"),
        ([torch.tensor([3]), torch.tensor([-1])], "tokens: prompt 1: token 0 is -1"),
        ([torch.tensor([3.0])], "token ids are torch.float32"),
        ([torch.tensor([[3]])], r"token ids are torch.int64 \[1, 1\]"),
        ([torch.zeros(2**20 + 1, dtype=torch.int64)], "has 1,048,577 tokens"),
    ],
)
def test_wrong_tokens(prompts: list[torch.Tensor], message: str) -> None:
    with streamed(FLASH.folder) as model, pytest.raises(UsageError, match=message):
        model.schedule(prompts)


@pytest.mark.parametrize("sizes", [[], [0], [4, -1]])
def test_wrong_sizes(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="expected one or more positive numbers"):
        list(split([torch.tensor([1])], sizes))
