"""Every kernel compiles at the shapes of Flash and Pro for real GPUs, within their limits and without spills."""

import os
import subprocess
import sys

import pytest

# In a process of its own: other tests may have imported Triton for its interpreter.
PROGRAM = """
import importlib, pkgutil, sys
import v4quant.kernels
from v4quant.kernels._offline import SHARED_LIMIT_BYTES, compile_offline
module = importlib.import_module(f"v4quant.kernels.{sys.argv[1]}")
target = sys.argv[2]
assert module.COMPILE_CASES
for case in module.COMPILE_CASES:
    if target not in case.targets:
        continue
    found = compile_offline(case, target)
    assert found.registers > 16, (case.name, found)
    assert found.stack_bytes == 0, (case.name, found)
    assert found.shared_bytes <= SHARED_LIMIT_BYTES[target], (case.name, found)
    assert found.tensor_memory_columns <= 512, (case.name, found)
    assert bool(found.mma) == case.needs_mma, (case.name, found)
    assert found.widest_load_bits == 128, (case.name, found)
    print(case.name, found)
"""
MODULES = [
    "_act_quant_fp4_triton",
    "_act_quant_fp8_triton",
    "_compress_kv_triton",
    "_dequantize_triton",
    "_fp4_expert_gemm_triton",
    "_fp8_gemm_triton",
    "_hadamard_triton",
    "_hyper_mix_triton",
    "_indexer_key_cache_triton",
    "_indexer_scores_triton",
    "_kv_cache_triton",
    "_rms_norm_triton",
    "_rope_triton",
    "_route_triton",
    "_sparse_attention_triton",
    "_top_k_triton",
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("module", MODULES)
def test_compiles_within_limits(module: str, target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, module, target]
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
