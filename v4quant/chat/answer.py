"""From a prompt to what the model writes behind it: where the answer begins, and its text as it comes."""

from collections.abc import Sequence

from v4quant.chat.decode import Completion, parse_segments
from v4quant.chat.segments import Part
from v4quant.chat.tokenizer import EncodedPrompt, Tokenizer
from v4quant.chat.tokens import IDS, THINK
from v4quant.errors import MessagesError

# What a decoder writes for bytes that are no character, or only the beginning of one.
_NO_CHARACTER = "\ufffd"
_OPENERS = (Part.HEADER, Part.TASK)
_ANSWERS = (Part.REASONING, Part.CONTENT, Part.TOOL_CALLS)


class Answer:
    """What is to be written behind a prompt, and was written there so far.

    Attributes:
        ids: token ids that the model gave.
    """

    def __init__(self, prompt: EncodedPrompt, tokenizer: Tokenizer) -> None:
        """Begin behind a prompt.

        Raises:
            MessagesError: if the prompt asks for no answer.
        """
        last = prompt.spans[-1].part
        if last not in _OPENERS and last not in _ANSWERS:
            raise MessagesError(
                f"the conversation ends in {last}, expected something to answer: a message of a user or a tool, or an "
                "assistant's with wo_eos, a prefix to continue"
            )
        opener = max((span.stop for span in prompt.spans if span.part in _OPENERS), default=0)
        self._begun = prompt.ids[opener:]  # of the answer, by the prompt
        self._thinking = opener > 0 and prompt.ids[opener - 1] == IDS[THINK]
        self._tokenizer = tokenizer
        self._held: list[int] = []
        self.ids: list[int] = []

    def add(self, token: int) -> str:
        """Take in a token.

        Returns:
            The text that is now certain: no half of a character, whose other half is yet to come.

        Raises:
            UsageError: if it is none of the tokenizer's.
        """
        self.ids.append(token)
        self._held.append(token)
        text = self._text(self._held)
        if text.endswith(_NO_CHARACTER):
            return ""
        self._held.clear()
        return text

    def rest(self) -> str:
        """The text that was held back, at the end."""
        text = self._text(self._held)
        self._held.clear()
        return text

    @property
    def text(self) -> str:
        """Everything that the model wrote."""
        return self._text(self.ids)

    def message(self) -> Completion:
        """The assistant's message, with what the prompt began of it.

        Raises:
            CompletionError: if it is not well formed, or not at its end.
        """
        return parse_segments(self._tokenizer.segments([*self._begun, *self.ids]), thinking=self._thinking)

    def _text(self, ids: Sequence[int]) -> str:
        return "".join(text for text, _ in self._tokenizer.segments(ids))
