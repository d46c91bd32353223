"""Configs of the releases, and a tiny one, for tests of the budget."""

from functools import cache
from pathlib import Path

from v4quant.config import V4Config
from v4quant.testing.releases import synth_config

_CONFIGS = Path(__file__).parents[1] / "data" / "configs"
MILLION = 2**20


@cache
def released(name: str) -> V4Config:
    path = _CONFIGS / f"{name}.json"
    return V4Config.load(path.read_bytes(), path.name)


@cache
def tiny(like: str = "flash") -> V4Config:
    return V4Config.from_json(synth_config(like, tiny=True)[0], like)
