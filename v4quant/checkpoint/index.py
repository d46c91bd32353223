"""`model.safetensors.index.json`: which tensor is in which file, and how many bytes of tensor data there are.

Written as the releases have it: indented by two, no final newline. Read as hostile input: file names are only ever
compared with the names of files that are in the folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from v4quant import strict_json
from v4quant.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
# The largest of a release has 11.7 MB.
MAX_INDEX_BYTES = 64 * 2**20
_HINT = "Download the index again; it must fit the shards."


@dataclass(frozen=True)
class Index:
    """A parsed index.

    Attributes:
        total_size: bytes of tensor data that it claims; None where it does not say.
        weight_map: tensor name -> file name.
    """

    total_size: int | None
    weight_map: Mapping[str, str]


def build_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Write an index.

    Args:
        weight_map: tensor name -> file name, in the order to write.
        total_size: bytes of tensor data in all files together.
    """
    return json.dumps({"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}, indent=2).encode()


def parse_index(text: bytes, where: str) -> Index:
    """Read an index.

    Args:
        text: the whole file.
        where: what to call it in errors.

    Raises:
        CheckpointError: if it is too large, no JSON, or has no weight_map of strings.
    """
    if len(text) > MAX_INDEX_BYTES:
        raise CheckpointError(f"{where}: has {len(text):,} bytes, expected at most {MAX_INDEX_BYTES:,}", hint=_HINT)
    try:
        data = strict_json.parse(text)
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}", hint=_HINT) from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{where}: weight_map is no object of file names", hint=_HINT)
    metadata = data.get("metadata", {})
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total_size is not None and type(total_size) is not int:
        # transformers has written it as a float; only whole numbers mean something.
        if not isinstance(total_size, float) or not total_size.is_integer():
            raise CheckpointError(f"{where}: metadata.total_size is {str(total_size)[:40]}, expected bytes", hint=_HINT)
        total_size = int(total_size)
    return Index(total_size, weight_map)
