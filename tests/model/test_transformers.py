"""The forward pass without rounding gives the logits of Hugging Face transformers, which shares no line with it.

Both run the same BF16 checkpoint in FP32: the wiring of the model is compared, not its arithmetic. They differ by the
order of FP32 sums, about 1e-6; nothing of transformers has to be changed for that. Its deviations from the release
(cosines and sines in BF16, scores and mixing weights in BF16, the routing weight behind w2) are roundings to the
model's dtype or other orders of products, and vanish in FP32; the 1e-20 that it adds to the sum of routing weights is
below half an ulp of any sum.

Only ties in the indexer's choice are anybody's guess: the prompt is one in which none of random scores occurs.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoint.conversion import REFERENCES, convert
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.config import V4Config
from v4quant.model import attention, block
from v4quant.model.arithmetic import Activations, Arithmetic
from v4quant.model.chunk import split
from v4quant.model.float32 import Float32
from v4quant.model.router import pick_experts
from v4quant.model.streaming import StreamedModel, run_block
from v4quant.model.transformer import Transformer

TOKENS = 320
UNROUNDED = Arithmetic(activations=Activations.NONE)
TOLERANCE = 1e-4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products in many threads mostly wait for each other, the more so beside other test workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=REFERENCES, ids=lambda folder: folder.name)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference checkpoint, converted to BF16."""
    source: Path = request.param
    out = tmp_path_factory.mktemp(source.name) / "bf16"
    convert(source, out, "bf16")
    return out


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    """What transformers makes of the prompt in FP32: [TOKENS, V]."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    model, problems = loaded
    assert not any(problems.values()), problems
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    found: torch.Tensor = model(prompt()[None], use_cache=False).logits[0]
    return found


def prompt() -> torch.Tensor:
    return torch.randint(512, (TOKENS,), generator=torch.Generator().manual_seed(15))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def streamed_logits(checkpoint: Path, sizes: tuple[int, ...] = ()) -> torch.Tensor:
    with StreamedModel(open_checkpoint(checkpoint), UNROUNDED) as model:
        schedule = model.schedule([prompt()], sizes)
        streams = model.embed(schedule.input_ids)
        for layer in model.blocks(0, model.config.num_hidden_layers):
            streams = run_block(layer, streams, schedule).streams
        return model.head().logits(streams)


def test_the_prompt_reaches_every_part(checkpoint: Path) -> None:
    """Longer than the window, more entries than the indexer may pick, more than one of HCA, both kinds of router."""
    config = open_checkpoint(checkpoint).config
    ratios = config.compress_ratios[: config.num_hidden_layers]
    assert config.vocab_size == 512
    assert config.sliding_window < TOKENS
    assert config.index_topk < TOKENS // 4
    assert {4, 128} <= set(ratios) and TOKENS // 128 > 1
    assert 0 < config.num_hash_layers < config.num_hidden_layers


def test_streamed_logits(checkpoint: Path, expected: torch.Tensor) -> None:
    assert relative_error(streamed_logits(checkpoint), expected) < TOLERANCE


def test_streamed_logits_of_pieces_and_single_tokens(checkpoint: Path, expected: torch.Tensor) -> None:
    if open_checkpoint(checkpoint).config.index_n_heads < 8:
        pytest.skip("where no head of few likes an entry its score is 0: ties, which other shapes break otherwise")
    assert relative_error(streamed_logits(checkpoint, (200, 7, 1)), expected) < TOLERANCE


def test_logits_of_the_whole_model_in_memory(checkpoint: Path, expected: torch.Tensor) -> None:
    model = Transformer(open_checkpoint(checkpoint), UNROUNDED)
    caches = model.cache(1)
    streams = [model.streams(chunk, caches) for chunk in split([prompt()], [160])]
    assert relative_error(model.logits(torch.cat(streams)), expected) < TOLERANCE


def _leave_out_the_inverse_rotation(patch: pytest.MonkeyPatch) -> None:
    rotate = Float32.rope_
    patch.setattr(Float32, "rope_", lambda ops, x, table, inverse=False: x if inverse else rotate(ops, x, table))


def _transpose_the_residual_mix(patch: pytest.MonkeyPatch) -> None:
    combine = Float32.combine
    patch.setattr(Float32, "combine", lambda ops, f, x, post, comb: combine(ops, f, x, post, comb.mT))


def _widen_the_window(patch: pytest.MonkeyPatch) -> None:
    entries = attention.window_entries
    patch.setattr(attention, "window_entries", lambda positions, window: entries(positions, window + 1))


def _show_a_compressed_entry_too_early(patch: pytest.MonkeyPatch) -> None:
    entries = attention.all_entries

    def shifted(chunk: Any, ratio: int) -> torch.Tensor:
        return entries(replace(chunk, positions=chunk.positions + 1), ratio)

    patch.setattr(attention, "all_entries", shifted)


def _forget_the_weights_of_index_heads(patch: pytest.MonkeyPatch) -> None:
    pick = Float32.pick
    patch.setattr(
        Float32, "pick", lambda ops, q, keys, weights, *rest: pick(ops, q, keys, torch.ones_like(weights), *rest)
    )


def _forget_the_sink(patch: pytest.MonkeyPatch) -> None:
    attend = Float32.attend
    patch.setattr(Float32, "attend", lambda ops, q, sink, picked: attend(ops, q, sink - 1e4, picked))


def _forget_the_routed_scaling(patch: pytest.MonkeyPatch) -> None:
    def unscaled(x: torch.Tensor, ids: torch.Tensor, weights: Any, config: V4Config, ops: Any) -> Any:
        return pick_experts(x, ids, weights, replace(config, routed_scaling_factor=1.0), ops)

    patch.setattr(block, "pick_experts", unscaled)


@pytest.mark.parametrize(
    "break_it",
    [
        _leave_out_the_inverse_rotation,
        _transpose_the_residual_mix,
        _widen_the_window,
        _show_a_compressed_entry_too_early,
        _forget_the_weights_of_index_heads,
        _forget_the_sink,
        _forget_the_routed_scaling,
    ],
    ids=lambda function: function.__name__.strip("_"),
)
def test_a_wrong_wire_shows(
    checkpoint: Path, expected: torch.Tensor, break_it: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: each of these is far outside of the tolerance."""
    break_it(monkeypatch)
    assert relative_error(streamed_logits(checkpoint), expected) > 10 * TOLERANCE
