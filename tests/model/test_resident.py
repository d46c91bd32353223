"""Memory of the whole model: what headers say is what is held, and what does not fit is refused."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.conversion import convert
from tests.model.references import DATA, named
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.errors import UsageError
from v4quant.model import generation, resident
from v4quant.model.arithmetic import Activations, Arithmetic, Products
from v4quant.model.generation import generate
from v4quant.model.resident import Needs, free_bytes, needs_of, require_fits
from v4quant.model.sampling import Sampling
from v4quant.model.transformer import Transformer

FLASH = named("tiny-flash")
FORMS = ["native", "fp8", "bf16"]
ARITHMETICS = [
    Arithmetic(),
    Arithmetic(products=Products.CODED),
    Arithmetic(Activations.STORED, Products.CODED),
    Arithmetic(Activations.NONE, Products.CODED),
]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, list):
        for own in value:
            yield from tensors_in(own)


def held(model: Transformer) -> int:
    """Bytes of all weights that a model holds."""
    head = model._head
    parts: list[Any] = [head._mix, head._norm, head._kept]
    for block in model._blocks:
        parts += [block.weights, block.experts._coded, block.experts._decoded]  # type: ignore[attr-defined]
    return sum(tensor.nbytes for part in parts for tensor in tensors_in(part))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    (folder / "native").symlink_to(FLASH.folder)
    for form in FORMS[1:]:
        convert(FLASH.folder, folder / form, form)
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=lambda own: f"{own.activations}-{own.products}")
def test_weights_to_the_byte(form: str, arithmetic: Arithmetic, folder: Path) -> None:
    checkpoint = open_checkpoint(folder / form)
    assert needs_of(checkpoint, arithmetic, 100).weights == held(Transformer(checkpoint, arithmetic))


def test_base_scales_count() -> None:
    checkpoint = open_checkpoint(DATA / "reference" / "tiny-base")
    arithmetic = Arithmetic(products=Products.CODED)
    assert needs_of(checkpoint, arithmetic, 100).weights == held(Transformer(checkpoint, arithmetic))


@pytest.mark.parametrize("prompt", [1, 100, 300])
def test_the_cache_has_room(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 64)
    monkeypatch.setattr(resident, "PREFILL_TOKENS", 64)
    checkpoint = open_checkpoint(FLASH.folder)
    model = Transformer(checkpoint)
    caches = model.cache(1)
    monkeypatch.setattr(Transformer, "cache", lambda *_: caches)
    list(generate(model, FLASH.ids[:prompt], Sampling(), 8, -1))
    found = sum(cache.bytes for cache in caches)
    assert found <= needs_of(checkpoint, Arithmetic(), prompt + 8).cache <= 6 * found


def test_what_does_not_fit_is_refused() -> None:
    needs = Needs(160 * 10**9, 5 * 10**9, 10**9)
    require_fits(needs, 166 * 10**9, "flash")
    require_fits(needs, None, "flash")
    with pytest.raises(UsageError) as refused:
        require_fits(needs, 24 * 10**9, "flash")
    assert str(refused.value) == (
        "flash: in memory it takes 166.00 GB (weights 160.00 GB, cache 5.00 GB, work 1.00 GB), and 24.00 GB is free"
    )
    assert "v4quant parity and v4quant reference" in refused.value.hint


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(resident, "_CGROUP", tmp_path)
    monkeypatch.setattr(resident, "_MEMINFO", tmp_path / "meminfo")
    assert free_bytes(cpu) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     2048 kB\n")
    assert free_bytes(cpu) == 2**21
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\nfile 300000\nshmem 100000\n")
    assert free_bytes(cpu) == 500_000, "pages of files can go, those of shared memory cannot"
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu) == 2**21
    (tmp_path / "meminfo").write_text("MemAvailable: lots\n")
    assert free_bytes(cpu) is None
