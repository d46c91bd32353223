"""What `write_reference` writes: the reference's names, dtypes and shapes, the same in one run or in pieces."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.model.references import REFERENCES, Reference, named, relative_error, streamed
from v4quant.checkpoint.tensor_file import TensorWriter
from v4quant.errors import CheckpointError, OutputError, UsageError
from v4quant.model.arithmetic import Products
from v4quant.model.reference import Task, write_reference

FLASH = named("tiny-flash")


def write(reference: Reference, out: Path, tokens: Path, prefill: int | None, layers: tuple[int, int] | None) -> None:
    with streamed(reference.folder, Products.DECODED) as model:
        write_reference(model, Task.load(tokens, model.config, prefill, layers), out)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)
def test_same_names_dtypes_and_shapes_as_the_reference(reference: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    write(reference, out, reference.outputs, reference.prefill, None)
    with safetensors.safe_open(out, "pt") as ours, safetensors.safe_open(reference.outputs, "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118, the file is no dict
            expected, found = theirs.get_tensor(name), ours.get_tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert ours.metadata().items() >= theirs.metadata().items()
    found = safetensors.torch.load_file(out)
    assert torch.equal(found["input_ids"], reference.ids)
    first = reference.tensor("layer0.out")
    assert relative_error(found["layer0.out"], first) < 0.025
    picks = found.get("layer2.indexer_topk")
    if picks is not None:
        valid = picks >= 0
        assert bool((picks[valid] >= reference.prefill).all())
    assert list(tmp_path.iterdir()) == [out]


def test_in_pieces_as_in_one_run(tmp_path: Path) -> None:
    whole, first, rest = (tmp_path / f"{name}.safetensors" for name in ("whole", "first", "rest"))
    write(FLASH, whole, FLASH.outputs, 290, None)
    write(FLASH, first, FLASH.outputs, 290, (0, 2))
    write(FLASH, rest, first, 290, (3, 4))
    expected = safetensors.torch.load_file(whole)
    found = safetensors.torch.load_file(first) | safetensors.torch.load_file(rest)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert "logits" not in safetensors.torch.load_file(first)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_few_tokens(tokens: int, tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    safetensors.torch.save_file({"input_ids": torch.arange(tokens, dtype=torch.int32)}, file)
    write(FLASH, tmp_path / "out.safetensors", file, None, None)
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert found["logits"].shape == (tokens, 512)
    assert found["layer2.indexer_topk"].shape == (tokens, tokens // 4)
    assert ("mtp_logits" in found) == (tokens > 1)


@pytest.mark.parametrize(
    ("prefill", "layers", "message"),
    [
        (0, None, "prefill is 0, expected 1 to the 300 tokens"),
        (301, None, "prefill is 301"),
        (None, (0, 5), "layers are 0-5, expected a part of 0-4"),
        (None, (3, 2), "layers are 3-2"),
    ],
)
def test_wrong_tasks(prefill: int | None, layers: tuple[int, int] | None, message: str) -> None:
    with streamed(FLASH.folder) as model, pytest.raises(UsageError, match=message):
        Task.load(FLASH.outputs, model.config, prefill, layers)


def test_wrong_files(tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    with streamed(FLASH.folder) as model:
        with pytest.raises(UsageError, match="no such file"):
            Task.load(file, model.config, None, None)
        safetensors.torch.save_file({"ids": torch.arange(3)}, file)
        with pytest.raises(CheckpointError, match="has no tensor input_ids, but ids"):
            Task.load(file, model.config, None, None)
        safetensors.torch.save_file({"input_ids": torch.zeros(3)}, file)
        with pytest.raises(CheckpointError, match="input_ids is F32, expected I64 or I32"):
            Task.load(file, model.config, None, None)
        safetensors.torch.save_file({"input_ids": torch.arange(3)}, file)
        with pytest.raises(CheckpointError, match=r"has no tensor layer1\.out"):
            Task.load(file, model.config, None, (2, 2))
        safetensors.torch.save_file({"input_ids": torch.arange(3), "layer1.out": torch.zeros(3, 4, 8).bfloat16()}, file)
        with pytest.raises(UsageError, match=r"layer1\.out has shape \[3, 4, 8\], expected \[3, 4, 256\]"):
            Task.load(file, model.config, None, (2, 2))
        file.write_bytes(b"\0" * 40)
        with pytest.raises(CheckpointError, match=r"tokens\.safetensors: header is not valid JSON"):
            Task.load(file, model.config, None, None)


def test_an_interrupted_run_leaves_no_file(tmp_path: Path) -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with streamed(FLASH.folder) as model:
        task = Task.load(FLASH.outputs, model.config, None, None)
        with pytest.raises(KeyboardInterrupt):
            write_reference(model, task, tmp_path / "out.safetensors", stop)
        assert not list(tmp_path.iterdir())
        with pytest.raises(OutputError, match="cannot write"):
            write_reference(model, task, tmp_path / "missing" / "out.safetensors")


def test_only_the_file_itself_is_looked_at(tmp_path: Path) -> None:
    """Links and folders beside it are nobody's business; it may be hidden, or a link itself."""
    (tmp_path / "foreign").symlink_to("/etc/passwd")
    hidden = tmp_path / ".tokens.safetensors"
    safetensors.torch.save_file({"input_ids": torch.arange(3)}, hidden)
    (tmp_path / "link.safetensors").symlink_to(hidden)
    with streamed(FLASH.folder) as model:
        for name in (".tokens.safetensors", "link.safetensors"):
            assert Task.load(tmp_path / name, model.config, None, None).input_ids.tolist() == [0, 1, 2]
        with pytest.raises(UsageError, match="is a folder"):
            Task.load(tmp_path, model.config, None, None)


def test_nan_in_the_streams_to_go_on_from(tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    streams = torch.zeros(3, 4, 256).bfloat16()
    streams[1, 2, 3] = torch.nan
    safetensors.torch.save_file({"input_ids": torch.arange(3), "layer0.out": streams}, file)
    with streamed(FLASH.folder) as model, pytest.raises(CheckpointError, match=r"layer0\.out holds NaN"):
        Task.load(file, model.config, None, (1, 1))


def test_a_failed_finish_closes_its_file_once(tmp_path: Path) -> None:
    """After a failure the descriptor's number may be another file's."""
    writer = TensorWriter(tmp_path / "a.safetensors", {"x": ("F32", (1,))}, {})
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(OutputError):
        writer.finish()
    with (tmp_path / "other").open("w") as other:
        writer.abandon()
        other.write("still open")
        other.flush()
