"""A remembered reference answers as one that runs alongside."""

from dataclasses import replace
from pathlib import Path

from tests.model.references import named
from tests.parity.runs import edited
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.model.streaming import StreamedModel
from v4quant.parity.lockstep import Lockstep, Outcome
from v4quant.parity.prompts import built_prompts
from v4quant.parity.reference import Alongside, Reference
from v4quant.parity.remembered import Remembered
from v4quant.parity.verdict import blocks_of

FOLDER = named("tiny-base").folder


def outcome(candidate: Path, reference: Reference) -> Outcome:
    with StreamedModel(open_checkpoint(candidate)) as model:
        return Lockstep(model, reference, built_prompts(model.config, None, None)).run()


def without_cost(found: Outcome) -> list[object]:
    """Everything but seconds and bytes."""
    blocks = [replace(block, seconds=0.0, bytes_read=0) for block in blocks_of(found)]
    return [found.embedding, found.logits, found.mtp_logits, *blocks]


def test_it_answers_the_same(tmp_path: Path) -> None:
    changed = edited(FOLDER, tmp_path / "changed", "layers.1.ffn_norm.weight", lambda values: values.mul_(1.5))
    with StreamedModel(open_checkpoint(FOLDER)) as one, StreamedModel(open_checkpoint(FOLDER)) as other:
        remembered = Remembered(Alongside(one))
        first = outcome(FOLDER, remembered)
        read = one.reader.weights.bytes_read
        again = outcome(changed, remembered)
        assert one.reader.weights.bytes_read == read, "the reference ran once"
        assert without_cost(again) == without_cost(outcome(changed, Alongside(other)))
    assert without_cost(first) != without_cost(again)
