"""One operation a file: formula and shapes, torch reference, public op; its Triton body lies beside it.

`X.py` holds `X_torch`, the reference, and `X`, which checks its arguments, takes the Triton kernel of `_X_triton.py`
for CUDA tensors and the reference for others (`V4QUANT_KERNELS=torch|triton` forces one). Only the `_*_triton.py` files
import triton, on first use, so references work where there is no Triton.
"""
