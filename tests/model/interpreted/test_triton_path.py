"""Every layer of the reference checkpoints on the Triton bodies: against the stored outputs and the torch references.

The interpreter takes a second or so for each token of a layer, so the context is computed by the references and the
last tokens by the kernels, from the same pages; the slow test computes everything by the kernels.
"""

import pytest
import torch

from tests.kernels.rounded_once import query_norm_rounded_once
from tests.model.references import REFERENCES, Reference, named, relative_error, streamed
from v4quant.kernels import query_norm
from v4quant.model.block import Block
from v4quant.model.chunk import split
from v4quant.model.streaming import Schedule, run_block

CONTEXT, LAST = 143, 1  # the last token completes a CSA entry


@pytest.fixture(autouse=True)
def roots_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does; see query_norm."""
    monkeypatch.setattr(query_norm, "query_norm_torch_", lambda q, eps, _: q.copy_(query_norm_rounded_once(q, eps)))


def last_tokens(block: Block, streams: torch.Tensor, ids: torch.Tensor, kernels: str) -> torch.Tensor:
    """Streams of the last tokens behind a context that the references computed."""
    with pytest.MonkeyPatch.context() as patch:
        cache = block.cache(1)
        context, last = split([ids], [CONTEXT, LAST])
        patch.setenv("V4QUANT_KERNELS", "torch")
        block.attend(streams[:CONTEXT], context, cache)
        patch.setenv("V4QUANT_KERNELS", kernels)
        attended, _ = block.attend(streams[CONTEXT:], last, cache)
        return block.feed_forward(attended, last.input_ids).streams


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)
def test_last_tokens_of_every_layer(reference: Reference) -> None:
    ids = reference.ids[: CONTEXT + LAST]
    equal = []
    with torch.inference_mode(), streamed(reference.folder) as model:
        for layer, block in enumerate(model.blocks(0, model.config.num_hidden_layers)):
            streams = reference.input_of(layer, model)[: CONTEXT + LAST]
            found = last_tokens(block, streams, ids, "triton")
            expected = last_tokens(block, streams, ids, "torch")
            # One rounding edge moves a token by some percent, another order of sums by nothing.
            assert relative_error(found, expected) < 0.03, (layer, block.ratio)
            stored = reference.tensor(f"layer{layer}.out")[CONTEXT : CONTEXT + LAST]
            assert relative_error(found, stored) < 0.04, (layer, block.ratio)
            equal += (found == expected).flatten(1).all(1).tolist()
    assert sum(equal) >= 0.6 * len(equal), equal


@pytest.mark.slow
def test_all_tokens_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = named("tiny-flash")
    monkeypatch.setenv("V4QUANT_KERNELS", "triton")
    with torch.inference_mode(), streamed(reference.folder) as model:
        schedule = Schedule.of([reference.ids], [reference.prefill, 1])
        for layer, block in enumerate(model.blocks(0, model.config.num_hidden_layers)):
            result = run_block(block, reference.input_of(layer, model), schedule)
            expected = reference.tensor(f"layer{layer}.out")
            equal = (result.streams == expected).flatten(1).all(1)
            assert relative_error(result.streams, expected) < 0.025, (layer, block.ratio)
            assert float(equal.float().mean()) > 0.7, (layer, block.ratio)
