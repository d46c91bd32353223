"""The tokens of a comparison: built for a config so that every path of the model fires, or given by the user.

A built set has one long prompt and one that is shorter than the window. The long one goes on for 256 tokens after the
indexer has more compressed entries than it may pick, and for two windows and two HCA entries; its ids are spread over
the whole vocabulary, so that hash layers reach most of their table, and its second half repeats pieces of the first, so
that attention has something to find. The last tokens are decode steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from v4quant import strict_json
from v4quant.checkpoint.files import Source
from v4quant.checkpoint.tensor_file import TensorFile
from v4quant.config import V4Config
from v4quant.errors import CheckpointError, UsageError
from v4quant.model.chunk import check_prompts
from v4quant.parity.conversations import Conversation

DECODE_STEPS = 8
_CSA, _HCA = 4, 128
_BEHIND_THE_CUT = 256
_SHORT = 48
_SEED = 4
_REPEATED = 16
# Far above what any path needs; streams of so many tokens take a few GB.
_MOST_BUILT = 2**17
_MAX_TEXT_BYTES = 2**28
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Prompts:
    """Token ids to run, and how.

    Attributes:
        ids: int64 [n] each.
        sizes: tokens a step of the plain run: a prefill, then decode steps one by one.
        source: where they come from, for people.
        conversations: what the prompts are, one each; none where they are no conversations.
    """

    ids: tuple[torch.Tensor, ...]
    sizes: tuple[int, int]
    source: str
    conversations: tuple[Conversation, ...] = ()

    @classmethod
    def of(cls, ids: Sequence[torch.Tensor], prefill: int | None, config: V4Config, source: str) -> "Prompts":
        """Check prompts, and cut the longest into a prefill and decode steps.

        Args:
            prefill: tokens of the prefill; None leaves the last 8 tokens of the longest prompt, at most a quarter of
                it, as decode steps.

        Raises:
            UsageError: if the model cannot take them, or the prefill is longer than every prompt.
        """
        check_prompts(ids, config, source)
        longest = max(len(prompt) for prompt in ids)
        if prefill is None:
            prefill = longest - min(DECODE_STEPS, longest // 4)
        if not 1 <= prefill <= longest:
            raise UsageError(f"--prefill is {prefill}, expected 1 to the {longest:,} tokens of the longest prompt")
        return cls(tuple(ids), (prefill, 1), source)

    @classmethod
    def of_conversations(
        cls, conversations: Sequence[Conversation], prefill: int | None, config: V4Config, source: str
    ) -> "Prompts":
        """Check conversations; see `of`.

        Raises:
            UsageError: if the model cannot take them, or the prefill is longer than every one.
        """
        for conversation in conversations:  # before hours of work, not after
            ids = conversation.ids if conversation.opening is None else conversation.opening.ids
            check_prompts([torch.tensor(ids)], config, f"{source}: {conversation.name}, to be answered")
        plain = cls.of([torch.tensor(conversation.ids) for conversation in conversations], prefill, config, source)
        return replace(plain, conversations=tuple(conversations))

    @property
    def other_sizes(self) -> tuple[int, int, int]:
        """Other chunks of the same tokens: three uneven pieces, seams at odd places, within windows and entries."""
        longest = max(len(prompt) for prompt in self.ids)
        first, second = longest * 37 // 100 | 1, max(2, longest * 29 // 100 & ~1)
        return first, second, longest

    @property
    def mtp_lengths(self) -> list[int]:
        """Positions of each prompt that an MTP block predicts from: those of the prefill but the last."""
        return [max(min(len(prompt), self.sizes[0]) - 1, 0) for prompt in self.ids]


def built_prompts(config: V4Config, length: int | None, prefill: int | None) -> Prompts:
    """Build a set for a config.

    Args:
        length: tokens in all; None for what every path needs.

    Raises:
        UsageError: if the model cannot take so many.
    """
    total = length or needed_tokens(config)
    short = min(_SHORT, config.sliding_window // 2)
    if total < 3 * short or short < 2:
        short = 0
    if total - short > min(config.max_position_embeddings, _MOST_BUILT):
        raise UsageError(
            f"{total:,} tokens are to be built, expected at most {min(config.max_position_embeddings, _MOST_BUILT):,}",
            hint="Give fewer with --length, or a smaller --index-topk.",
        )
    random = torch.Generator().manual_seed(_SEED)
    long = torch.randint(config.vocab_size, (total - short,), generator=random)
    for first in range(len(long) // 2, len(long) - _REPEATED, 3 * _REPEATED):
        start = (first - len(long) // 2) % max(len(long) // 2 - _REPEATED, 1)
        long[first : first + _REPEATED] = long[start : start + _REPEATED].clone()
    prompts = [long, torch.randint(config.vocab_size, (short,), generator=random)] if short else [long]
    return Prompts.of(prompts, prefill, config, "built for this config")


def needed_tokens(config: V4Config) -> int:
    """Tokens of a built set that lets every path fire."""
    ratios = set(config.compress_ratios)
    needs = [2 * config.sliding_window]
    if _CSA in ratios:
        needs.append(_CSA * config.index_topk + _BEHIND_THE_CUT)
    if _HCA in ratios:
        needs.append(2 * _HCA)
    short = min(_SHORT, config.sliding_window // 2)
    longest = min(max(needs) + DECODE_STEPS, config.max_position_embeddings)
    return longest + (short if longest >= 2 * short else 0)


def read_prompts(path: Path, config: V4Config, prefill: int | None) -> Prompts:
    """Read prompts from a file of token ids.

    Args:
        path: *.jsonl, one prompt a line, a list of ids or an object with `input_ids`; or safetensors with `input_ids`
            I64 or I32, [T] for one prompt or [N, T] for N of the same length.

    Raises:
        UsageError: if there is no such file, or it holds no prompts that the model can take.
        CheckpointError: if a safetensors file is damaged.
    """
    if path.suffix == ".jsonl":
        return Prompts.of(_jsonl(path), prefill, config, str(path))
    if path.suffix != ".safetensors":
        raise UsageError(
            f"{path}: expected a file of token ids, *.safetensors or *.jsonl",
            hint="For text: --text FILE, which takes the checkpoint's tokenizer.",
        )
    ids = TensorFile(path).read("input_ids", (torch.int64, torch.int32)).long()
    if ids.dim() not in (1, 2):
        raise UsageError(f"{path}: input_ids has shape {list(ids.shape)}, expected [T] or [N, T]")
    return Prompts.of(list(ids.view(-1, ids.shape[-1])) if ids.numel() else [], prefill, config, str(path))


def _jsonl(path: Path) -> list[torch.Tensor]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file, expected token ids, one JSON list a line", hint="Check the path.")
    prompts = []
    for number, line in enumerate(_text(path).split("\n"), start=1):  # splitlines would cut strings too
        if not line.strip():
            continue
        try:
            found = strict_json.parse(line)
        except ValueError as error:
            raise UsageError(f"{path} line {number}: is not JSON: {error}") from None
        if isinstance(found, dict):
            found = found.get("input_ids")
        if not isinstance(found, list) or any(type(token) is not int or not 0 <= token < 2**31 for token in found):
            raise UsageError(
                f"{path} line {number}: expected a list of token ids, or an object with one as input_ids",
                hint='For example: {"input_ids": [0, 671, 6102]}',
            )
        prompts.append(torch.tensor(found, dtype=torch.int64))
    return prompts


def text_prompts(path: Path, files: Source, config: V4Config, length: int | None, prefill: int | None) -> Prompts:
    """Encode a text file, one prompt, with the tokenizer of a checkpoint.

    Args:
        files: of the checkpoint.
        length: take so many tokens at most.

    Raises:
        UsageError: if there is no such file, the text gives no tokens, or the tokenizers package is missing.
        CheckpointError: if the checkpoint has no tokenizer, or a damaged one.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file, expected a text in UTF-8", hint="Check the path.")
    if _TOKENIZER not in files:
        raise CheckpointError(
            f"{files.where}: has no {_TOKENIZER}, which --text needs",
            hint="Copy it from the release, or give token ids: --tokens FILE",
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError("--text needs the package tokenizers", hint="Install it: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_str(files.read(_TOKENIZER).decode())
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"{files.where}/{_TOKENIZER}: cannot be read: {error}") from error
    content = _text(path)
    try:
        ids = tokenizer.encode(content).ids[:length]
    except Exception as error:
        raise CheckpointError(f"{files.where}/{_TOKENIZER}: cannot encode {path}: {error}") from error
    return Prompts.of([torch.tensor(ids, dtype=torch.int64)], prefill, config, str(path))


def _text(path: Path) -> str:
    """A file of text without its byte order mark; ends of lines as \\n."""
    try:
        size = path.stat().st_size
        if size > _MAX_TEXT_BYTES:
            raise UsageError(f"{path}: has {size:,} bytes, expected at most {_MAX_TEXT_BYTES:,}")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from None
