"""The forward pass of DeepSeek-V4, in the arithmetic of DeepSeek's released inference code; one idea a file.

The arithmetic belongs to the run, not to the storage: a checkpoint that stores BF16 weights runs with the same
activation quantisation as the release that it was converted from.

    chunk -> transformer or streaming -> block -> attention (compressor, indexer, cache), router, experts
                                                  every operation through `operations`: release or float32
"""
