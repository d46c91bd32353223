"""The exception tree: the library raises, `cli/main.py` prints the message and exits with the class's code.

A message says where, what was expected and what was found; `hint` says what to do next.
"""


class V4QuantError(Exception):
    """Base of every error that v4quant raises on purpose.

    Args:
        message: where, expected, found; one line, or a line and an indented list.
        hint: the next thing to do, one sentence; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class CheckFailedError(V4QuantError):
    """A check ran and its answer is no: a conversion that would round, a verification that found a difference."""

    exit_code = 1


class UsageError(V4QuantError):
    """The command line or a config.json asks for something that v4quant does not do."""

    exit_code = 2


class MessagesError(UsageError):
    """Messages that V4's prompt has no form for: a field of the wrong kind, an unknown role or task, a lost meaning."""


class CompletionError(CheckFailedError):
    """A completion that is not well formed: no end of reasoning or of the sentence, a tool call that cannot be read."""


class CheckpointError(V4QuantError):
    """Checkpoint data is missing, damaged, contradicts itself, or changed under our hands."""

    exit_code = 3


class HubError(V4QuantError):
    """The Hub, the network or the account refuses: not found, not permitted, not reachable, or not as it promised."""

    exit_code = 4


class OutputError(V4QuantError):
    """The output folder or its disk refuses: exists already, is full, is not writable."""

    exit_code = 5


class InterruptedRunError(V4QuantError):
    """The user pressed Ctrl-C; finished work is kept and the same command continues it."""

    exit_code = 130
