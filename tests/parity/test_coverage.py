"""Paths of the model: each fires exactly when a prompt is long enough, and what never fired is named."""

from typing import Any

import pytest
import torch

from tests.parity.test_verdict import block, logit_figures, logits, outcome
from v4quant.config import V4Config
from v4quant.parity.coverage import Coverage, ExpertsSeen, Path, coverage_of
from v4quant.parity.execution import Executed
from v4quant.parity.lockstep import Outcome
from v4quant.parity.prompts import Prompts, built_prompts
from v4quant.testing.releases import Like, synth_config


def config_of(like: str, **options: Any) -> V4Config:
    return V4Config.from_json(synth_config(like, tiny=True, **options)[0], like)


FLASH, PRO, DSPARK = config_of("flash"), config_of("pro"), config_of("flash-0731")
ALWAYS_SILENT = ["swiglu_limit cuts off"]  # in an outcome made by hand


def outcome_of(config: V4Config, **options: Any) -> Outcome:
    """Every layer ran, and the MTP block where there is one that can be run."""
    layers = [block(f"layer {number}") for number in range(config.num_hidden_layers)]
    if config.mtp_blocks and not config.is_dspark:
        options = {"mtp": block("mtp 0"), "mtp_logits": logits(logit_figures())} | options
    return outcome(*layers, **options)


def covered(lengths: list[int], config: V4Config = FLASH, prefill: int | None = None, **options: Any) -> Coverage:
    prompts = Prompts.of([torch.arange(length) % config.vocab_size for length in lengths], prefill, config, "test")
    return coverage_of(outcome_of(config, **options), config, prompts)


def path_of(coverage: Coverage, name: str) -> Path:
    (found,) = [path for path in coverage.paths if path.path == name]
    return found


@pytest.mark.parametrize(
    ("path", "longest"),
    [
        ("window slides", 32),
        ("CSA entries attended to", 3),
        ("indexer has to choose", 16 * 4 + 3),
        ("HCA entries attended to", 127),
    ],
)
def test_paths_fire_from_one_token_on(path: str, longest: int) -> None:
    """Of a prompt of so many tokens none takes the path; of one more, the last one does."""
    silent = covered([longest, 2])
    assert path_of(silent, path).fired == 0
    assert path in silent.silent
    fires = covered([longest + 1, 2])
    assert (path_of(fires, path).fired, path_of(fires, path).of) == (1, longest + 3)
    assert path not in fires.silent
    assert path_of(covered([longest + 5, longest + 1]), path).fired == 6


def test_what_it_takes_is_what_it_takes() -> None:
    """The needs are of this config: 4 x index_topk of 16, a window of 32."""
    needs = {path.path: path.needs for path in covered([5]).paths}
    assert needs["indexer has to choose"].startswith("a prompt longer than 4 x index_topk = 64")
    assert "sliding_window = 32" in needs["window slides"]
    assert needs["HCA entries attended to"] == "a prompt of 128 tokens or more"


def test_built_prompts_leave_no_path_silent_but_those_that_cannot_run() -> None:
    for like in Like:
        config = config_of(like)
        prompts = built_prompts(config, None, None)
        found = coverage_of(outcome_of(config), config, prompts)
        stages = [f"DSpark stage {number}" for number in range(3)] if config.is_dspark else []
        assert found.silent == [*ALWAYS_SILENT, *stages], like


def test_short_prompts_are_silent_about_most() -> None:
    assert covered([1]).silent == [
        "window slides",
        "CSA entries attended to",
        "indexer has to choose",
        "HCA entries attended to",
        *ALWAYS_SILENT,
        "decode steps",
    ]


def test_models_without_some_paths() -> None:
    """One window-only layer, hash-routed, no MTP block; a Pro has no window-only layer and all others."""
    window = config_of("flash", layers=1, mtp=False)
    assert [path.path for path in covered([9], window).paths] == [
        "window slides",
        "hash-routed layers",
        "rows of the hash table",
        "swiglu_limit cuts off",
        "decode steps",
    ]
    assert [path.path for path in covered([9], PRO).paths] == [path.path for path in covered([9], FLASH).paths]
    assert "score-routed layers" in [path.path for path in covered([9], PRO).paths]


