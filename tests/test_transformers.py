"""Proves that converted checkpoints are the same model to Hugging Face transformers, bit for bit.

A reference checkpoint is loaded twice: as it is, decoded by transformers' own FP4 and FP8 code, and converted by
v4quant to bf16, which transformers loads without knowing of any quantisation. The two decoders share nothing. Every
parameter and every logit must be equal; one value with its sign flipped must show.
"""

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import quantizer_finegrained_fp8

from v4quant.checkpoint.apply import apply
from v4quant.checkpoint.certificate import Verdict
from v4quant.checkpoint.plan import make_plan
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.formats import format_named

DATA = Path(__file__).parent / "data"
REFERENCES = sorted((DATA / "reference").iterdir())
# Only on machines that have the whole set of reference checkpoints beside the repository.
REFERENCES += [path for path in [DATA.parents[2] / "shared" / "reference" / "tiny-pro"] if path.exists()]
FLASH = DATA / "reference" / "tiny-flash"

TOKENS = 300
VOCABULARY = 512
SIGN_BIT = np.uint16(0x8000)


@pytest.fixture(autouse=True)
def no_accelerate_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The FP8 quantizer refuses to load without accelerate, but on a CPU nothing of accelerate is used."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products in many threads mostly wait for each other, the more so beside other test workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def flash_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-flash, converted to bf16."""
    return convert(FLASH, "bf16", tmp_path_factory.mktemp("flash") / "bf16")


def convert(source: Path, target: str, out: Path) -> Path:
    report = apply(make_plan(open_checkpoint(source), format_named(target)), out)
    assert report.verdicts[Verdict.ROUNDED] == 0
    return out


def load(folder: Path) -> torch.nn.Module:
    """Load a checkpoint with transformers, every quantised weight decoded; all of its tensors must find a place."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        config.quantization_config = {**quantization, "dequantize": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, local_files_only=True, output_loading_info=True
    )
    model: torch.nn.Module = loaded[0]
    problems: dict[str, Any] = loaded[1]
    assert not any(problems.values()), problems
    assert {parameter.dtype for parameter in model.parameters()} <= {torch.bfloat16, torch.float32}
    return model


def input_ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(TOKENS))  # [1, TOKENS]


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Next-token logits of one prefill."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids(), use_cache=False).logits  # [1, TOKENS, VOCABULARY]
    assert found.shape == (1, TOKENS, VOCABULARY)
    assert found.isfinite().all()
    return found


@cache
def original_logits(folder: Path) -> torch.Tensor:
    """What transformers computes from a checkpoint as released."""
    return logits(load(folder))


def different_bits(left: torch.Tensor, right: torch.Tensor) -> int:
    """Count values that differ in dtype or in any bit, the sign of zero included."""
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    return int((left.contiguous().view(torch.uint8) != right.contiguous().view(torch.uint8)).sum())


def state(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers; floats as float32, because transformers keeps norms in BF16 where it dequantises, in
    float32 elsewhere, and multiplies them in float32 either way."""
    for name, tensor in model.state_dict().items():
        yield name, tensor.float() if tensor.is_floating_point() else tensor


def test_the_prompt_reaches_every_kind_of_attention() -> None:
    """Longer than the window, more compressed entries than the indexer may keep, and several heavily compressed."""
    for folder in REFERENCES:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        rates = config.compress_rates
        assert config.vocab_size == VOCABULARY
        assert config.sliding_window < TOKENS
        assert config.index_topk < TOKENS // rates["compressed_sparse_attention"]
        assert TOKENS // rates["heavily_compressed_attention"] > 1
        assert {"compressed_sparse_attention", "heavily_compressed_attention"} <= set(config.layer_types)
        assert {"hash_moe", "moe"} == set(config.mlp_layer_types)


@pytest.mark.parametrize("target", ["bf16", "fp8"])
@pytest.mark.parametrize("folder", REFERENCES, ids=lambda folder: folder.name)
def test_same_parameters_and_logits(folder: Path, target: str, tmp_path: Path) -> None:
    converted, original = load(convert(folder, target, tmp_path / target)), load(folder)
    expected = dict(state(original))
    found = dict(state(converted))
    assert found.keys() == expected.keys()
    assert [name for name in expected if different_bits(found[name], expected[name])] == []
    assert different_bits(logits(converted), original_logits(folder)) == 0


@pytest.mark.parametrize(
    "tensor",
    [
        "embed.weight",
        "layers.0.attn.wq_a.weight",
        "layers.0.ffn.experts.3.w2.weight",
        "layers.1.ffn.shared_experts.w1.weight",
        "layers.2.attn.compressor.wkv.weight",
        "layers.2.attn.indexer.wq_b.weight",
        "layers.3.attn.compressor.wgate.weight",
        "layers.4.attn.wo_a.weight",
        "head.weight",
    ],
)
def test_one_flipped_sign_shows(tensor: str, flash_bf16: Path, tmp_path: Path) -> None:
    """Negative control: the comparison above sees one wrong value, in the kinds of weights that it is about."""
    broken = shutil.copytree(flash_bf16, tmp_path / "broken")
    flip_largest(broken, tensor)
    assert different_bits(logits(load(broken)), original_logits(FLASH)) > 0


def flip_largest(folder: Path, tensor: str) -> None:
    """Change the sign of a BF16 tensor's largest value on disk; of the embedding, that of a token in the prompt."""
    [entry] = [entry for name, entry in open_checkpoint(folder).tensors.items() if name == tensor]
    assert entry.dtype == "BF16"
    stored = np.memmap(folder / entry.file, np.uint16, "r+", entry.start, entry.shape)
    values = stored[int(input_ids()[0, 0])] if tensor == "embed.weight" else stored
    place = np.unravel_index(np.argmax(values & ~SIGN_BIT), values.shape)
    values[place] ^= SIGN_BIT
    stored.flush()
