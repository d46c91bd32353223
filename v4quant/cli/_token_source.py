"""Where the tokens of `v4quant parity` come from, as the user says."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from v4quant.cli._conversations import read_conversations
from v4quant.errors import UsageError

if TYPE_CHECKING:
    from v4quant.checkpoint.reader import Checkpoint
    from v4quant.checkpoint.sharding.rank_tensors import Sharded
    from v4quant.parity.prompts import Prompts
    from v4quant.parity.stored import StoredOutputs

_ANSWER_TOKENS = 64  # room for a call or two


@dataclass(frozen=True)
class TokenSource:
    """Options that say which tokens are run; None for what was not given.

    Attributes:
        tokens, text, messages: files.
        thinking: of messages.
        continuation: tokens of the greedy answers to them.
        length, prefill: how many tokens.
    """

    tokens: Path | None
    text: Path | None
    messages: Path | None
    thinking: bool
    continuation: int | None
    length: int | None
    prefill: int | None

    @property
    def answer_tokens(self) -> int:
        """Tokens of each greedy answer."""
        return _ANSWER_TOKENS if self.continuation is None else self.continuation

    def prompts(
        self, candidate: "Checkpoint | Sharded", reference: "Checkpoint | StoredOutputs", index_topk: int | None
    ) -> "Prompts":
        """Read the tokens, or build them.

        Raises:
            UsageError: if the options exclude each other, or the model cannot take the tokens.
            CheckpointError: if a file of tokens is damaged, or there is no tokenizer for a text.
        """
        from v4quant.parity.prompts import Prompts, built_prompts, read_prompts, text_prompts
        from v4quant.parity.stored import StoredOutputs

        if self.messages is None and (self.thinking or self.continuation is not None):
            given = "--thinking" if self.thinking else "--continuation"
            raise UsageError(f"{given} is given without --messages, whose conversations it is about")
        # The candidate's config may be the fault.
        config = candidate.config if isinstance(reference, StoredOutputs) else reference.config
        config = config if index_topk is None else replace(config, index_topk=index_topk)
        if isinstance(reference, StoredOutputs):
            self._require_none(index_topk)
            return Prompts.of([reference.input_ids], reference.prefill, config, str(reference.path))
        self._require_one()
        if self.tokens is not None:
            return read_prompts(self.tokens, config, self.prefill)
        if self.text is not None:
            return text_prompts(self.text, reference.files, config, self.length, self.prefill)
        if self.messages is not None:
            conversations = read_conversations(self.messages, reference.files, thinking=self.thinking)
            where = f"{self.messages}, {'thinking' if self.thinking else 'chat'} mode"
            return Prompts.of_conversations(conversations, self.prefill, config, where)
        return built_prompts(config, self.length, self.prefill)

    @property
    def _given(self) -> list[str]:
        """Options that were given."""
        values = {"--tokens": self.tokens, "--text": self.text, "--messages": self.messages, "--length": self.length}
        return [name for name, value in values.items() if value is not None]

    def _require_none(self, index_topk: int | None) -> None:
        """Refuse what outputs that were stored have decided already."""
        more = {"--prefill": self.prefill, "--index-topk": index_topk}
        given = [*self._given, *(name for name, value in more.items() if value is not None)]
        if given:
            raise UsageError(f"{given[0]} is given with --reference-outputs, whose tokens and settings are in the file")

    def _require_one(self) -> None:
        """Refuse options that exclude each other."""
        given = self._given
        if len(given) < 2 or given == ["--text", "--length"]:
            return
        if given[1] == "--length":
            raise UsageError(f"--length is given with {given[0]}, expected one: all tokens of the file are run")
        raise UsageError(f"{given[0]} and {given[1]} are both given, expected one")
