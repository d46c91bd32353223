"""What a model costs: parameters, checkpoint bytes, KV cache and FLOPs, from its config alone."""

from v4quant.budget.gpu import GPU_MEMORY_MIB, Load
from v4quant.budget.summary import budget, gpu_budget

__all__ = ["GPU_MEMORY_MIB", "Load", "budget", "gpu_budget"]
