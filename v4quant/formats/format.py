"""What every checkpoint format says of itself: its encodings, and the keys that its config files carry."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from v4quant.encodings import Scheme

# config.json of every V4 release, Base included.
FP8_QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


@dataclass(frozen=True)
class Format:
    """One checkpoint format.

    Attributes:
        scheme: how routed experts and the other quantised matrices are stored.
        expert_dtype: value of the config.json key; None leaves the key out.
        quantization_config: what config.json says where the source has none; None removes the key.
        inference: keys of DeepSeek's flat inference/config.json; None removes a key.
        summary: one line for people.
    """

    scheme: Scheme
    expert_dtype: str | None
    quantization_config: Mapping[str, Any] | None
    inference: Mapping[str, str | None]
    summary: str

    @property
    def name(self) -> str:
        """The name that `--to` takes."""
        return self.scheme.name

    def config_json(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Rewrite a config.json so that it says what this format stores; every other key and their order stay."""
        config = dict(source)
        _set_or_remove(config, "expert_dtype", self.expert_dtype)
        if self.quantization_config is None:
            config.pop("quantization_config", None)
        else:
            stored = config.get("quantization_config") or self.quantization_config
            # transformers moves expert_dtype in here; the top-level key is the one that this format sets.
            kept = {key: value for key, value in stored.items() if key != "expert_dtype"}
            if self.scheme.dense.scale_dtype == "F8_E8M0" and "scale_fmt" in kept:
                kept["scale_fmt"] = FP8_QUANTIZATION_CONFIG["scale_fmt"]
            config["quantization_config"] = kept
        return config

    def inference_config(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """Rewrite DeepSeek's inference/config.json likewise."""
        config = dict(source)
        for key, value in self.inference.items():
            _set_or_remove(config, key, value)
        return config


def _set_or_remove(config: dict[str, Any], key: str, value: str | None) -> None:
    if value is None:
        config.pop(key, None)
    else:
        config[key] = value
