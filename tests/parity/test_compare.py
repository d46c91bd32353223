"""Verdicts on whole checkpoints: equal ones identical, other machines indistinguishable, faults different."""

from pathlib import Path

import pytest
import torch

from tests.model.references import REFERENCES, Reference, named
from tests.parity.runs import compared, compared_with_stored, converted, edited, with_config
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.errors import CheckFailedError, UsageError
from v4quant.kernels.sparse_attention import Picked
from v4quant.model import attention, experts
from v4quant.model.arithmetic import Activations
from v4quant.model.release import Release
from v4quant.parity.attribution import blame
from v4quant.parity.compare import Comparison
from v4quant.parity.prompts import built_prompts
from v4quant.parity.verdict import Verdict

every_reference = pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)


def blamed(comparison: Comparison) -> tuple[int | None, str | None]:
    """Layer and module that the comparison names."""
    who = blame(comparison.outcome, comparison.judgement, comparison.attribution)
    return who.layer, who.module


@every_reference
def test_a_checkpoint_is_identical_to_itself(reference: Reference) -> None:
    comparison = compared(reference.folder, reference.folder)
    outcome = comparison.outcome
    assert comparison.judgement.verdict is Verdict.IDENTICAL
    assert comparison.judgement.departures == [] and comparison.attribution == ()
    assert outcome.mtp is not None and outcome.mtp_logits is not None and outcome.logits is not None
    for block in [*outcome.layers, outcome.mtp]:
        for figures in (block.isolated, block.accumulated):
            assert figures is not None
            assert (figures.streams.rel_err, figures.streams.max_abs, figures.streams.cosine) == (0.0, 0.0, 1.0)
            assert (figures.routing.agreement, figures.routing.swapped_mass) == (1.0, 0.0)
            assert figures.indexer_overlap in (None, 1.0)
    for head in (outcome.logits, outcome.mtp_logits):
        found = head.found
        assert (found.kl.max, found.kl_reverse.max, found.top1, found.top5_overlap) == (0.0, 0.0, 1.0, 1.0)
        assert found.perplexity_found == found.perplexity_expected
    assert not comparison.coverage.silent or comparison.coverage.silent == ["swiglu_limit cuts off"]


@every_reference
def test_the_noise_is_seen(reference: Reference) -> None:
    """A floor of nothing would judge everything different, and one of everything nothing."""
    outcome = compared(reference.folder, reference.folder).outcome
    assert outcome.noise_of == "reference" and outcome.logits is not None
    for noise in outcome.logits.noise.values():
        assert 1e-4 < noise.kl.mean < 0.03 and 0.8 < noise.top1 < 1.0
    for name in outcome.layers[0].noise:
        errors = [layer.noise[name][0].streams.rel_err for layer in outcome.layers]
        assert 1e-4 < max(errors) < 0.02, name


@every_reference
@pytest.mark.parametrize("target", ["fp8", "bf16"])
def test_a_value_exact_conversion_is_identical(reference: Reference, target: str, tmp_path: Path) -> None:
    out = converted(reference.folder, tmp_path / "out", target)
    assert compared(out, reference.folder).judgement.verdict is Verdict.IDENTICAL
    assert compared(reference.folder, out).judgement.verdict is Verdict.IDENTICAL


def test_stored_arithmetic_lets_a_bf16_side_alone(tmp_path: Path) -> None:
    folder = named("tiny-flash").folder
    out = converted(folder, tmp_path / "out", "bf16")
    comparison = compared(out, folder, activations=Activations.STORED)
    assert comparison.judgement.verdict is Verdict.DIFFERENT
    assert blamed(comparison) == (0, None), "no weights explain it"
    fp8 = converted(folder, tmp_path / "fp8", "fp8")
    assert compared(fp8, folder, activations=Activations.STORED).judgement.verdict is Verdict.IDENTICAL


@every_reference
def test_experts_on_a_coarser_grid_are_different(reference: Reference, tmp_path: Path) -> None:
    out = reference.folder
    if open_checkpoint(out).scheme.name == "native":
        config = open_checkpoint(out).config
        out = tmp_path / "out"
        previous = reference.folder
        for expert in range(config.n_routed_experts):
            copy = tmp_path / f"copy{expert}"
            previous = edited(previous, copy, f"layers.1.ffn.experts.{expert}.w1.weight", _drop_the_mantissa)
        out = previous
    else:
        out = converted(out, tmp_path / "out", "native")  # FP8 experts as FP4
    comparison = compared(out, reference.folder)
    assert comparison.judgement.verdict is Verdict.DIFFERENT
    assert blamed(comparison)[1] == "experts"
    assert comparison.attribution[0].exchanges[0].error == 0.0
    assert all(".ffn.experts." in mismatch.tensor for mismatch in comparison.attribution[0].tensors)


def _drop_the_mantissa(codes: torch.Tensor) -> None:
    """1.5, 3 and 6 become 1, 2 and 4."""
    codes &= 0b1110_1110


@every_reference
def test_stored_outputs_of_the_release_are_indistinguishable(reference: Reference) -> None:
    comparison = compared_with_stored(reference)
    assert comparison.judgement.verdict is Verdict.INDISTINGUISHABLE
    assert comparison.outcome.noise_of == "candidate" and comparison.outcome.mtp_logits is not None


