"""Messages to turns: V4 has no role for tools, so results, and the user's texts after them, share one user turn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from v4quant.chat.messages import Message, Role
from v4quant.errors import MessagesError


@dataclass(frozen=True, slots=True)
class Piece:
    """A text or a tool result of a user turn.

    Attributes:
        text: its text.
        is_result: of a tool.
        call_id: of the call that a result answers.
        message: index of the message that it comes from.
    """

    text: str
    is_result: bool
    call_id: str
    message: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What is rendered as one: a message, or a user turn of one or more messages.

    Attributes:
        message: the message; of a user turn the first, for its role and task.
        index: of that message.
        pieces: of a user turn.
    """

    message: Message
    index: int
    pieces: tuple[Piece, ...] = ()

    @property
    def role(self) -> Role:
        """Role of the turn; tool results have the user's."""
        return Role.USER if self.message.role is Role.TOOL else self.message.role

    @property
    def task(self) -> str | None:
        """The quick instruction that the turn ends in."""
        return self.message.task


def merge_turns(messages: Sequence[Message]) -> list[Turn]:
    """Merge neighbours that share a user turn, and put tool results into the order of their calls.

    A text joins a user turn unless that carries a task; a tool result joins any.

    Raises:
        MessagesError: if a message with a task would join, and its task be lost.
    """
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if message.role not in (Role.USER, Role.TOOL):
            turns.append(Turn(message, index))
            continue
        is_result = message.role is Role.TOOL
        piece = Piece(message.content, is_result, message.tool_call_id, index)
        last = turns[-1] if turns and turns[-1].role is Role.USER else None
        if last is None or (last.task is not None and not is_result):
            turns.append(Turn(message, index, (piece,)))
        elif message.task is not None:
            raise MessagesError(
                f"messages[{index}].task is {message.task}, but the message joins messages[{last.index}] in one user "
                "turn, where the released encoder drops it",
                hint="Put the task on the first message of the turn.",
            )
        else:
            turns[-1] = replace(last, pieces=(*last.pieces, piece))
    return _in_order_of_calls(turns)


def _in_order_of_calls(turns: list[Turn]) -> list[Turn]:
    """Sort each turn's results by their calls in the last assistant message that has any; unknown ids count as first.

    Texts stay where they are.
    """
    order: dict[str, int] = {}
    result = []
    for turn in turns:
        if turn.message.tool_calls:
            order = {call.id: index for index, call in enumerate(turn.message.tool_calls) if call.id}
        answers = iter(
            sorted((piece for piece in turn.pieces if piece.is_result), key=lambda piece: order.get(piece.call_id, 0))
        )
        pieces = tuple(next(answers) if piece.is_result else piece for piece in turn.pieces)
        result.append(replace(turn, pieces=pieces))
    return result


def last_user_turn(turns: Sequence[Turn]) -> int:
    """Index of the last turn of a user or developer; -1 where there is none."""
    return max((at for at, turn in enumerate(turns) if turn.role in (Role.USER, Role.DEVELOPER)), default=-1)


def drop_reasoning(turns: Sequence[Turn]) -> list[Turn]:
    """What is left of a history without tools: before the last user turn no reasoning, and no developer messages."""
    last = last_user_turn(turns)
    kept = []
    for at, turn in enumerate(turns):
        if at < last and turn.role is Role.DEVELOPER:
            continue
        is_old = at < last and turn.role is Role.ASSISTANT
        kept.append(replace(turn, message=replace(turn.message, reasoning="")) if is_old else turn)
    return kept
