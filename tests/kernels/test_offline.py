"""Every kernel compiles at the shapes of Flash and Pro for real GPUs, within their limits and without spills."""

import os
import subprocess
import sys

import pytest

# In a process of its own: other tests may have imported Triton for its interpreter.
PROGRAM = """
import importlib, sys
from v4quant.kernels._offline import SHARED_LIMIT_BYTES, TARGETS, compile_offline
module = importlib.import_module(f"v4quant.kernels.{sys.argv[1]}")
assert {target for case in module.COMPILE_CASES for target in case.targets} == set(TARGETS)
for target in TARGETS:
    for case in (case for case in module.COMPILE_CASES if target in case.targets):
        found = compile_offline(case, target)
        assert found.registers > 16, (case.name, found)
        assert found.stack_bytes == 0, (case.name, found)
        assert found.shared_bytes <= SHARED_LIMIT_BYTES[target], (case.name, found)
        assert found.tensor_memory_columns <= 512, (case.name, found)
        assert bool(found.mma) == case.needs_mma, (case.name, found)
        assert found.widest_load_bits == 128, (case.name, found)
        print(target, case.name, found)
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
    "_query_norm_triton",
    "_rms_norm_triton",
    "_rope_triton",
    "_route_triton",
    "_sparse_attention_triton",
    "_top_k_triton",
]


@pytest.mark.parametrize("module", MODULES)
def test_compiles_within_limits(module: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"
    command = [sys.executable, "-c", PROGRAM, module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
