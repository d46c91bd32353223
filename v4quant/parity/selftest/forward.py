"""The parity check of the selftest: a copy against the sound checkpoint, which runs once and is remembered."""

from pathlib import Path

from v4quant.checkpoint.reader import open_checkpoint
from v4quant.model.streaming import StreamedModel
from v4quant.parity.attribution import blame
from v4quant.parity.compare import require_same_shape
from v4quant.parity.lockstep import Lockstep
from v4quant.parity.prompts import built_prompts
from v4quant.parity.reference import Alongside
from v4quant.parity.remembered import Remembered
from v4quant.parity.sentences import describe
from v4quant.parity.verdict import Verdict, judge


class ForwardCheck:
    """Says of copies of a checkpoint whether they still compute what it computes; a context manager."""

    def __init__(self, sound: Path) -> None:
        """Compare with the checkpoint that lies in this folder from the first call on."""
        self._folder = sound
        self._model: StreamedModel | None = None
        self._reference: Remembered | None = None

    def __enter__(self) -> "ForwardCheck":
        return self

    def __exit__(self, *_: object) -> None:
        if self._model is not None:
            self._model.__exit__()

    def __call__(self, copy: Path) -> tuple[bool, str]:
        """Whether the verdict is `different`, and why.

        Raises:
            V4QuantError: if the copy cannot be run.
        """
        if self._model is None or self._reference is None:
            self._model = StreamedModel(open_checkpoint(self._folder))
            self._reference = Remembered(Alongside(self._model))
        candidate, sound = open_checkpoint(copy), open_checkpoint(self._folder)
        require_same_shape(candidate, sound)
        with StreamedModel(candidate) as model:
            outcome = Lockstep(model, self._reference, built_prompts(sound.config, None, None)).run()
        judgement = judge(outcome)
        if judgement.verdict is not Verdict.DIFFERENT:
            return False, f"{judgement.verdict}{_differing(judgement.verdict)}"
        who = blame(outcome, judgement, ())
        place = "" if who.layer is None else f"layer {who.layer}: "
        return True, f"{place}{describe(judgement.departures[0])}"


def _differing(verdict: Verdict) -> str:
    return "" if verdict is Verdict.IDENTICAL else ": what changes is within the noise"
