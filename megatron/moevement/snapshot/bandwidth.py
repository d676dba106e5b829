"""Measures how fast this rank copies from its device to host memory, and chooses the chunks to do it in.

Small chunks let the small copies pass that the model itself waits for; large ones waste less of the link.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.moevement.operators.state import MemoryRange, TrainingState, full_pieces
from moevement_ext import CopyEngine, DeviceDigests, DigestPool, EngineError, HostRegion

MEASURE_BYTES_LIMIT = 256 << 20
DIGEST_MEASURE_BYTES = 128 << 20
REPEATS = 3
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Chunks:
    """Bytes of a chunk, and how many are handed to the device at a time."""

    nbytes: int
    in_flight: int


def measure_bandwidth(
    engine: CopyEngine,
    sources: Sequence[MemoryRange],
    directory: Path,
    rank: int,
    stream: int,
    candidates: Sequence[Chunks],
) -> dict[Chunks, float]:
    """Bytes per second by candidate, the median of three batches of up to 256 MiB of the training state itself.

    The engine keeps the last candidate's chunks.

    Args:
        engine: the copy engine, idle.
        sources: device ranges to copy.
        directory: where the slots will lie; a scratch file is made in it and removed.
        rank: keeps the scratch files of ranks apart.
        stream: the device stream that produces the sources.
        candidates: at least one.
    """
    chosen, total = list[MemoryRange](), 0
    for piece in sources:
        nbytes = min(piece.nbytes, MEASURE_BYTES_LIMIT - total)
        if nbytes:
            chosen.append(MemoryRange(piece.address, nbytes))
        total += nbytes
    if not total:
        return dict.fromkeys(candidates, float("inf"))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".bandwidth.rank{rank:05d}"
    path.unlink(missing_ok=True)
    region = HostRegion.create(str(path), total, prefault=True)
    registered = False
    rates = {}
    try:
        registered = engine.register_host(region.address, region.nbytes)
        addresses = np.array([p.address for p in chosen], dtype=np.uint64)
        sizes = np.array([p.nbytes for p in chosen], dtype=np.uint64)
        offsets = np.concatenate([np.zeros(1, np.uint64), np.cumsum(sizes)[:-1]]) + np.uint64(region.address)
        for candidate in candidates:
            engine.set_chunks(candidate.nbytes, candidate.in_flight)
            seconds = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                # Not hurried, as a slot isn't while an iteration runs.
                ticket = engine.submit(addresses, offsets, sizes, stream=stream, label="bandwidth probe")
                if not engine.wait(ticket, TIMEOUT_SECONDS):
                    engine.cancel(ticket)
                    raise EngineError(f"the bandwidth probe took longer than {TIMEOUT_SECONDS:g} s")
                seconds.append(time.perf_counter() - started)
            rates[candidate] = total / sorted(seconds)[REPEATS // 2]
    finally:
        if registered:
            engine.unregister_host(region.address)
        region.close()
        path.unlink(missing_ok=True)
    return rates


def measure_digests(pool: DigestPool | None, state: TrainingState, device: DeviceDigests | None = None) -> float:
    """Bytes per second that are digested when nothing else runs; where nothing is, there is no limit.

    Args:
        pool: digests slots in host memory.
        state: what `device` digests.
        device: digests slots on the device, in the pool's place.

    Raises:
        EngineError: the device can't, or takes too long.
    """
    if device is not None:
        return _measure_device_digests(device, state)
    if pool is None:
        return float("inf")
    memory = np.ones(DIGEST_MEASURE_BYTES, dtype=np.uint8)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        pool.digest(memory.ctypes.data, memory.nbytes)
        seconds.append(time.perf_counter() - started)
    return memory.nbytes / sorted(seconds)[REPEATS // 2]


def _measure_device_digests(digests: DeviceDigests, state: TrainingState) -> float:
    """Of all that slots hold in full, which is far more than a device's cache."""
    pieces = full_pieces(state)
    addresses = np.array([piece.address for piece in pieces], dtype=np.uint64)
    sizes = np.array([piece.nbytes for piece in pieces], dtype=np.uint64)
    seconds = []
    for _ in range(REPEATS):
        ticket = digests.submit(addresses, sizes, state.stream(), "the digest probe")
        if digests.wait(ticket, TIMEOUT_SECONDS) is None:
            digests.cancel(ticket)
            raise EngineError(f"the digest probe took longer than {TIMEOUT_SECONDS:g} s")
        seconds.append(digests.seconds(ticket))
    middle = sorted(seconds)[REPEATS // 2]
    return int(sizes.sum()) / middle if middle > 0 else float("inf")


def choose_chunks(rates: Mapping[Chunks, float], awaited_copies: int, copy_seconds: float) -> Chunks:
    """The candidate that costs an iteration least.

    A small copy waits for the chunk that is on the link, and no longer. That delay, of all of them together, and the
    share of the link that is wasted are weighed against each other as shares of the iteration.

    Args:
        rates: bytes per second by candidate.
        awaited_copies: small copies that the model waits for in an iteration.
        copy_seconds: of an iteration, before the optimizer step.
    """
    best = max(rates.values())

    def cost(chunks: Chunks) -> float:
        delay = awaited_copies * chunks.nbytes / rates[chunks] / copy_seconds if copy_seconds > 0 else 0.0
        return delay + (1 - rates[chunks] / best if best < float("inf") else 0.0)

    return min(rates, key=lambda chunks: (cost(chunks), chunks.nbytes, chunks.in_flight))
