"""One module is damaged, and the comparison has to name it, its layer and its tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.model.references import named
from tests.parity.runs import compared, edited, with_config
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.parity.attribution import blame
from v4quant.parity.compare import Comparison, Task, compare
from v4quant.parity.prompts import Prompts
from v4quant.parity.stored import StoredOutputs
from v4quant.parity.verdict import Verdict

BASE = named("tiny-base")


def _negate(values: torch.Tensor) -> None:
    if values.dtype == torch.uint8:
        values ^= 0x80  # the sign of E4M3
    else:
        values.neg_()


def _clear(values: torch.Tensor) -> None:
    values.zero_()


def _double(values: torch.Tensor) -> None:
    values *= 2


def _roll(values: torch.Tensor) -> None:
    values.copy_(values.roll(1, 0))


CASES: list[tuple[str, Callable[[torch.Tensor], None], int | None, str]] = [
    ("layers.1.attn.attn_sink", _clear, 1, "attention projections"),
    ("layers.0.attn.wkv.weight", _negate, 0, "attention projections"),
    ("layers.2.attn.compressor.wkv.weight", _negate, 2, "compressor"),
    ("layers.1.attn.indexer.weights_proj.weight", _negate, 1, "indexer"),
    ("layers.1.attn.indexer.compressor.wkv.weight", _roll, 1, "indexer"),
    ("layers.1.ffn.gate.weight", _roll, 1, "router"),
    ("layers.0.ffn.gate.tid2eid", _roll, 0, "router"),
    ("layers.2.hc_ffn_base", _double, 2, "hyper-connections"),
    ("layers.1.ffn_norm.weight", _double, 1, "norms"),
    ("layers.1.ffn.shared_experts.w2.weight", _negate, 1, "experts"),
    ("layers.2.ffn.experts.5.w1.weight", _negate, 2, "experts"),
    ("embed.weight", _roll, None, "embedding"),
    ("head.weight", _roll, None, "head"),
    ("mtp.0.ffn_norm.weight", _double, None, "mtp"),
    ("mtp.0.e_proj.weight", _negate, None, "mtp"),
]


@pytest.mark.parametrize(("tensor", "change", "layer", "module"), CASES, ids=[case[0] for case in CASES])
def test_the_damaged_module_is_named(
    tensor: str, change: Callable[[torch.Tensor], None], layer: int | None, module: str, tmp_path: Path
) -> None:
    comparison = compared(edited(BASE.folder, tmp_path / "out", tensor, change), BASE.folder)
    assert comparison.judgement.verdict is Verdict.DIFFERENT
    who = blame(comparison.outcome, comparison.judgement, comparison.attribution)
    assert (who.layer, who.module) == (layer, module)
    if layer is not None:
        [block] = comparison.attribution
        assert block.exchanges[0].error == 0.0 and block.exchanges[0].explains == 1.0
        assert all(exchange.error > 0.0 for exchange in block.exchanges[1:])
        assert [mismatch.tensor for mismatch in block.tensors] == [tensor]


@pytest.mark.parametrize(
    ("keys", "layer"), [({"rope_theta": 1e6}, 0), ({"routed_scaling_factor": 1.0}, 0), ({"sliding_window": 31}, 0)]
)
def test_a_wrong_config_is_named(keys: dict[str, Any], layer: int, tmp_path: Path) -> None:
    comparison = compared(with_config(BASE.folder, tmp_path / "out", **keys), BASE.folder)
    assert comparison.judgement.verdict is Verdict.DIFFERENT
    who = blame(comparison.outcome, comparison.judgement, comparison.attribution)
    assert (who.layer, who.module) == (layer, "config.json")


def test_two_damaged_modules_are_both_left_in_the_table(tmp_path: Path) -> None:
    first = edited(BASE.folder, tmp_path / "one", "layers.1.ffn_norm.weight", _double)
    comparison = compared(edited(first, tmp_path / "two", "layers.1.attn.wkv.weight", _negate), BASE.folder)
    block = comparison.attribution[0]
    found = {exchange.module: exchange.error for exchange in block.exchanges}
    assert 0 < found["norms"] < block.error or 0 < found["attention projections"] < block.error
    assert {mismatch.tensor for mismatch in block.tensors} == {"layers.1.ffn_norm.weight", "layers.1.attn.wkv.weight"}


def _stored(path: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Comparison:
    """Compare with stored outputs after a change to each of their tensors."""
    with safe_open(BASE.outputs, "pt") as file:
        tensors = {name: change(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118, no dict
        metadata = file.metadata()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    checkpoint = open_checkpoint(BASE.folder)
    stored = StoredOutputs(path, checkpoint.config)
    prompts = Prompts.of([stored.input_ids], stored.prefill, checkpoint.config, "stored")
    return compare(Task(checkpoint, stored, prompts))


def test_outputs_shifted_by_a_position_are_seen(tmp_path: Path) -> None:
    def shifted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if name == "input_ids" else tensor.roll(1, 0)

    assert _stored(tmp_path / "same.safetensors", lambda _, tensor: tensor).judgement.verdict is not Verdict.DIFFERENT
    assert _stored(tmp_path / "shifted.safetensors", shifted).judgement.verdict is Verdict.DIFFERENT


@pytest.mark.parametrize("part", ["logits", "mtp_logits", "input_ids"])
def test_labels_shifted_by_one_are_seen(part: str, tmp_path: Path) -> None:
    comparison = _stored(
        tmp_path / "shifted.safetensors", lambda name, tensor: tensor.roll(1, 0) if name == part else tensor
    )
    assert comparison.judgement.verdict is Verdict.DIFFERENT
    wheres = {departure.where for departure in comparison.judgement.departures}
    assert wheres == {part} if part != "input_ids" else {"logits", "layer 0"} <= wheres
