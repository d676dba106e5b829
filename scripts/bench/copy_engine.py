"""What the copy engine gets out of the link between host and device, and what others on that link feel of it.

    python scripts/bench/copy_engine.py                    on the GPU; --device cpu tries the benchmark itself

Four parts, all in one process. Bandwidth against chunk size and chunks in flight, both directions. Bandwidth against
the size of the pieces, gathered and copied one by one. The delay of a small copy to the host, as a training step awaits
them, beside a bulk copy. The rate of digests: by number of threads; on the device by number of blocks, alone and beside
a bulk copy; and the rate at which the device reads the same bytes, the most that it could reach. Beside every figure of
bandwidth stands that of one pinned copy by the CUDA runtime measured just before it. Writes `<output>.json` and
`<output>.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from moevement_ext import CopyEngine, HostRegion
from scripts.bench import digests

KIB, MIB = 1 << 10, 1 << 20
CHUNKS_KIB = (512, 1024, 2048, 4096, 8192, 16384)
FLIGHTS = (1, 2, 3, 4)
STREAMS = (1, 2, 3)
PIECES_KIB = (4, 16, 64, 256, 1024, 4096)
DIRECTIONS = ("to_host", "to_device")
SMALL_COPIES = 40
DIGESTED_PIECE_KIB = 64
# What the plot shows of (streams, in flight), and how.
LINES = {(1, 1): "C0-", (1, 2): "C1--", (1, 4): "C2--", (2, 2): "C3-", (2, 4): "C4-", (3, 3): "C5-"}
# Between pieces on the device, so that no two can be joined to one copy.
GAP_BYTES = 256
TIMEOUT_SECONDS = 120.0
Words = np.ndarray[Any, Any]


def main() -> int:
    """Run all parts, write the results and print a table."""
    options = parse()
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with Bench(options) as bench:
        result = {
            "command": " ".join(["python scripts/bench/copy_engine.py", *sys.argv[1:]]).replace(
                options.output, output.name
            ),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
            "cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "bytes": bench.nbytes,
            "rounds": options.rounds,
            "limit": bench.limits(),
            "chunks": bench.chunks(),
            "pieces": bench.pieces(),
            "small_copies": bench.small_copies(),
            "digests": bench.digests(),
        }
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, output.with_suffix(".png"))
    print_table(result)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--mib", type=int, default=1024, help="MiB of one copy")
    parser.add_argument("--rounds", type=int, default=7, help="copies of each kind, of which the median counts")
    parser.add_argument("--output", default="runs/copy_engine", help="path of the results without ending")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU; --device cpu tries the benchmark itself")
    if options.mib < 16 or options.rounds < 1:
        parser.error("--mib must be at least 16 and --rounds at least 1")
    return options


class Bench:
    """Device memory, pinned shared memory as slots have it, and memory that the CUDA runtime pinned."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.nbytes: int = options.mib * MIB
        self._on_gpu, self._rounds, self._kind = options.device == "cuda", options.rounds, options.device
        spread = self.nbytes + self.nbytes // (min(PIECES_KIB) * KIB) * GAP_BYTES
        self._device = torch.randint(0, 256, (spread,), dtype=torch.uint8, device=options.device)
        self._pinned = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        self._path = f"/dev/shm/moevement-bench-{uuid.uuid4().hex[:12]}"
        self._region = HostRegion.create(self._path, self.nbytes, prefault=True)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._region.close()
        Path(self._path).unlink()

    @contextlib.contextmanager
    def _engine(self, **limits: Any) -> Iterator[CopyEngine]:
        with CopyEngine("cuda" if self._on_gpu else "cpu", **limits) as engine:
            engine.register_host(self._region.address, self._region.nbytes)
            yield engine

    def _plain(self, direction: str) -> float:
        """Bytes a second of one copy by torch between the device and memory that is pinned."""
        device, host = self._device[: self.nbytes], self._pinned
        target, source = (host, device) if direction == "to_host" else (device, host)
        self._synchronize()
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        self._synchronize()
        return self.nbytes / (time.perf_counter() - started)

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _batch(self, piece: int, direction: str) -> tuple[Words, Words, Words]:
        """Pieces that lie apart on the device and close together on the host, as those of a slot do."""
        count = self.nbytes // piece
        index = np.arange(count, dtype=np.uint64)
        device = index * np.uint64(piece + (GAP_BYTES if count > 1 else 0)) + np.uint64(self._device.data_ptr())
        host = index * np.uint64(piece) + np.uint64(self._region.address)
        sizes = np.full(count, piece, dtype=np.uint64)
        return (device, host, sizes) if direction == "to_host" else (host, device, sizes)

    def _rate(self, engine: CopyEngine, piece: int, direction: str, hurried: bool) -> dict[str, float]:
        """Bytes a second by the engine, and as a share of the pinned copies measured in between.

        Tickets that are hurried, because somebody waits for them, have twice the chunks in flight.
        """
        sources, destinations, sizes = self._batch(piece, direction)
        rates, shares = [], []
        for _ in range(1 + self._rounds):
            limit = self._plain(direction)
            started = time.perf_counter()
            ticket = engine.submit(sources, destinations, sizes)
            if hurried:
                engine.hurry(ticket)
            engine.wait(ticket, TIMEOUT_SECONDS)
            rates.append(int(sizes.sum()) / (time.perf_counter() - started))
            shares.append(rates[-1] / limit)
        rates, shares = rates[1:], shares[1:]
        return {
            "rate": statistics.median(rates),
            "share": statistics.median(shares),
            "share_least": min(shares),
            "share_most": max(shares),
        }

    def limits(self) -> dict[str, float]:
        """The pinned copy alone, by direction."""
        return {d: statistics.median(self._plain(d) for _ in range(self._rounds + 2)) for d in DIRECTIONS}

    def chunks(self) -> list[dict[str, Any]]:
        """Bulk copies, by chunk size and chunks in flight."""
        found = []
        for streams in STREAMS:
            with self._engine(max_chunk_bytes=max(CHUNKS_KIB) * KIB, copy_streams=streams) as engine:
                for flight, chunk in itertools.product(FLIGHTS, CHUNKS_KIB):
                    engine.set_chunks(chunk * KIB, flight)
                    for direction in DIRECTIONS:
                        kind = {"chunk_kib": chunk, "in_flight": flight, "streams": streams, "direction": direction}
                        found.append(kind | self._rate(engine, self.nbytes, direction, hurried=False))
        return found

    def pieces(self) -> list[dict[str, Any]]:
        """Copies of many pieces, by their size, with the engine's own limits."""
        found = []
        for gathered in (True, False):
            with self._engine(**({} if gathered else {"gather_bytes_limit": 0})) as engine:
                for piece in PIECES_KIB:
                    for direction in DIRECTIONS:
                        kind = {"piece_kib": piece, "gathered": gathered, "direction": direction}
                        found.append(kind | self._rate(engine, piece * KIB, direction, hurried=True))
        return found

    def small_copies(self) -> list[dict[str, Any]]:
        """Microseconds of a 4-byte copy to the host on a stream of its own, alone and beside a bulk copy."""
        if not self._on_gpu:
            return []
        new_stream: Any = torch.cuda.Stream
        stream, target = new_stream(), torch.empty(4, dtype=torch.uint8, pin_memory=True)

        def read_back() -> float:
            started = time.perf_counter()
            with torch.cuda.stream(stream):
                target.copy_(self._device[:4], non_blocking=True)
            stream.synchronize()
            return 1e6 * (time.perf_counter() - started)

        found = [{"chunk_kib": 0, "in_flight": 0, "streams": 0} | microseconds([read_back() for _ in range(200)])]
        sources, destinations, sizes = self._batch(self.nbytes, "to_host")
        for streams in STREAMS:
            with self._engine(max_chunk_bytes=max(CHUNKS_KIB) * KIB, copy_streams=streams) as engine:
                for flight, chunk in itertools.product(FLIGHTS, CHUNKS_KIB):
                    engine.set_chunks(chunk * KIB, flight)
                    times: list[float] = []
                    while len(times) < SMALL_COPIES:
                        ticket = engine.submit(sources, destinations, sizes)
                        while engine.stats(ticket).bytes == 0:
                            pass
                        while engine.stats(ticket).bytes < 0.9 * self.nbytes and len(times) < SMALL_COPIES:
                            times.append(read_back())
                        engine.wait(ticket, TIMEOUT_SECONDS)
                    found.append({"chunk_kib": chunk, "in_flight": flight, "streams": streams} | microseconds(times))
        return found

    def digests(self) -> dict[str, Any]:
        """Digests of host memory by threads and of device memory, in bytes a second, and what reading alone reaches."""
        rates = digests.thread_rates(self._region.address, self.nbytes, self._rounds)
        words = self._device[: self.nbytes].view(torch.int64)

        def read() -> None:
            words.sum()
            self._synchronize()

        reads = self.nbytes / digests.timed(read, self._rounds)
        with self._engine() as engine:
            batch = self._batch(DIGESTED_PIECE_KIB * KIB, "to_host")
            found = digests.device_rates(self._kind, engine, batch, self._rounds)
        return {"rate_by_threads": rates, "device_read_rate": reads, "device": found}


