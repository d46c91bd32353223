"""Outputs that were computed elsewhere, in the place of a reference that runs alongside.

Names and shapes as `v4quant reference` writes them (model/reference.py): all layers and the logits have to be there.
"""

import hashlib
from pathlib import Path

import torch

from v4quant.checkpoint.tensor_file import TensorFile
from v4quant.config import V4Config
from v4quant.errors import CheckpointError, UsageError
from v4quant.model.reference import Task, output_tensors
from v4quant.model.streaming import BlockResult

_HASH_BYTES = 4 * 2**20


class StoredOutputs:
    """A file of reference outputs, checked against the config of the model that shall be compared with it.

    Attributes:
        input_ids: int64 [T].
        prefill: P.
        metadata: text from its header.
        has_mtp: whether MTP logits are stored.
    """

    def __init__(self, path: Path, config: V4Config) -> None:
        """Read the header and the tokens.

        Raises:
            UsageError: if there is no such file, or its tokens or shapes are not this model's.
            CheckpointError: if it is damaged or not whole.
        """
        self.path = path
        self._file = TensorFile(path)
        self.metadata = self._file.metadata
        self._experts = config.n_routed_experts
        self.input_ids = self._ids()
        self.prefill = self._prefill()
        task = Task(self.input_ids, self.prefill, 0, config.num_hidden_layers - 1, None)
        expected = output_tensors(task, config)
        self.has_mtp = "mtp_logits" in self._file.tensors
        for name, (dtype, shape) in expected.items():
            entry = self._file.tensors.get(name)
            if entry is None and name == "mtp_logits":
                continue
            if entry is None:
                raise CheckpointError(
                    f"{path}: has no tensor {name}, expected the outputs of every layer and the logits",
                    hint="Make it with: v4quant reference SRC FILE --tokens TOKENS",
                )
            if name != "input_ids" and (entry.dtype, entry.shape) != (dtype, shape):
                raise UsageError(
                    f"{path}: {name} is {entry.dtype} {list(entry.shape)}, expected {dtype} {list(shape)} by the "
                    "config of the checkpoint",
                    hint="Compare with outputs of a model of the same shape.",
                )

    def _ids(self) -> torch.Tensor:
        ids = self._file.read("input_ids", (torch.int64, torch.int32)).long()
        if ids.dim() != 1:
            raise UsageError(f"{self.path}: input_ids has shape {list(ids.shape)}, expected one row of token ids")
        if not len(ids):
            raise CheckpointError(f"{self.path}: input_ids is empty, expected the tokens of the outputs")
        return ids

    def _prefill(self) -> int:
        text = self.metadata.get("prefill", str(len(self.input_ids)))
        if not (text.isdecimal() and len(text) < 10 and 1 <= int(text) <= len(self.input_ids)):
            raise CheckpointError(
                f"{self.path}: prefill is {text!r}, expected 1 to its {len(self.input_ids)} tokens (metadata)"
            )
        return int(text)

    def block(self, layer: int) -> BlockResult:
        """What the reference made of a layer; its indexer's picks of the prefill alone."""
        name = f"layer{layer}"
        streams = self._file.read(f"{name}.out", (torch.bfloat16,))
        indices = self._file.read(f"{name}.router_indices", (torch.int32,)).long()
        weights = self._file.read(f"{name}.router_weights", (torch.float32,))
        if not (bool(streams.isfinite().all()) and bool(weights.isfinite().all())):
            raise CheckpointError(f"{self.path}: {name} holds NaN or infinity", hint="Compute it again.")
        self._require_within(
            f"{name}.router_indices", indices, indices >= 0, self._experts, f"0 to {self._experts - 1}"
        )
        topk = None
        if f"{name}.indexer_topk" in self._file.tensors:
            stored = self._file.read(f"{name}.indexer_topk", (torch.int32,))
            first, stop = self.prefill, self.prefill + self.prefill // 4  # entry j stands as j + P
            sound = (stored >= first) | (stored == -1)
            self._require_within(f"{name}.indexer_topk", stored, sound, stop, f"-1 or {first} to {stop - 1}")
            topk = torch.where(stored >= 0, stored - first, -1)
        return BlockResult(streams, indices, weights, topk)

    def _require_within(self, name: str, found: torch.Tensor, sound: torch.Tensor, stop: int, expected: str) -> None:
        """Refuse numbers that are not `sound`, or from `stop` on."""
        wrong = found[~sound | (found >= stop)]
        if len(wrong):
            raise CheckpointError(
                f"{self.path}: {name} holds {int(wrong[0])}, expected {expected}", hint="Compute it again."
            )

    def columns(self, name: str, first: int, last: int) -> torch.Tensor:
        """Columns of `logits` or `mtp_logits`: float32 [T, last - first]."""
        found = self._file.columns(name, first, last)
        if not bool(found.isfinite().all()):
            raise CheckpointError(f"{self.path}: {name} holds NaN or infinity", hint="Compute it again.")
        return found

    def sha256(self) -> str:
        """Of the whole file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while data := file.read(_HASH_BYTES):
                digest.update(data)
        return digest.hexdigest()
