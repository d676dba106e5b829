"""Measures how fast this rank copies from its device to host memory, with the engine and memory that slots use."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.moevement.operators.state import MemoryRange
from moevement_ext import CopyEngine, HostRegion

MEASURE_BYTES_LIMIT = 256 << 20
REPEATS = 3


def measure_bandwidth(
    engine: CopyEngine, sources: Sequence[MemoryRange], directory: Path, rank: int, stream: int
) -> float:
    """Bytes per second, the median of three batches of up to 256 MiB of the training state itself.

    Args:
        engine: the copy engine.
        sources: device ranges to copy.
        directory: where the slots will lie; a scratch file is made in it and removed.
        rank: keeps the scratch files of ranks apart.
        stream: the device stream that produces the sources.
    """
    chosen, total = list[MemoryRange](), 0
    for piece in sources:
        nbytes = min(piece.nbytes, MEASURE_BYTES_LIMIT - total)
        if nbytes:
            chosen.append(MemoryRange(piece.address, nbytes))
        total += nbytes
    if not total:
        return float("inf")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".bandwidth.rank{rank:05d}"
    path.unlink(missing_ok=True)
    region = HostRegion.create(str(path), total, prefault=True)
    registered = False
    try:
        registered = engine.register_host(region.address, region.nbytes)
        addresses = np.array([p.address for p in chosen], dtype=np.uint64)
        sizes = np.array([p.nbytes for p in chosen], dtype=np.uint64)
        offsets = np.concatenate([np.zeros(1, np.uint64), np.cumsum(sizes)[:-1]]) + np.uint64(region.address)
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            engine.copy_now(addresses, offsets, sizes, stream=stream, label="bandwidth probe")
            seconds.append(time.perf_counter() - started)
    finally:
        if registered:
            engine.unregister_host(region.address)
        region.close()
        path.unlink(missing_ok=True)
    return total / sorted(seconds)[REPEATS // 2]
