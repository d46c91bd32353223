"""The reference checkpoints with the outputs that DeepSeek's released inference code gives on them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from v4quant.checkpoint.reader import open_checkpoint
from v4quant.model.arithmetic import Arithmetic, Products
from v4quant.model.block import Block
from v4quant.model.streaming import BlockResult, Schedule, StreamedModel, run_block

DATA = Path(__file__).parents[1] / "data"
# Only on machines that have the whole set of reference checkpoints beside the repository.
SHARED = DATA.parents[2] / "shared" / "reference"


@dataclass(frozen=True)
class Reference:
    """A checkpoint and its outputs.

    Attributes:
        folder: the checkpoint.
        outputs: the file of outputs.
        floor: how far the reference is from itself, as stored beside it.
    """

    folder: Path
    outputs: Path
    floor: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    def tensor(self, name: str) -> torch.Tensor:
        with safetensors.safe_open(self.outputs, "pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    def has(self, name: str) -> bool:
        with safetensors.safe_open(self.outputs, "pt") as file:
            return name in file.keys()  # noqa: SIM118, the file is no dict

    @property
    def ids(self) -> torch.Tensor:
        return self.tensor("input_ids")

    @property
    def prefill(self) -> int:
        with safetensors.safe_open(self.outputs, "pt") as file:
            return int(file.metadata()["prefill"])

    def input_of(self, layer: int, model: StreamedModel) -> torch.Tensor:
        """What the reference fed into a layer."""
        return self.tensor(f"layer{layer - 1}.out") if layer else model.embed(self.ids)


def _references() -> Iterator[Reference]:
    for folder in sorted((DATA / "reference").iterdir()):
        outputs = DATA / "outputs" / f"{folder.name}.safetensors"
        yield Reference(folder, outputs, json.loads(outputs.with_suffix(".json").read_text()))
    pro = SHARED / "tiny-pro"
    if pro.exists():
        yield Reference(pro, pro / "reference.safetensors", json.loads((pro / "noise_floor.json").read_text()))


REFERENCES = list(_references())


def named(name: str) -> Reference:
    return next(reference for reference in REFERENCES if reference.name == name)


def streamed(folder: Path, products: Products = Products.CODED) -> StreamedModel:
    """A model in the release's arithmetic."""
    return StreamedModel(open_checkpoint(folder), Arithmetic(products=products))


def isolated(reference: Reference, products: Products) -> Iterator[tuple[int, Block, BlockResult]]:
    """Every layer, fed what the reference fed it, with the reference's split into prefill and decode steps."""
    with torch.inference_mode(), streamed(reference.folder, products) as model:
        schedule = model.schedule([reference.ids], [reference.prefill, 1])
        for layer, block in enumerate(model.blocks(0, model.config.num_hidden_layers)):
            yield layer, block, run_block(block, reference.input_of(layer, model), schedule)


def final_streams(model: StreamedModel, schedule: Schedule) -> torch.Tensor:
    """Streams after the last layer."""
    streams = model.embed(schedule.input_ids)
    for block in model.blocks(0, model.config.num_hidden_layers):
        streams = run_block(block, streams, schedule).streams
    return streams


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def mean_kl(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Mean over tokens of KL(expected || actual), of logits [T, V]."""
    log = expected.log_softmax(-1)
    return float((log.exp() * (log - actual.log_softmax(-1))).sum(-1).mean())


def top1(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Share of tokens with the same best next token."""
    return float((expected.argmax(-1) == actual.argmax(-1)).float().mean())
