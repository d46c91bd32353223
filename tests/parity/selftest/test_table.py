"""Which of inspect and verify catch which corruption, as a literal table, and how the table is made and left behind.

Parity is a stand-in here; what it catches is the business of its own tests.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.selftest.copies import hashes, tensors
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.errors import CheckpointError, InterruptedRunError, OutputError
from v4quant.parity.selftest.corruption import Corruption
from v4quant.parity.selftest.corruptions import CORRUPTIONS
from v4quant.parity.selftest.editor import Editor
from v4quant.parity.selftest.table import (
    CONTROL,
    NOT_REACHED,
    Finding,
    Row,
    blind_spots,
    caught_counts,
    false_alarms,
    planted,
    run_selftest,
    sound_folder,
    table_json,
)

BOTH, VERIFY, NEITHER = "inspect verify", "verify", ""
# On tiny Flash, native: what catches it, and how many stored tensors are not what they were; None for shards whose
# header no longer fits. inspect reads no values, so only verify sees those; verify reports what inspect sees, too.
# Neither sees torch_dtype: no tensor of V4 and no line of the forward pass depends on it, only what loaders cast to.
EXPECTED: dict[str, tuple[str, int | None]] = {
    "shard-truncated": (BOTH, None),
    "shard-trailing-bytes": (BOTH, None),
    "shard-zero-tail": (VERIFY, 15),
    "shard-bit-flipped": (VERIFY, 1),
    "shard-lost": (BOTH, 76),
    "shard-of-another-layer": (BOTH, 141),
    "shard-stored-twice": (BOTH, 65),
    "index-lost": (BOTH, 0),
    "index-total-size-stale": (BOTH, 0),
    "index-lists-more": (BOTH, 0),
    "index-lists-less": (BOTH, 0),
    "index-of-another-split": (BOTH, 0),
    "tensor-lost": (BOTH, 1),
    "scale-lost": (BOTH, 1),
    "tensor-renamed": (BOTH, 2),
    "hc-stored-bf16": (BOTH, 30),
    "mtp-lost": (BOTH, 75),
    "mtp-lost-config-adapted": (VERIFY, 75),
    "mtp-lost-index-stale": (BOTH, 75),
    "last-layer-lost": (BOTH, 69),
    "last-layer-lost-config-adapted": (VERIFY, 69),
    "scale-exponent-off": (VERIFY, 1),
    "scale-block-halved": (VERIFY, 1),
    "scale-saturated": (VERIFY, 2),
    "scale-byte-as-number": (VERIFY, 1),
    "scales-stored-as-numbers": (BOTH, 107),
    "scale-nan": (VERIFY, 1),
    "scale-transposed": (VERIFY, 1),
    "scale-rows-shifted": (VERIFY, 1),
    "scales-w1-w3-exchanged": (VERIFY, 2),
    "scales-w1-w3-larger": (VERIFY, 2),
    "nibbles-swapped": (VERIFY, 1),
    "fp4-code-flipped": (VERIFY, 1),
    "fp4-coarse-grid": (VERIFY, 18),
    "negative-zeros-lost": (VERIFY, 1),
    "signs-lost": (VERIFY, 1),
    "norm-bit-flipped": (VERIFY, 1),
    "norm-nan": (VERIFY, 1),
    "norm-ones": (VERIFY, 1),
    "fp32-tables-bf16": (VERIFY, 39),
    "hc-bf16": (VERIFY, 30),
    "router-bias-bf16": (VERIFY, 2),
    "router-bias-zero": (VERIFY, 1),
    "gate-fp8": (VERIFY, 1),
    "compressor-fp8": (VERIFY, 1),
    "attn-sink-zero": (VERIFY, 1),
    "indexer-signs-lost": (VERIFY, 1),
    "tid2eid-bf16": (VERIFY, 2),
    "tid2eid-out-of-range": (VERIFY, 1),
    "rows-swapped": (VERIFY, 2),
    "columns-shifted": (VERIFY, 1),
    "ape-shifted": (VERIFY, 1),
    "embedding-shifted": (VERIFY, 1),
    "head-shifted": (VERIFY, 1),
    "head-is-embedding": (VERIFY, 1),
    "tid2eid-shifted": (VERIFY, 1),
    "attn-sink-rotated": (VERIFY, 1),
    "hc-comb-transposed": (VERIFY, 2),
    "compressor-wkv-wgate-exchanged": (VERIFY, 2),
    "compressor-windows-exchanged": (VERIFY, 3),
    "wo-a-groups-rotated": (VERIFY, 2),
    "wkv-rope-order": (VERIFY, 1),
    "w1-w3-exchanged": (VERIFY, 4),
    "shared-w1-w3-exchanged": (VERIFY, 4),
    "experts-exchanged": (VERIFY, 12),
    "experts-rotated": (VERIFY, 36),
    "expert-duplicated": (VERIFY, 6),
    "layers-experts-exchanged": (VERIFY, 72),
    "attn-ffn-norms-exchanged": (VERIFY, 2),
    "q-kv-norms-exchanged": (VERIFY, 2),
    "mtp-projections-exchanged": (VERIFY, 4),
    "rope-bases-exchanged": (VERIFY, 0),
    "rope-theta-wrong": (VERIFY, 0),
    "yarn-factor-lost": (VERIFY, 0),
    "yarn-length-wrong": (VERIFY, 0),
    "swiglu-limit-lost": (BOTH, 0),
    "swiglu-limit-off": (VERIFY, 0),
    "routed-scaling-lost": (VERIFY, 0),
    "window-off-by-one": (VERIFY, 0),
    "index-topk-off-by-one": (VERIFY, 0),
    "sinkhorn-once": (VERIFY, 0),
    "rms-norm-eps-wrong": (VERIFY, 0),
    "hash-layers-forgotten": (BOTH, 0),
    "compress-ratios-exchanged": (BOTH, 0),
    "picks-off-by-one": (BOTH, 0),
    "config-of-another-model": (BOTH, 0),
    "quantization-config-lost": (BOTH, 0),
    "expert-dtype-wrong": (BOTH, 0),
    "scale-label-lost": (VERIFY, 0),
    "mtp-not-announced": (BOTH, 0),
    "eos-changed": (VERIFY, 0),
    "torch-dtype-float16": (NEITHER, 0),
}
# Smaller than by default, to be quick.
run = functools.partial(run_selftest, max_experts=6, max_vocabulary=64)


def nothing(_copy: Path) -> tuple[bool, str]:
    """A parity check that sees no difference."""
    return False, "indistinguishable"


def some(*names: str) -> list[Corruption]:
    return [CORRUPTIONS[name] for name in names]


def test_the_table_of_a_native_checkpoint(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    before = hashes(tiny("flash"))
    changed: dict[str, int] = {}
    seen: list[str] = []
    parity_saw: list[str] = []
    work = tmp_path / "work"

    def parity(copy: Path) -> tuple[bool, str]:
        name = seen[-1]
        parity_saw.append(name)
        was, now = tensors(sound_folder(work)), tensors(copy)
        changed[name] = len({key[1] for key in was.keys() | now.keys() if was.get(key) != now.get(key)})
        return changed[name] > 0, f"{changed[name]} tensors"

    rows = run(open_checkpoint(tiny("flash")), work, parity, lambda _done, _total, name: seen.append(name))
    assert seen == [CONTROL, *CORRUPTIONS] == [row.name for row in rows]
    assert not work.exists()
    assert hashes(tiny("flash")) == before
    assert rows[0].caught_by == []
    by_name = {row.name: row for row in rows[1:]}
    assert by_name.pop("quantization-config-left").skipped == "weights are quantised"
    found = {name: " ".join(check for check in row.caught_by if check != "parity") for name, row in by_name.items()}
    assert found == {name: catches for name, (catches, _) in EXPECTED.items()}
    for name, row in by_name.items():
        assert row.inspect and row.verify and row.parity
        if row.inspect.caught:
            assert row.parity == Finding(False, NOT_REACHED)
            assert name not in parity_saw
        else:
            assert changed[name] == EXPECTED[name][1]
            assert row.parity == Finding(changed[name] > 0, f"{changed[name]} tensors")
        for finding in (row.inspect, row.verify, row.parity):
            assert finding.reason
            assert "\n" not in finding.reason
            assert str(work) not in finding.reason
    assert blind_spots(rows) == ["torch-dtype-float16"]
    assert caught_counts(rows)["verify"] == len(EXPECTED) - 1


@pytest.mark.parametrize("kind", ["fp8", "bf16", "flash-base"])
def test_every_other_form_is_blind_in_the_same_place(kind: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    corruptions = some(
        "shard-bit-flipped", "signs-lost", "mtp-lost-config-adapted", "swiglu-limit-off", "torch-dtype-float16"
    )
    rows = run(open_checkpoint(tiny(kind)), tmp_path, nothing, corruptions=corruptions)
    assert [row.caught_by for row in rows] == [[], ["verify"], ["verify"], ["verify"], ["verify"], []]


def test_scales_as_numbers_look_sound_to_inspect_in_fp8(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """FP8 weights under F32 scales are the form of the Base releases, whatever the scales are."""
    corruptions = some("scales-stored-as-numbers")
    rows = run(open_checkpoint(tiny("fp8")), tmp_path, nothing, corruptions=corruptions)
    assert rows[1].caught_by == ["verify"]


def test_json_and_counts() -> None:
    no, yes = Finding(False, "no"), Finding(True, "yes")
    rows = [
        Row(CONTROL, "none", no, no, no),
        Row("a", "A.", yes, yes, no),
        Row("b", "B.", no, yes, yes),
        Row("c", "C.", no, no, no),
        Row("d", "D.", skipped="bf16 has no scales"),
    ]
    assert [row.name for row in planted(rows)] == ["a", "b", "c"]
    assert caught_counts(rows) == {"inspect": 1, "verify": 2, "parity": 1}
    assert blind_spots(rows) == ["c"]
    assert false_alarms(rows) == []
    assert false_alarms([Row(CONTROL, "none", no, yes, yes)]) == ["verify", "parity"]
    found = json.loads(json.dumps(table_json(rows)))
    assert {key: value for key, value in found.items() if key != "rows"} == {
        "planted": 3,
        "caught": {"inspect": 1, "verify": 2, "parity": 1},
        "blind": ["c"],
        "false_alarms": [],
        "skipped": {"d": "bf16 has no scales"},
    }
    assert found["rows"][1] == {
        "corruption": "a",
        "what": "A.",
        "inspect": {"caught": True, "reason": "yes"},
        "verify": {"caught": True, "reason": "yes"},
        "parity": {"caught": False, "reason": "no"},
        "caught_by": ["inspect", "verify"],
        "skipped": "",
    }
    assert found["rows"][4]["inspect"] is None


def test_what_changes_nothing_is_skipped(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    idle = Corruption(
        "idle", "Nothing is done.", lambda editor: editor.write("norm.weight", editor.read("norm.weight"))
    )
    rows = run(open_checkpoint(tiny("flash")), tmp_path, nothing, corruptions=[idle])
    assert rows[1].skipped
    assert rows[1].inspect is None
    assert planted(rows) == []


def test_an_error_of_v4quant_in_parity_is_a_catch(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    def refuse(copy: Path) -> tuple[bool, str]:
        if "NaN" in open_checkpoint(copy).where:
            return False, ""
        raise CheckpointError(f"{copy}: holds\n  NaN")

    rows = run(open_checkpoint(tiny("flash")), tmp_path, refuse, corruptions=some("norm-nan"))
    assert rows[1].parity == Finding(True, "holds NaN")
    assert false_alarms(rows) == ["parity"]  # the control is refused, too


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, InterruptedRunError, OutputError])
def test_any_other_error_comes_through_and_leaves_nothing(
    error: type[BaseException], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    calls: list[Path] = []

    def fail(copy: Path) -> tuple[bool, str]:
        calls.append(copy)
        if len(calls) > 1:
            raise error("stop")
        return False, ""

    with pytest.raises(error):
        run(open_checkpoint(tiny("flash")), tmp_path, fail, corruptions=some("signs-lost"))
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupt_while_a_copy_is_written_leaves_nothing(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(open_checkpoint(tiny("flash")), tmp_path / "work", nothing)
    assert not (tmp_path / "work").exists()


def test_parity_may_keep_the_sound_checkpoint_open(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Links change a file's times, which an open checkpoint watches; so copies are no links to the sound one."""
    kept: list[Editor] = []

    def parity(copy: Path) -> tuple[bool, str]:
        if not kept:
            kept.append(Editor(open_checkpoint(sound_folder(tmp_path))))
        for name in kept[0].checkpoint.tensors:
            kept[0].read(name)
        return not copy.exists(), "read"

    rows = run(open_checkpoint(tiny("flash")), tmp_path, parity, corruptions=some("eos-changed", "signs-lost"))
    assert [row.parity for row in rows] == 3 * [Finding(False, "read")]


@pytest.mark.parametrize("name", ["sound", "originals", "copy"])
def test_what_is_not_ours_is_neither_used_nor_removed(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    with pytest.raises(OutputError):
        run(open_checkpoint(tiny("flash")), tmp_path, nothing)
    assert (tmp_path / name / "mine.txt").read_text() == "mine"


def test_a_damaged_source_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    editor = Editor(open_checkpoint(tiny("flash")))
    CORRUPTIONS["tensor-lost"].apply(editor)
    editor.finish(tmp_path / "damaged")
    with pytest.raises(CheckpointError):
        run(open_checkpoint(tmp_path / "damaged"), tmp_path / "work", nothing)
    assert not (tmp_path / "work").exists()