def microseconds(times: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    ordered = sorted(times)
    return {"median_us": statistics.median(ordered), "p95_us": ordered[int(0.95 * len(ordered))], "copies": len(times)}


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    limit = {d: result["limit"][d] / 1e9 for d in DIRECTIONS}
    print(
        f"\n{result['device']}, {result['cores']} cores, torch {result['torch']}: {result['bytes'] // MIB} MiB a copy"
    )
    print(f"pinned copy: {limit['to_host']:.2f} GB/s to the host, {limit['to_device']:.2f} GB/s to the device")
    small = {(s["streams"], s["in_flight"], s["chunk_kib"]): s for s in result["small_copies"]}
    if small:
        print(f"small copy alone: {small[0, 0, 0]['median_us']:.0f} us, p95 {small[0, 0, 0]['p95_us']:.0f}")
    print(
        "streams, in flight, KiB a chunk: share of the pinned copy, both ways; small copy beside it, median and p95 us"
    )
    share = {(c["streams"], c["in_flight"], c["chunk_kib"], c["direction"]): c["share"] for c in result["chunks"]}
    for key in itertools.product(STREAMS, FLIGHTS, CHUNKS_KIB):
        ways = " ".join(f"{100 * share[(*key, direction)]:6.1f}%" for direction in DIRECTIONS)
        delay = f"{small[key]['median_us']:7.0f} {small[key]['p95_us']:7.0f}" if key in small else ""
        print(f"  {key[0]} {key[1]} {key[2]:6d}  {ways}  {delay}")
    for one in result["pieces"]:
        how = "gathered" if one["gathered"] else "one by one"
        print(
            f"  pieces of {one['piece_kib']:5d} KiB {how:10s} {one['direction']:9s} {one['rate'] / 1e9:6.2f} GB/s, "
            f"{100 * one['share']:5.1f}% ({100 * one['share_least']:.1f} to {100 * one['share_most']:.1f})"
        )
    digests.print_rates(result["digests"])


def plot(result: dict[str, Any], path: Path) -> None:
    """Bandwidth by chunk size, by piece size; delay of small copies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    kinds = {"share": (axes[0][0], result["chunks"]), "median_us": (axes[0][1], result["small_copies"])}
    for field, (ax, rows) in kinds.items():
        for (streams, flight), style in LINES.items():
            line = [r for r in rows if (r["streams"], r["in_flight"]) == (streams, flight)]
            line = [r for r in line if r.get("direction", "to_host") == "to_host"]
            values = [(100 if field == "share" else 1) * r[field] for r in line]
            label = f"{streams} stream{'s' if streams > 1 else ''}, {flight} in flight"
            ax.plot([r["chunk_kib"] / 1024 for r in line], values, style, marker="o", ms=3, label=label)
        ax.set_xlabel("MiB a chunk")
    axes[0][0].axhline(95, color="0.5", linestyle=":", linewidth=1)
    axes[0][0].set_ylabel("% of the pinned copy (dotted: 95%)")
    axes[0][0].set_title(f"to the host: 100% is {result['limit']['to_host'] / 1e9:.1f} GB/s", loc="left")
    if result["small_copies"]:
        alone = result["small_copies"][0]["median_us"]
        axes[0][1].axhline(alone, color="0.5", linestyle=":", linewidth=1)
        axes[0][1].set_title("4 bytes to the host beside a bulk copy", loc="left")
        axes[0][1].set_yscale("log")
        axes[0][1].set_ylabel(f"median microseconds (dotted: alone, {alone:.0f})")
    for gathered, style in ((True, "-"), (False, "--")):
        for direction, colour in zip(DIRECTIONS, ("tab:blue", "tab:orange"), strict=True):
            line = [p for p in result["pieces"] if p["gathered"] == gathered and p["direction"] == direction]
            label = f"{direction.replace('_', ' ')}, {'gathered' if gathered else 'one by one'}"
            sizes = [p["piece_kib"] for p in line]
            axes[1][0].plot(sizes, [100 * p["share"] for p in line], style, color=colour, marker="o", ms=3, label=label)
    axes[1][0].axhline(90, color="0.5", linestyle=":", linewidth=1)
    axes[1][0].set_xlabel("KiB a piece")
    axes[1][0].set_ylabel("% of the pinned copy (dotted: 90%)")
    axes[1][0].set_title("pieces that lie apart on the device", loc="left")
    rates = result["digests"]["rate_by_threads"]
    axes[1][1].plot(list(map(int, rates)), [rate / 1e9 for rate in rates.values()], marker="o", ms=3)
    axes[1][1].axhline(result["limit"]["to_host"] / 1e9, color="0.5", linestyle=":", linewidth=1)
    axes[1][1].set_xlabel("threads")
    axes[1][1].set_ylabel("GB/s (dotted: the link)")
    axes[1][1].set_title("digests of host memory", loc="left")
    for ax in axes.flat:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Copy engine on {result['device']}", x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
