"""One side of `forward.py`, in a process of its own: one layer, the same tokens again and again.

    python benchmarks/_forward_side.py ours|theirs SOURCE LAYER TOKENS PASSES

prints one JSON object: `seconds` and `cpu_seconds` of each pass, `experts` that were used, and of `ours` `bytes_read` a
pass, with the `read_seconds` that it takes to read just these bytes in one thread.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SEED = 0
THREADS = 2
# `_keep_in_fp32_modules_strict` of transformers' DeepSeek-V4, in one layer.
KEPT_IN_FP32 = ("attn_hc", "ffn_hc", "norm.weight", "sinks", "position_bias", "e_score_correction_bias")


def inputs(tokens: int, vocabulary: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [T] and residual streams bfloat16 [T, 4, d], the same on both sides."""
    random = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocabulary, (tokens,), generator=random)
    return ids, torch.randn(tokens, 4, width, generator=random).to(torch.bfloat16)


def timed(job: Callable[[], Any], passes: int) -> tuple[dict[str, list[float]], Any]:
    """Seconds of each pass, and what the last one gave."""
    wall, cpu, found = [], [], None
    for _ in range(passes):
        start, start_cpu = time.perf_counter(), time.process_time()
        found = job()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {"seconds": wall, "cpu_seconds": cpu}, found


def ours(source: Path, layer: int, tokens: int, passes: int) -> dict[str, Any]:
    """The streamed layer: each pass reads its weights, dense ones and experts, from the checkpoint."""
    from v4quant.checkpoint.reader import open_checkpoint
    from v4quant.model.streaming import StreamedModel, run_block

    with StreamedModel(open_checkpoint(source)) as model:
        config = model.config
        ids, streams = inputs(tokens, config.vocab_size, config.hidden_size)
        schedule = model.schedule([ids])

        def run() -> Any:
            [result] = [run_block(block, streams, schedule) for block in model.blocks(layer, layer + 1)]
            return result

        read_seconds = seconds_to_read(model.reader.weights, f"layers.{layer}.")
        before = model.bytes_read
        seconds, result = timed(run, passes)
        read = (model.bytes_read - before) // passes
        experts = len(result.router_indices.unique())
        return {**seconds, "experts": experts, "bytes_read": read, "read_seconds": read_seconds}


def seconds_to_read(weights: Any, prefix: str) -> float:
    """Read every tensor of a layer and do nothing with it."""
    start = time.perf_counter()
    checkpoint = weights.source
    buffer = bytearray(max(entry.bytes for name, entry in checkpoint.tensors.items() if name.startswith(prefix)))
    for name, entry in checkpoint.tensors.items():
        if name.startswith(prefix):
            checkpoint.files.read_into(entry.file, entry.start, memoryview(buffer)[: entry.bytes])
    return time.perf_counter() - start


def theirs(source: Path, layer: int, tokens: int, passes: int) -> dict[str, Any]:
    """transformers' layer, its weights in memory before anything is timed: BF16, and FP32 where it keeps that."""
    from transformers import AutoConfig
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

    config = AutoConfig.from_pretrained(source, local_files_only=True)
    config._attn_implementation = "eager"  # the only one that it has
    config._experts_implementation = "grouped_mm"  # what a whole model is loaded with
    with torch.device("meta"):
        block = hf.DeepseekV4DecoderLayer(config, layer).eval().to(torch.bfloat16)
    block.to_empty(device="cpu")
    fill(block, config)
    rotary = hf.DeepseekV4RotaryEmbedding(config)
    ids, streams = inputs(tokens, config.vocab_size, config.hidden_size)
    experts: set[int] = set()
    block.mlp.gate.register_forward_hook(lambda *call: experts.update(call[2][2].unique().tolist()))

    def run() -> torch.Tensor:
        positions = torch.arange(tokens)[None]
        embeddings = streams[None, :, 0]
        tables = {name: rotary(embeddings, position_ids=positions, layer_type=name) for name in ("main", "compress")}
        mask = create_sliding_window_causal_mask(
            config=config, inputs_embeds=embeddings, attention_mask=None, past_key_values=None, position_ids=positions
        )
        found: torch.Tensor = block(
            streams[None],
            input_ids=ids[None],
            position_embeddings=tables,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=None,
        )
        return found

    seconds, found = timed(run, passes)
    assert found.isfinite().all()
    return {**seconds, "experts": len(experts)}


def fill(block: torch.nn.Module, config: Any) -> None:
    """Random weights of a trained layer's size; in FP32 those that transformers keeps so; routes to every expert."""
    for part in block.modules():
        if type(part).__name__ == "DeepseekV4RotaryEmbedding":
            part.__init__(config)  # type: ignore[misc]  # its buffers are computed, not loaded
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        if name.endswith("tid2eid"):
            first = torch.randint(config.n_routed_experts, (len(tensor), 1))
            step = config.n_routed_experts // tensor.shape[1]
            tensor.copy_((first + step * torch.arange(tensor.shape[1])) % config.n_routed_experts)
            continue
        values = tensor.view(-1)
        pattern = torch.randn(min(len(values), 2**20)).mul_(0.02).to(tensor.dtype)
        for start in range(0, len(values), len(pattern)):
            values[start : start + len(pattern)] = pattern[: len(values) - start]
        if "norm.weight" in name:
            values.fill_(1.0)
        if any(part_name in name for part_name in KEPT_IN_FP32):
            tensor.data = tensor.data.float()


def main() -> None:
    """Run what the arguments say."""
    side, source, layer, tokens, passes = sys.argv[1:]
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        run = {"ours": ours, "theirs": theirs}[side]
        print(json.dumps(run(Path(source), int(layer), int(tokens), int(passes))))


if __name__ == "__main__":
    main()
