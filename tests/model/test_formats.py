"""The same model in every stored format: in the release's arithmetic, the same bits."""

from pathlib import Path

import pytest
import torch

from tests.checkpoint.conversion import convert
from tests.model.references import REFERENCES, Reference, final_streams
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.model.arithmetic import Activations, Arithmetic, Products
from v4quant.model.streaming import StreamedModel


def logits(folder: Path, ids: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
    with torch.inference_mode(), StreamedModel(open_checkpoint(folder), arithmetic) as model:
        return model.head().logits(final_streams(model, model.schedule([ids], [130, 1])))


@pytest.mark.parametrize("to", ["bf16", "fp8"])
@pytest.mark.parametrize("reference", REFERENCES[:2], ids=lambda reference: reference.name)
def test_converted_checkpoints_compute_the_same_bits(reference: Reference, to: str, tmp_path: Path) -> None:
    convert(reference.folder, tmp_path / to, to)
    ids = reference.ids[:140]
    original = logits(reference.folder, ids, Arithmetic())
    assert torch.equal(logits(tmp_path / to, ids, Arithmetic()), original)
    # Each as its own format would be run: FP8 weights as before, BF16 ones without rounding of activations.
    stored = logits(tmp_path / to, ids, Arithmetic(Activations.STORED))
    assert torch.equal(stored, original) == (to == "fp8")


def test_coded_products_of_a_bf16_checkpoint_are_decoded_ones(tmp_path: Path) -> None:
    reference = REFERENCES[1]
    convert(reference.folder, tmp_path / "bf16", "bf16")
    ids = reference.ids[:40]
    coded = logits(tmp_path / "bf16", ids, Arithmetic(products=Products.CODED))
    assert torch.equal(coded, logits(tmp_path / "bf16", ids, Arithmetic()))


def test_one_flipped_bit_shows(tmp_path: Path) -> None:
    """A sign of one weight of one expert that is used."""
    reference = REFERENCES[1]
    ids = reference.ids[:140]
    original = logits(reference.folder, ids, Arithmetic())
    convert(reference.folder, tmp_path / "fp8", "fp8")
    checkpoint = open_checkpoint(tmp_path / "fp8")
    entry = checkpoint.tensors["layers.0.ffn.experts.3.w2.weight"]
    path = tmp_path / "fp8" / entry.file
    data = bytearray(path.read_bytes())
    place = next(place for place in range(entry.start, entry.stop) if data[place] & 0x7F > 0x40)
    data[place] ^= 0x80
    path.write_bytes(data)
    assert not torch.equal(logits(tmp_path / "fp8", ids, Arithmetic()), original)
