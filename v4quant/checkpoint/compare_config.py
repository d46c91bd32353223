"""Compare what two config.json files say of the model: dimensions, arithmetic and special tokens, not the storage.

Weights that are right to the bit compute something else under another RoPE base or without swiglu_limit, and no header
shows it: most of these keys decide nothing about a tensor's shape.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from v4quant.checkpoint.reader import Checkpoint
from v4quant.config_keys import show

# A conversion changes these two; audit.py compares them with the tensors that are stored.
_STORAGE_FIELDS = {"expert_dtype", "quantization_config"}
# Keys that servers stop or begin at. V4Config lacks them, as no tensor and no forward pass depends on them.
_TOKEN_KEYS = ("bos_token_id", "eos_token_id")
_SCALE_LABEL = "ue8m0"


def config_differences(out: Checkpoint, source: Checkpoint) -> Iterator[str]:
    """Say in one line each where the config of `out` describes another model than that of `source`."""
    for field in dataclasses.fields(source.config):
        if field.name not in _STORAGE_FIELDS:
            found, expected = getattr(out.config, field.name), getattr(source.config, field.name)
            yield from _differences(field.name, found, expected)
    for key in _TOKEN_KEYS:
        if key in source.config_json:
            yield from _differences(key, out.config_json.get(key), source.config_json[key])
    yield from _lost_scale_label(out, source)


def _differences(name: str, found: Any, expected: Any) -> Iterator[str]:
    """Compare one value; of objects and arrays that part is named which differs."""
    if found == expected:
        return
    if dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            part = f"{name}.{field.name}"
            yield from _differences(part, getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, tuple):
        if len(found) != len(expected):
            yield f"{name} has {len(found)} elements, expected {len(expected)}"
            return
        position = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        yield f"{name}[{position}] is {show(found[position])}, expected {show(expected[position])}"
    else:
        yield f"{name} is {show(found)}, expected {show(expected)}"


def _lost_scale_label(out: Checkpoint, source: Checkpoint) -> Iterator[str]:
    """Loaders that are not told ue8m0 round E8M0 scales again, or read them as another dtype.

    Base stores F32 scales under this label, so only E8M0 scales without it are wrong.
    """
    ours, theirs = out.config.quantization_config, source.config.quantization_config
    if ours is None or theirs is None or out.scheme.dense.scale_dtype != "F8_E8M0":
        return
    if theirs.scale_fmt == _SCALE_LABEL != ours.scale_fmt:
        yield f"quantization_config.scale_fmt is {show(ours.scale_fmt)}, expected {show(_SCALE_LABEL)}"