def test_layers_by_routing() -> None:
    found = covered([9])
    assert (path_of(found, "hash-routed layers").fired, path_of(found, "hash-routed layers").of) == (3, 3)
    assert (path_of(found, "score-routed layers").fired, path_of(found, "score-routed layers").of) == (2, 2)
    layers = [block(f"layer {number}", experts_seen=0 if number in (0, 4) else 5) for number in range(5)]
    own = outcome(*layers, mtp=block("mtp 0"), mtp_logits=logits())
    prompts = Prompts.of([torch.arange(9)], None, FLASH, "test")
    found = coverage_of(own, FLASH, prompts)
    assert path_of(found, "hash-routed layers").fired == 2
    assert path_of(found, "score-routed layers").fired == 1
    assert found.experts == [ExpertsSeen(number, 0 if number in (0, 4) else 5, 8) for number in range(5)]


def test_different_tokens_reach_the_hash_table() -> None:
    prompts = Prompts.of([torch.tensor([3, 3, 3, 5]), torch.tensor([5, 6])], None, FLASH, "test")
    path = path_of(coverage_of(outcome_of(FLASH), FLASH, prompts), "rows of the hash table")
    assert (path.fired, path.of) == (3, 512)


@pytest.mark.parametrize(
    ("lengths", "prefill", "steps"),
    [([20], None, 5), ([20], 20, 0), ([20, 18, 3], 16, 6), ([20], 1, 19), ([1], None, 0)],
)
def test_decode_steps(lengths: list[int], prefill: int | None, steps: int) -> None:
    found = covered(lengths, prefill=prefill)
    assert found.decode_steps == steps
    assert path_of(found, "decode steps").fired == steps
    assert ("decode steps" in found.silent) == (steps == 0)
    assert (found.tokens, found.prompts) == (sum(lengths), len(lengths))


def test_clamped_values_of_all_blocks() -> None:
    own = outcome(block(clamped=3), block("layer 1", clamped=4), mtp=block("mtp 0", clamped=5), mtp_logits=logits())
    found = coverage_of(own, FLASH, Prompts.of([torch.arange(9)], None, FLASH, "test"))
    assert path_of(found, "swiglu_limit cuts off").fired == 12


def test_the_mtp_block() -> None:
    assert path_of(covered([9]), "MTP block 0").fired == 100  # the tokens of the outcome made by hand
    assert path_of(covered([9]), "MTP block 0").of == 9
    silent = covered([9], mtp=None, mtp_logits=None)
    assert path_of(silent, "MTP block 0").fired == 0
    assert "MTP block 0" in silent.silent


def test_dspark_stages_are_never_run() -> None:
    found = covered([9], DSPARK)
    stages = [path for path in found.paths if path.path.startswith("DSpark")]
    assert [path.path for path in stages] == [f"DSpark stage {number}" for number in range(3)]
    assert all(path.path in found.silent and path.needs.startswith("code for it") for path in stages)
    assert not [path for path in found.paths if path.path.startswith("MTP")]


def test_more_mtp_blocks_than_are_run() -> None:
    keys = synth_config("flash", tiny=True)[0]
    keys |= {"num_nextn_predict_layers": 3, "compress_ratios": [*keys["compress_ratios"], 0, 0]}
    config = V4Config.from_json(keys, "test")
    found = covered([9], config)
    assert [path.path for path in found.paths if path.path.startswith("MTP")] == [f"MTP block {n}" for n in range(3)]
    assert [name for name in found.silent if name.startswith("MTP")] == ["MTP block 1", "MTP block 2"]


def test_executed_counts_of_all_blocks() -> None:
    own = outcome(
        block(executed=[Executed("tokens", 1, 2)]),
        mtp=block("mtp 0", executed=[Executed("tokens", 10, 10)]),
        mtp_logits=logits(),
    )
    found = coverage_of(own, FLASH, Prompts.of([torch.arange(9)], None, FLASH, "test"))
    assert found.executed == [Executed("tokens", 11, 12)]
