"""How fast are the casts, in bytes read and written a second, against a large memcpy in the same run?

Every cast works on expert-sized matrices [2048, 4096], as many as make the working set several hundred MB, so that all
traffic is with main memory; two threads, one process, a matrix at a time, as `convert` does. Each round times the
memcpy (numpy.copyto, 1 GiB, halved between the same two threads) and then every cast; a row holds medians over rounds.
Rounding rows encode normally distributed weights, the others weights that lie on the target's grid.

    python benchmarks/casts.py [--rounds N]     writes benchmarks/results/casts.csv
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from _results import environment, write_csv

from v4quant.numerics.casts import bf16_to_fp4, bf16_to_fp8, fp4_to_bf16, fp4_to_fp8, fp8_to_bf16

ROWS, COLUMNS, MATRICES = 2048, 4096, 24
THREADS = 2
MEMCPY_BYTES = 2**30

Bytes = npt.NDArray[np.uint8]
Job = Callable[[int], object]


def matrices(dtype: type[np.generic], columns: int, rows: int = ROWS) -> npt.NDArray[np.generic]:
    """Memory for MATRICES matrices, touched so that no page fault is timed."""
    return np.ones((MATRICES, rows, columns), dtype)


def fill(target: npt.NDArray[np.generic], first: npt.NDArray[np.generic]) -> None:
    """Repeat one matrix in all of them."""
    target[...] = first


def jobs() -> dict[str, tuple[Job, int]]:
    """Name -> a function that casts matrix i, and the bytes that all matrices read and write."""
    random = np.random.default_rng(0)
    packed, scale4 = matrices(np.uint8, COLUMNS // 2), matrices(np.uint8, COLUMNS // 32)
    codes, scale8 = matrices(np.uint8, COLUMNS), matrices(np.uint8, COLUMNS // 128, ROWS // 128)
    from_fp4, from_fp8, normal = (matrices(np.uint16, COLUMNS) for _ in range(3))
    fill(packed, random.integers(0, 256, packed.shape[1:], np.uint8))
    fill(scale4, random.integers(113, 119, scale4.shape[1:], np.uint8))
    for i in range(MATRICES):
        fp4_to_bf16(packed[i], scale4[i], from_fp4[i])
    weights = random.standard_normal((ROWS, COLUMNS), np.float32) * np.float32(0.02)
    fill(normal, (weights.view(np.uint32) >> 16).astype(np.uint16))
    for i in range(MATRICES):
        bf16_to_fp8(normal[i], codes[i], scale8[i])
        fp8_to_bf16(codes[i], scale8[i], from_fp8[i])
    out16, out8, out4 = matrices(np.uint16, COLUMNS), matrices(np.uint8, COLUMNS), matrices(np.uint8, COLUMNS // 2)
    out_scale4, out_scale8 = np.ones_like(scale4), np.ones_like(scale8)
    fp4, fp8, bf16 = packed.nbytes + scale4.nbytes, codes.nbytes + scale8.nbytes, from_fp4.nbytes
    return {
        "fp4 -> bf16": (lambda i: fp4_to_bf16(packed[i], scale4[i], out16[i]), fp4 + bf16),
        "fp4 -> fp8": (lambda i: fp4_to_fp8(packed[i], scale4[i], out8[i], out_scale8[i]), fp4 + fp8),
        "fp8 -> bf16": (lambda i: fp8_to_bf16(codes[i], scale8[i], out16[i]), fp8 + bf16),
        "bf16 -> fp4": (lambda i: bf16_to_fp4(from_fp4[i], out4[i], out_scale4[i]), bf16 + fp4),
        "bf16 -> fp4, like": (lambda i: bf16_to_fp4(from_fp4[i], out4[i], out_scale4[i], scale4[i]), bf16 + fp4),
        "bf16 -> fp4, rounding": (lambda i: bf16_to_fp4(normal[i], out4[i], out_scale4[i]), bf16 + fp4),
        "bf16 -> fp8": (lambda i: bf16_to_fp8(from_fp8[i], out8[i], out_scale8[i]), bf16 + fp8),
        "bf16 -> fp8, like": (lambda i: bf16_to_fp8(from_fp8[i], out8[i], out_scale8[i], scale8[i]), bf16 + fp8),
        "bf16 -> fp8, rounding": (lambda i: bf16_to_fp8(normal[i], out8[i], out_scale8[i]), bf16 + fp8),
    }


def memcpy_job() -> Job:
    """Copy half i of a 1 GiB array."""
    source, target = np.ones(MEMCPY_BYTES, np.uint8), np.zeros(MEMCPY_BYTES, np.uint8)
    half = MEMCPY_BYTES // THREADS

    def copy(i: int) -> None:
        np.copyto(target[i * half : (i + 1) * half], source[i * half : (i + 1) * half])

    return copy


def rate(pool: ThreadPoolExecutor, job: Job, count: int, moved_bytes: int) -> float:
    """GB/s of one pass over all parts of a job."""
    start = time.perf_counter()
    list(pool.map(job, range(count)))
    return moved_bytes / (time.perf_counter() - start) / 1e9


def main() -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take medians over")
    rounds = parser.parse_args().rounds
    copy, casts = memcpy_job(), jobs()
    memcpy: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in casts}
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(rounds):
            memcpy.append(rate(pool, copy, THREADS, 2 * MEMCPY_BYTES))
            for name, (job, moved_bytes) in casts.items():
                rates[name].append(rate(pool, job, MATRICES, moved_bytes))
    baseline = statistics.median(memcpy)
    print(f"{'memcpy, 2 threads':<24}{baseline:6.1f} GB/s")
    rows: list[dict[str, object]] = []
    for name, measured in rates.items():
        speed = statistics.median(measured)
        print(f"{name:<24}{speed:6.1f} GB/s  {speed / baseline:5.2f} of memcpy")
        ratio = f"{speed / baseline:.3f}"
        rows.append({"cast": name, "gb_per_s": f"{speed:.2f}", "memcpy_gb_per_s": f"{baseline:.2f}", "ratio": ratio})
    common = {
        "threads": THREADS,
        "matrices": f"{MATRICES}x[{ROWS},{COLUMNS}]",
        "rounds": rounds,
        **environment("numpy", "numba"),
    }
    write_csv("casts", rows, common)


if __name__ == "__main__":
    main()
