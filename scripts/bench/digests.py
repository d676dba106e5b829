"""The digests' part of the copy engine's benchmark: threads on host memory, the kernel on device memory."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

from moevement_ext import CopyEngine, DeviceDigests, DigestPool

THREADS = (1, 2, 4, 8, 16)
BLOCKS = (8, 16, 32, 64, 132, 264)
TIMEOUT_SECONDS = 120.0


def timed(action: Callable[[], object], rounds: int) -> float:
    """The median seconds of an action, the first time not counted."""
    action()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def thread_rates(address: int, nbytes: int, rounds: int) -> dict[int, float]:
    """Bytes a second that threads digest in host memory, by their number."""
    rates = {}
    for threads in THREADS:
        with DigestPool(threads) as pool:
            rates[threads] = nbytes / timed(functools.partial(pool.digest, address, nbytes), rounds)
    return rates


def device_rates(
    device: Literal["cpu", "cuda"], engine: CopyEngine, batch: tuple[Any, Any, Any], rounds: int
) -> list[dict[str, float]]:
    """Digests on the device by number of blocks: bytes a second, seconds, and what a copy beside them loses.

    The digests must be those of the copied bytes on the host; anything else ends the benchmark.

    Args:
        device: where the sources lie.
        engine: copies beside the digests.
        batch: sources, destinations and sizes.
        rounds: of each kind, of which the median counts.
    """
    sources, destinations, sizes = batch
    nbytes, found = int(sizes.sum()), []
    with DeviceDigests(device, ranges_limit=len(sizes), bytes_limit=nbytes) as digests, DigestPool(4) as pool:
        engine.copy_now(sources, destinations, sizes)
        wanted = pool.wait(pool.submit(destinations, sizes), TIMEOUT_SECONDS)

        def digest() -> float:
            ticket = digests.submit(sources, sizes)
            if digests.wait(ticket, TIMEOUT_SECONDS) != wanted:
                raise RuntimeError("the device's digests are not those of the copied bytes")
            return digests.seconds(ticket)

        def copy(beside: bool) -> tuple[float, int]:
            started, count = time.perf_counter(), 0
            ticket = engine.submit(sources, destinations, sizes)
            while beside and not engine.done(ticket):
                digest()
                count += 1
            engine.wait(ticket, TIMEOUT_SECONDS)
            return time.perf_counter() - started, count

        for blocks in BLOCKS:
            digests.set_blocks(blocks)
            call = timed(digest, rounds)
            seconds = statistics.median(digest() for _ in range(rounds))
            beside = [copy(beside=True) for _ in range(rounds)]
            found.append(
                {
                    "blocks": blocks,
                    "rate": nbytes / seconds if seconds else 0.0,
                    "seconds": seconds,
                    "call_seconds": call,
                    "copy_seconds_alone": statistics.median(copy(beside=False)[0] for _ in range(rounds)),
                    "copy_seconds_beside": statistics.median(seconds for seconds, _ in beside),
                    "digests_beside_a_copy": statistics.median(count for _, count in beside),
                }
            )
    return found


def print_rates(result: dict[str, Any]) -> None:
    """The result for people."""
    threads = ", ".join(f"{count} threads {rate / 1e9:.1f} GB/s" for count, rate in result["rate_by_threads"].items())
    print(f"digests: {threads}")
    print(f"device reads {result['device_read_rate'] / 1e9:.0f} GB/s; its digests:")
    for one in result["device"]:
        times = {name: f"{1000 * value:.2f} ms" for name, value in one.items() if name.endswith("seconds")}
        copies = [f"{1000 * one[f'copy_seconds_{kind}']:.1f} ms" for kind in ("alone", "beside")]
        print(
            f"  {one['blocks']:4.0f} blocks {one['rate'] / 1e9:7.1f} GB/s, {times['seconds']} on the device, "
            f"{times['call_seconds']} for the caller; a copy takes {copies[0]} alone, {copies[1]} beside "
            f"{one['digests_beside_a_copy']:.0f} digests"
        )
