"""v4quant: convert, prove and publish DeepSeek-V4 checkpoints."""

__version__ = "0.1.0"
