"""Segments to token ids and back, with the checkpoint's own tokenizer.json.

The `tokenizers` package matches special tokens wherever they are spelled. Here it is given the file without its added
tokens, so that text can give none of them, and control tokens get their ids from the file's own list.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from v4quant import strict_json
from v4quant.chat.segments import Part, Prompt, Segment
from v4quant.chat.tokens import IDS
from v4quant.errors import CheckpointError, MessagesError, UsageError

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 2**28  # V4's has 6.4 MB


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens that come from one part of one message; ids[start:stop].

    Attributes:
        start, stop: which tokens. A token that lies over a seam belongs to the part that its first character is in.
        part: what they are.
        message: index of the message; -1 for what comes from none.
    """

    start: int
    stop: int
    part: Part
    message: int


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt in token ids.

    Attributes:
        ids: the tokens.
        spans: in order and without gaps.
    """

    ids: list[int]
    spans: list[Span]


class Tokenizer:
    """V4's tokenizer, with control tokens apart from text.

    Attributes:
        where: what it is called in errors.
    """

    def __init__(self, content: bytes, where: str) -> None:
        """Read a tokenizer.json.

        Args:
            content: the whole file.
            where: what to call it in errors.

        Raises:
            CheckpointError: if it is no tokenizer, or not V4's.
            UsageError: if the tokenizers package is missing.
        """
        self.where = where
        data = _parse(content, where)
        added = _added_tokens(data, where)
        wrong = [token for token, own in IDS.items() if added.get(token) != own]
        if wrong:
            raise CheckpointError(
                f"{where}: gives {wrong[0]} the id {added.get(wrong[0])}, expected {IDS[wrong[0]]}: it is not V4's "
                "tokenizer",
                hint="Use the tokenizer.json of the release.",
            )
        self._texts = {own: token for token, own in added.items()}
        self._model = _model(data, where)

    @property
    def size(self) -> int:
        """The largest id that it gives, and one."""
        return max(max(self._texts), self._model.get_vocab_size() - 1) + 1

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Encode a prompt: control tokens by id, text as text.

        Raises:
            MessagesError: if the tokenizer fails on a text.
        """
        ids: list[int] = []
        owners: list[Segment] = []
        for is_control, group in groupby(prompt.segments, key=lambda segment: segment.is_control):
            run = list(group)
            if is_control:
                ids += [IDS[segment.text] for segment in run]
                owners += run
            else:
                for own, segment in self._encode_run(run):
                    ids.append(own)
                    owners.append(segment)
        return EncodedPrompt(ids, _spans(owners))

    def _encode_run(self, run: Sequence[Segment]) -> Iterator[tuple[int, Segment]]:
        """Encode texts that follow one another as one, as the tokenizer would see them; each token with its segment."""
        encoding = self._encode_text("".join(segment.text for segment in run))
        ends, end = [], 0
        for segment in run:
            end += len(segment.text)
            ends.append(end)
        at = 0
        for own, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            while start >= ends[at] and at + 1 < len(ends):
                at += 1
            yield own, run[at]

    def _encode_text(self, text: str) -> "tokenizers.Encoding":
        try:
            return self._model.encode(text, add_special_tokens=False)
        except Exception as error:  # the package raises bare Exception
            raise MessagesError(f"{self.where}: cannot encode a text of {len(text):,} characters: {error}") from error

    def segments(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        """Decode token ids into pieces of text, and whether each is a control token: parse_segments reads them.

        Raises:
            UsageError: if an id is none of the tokenizer's.
        """
        known = self._model.get_vocab_size()
        for position, own in enumerate(ids):
            if own not in self._texts and not 0 <= own < known:
                raise UsageError(f"token {position} is {own}, expected an id of {self.where}")
        pieces = []
        for is_control, group in groupby(ids, key=self._texts.__contains__):
            run = list(group)
            if is_control:
                pieces += [(self._texts[own], True) for own in run]
            else:
                pieces.append((self._model.decode(run, skip_special_tokens=False), False))
        return pieces


def _parse(content: bytes, where: str) -> dict[str, Any]:
    if len(content) > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{where}: has {len(content):,} bytes, expected a tokenizer.json")
    try:
        data = strict_json.parse(content)
    except ValueError as error:
        raise CheckpointError(f"{where}: is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: holds no JSON object, expected a tokenizer.json")
    return data


def _added_tokens(data: dict[str, Any], where: str) -> dict[str, int]:
    """Spelling -> id of the added tokens."""
    added = data.get("added_tokens")
    result: dict[str, int] = {}
    for token in added if isinstance(added, list) else ():
        text, own = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        if not isinstance(text, str) or type(own) is not int or own < 0:
            raise CheckpointError(f"{where}: added_tokens holds an entry without content and id")
        result[text] = own
    return result


def _model(data: dict[str, Any], where: str) -> "tokenizers.Tokenizer":
    """The tokenizer without added tokens."""
    try:
        from tokenizers import Tokenizer as Model
    except ImportError:
        raise UsageError("token ids need the package tokenizers", hint="Install it: pip install tokenizers") from None
    plain = {**data, "added_tokens": [], "truncation": None, "padding": None}
    try:
        return Model.from_str(json.dumps(plain))
    except Exception as error:  # the package raises bare Exception
        raise CheckpointError(f"{where}: cannot be read: {error}") from error


def _spans(owners: Sequence[Segment]) -> list[Span]:
    spans, start = [], 0
    for (part, message), group in groupby(owners, key=lambda segment: (segment.part, segment.message)):
        stop = start + sum(1 for _ in group)
        spans.append(Span(start, stop, part, message))
        start = stop
    return spans
