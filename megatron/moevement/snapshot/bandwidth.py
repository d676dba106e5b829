"""Measures how fast this rank copies from its device to host memory, and chooses the chunks to do it in.

Small chunks let the small copies pass that the model itself waits for; large ones waste less of the link.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.moevement.errors import StoreError
from megatron.moevement.operators.state import MemoryRange, TrainingState, full_pieces
from moevement_ext import CopyEngine, DeviceDigests, DigestPool, EngineError, HostRegion

MEASURE_BYTES_LIMIT = 256 << 20
# In so many places of the state, of which each begins as aligned as memory is.
_EXTENTS = 32
_ALIGNMENT_BYTES = 256
DIGEST_MEASURE_BYTES = 128 << 20
REPEATS = 3
EQUAL_RATES = 0.05
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Chunks:
    """Bytes of a chunk, and how many are handed to the device at a time."""

    nbytes: int
    in_flight: int


class LinkProbe:
    """Copies up to 256 MiB of the training state to pinned scratch memory, which nobody reads.

    Args:
        engine: the copy engine.
        sources: device ranges to copy.
        directory: where the slots will lie; a scratch file is made in it, and removed by `close`.
        rank: keeps the scratch files of ranks apart.
        stream: the device stream that produces the sources.

    Raises:
        StoreError: there is no room in the directory.
    """

    def __init__(
        self, engine: CopyEngine, sources: Sequence[MemoryRange], directory: Path, rank: int, stream: int
    ) -> None:
        chosen = sample(sources, MEASURE_BYTES_LIMIT)
        self.nbytes = total = sum(piece.nbytes for piece in chosen)
        self._engine, self._stream = engine, stream
        self._ticket: int | None = None
        self._registered = False
        self._region: HostRegion | None = None
        if not total:
            return
        self._path = directory / f".bandwidth.rank{rank:05d}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._path.unlink(missing_ok=True)
            self._region = region = HostRegion.create(str(self._path), total, prefault=True)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._path.unlink()
            raise StoreError(
                f"--sparse-ckpt-dir {directory.parent}: no room for {total / (1 << 20):.1f} MiB to measure with: "
                f"{error.strerror}; choose another directory, make room or force --sparse-ckpt-window"
            ) from error
        try:
            self._registered = engine.register_host(region.address, region.nbytes)
        except BaseException:
            self.close()
            raise
        self._sources = np.array([p.address for p in chosen], dtype=np.uint64)
        self._sizes = np.array([p.nbytes for p in chosen], dtype=np.uint64)
        self._targets = np.cumsum(self._sizes) - self._sizes + np.uint64(region.address)

    def seconds(self) -> float:
        """Copies it once, with nothing else to do.

        Raises:
            EngineError: the copy failed or took too long.
        """
        started = time.perf_counter()
        # Not hurried, as a slot isn't while an iteration runs.
        ticket = self._submit(1)
        if not self._engine.wait(ticket, TIMEOUT_SECONDS):
            self._engine.cancel(ticket)
            raise EngineError(f"the bandwidth probe took longer than {TIMEOUT_SECONDS:g} s")
        return time.perf_counter() - started

    def start(self, times: int) -> None:
        """Begins to copy it so many times, while an iteration runs; what an interrupted one had begun ends."""
        if self._ticket is not None:
            self.stop()
        self._ticket = self._submit(times)

    def stop(self) -> float:
        """Ends what `start` began; bytes per second until then, 0 if nothing was copied."""
        assert self._ticket is not None
        ticket, self._ticket = self._ticket, None
        stats = self._engine.stats(ticket)
        self._engine.cancel(ticket)
        return stats.bytes / stats.copy_seconds if stats.copy_seconds > 0 else 0.0

    def close(self) -> None:
        """Frees the scratch memory; may be called again."""
        if self._ticket is not None:
            self.stop()
        if self._region is None:
            return
        if self._registered:
            self._engine.unregister_host(self._region.address)
        self._region.close()
        self._region = None
        self._path.unlink(missing_ok=True)

    def _submit(self, times: int) -> int:
        sources, targets, sizes = (np.tile(array, times) for array in (self._sources, self._targets, self._sizes))
        return self._engine.submit(sources, targets, sizes, stream=self._stream, label="bandwidth probe")


def sample(pieces: Sequence[MemoryRange], limit: int) -> list[MemoryRange]:
    """At most `limit` bytes of the pieces, from places that are evenly apart.

    Small pieces have the share of the bytes that they have in a slot: they are gathered by a kernel, which waits for
    its turn beside training, so that too many of them would make the link look slow.
    """
    total = sum(piece.nbytes for piece in pieces)
    if total <= limit:
        return [piece for piece in pieces if piece.nbytes]
    extent, chosen = max(1, limit // _EXTENTS), list[MemoryRange]()
    count = limit // extent
    places = iter([total * number // count for number in range(count)])
    place, left, passed = next(places), extent, 0
    for piece in pieces:
        taken = 0
        while place < passed + piece.nbytes:
            # An extent that comes to the end of its piece goes on in the next one.
            begin = max(taken, (place - passed) // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES if place > passed else 0)
            nbytes = min(left, piece.nbytes - begin)
            chosen.append(MemoryRange(piece.address + begin, nbytes))
            taken, left = begin + nbytes, left - nbytes
            if left:
                place = passed + piece.nbytes
            else:
                place, left = next(places, total), extent
        passed += piece.nbytes
    return chosen


def measure_bandwidth(probe: LinkProbe, engine: CopyEngine, candidates: Sequence[Chunks]) -> dict[Chunks, float]:
    """Bytes per second by candidate, the median of three copies with nothing else to do.

    The engine, which is idle, keeps the last candidate's chunks.
    """
    if not probe.nbytes:
        return dict.fromkeys(candidates, float("inf"))
    rates = {}
    for candidate in candidates:
        engine.set_chunks(candidate.nbytes, candidate.in_flight)
        seconds = sorted(probe.seconds() for _ in range(REPEATS))
        rates[candidate] = probe.nbytes / seconds[REPEATS // 2]
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
    share of the link that is wasted are weighed against each other as shares of the iteration. Rates within 5% of the
    best count as equal to it: so much they vary from one measurement to the next.

    Args:
        rates: bytes per second by candidate.
        awaited_copies: small copies that the model waits for in an iteration.
        copy_seconds: of an iteration, before the optimizer step.
    """
    best = max(rates.values())

    def cost(chunks: Chunks) -> float:
        delay = awaited_copies * chunks.nbytes / rates[chunks] / copy_seconds if copy_seconds > 0 else 0.0
        return delay + (max(0.0, 1 - EQUAL_RATES - rates[chunks] / best) if best < float("inf") else 0.0)

    return min(rates, key=lambda chunks: (cost(chunks), chunks.nbytes, chunks.in_flight))