def _wrong_sink(patch: pytest.MonkeyPatch) -> None:
    right = Release.attend
    patch.setattr(Release, "attend", lambda self, q, sink, picked: right(self, q, torch.zeros_like(sink), picked))


def _window_shorter_by_one(patch: pytest.MonkeyPatch) -> None:
    right = attention.window_entries
    patch.setattr(attention, "window_entries", lambda positions, window: right(positions, window - 1))


def _window_shifted_by_one(patch: pytest.MonkeyPatch) -> None:
    right = attention.window_entries

    def shifted(positions: torch.Tensor, window: int) -> torch.Tensor:
        entries = right(positions, window)
        full = (entries >= 0).all(1)
        entries[full, 0] = entries[full, 1]  # the oldest entry is lost, the next one seen twice
        return entries

    patch.setattr(attention, "window_entries", shifted)


def _lose_the_first_key_of_a_list(patch: pytest.MonkeyPatch) -> None:
    """Which key that is depends on the order, so that the run's own noise hides it."""
    right = Release.attend

    def shifted(self: Release, q: torch.Tensor, sink: torch.Tensor, picked: list[Picked]) -> torch.Tensor:
        window = picked[0]
        entries = window.indices.clone()
        full = (entries >= 0).all(1)
        entries[full, 0] = entries[full, 1]
        return right(self, q, sink, [Picked(window.entries, entries, window.layout), *picked[1:]])

    patch.setattr(Release, "attend", shifted)


def _rope_not_inverted(patch: pytest.MonkeyPatch) -> None:
    right = Release.rope_
    patch.setattr(
        Release, "rope_", lambda self, x, cos_sin, inverse=False: x if inverse else right(self, x, cos_sin, inverse)
    )


def _pick_one_less(patch: pytest.MonkeyPatch) -> None:
    right = Release.pick

    def fewer(
        self: Release, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor, k: int
    ) -> torch.Tensor:
        picked = right(self, q, keys, weights, visible, k)
        picked[visible >= k, -1] = -1
        return picked

    patch.setattr(Release, "pick", fewer)


def _pick_the_next_one(patch: pytest.MonkeyPatch) -> None:
    """As many entries as there should be, the last one a place too far down."""
    right = Release.pick

    def shifted(
        self: Release, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor, k: int
    ) -> torch.Tensor:
        picked = right(self, q, keys, weights, visible, k + 1)
        enough = visible > k
        picked[enough, k - 1] = picked[enough, k]
        return picked[:, :k].contiguous()

    patch.setattr(Release, "pick", shifted)


DEFECTS = [
    _wrong_sink,
    _window_shorter_by_one,
    _window_shifted_by_one,
    _lose_the_first_key_of_a_list,
    _rope_not_inverted,
    _pick_one_less,
    _pick_the_next_one,
]


@every_reference
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__.strip("_"))
def test_a_planted_defect_is_different_from_stored_outputs(
    reference: Reference, defect: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(defect)
    defect(monkeypatch)
    comparison = compared_with_stored(reference)
    assert comparison.judgement.verdict is Verdict.DIFFERENT
    layer, module = blamed(comparison)
    assert layer is not None
    if "pick" in getattr(defect, "__name__", ""):
        assert comparison.outcome.layers[layer].ratio == 4
        assert module in ("indexer", None)


def test_a_module_that_never_ran_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides would agree; counts do not."""
    right = experts.routed_experts
    monkeypatch.setattr("v4quant.model.block.routed_experts", lambda asked, _source: [own.empty() for own in asked])
    folder = named("tiny-base").folder
    with pytest.raises(CheckFailedError, match="tokens in experts, the shared one included: 200 ran, expected 600"):
        compared(folder, folder, built_prompts(open_checkpoint(folder).config, 200, None))
    comparison = compared_with_stored(named("tiny-base"))
    assert comparison.judgement.verdict is Verdict.DIFFERENT
    assert "not executed" in comparison.judgement.departures[0].figure
    monkeypatch.setattr("v4quant.model.block.routed_experts", right)
    assert compared_with_stored(named("tiny-base")).judgement.verdict is Verdict.INDISTINGUISHABLE


def test_a_lost_mtp_block_is_different(tmp_path: Path) -> None:
    folder = named("tiny-base").folder
    ratios = list(open_checkpoint(folder).config.compress_ratios)
    kept = with_config(folder, tmp_path / "config", compress_ratios=ratios[:-1], num_nextn_predict_layers=0)
    for path in kept.glob("*.safetensors*"):
        path.unlink()
    _write_without_mtp(folder, kept)
    comparison = compared(kept, folder)
    assert comparison.judgement.verdict is Verdict.DIFFERENT
    assert blamed(comparison) == (None, "mtp")
    found = comparison.outcome.logits
    assert found is not None and found.found.bit_equal == 1.0
    without_mtp_tokens = built_prompts(open_checkpoint(folder).config, 60, 1)
    assert compared(kept, folder, without_mtp_tokens).judgement.verdict is Verdict.DIFFERENT


def _write_without_mtp(source: Path, out: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor for path in source.glob("model-*.safetensors") for name, tensor in load_file(path).items()}
    save_file(
        {name: value for name, value in tensors.items() if not name.startswith("mtp.")}, out / "model.safetensors"
    )


def test_models_of_other_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="num_hidden_layers is 5, expected 3"):
        compared(named("tiny-flash").folder, named("tiny-base").folder)
