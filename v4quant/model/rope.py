"""Which rotation a block uses: layers with compression turn slowly and stretch by YaRN, window-only ones do neither."""

import torch

from v4quant.config import V4Config
from v4quant.kernels.kv_layout import ROPE_DIM
from v4quant.kernels.rope_frequencies import rope_frequencies, rope_table


class Rotation:
    """Cosines and sines of one kind of block."""

    def __init__(self, config: V4Config, ratio: int, device: torch.device | str = "cpu") -> None:
        """The rotation of blocks with this compression: 0, 4 or 128."""
        if ratio:
            frequencies = rope_frequencies(ROPE_DIM, config.compress_rope_theta, config.rope_scaling)
        else:
            frequencies = rope_frequencies(ROPE_DIM, config.rope_theta)
        self._frequencies = frequencies.to(device)  # [R/2]

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """float32 [T, R], R/2 cosines and R/2 sines, for positions [T]."""
        return rope_table(positions, self._frequencies)
