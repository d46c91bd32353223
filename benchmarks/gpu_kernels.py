"""What part of a GPU's bandwidth and matrix throughput does each op reach, against ceilings of the same run?

Ceilings: a device copy of 1 GiB, and a BF16 product of 8192 x 8192 matrices by torch. Ops run at the shapes of Flash
and Pro with 1, 128 and 4,096 tokens; bytes count every operand once and the result once, whatever a kernel moves. Each
call follows a pass over a buffer larger than any L2 cache, which also hides the launch; a row holds the median over
rounds. With up to 128 tokens an op is compared with its torch reference first, and not timed where it differs.

    python benchmarks/gpu_kernels.py [--rounds N]     writes benchmarks/results/gpu_kernels.csv; without a GPU nothing
    python benchmarks/gpu_kernels.py --dry-run        goes through everything on the CPU at small shapes, writes nothing
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from _results import environment, write_csv

from v4quant.testing.op_run import FLASH, PRO, TINY, OpRun, Sizes
from v4quant.testing.op_runs_attention import ATTENTION_RUNS
from v4quant.testing.op_runs_dense import DENSE_RUNS

RUNS = {**DENSE_RUNS, **ATTENTION_RUNS}
TOKENS = (1, 128, 4096)
CHECKED_TOKENS = 128
COPY_BYTES = 2**30
MATRIX = 8192
FLUSH_BYTES = 2**28
WARM_UP = 3


class Clock:
    """Median seconds of a call on a device, or of one on the CPU where this is a dry run."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.buffer = torch.empty(FLUSH_BYTES if device == "cuda" else 1, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Time a call."""
        for _ in range(WARM_UP if self.device == "cuda" else 0):
            call()
        return statistics.median(self._once(call) for _ in range(self.rounds))

    def _once(self, call: Callable[[], object]) -> float:
        self.buffer.zero_()
        if self.device != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        first, last = self._event(), self._event()
        first.record()
        call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def ceilings(clock: Clock, copy_bytes: int, matrix: int) -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and FLOP a second of a BF16 product."""
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(matrix, matrix, device=clock.device).to(torch.bfloat16) for _ in range(2))
    bandwidth = 2 * copy_bytes / clock.seconds(lambda: target.copy_(source))
    return bandwidth, 2 * matrix**3 / clock.seconds(lambda: left @ right)


def measured(name: str, sizes: Sizes, tokens: int, clock: Clock) -> tuple[OpRun, float] | None:
    """An op's run and seconds; None where it does not fit into memory or differs from its reference."""
    try:
        run = RUNS[name](sizes, tokens, clock.device)
        if tokens <= CHECKED_TOKENS:
            run.check()
        return run, clock.seconds(run.op)
    except (torch.OutOfMemoryError, AssertionError) as error:
        print(f"{sizes.name:<6}{name:<24}{tokens:>6} tokens  not timed: {str(error).splitlines()[0]}")
        return None


def row(
    name: str, sizes: Sizes, tokens: int, run: OpRun, seconds: float, limits: tuple[float, float]
) -> dict[str, str]:
    """A line of the CSV."""
    bandwidth, throughput = run.moved_bytes / seconds, run.flops / seconds
    return {
        "model": sizes.name,
        "op": name,
        "tokens": str(tokens),
        "microseconds": f"{seconds * 1e6:.1f}",
        "gb_per_s": f"{bandwidth / 1e9:.1f}",
        "of_copy": f"{bandwidth / limits[0]:.3f}",
        "tflop_per_s": f"{throughput / 1e12:.2f}",
        "of_matmul": f"{throughput / limits[1]:.3f}",
    }


def main() -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="calls to take medians over")
    parser.add_argument("--dry-run", action="store_true", help="small shapes, torch references, CPU, no CSV")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("gpu_kernels: no GPU here, nothing measured")
        return
    # A variable that forces the references would time those.
    os.environ["V4QUANT_KERNELS"] = "torch" if arguments.dry_run else "triton"
    clock = Clock("cpu" if arguments.dry_run else "cuda", arguments.rounds)
    limits = ceilings(clock, *((2**20, 64) if arguments.dry_run else (COPY_BYTES, MATRIX)))
    print(f"ceilings: copy {limits[0] / 1e9:.0f} GB/s, BF16 product {limits[1] / 1e12:.1f} TFLOP/s")
    rows: list[dict[str, str]] = []
    for sizes in (TINY,) if arguments.dry_run else (FLASH, PRO):
        for name in RUNS:
            for tokens in (1, 9) if arguments.dry_run else TOKENS:
                if found := measured(name, sizes, tokens, clock):
                    rows.append(row(name, sizes, tokens, *found, limits))
                    print(
                        "{model:<6}{op:<24}{tokens:>6} tokens {microseconds:>10} us {gb_per_s:>8} GB/s {of_copy:>6} of "
                        "copy {tflop_per_s:>8} TFLOP/s {of_matmul:>6} of product".format(**rows[-1])
                    )
    if not arguments.dry_run:
        common = {"gpu": torch.cuda.get_device_name(), "copy_gb_per_s": f"{limits[0] / 1e9:.0f}"}
        common |= {"matmul_tflop_per_s": f"{limits[1] / 1e12:.1f}", "rounds": str(arguments.rounds)}
        write_csv("gpu_kernels", rows, {**common, **environment("torch", "triton")})


if __name__ == "__main__":
    main()
