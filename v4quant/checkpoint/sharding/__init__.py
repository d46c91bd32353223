"""Checkpoints cut into ranks and put together again: rules, layout, streaming, records, and what a rank holds."""
