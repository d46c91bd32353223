"""Continue a prompt token by token: a prefill in pieces, then decode steps.

The last token that is asked for is chosen and not fed: nobody asks what follows it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from v4quant.config import V4Config
from v4quant.model.cache import BlockCache
from v4quant.model.chunk import Chunk, check_prompts, split
from v4quant.model.sampling import Sampler, Sampling
from v4quant.model.transformer import Transformer

# Tokens of a prompt that go through all layers together; their residual streams take 32 MiB in Flash, 56 in Pro.
PREFILL_TOKENS = 1024


@dataclass(frozen=True)
class Step:
    """A token that was chosen.

    Attributes:
        token: its id.
        logits: what it was chosen by, float32 [V].
    """

    token: int
    logits: torch.Tensor


def prompt_of(ids: Sequence[int], config: V4Config, where: str) -> torch.Tensor:
    """Token ids to continue, checked: int64 [n].

    Args:
        where: what to call the prompt in errors.

    Raises:
        UsageError: if the model cannot take them.
    """
    prompt = torch.tensor(ids, dtype=torch.int64)
    check_prompts([prompt], config, where)
    return prompt


@torch.inference_mode()
def _prefill(model: Transformer, prompt: torch.Tensor, caches: Sequence[BlockCache]) -> torch.Tensor:
    """Logits behind a prompt: float32 [V]."""
    for chunk in split([prompt.to(model.device)], [PREFILL_TOKENS]):
        streams = model.streams(chunk, caches)
    return model.logits(streams[-1:])[0]


@torch.inference_mode()
def _decode(model: Transformer, token: int, position: int, caches: Sequence[BlockCache]) -> torch.Tensor:
    """Logits behind one more token: float32 [V]."""
    chunk = Chunk.of([(0, position, torch.tensor([token]))], model.device)
    return model.logits(model.streams(chunk, caches))[0]


def generate(
    model: Transformer, prompt: torch.Tensor, sampling: Sampling, max_tokens: int, stop: int
) -> Iterator[Step]:
    """Continue a prompt until `stop` is chosen, which is the last token given, or there are enough.

    Args:
        prompt: int64 [n], of prompt_of.
        max_tokens: at most so many; fewer where the model takes no more positions.
        stop: id of the token that ends.

    Raises:
        CheckFailedError: if logits are NaN or infinite.
    """
    sampler, caches = Sampler(sampling), model.cache(1)
    logits = _prefill(model, prompt, caches)
    # The token behind the last position is one that the model can still give.
    for position in range(len(prompt), min(len(prompt) + max_tokens, model.config.max_position_embeddings + 1)):
        token = sampler.choose(logits)
        yield Step(token, logits)
        if token == stop or position + 1 == len(prompt) + max_tokens:
            return
        logits = _decode(model, token, position, caches)
