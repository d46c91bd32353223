"""Generation: the same tokens as from full prefills, the logits of the streamed forward, and where it ends."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.model.references import final_streams, named, relative_error
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.errors import UsageError
from v4quant.model import generation
from v4quant.model.arithmetic import Activations, Arithmetic
from v4quant.model.cache import BlockCache
from v4quant.model.chunk import Chunk
from v4quant.model.generation import generate, prompt_of
from v4quant.model.sampling import Sampling
from v4quant.model.streaming import StreamedModel
from v4quant.model.transformer import Transformer

FLASH = named("tiny-flash")
# Nothing rounded: what is left between ways to the same number is the last bits of FP32 sums.
UNROUNDED = Arithmetic(Activations.NONE)
PROMPT = FLASH.ids[:150]  # windows of 32, 37 CSA entries of which 16 are picked, one HCA entry
NONE = -1  # no token ends it


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(open_checkpoint(FLASH.folder), UNROUNDED)


def tokens(model: Transformer, prompt: torch.Tensor, count: int, sampling: Sampling | None = None) -> list[int]:
    return [step.token for step in generate(model, prompt, sampling or Sampling(), count, NONE)]


def test_greedy_is_the_best_token_of_full_prefills(model: Transformer) -> None:
    found = tokens(model, PROMPT, 12)
    ids = PROMPT
    for token in found:
        with torch.inference_mode():
            logits = model.logits(model.streams(Chunk.of([(0, 0, ids)]), model.cache(1))[-1:])[0]
        assert token == int(logits.argmax()), len(ids)
        ids = torch.cat([ids, torch.tensor([token])])
    assert len(set(found)) > 6, "a text, not one token again and again"


def test_logits_are_those_of_the_streamed_forward(model: Transformer) -> None:
    steps = list(generate(model, PROMPT, Sampling(), 10, NONE))
    ids = torch.cat([PROMPT, torch.tensor([step.token for step in steps])])
    with torch.inference_mode(), StreamedModel(open_checkpoint(FLASH.folder), UNROUNDED) as streamed:
        expected = streamed.head().logits(final_streams(streamed, streamed.schedule([ids])))
    found = torch.stack([step.logits for step in steps])
    assert relative_error(found, expected[len(PROMPT) - 1 : -1]) < 1e-4


def test_a_prompt_in_pieces(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokens(model, PROMPT, 4)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 37)
    assert tokens(model, PROMPT, 4) == whole


def test_released_arithmetic_repeats_itself_bit_by_bit() -> None:
    model = Transformer(open_checkpoint(FLASH.folder))
    first, second = (list(generate(model, PROMPT, Sampling(1.0, 0.9, 5), 6, NONE)) for _ in range(2))
    assert [step.token for step in first] == [step.token for step in second]
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(first, second, strict=True))
    assert [step.token for step in first] != tokens(model, PROMPT, 6, Sampling(1.0, 0.9, 6))


def test_where_it_ends(model: Transformer) -> None:
    found = tokens(model, PROMPT, 5)
    assert len(found) == 5
    stop = found[2]
    ended = [step.token for step in generate(model, PROMPT, Sampling(), 5, stop)]
    assert ended == found[: found.index(stop) + 1]
    assert tokens(model, PROMPT, 1) == found[:1]


def test_the_last_positions() -> None:
    checkpoint = open_checkpoint(FLASH.folder)
    config = replace(checkpoint.config, max_position_embeddings=40)
    model = Transformer(checkpoint, UNROUNDED, config=config)
    assert len(tokens(model, FLASH.ids[:38], 9)) == 3, "behind tokens 38, 39 and 40"
    assert len(tokens(model, FLASH.ids[:40], 9)) == 1
    with pytest.raises(UsageError, match="chat: has 41 tokens, expected 1 to 40"):
        prompt_of(FLASH.ids[:41].tolist(), config, "chat")


def test_no_token_is_run_whose_logits_nobody_asks_for(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    streams = Transformer.streams

    def counted(own: Transformer, chunk: Chunk, caches: Sequence[BlockCache]) -> torch.Tensor:
        ran.append(len(chunk.input_ids))
        return streams(own, chunk, caches)

    monkeypatch.setattr(Transformer, "streams", counted)
    assert len(tokens(model, PROMPT, 3)) == 3
    assert ran == [150, 1, 1]


def test_layers_are_reported_as_they_are_read() -> None:
    read: list[str] = []
    Transformer(open_checkpoint(FLASH.folder), progress=read.append)
    assert read == [f"layer {index}" for index in range(5)]
