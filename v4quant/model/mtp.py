"""The multi-token prediction block of the preview and Base releases: one more block that predicts the token after next.

    input of position t = e_proj(norm(embedding of token t + 1)) + h_proj(norm(stream)) for each residual stream of t

It runs as a window-only block with a head of its own (collapse and norm; the vocabulary matrix is the model's). Source:
`MTPBlock` of DeepSeek's released inference code. The DSpark stages of 0731 and 0813 have another form and are not run.
"""

from dataclasses import dataclass

import torch

from v4quant.config import V4Config
from v4quant.model.head import embed
from v4quant.model.operations import Operations
from v4quant.model.weights import Matrix, Reader
from v4quant.names import block_prefix


def runnable_mtp_blocks(config: V4Config) -> int:
    """MTP blocks that can be run; DSpark stages are none."""
    return 0 if config.is_dspark else config.mtp_blocks


@dataclass(frozen=True)
class MtpInput:
    """What stands before an MTP block.

    Attributes:
        e_proj, h_proj: [d, d], of the embedding and of the streams.
        enorm, hnorm: [d], their norms.
    """

    e_proj: Matrix
    h_proj: Matrix
    enorm: torch.Tensor
    hnorm: torch.Tensor

    @classmethod
    def read(cls, reader: Reader, index: int) -> "MtpInput":
        """Read that of an MTP block."""
        prefix = block_prefix("mtp", index)
        return cls(
            reader.matrix(f"{prefix}e_proj"),
            reader.matrix(f"{prefix}h_proj"),
            reader.tensor(f"{prefix}enorm.weight"),
            reader.tensor(f"{prefix}hnorm.weight"),
        )

    def streams(self, streams: torch.Tensor, next_ids: torch.Tensor, reader: Reader, ops: Operations) -> torch.Tensor:
        """The block's input.

        Args:
            streams: activations [T, S, d] after the model's last layer.
            next_ids: int64 [T], the token that follows each.

        Returns:
            activations [T, S, d].
        """
        tokens, count, width = streams.shape
        e = ops.linear(ops.rms_norm(embed(next_ids, reader, ops), self.enorm), self.e_proj)  # [T, d]
        h = ops.linear(ops.rms_norm(streams.reshape(-1, width), self.hnorm), self.h_proj)  # [T S, d]
        return e[:, None] + h.view(tokens, count, width)
