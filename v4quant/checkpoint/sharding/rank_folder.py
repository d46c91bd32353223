"""What lies in a rank's folder beside its weights: config, index, certificate, and what of the model it holds.

`rank-{i}/v4quant.shards.json` says it in numbers: the grid and the rank's place in it, its layers and experts, and of
each tensor that is cut the axis, the range and the shape of the whole. All other tensors in the folder are whole.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.index import INDEX_NAME, build_index
from v4quant.checkpoint.layout import Shard
from v4quant.checkpoint.reader import SHARDS_NAME
from v4quant.checkpoint.sharding.grid import MAX_RANKS, Grid, Place
from v4quant.checkpoint.sharding.layout import Placement, ShardedLayout
from v4quant.checkpoint.sharding.rank_files import rank_folder
from v4quant.checkpoint.sharding.record import RECORD_VERSION
from v4quant.checkpoint.sharding.rules import Layout, Split, split_of
from v4quant.names import parse_name


def files_beside(layout: ShardedLayout) -> dict[str, bytes]:
    """Index and v4quant.shards.json of every rank's folder, by name."""
    cuts = _cuts(layout)
    found: dict[str, bytes] = {}
    for place, files in zip(layout.grid.places, layout.ranks, strict=True):
        folder = rank_folder(place.rank)
        found[f"{folder}/{INDEX_NAME}"] = _index(files, folder)
        found[f"{folder}/{SHARDS_NAME}"] = _record(layout, place, cuts[place.rank])
    return found


def _index(files: Sequence[Shard], folder: str) -> bytes:
    entries = [entry for file in files for entry in file.entries.values()]
    weight_map = {entry.name: entry.file.removeprefix(f"{folder}/") for entry in entries}
    return build_index(weight_map, sum(entry.bytes for entry in entries))


def _cuts(layout: ShardedLayout) -> list[dict[str, Any]]:
    """For each rank the tensors that it holds a part of: axis, range of it, shape of the whole."""
    rank_of = {file.name: rank for rank, files in enumerate(layout.ranks) for file in files}
    found: list[dict[str, Any]] = [{} for _ in layout.ranks]
    for places in layout.placements.values():
        for place in places:
            if len(place.shares) > 1:
                for number, copies in enumerate(place.shares):
                    for part in copies:
                        found[rank_of[part.file]][part.name] = _cut(place, number)
    return found


def _cut(place: Placement, number: int) -> dict[str, Any]:
    axis = 0 if place.split is Split.ROWS else 1
    size = place.shares[number][0].shape[axis]
    start = number * size
    return {"axis": axis, "start": start, "stop": start + size, "of": list(place.source.shape)}


def _record(layout: ShardedLayout, place: Place, cuts: Mapping[str, Any]) -> bytes:
    """What a rank holds."""
    run = layout.run
    return _json(_told(place, run.id, run.source, layout.held_by(place.rank), cuts)).encode()


def _told(place: Place, run: str, source: str, tensors: Iterable[str], cuts: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a rank's record."""
    grid, names = place.grid, [parsed for name in tensors if (parsed := parse_name(name))]
    return {
        "shards": RECORD_VERSION,
        "run": run,
        "source": source,
        "grid": {"tp": grid.tp, "ep": grid.ep, "pp": grid.pp},
        "rank": place.rank,
        "ranks": grid.ranks,
        "place": {"tp": place.tp_rank, "ep": place.ep_rank, "pp": place.stage},
        "layers": _range({name.index for name in names if name.block == "layers"}),
        "mtp_blocks": _range({name.index for name in names if name.block == "mtp"}),
        "experts": _range({name.expert for name in names if name.expert >= 0}),
        "cut": dict(sorted(cuts.items())),
    }


def wrong_keys(told: object, tensors: Mapping[str, TensorEntry]) -> list[str]:
    """Keys under which a rank's record does not say what follows from its grid, its rank and these tensors.

    Args:
        told: the record, parsed; hostile.
        tensors: what lies in the rank's folder.
    """
    grid, rank = (told.get("grid"), told.get("rank")) if isinstance(told, dict) else (None, None)
    if not isinstance(told, dict) or not isinstance(grid, dict) or grid.keys() != {"tp", "ep", "pp"}:
        return ["grid"]
    if not all(type(count) is int and 1 <= count <= MAX_RANKS for count in grid.values()):
        return ["grid"]
    if type(rank) is not int or not 0 <= rank < Grid(**grid).ranks:
        return ["rank"]
    place = Grid(**grid).place(rank)
    cuts = {name: cut for name, entry in tensors.items() if (cut := _cut_of_part(place, entry))}
    expected = _told(place, str(told.get("run")), str(told.get("source")), tensors, cuts)
    return [key for key, value in expected.items() if told.get(key) != value]


def _cut_of_part(place: Place, entry: TensorEntry) -> dict[str, Any] | None:
    """What the record says of a tensor that a rank holds a part of; None for a whole one."""
    parsed, shares = parse_name(entry.name), place.grid.tp
    split = split_of(parsed, Layout.RANKS) if parsed else Split.WHOLE
    axis = 0 if split is Split.ROWS else 1
    if shares == 1 or split not in (Split.ROWS, Split.COLUMNS) or len(entry.shape) <= axis:
        return None
    size = entry.shape[axis]
    whole = [*entry.shape[:axis], size * shares, *entry.shape[axis + 1 :]]
    return {"axis": axis, "start": place.tp_rank * size, "stop": (place.tp_rank + 1) * size, "of": whole}


def _json(told: Mapping[str, Any]) -> str:
    """A line for each key, and for each tensor that is cut."""
    lines = [f"  {json.dumps(name)}: {json.dumps(cut)}" for name, cut in told["cut"].items()]
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in told.items() if key != "cut"]
    cut = ' "cut": {\n' + ",\n".join(lines) + "\n }" if lines else ' "cut": {}'
    return "{\n" + ",\n".join([*head, cut]) + "\n}\n"


def _range(numbers: set[int]) -> list[int]:
    """First number and the one after the last; empty where there is none."""
    return [min(numbers), max(numbers) + 1] if numbers else []
