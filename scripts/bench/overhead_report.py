"""Table and plot of the overhead benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABELS = {
    "off": "no snapshots",
    "sparse": "sparse, every iteration",
    "transcript": "transcript alone",
    "sparse-transcript": "sparse and transcript",
    "sparse-undigested": "sparse without digests",
    "sparse-copy": "sparse, torch copy_",
    "dense-sync": "dense, torch copy_",
    "dense-side": "dense, side stream",
    "dcp": "dense, torch DCP async",
    "nvrx": "dense, NVRx local",
}


def print_table(result: dict[str, Any]) -> None:
    """The result for people."""
    machine, size = result["machine"], result["parameters"] / 1e6
    print(f"\n{result['model']}: {size:.1f} M parameters a rank, {result['processes']} ranks, {result['mode']} windows")
    print(f"{machine['device']}, {machine['cores']} cores ({machine['processor']}), torch {machine['torch']}")
    for name, one in result["variants"].items():
        low, high = one["quartiles"]
        print(
            f"  {name:26s} median {one['median']:8.4f} s, quartiles {low:.4f} to {high:.4f}, n={one['iterations']:2d}, "
            f"{100 * one['overhead']:+8.2f}%{pairs_of(one)}; busy {one['processor_median']:.3f} s; "
            f"peak {one['peak_device_mib']:.0f} MiB; costs 3% every {one['interval_at_3_percent']} iterations"
        )
    slots = result["slots"]
    if slots:
        print(
            f"  W={slots['window']}, slot of rank 0 {slots['slot_bytes'] / (1 << 20):.2f} MiB, failed slots "
            f"{slots['failed_slots']}; begin {1000 * slots['begin_seconds']:.2f} ms on the training thread; "
            f"planned with {slots['planned_with']}; {slots['calibration']}"
        )
        mib = {kind: slots[f"{kind}_bytes_taken"] / 2**20 for kind in ("shared", "host", "device")}
        print(
            f"  memory: {slots['memory_bytes'] / 2**20:.1f} MiB planned; taken {mib['shared']:.1f} shared and "
            f"{mib['host']:.1f} of its own, {mib['device']:.1f} on the device"
        )
    transcript = result["transcript"]
    if transcript:
        sent = ", ".join(f"{nbytes / 2**20:.2f}" for nbytes in transcript["bytes_by_rank"])
        room = f"{transcript['memory_bytes'] / 2**20:.1f} MiB a rank for {transcript['segments']} iterations"
        print(f"  transcript: {sent} MiB an iteration by rank; {room}")
    for name, one in result["variants"].items():
        if "transcript" in one:
            print(f"  {name}: {left_out(one['transcript'])}")
        if one.get("on_device"):
            kinds = ("busy_seconds", "idle_seconds", "awaited_seconds")
            busy, idle, read = (1000 * one["on_device"][kind] for kind in kinds)
            kernels = f"{one['on_device']['kernels']:.0f} kernels"
            print(f"  {name}: {kernels}, busy {busy:.1f} ms, idle {idle:.1f} ms, {read:.1f} ms of it for small copies")
        if "slot" in one:
            figures = ", ".join(f"{kind.removesuffix('_seconds')} {1000 * s:.2f} ms" for kind, s in one["slot"].items())
            print(f"  {name}: {figures}")


def pairs_of(one: dict[str, Any]) -> str:
    """Of the overhead between neighbouring blocks: median, its interval, smallest and largest."""
    pairs = one.get("overhead_of_block_pairs")
    if not pairs:
        return ""
    sure = one["overhead_interval_95"]
    interval = f"95% {100 * sure[0]:+.2f} to {100 * sure[1]:+.2f}" if sure else "too few for an interval"
    return (
        f" ({len(pairs)} block pairs: median {100 * one['overhead_median_of_pairs']:+.2f}%, {interval}; "
        f"all {100 * pairs[0]:+.2f} to {100 * pairs[-1]:+.2f})"
    )


def left_out(one: dict[str, Any]) -> str:
    """What of a variant's iterations is not in the transcript."""
    worst, reasons = max(one["left_out_by_rank"]), "".join(f": {reason}" for reason in one["reasons"])
    return f"{worst} of {one['iterations']} iterations are not in the transcript of some rank{reasons}"


def label(name: str, one: dict[str, Any]) -> str:
    """What a variant is called in the plot, and its overhead by pairs of blocks."""
    kind, _, switches = name.partition(":")
    lines = [LABELS[kind], *([switches] if switches else [])]
    if one.get("overhead_of_block_pairs"):
        sure = one["overhead_interval_95"]
        interval = f" ({100 * sure[0]:+.1f} to {100 * sure[1]:+.1f})" if sure else ""
        lines.append(f"{100 * one['overhead_median_of_pairs']:+.1f}%{interval}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Every counted iteration of all variants, with medians and quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    variants = result["variants"]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 1.1 * len(variants)), layout="constrained")
    for row, one in enumerate(variants.values()):
        milliseconds = [1000 * s for s in one["seconds"]]
        axes.barh(row, 1000 * (one["quartiles"][1] - one["quartiles"][0]), 0.6, 1000 * one["quartiles"][0], color="0.9")
        axes.scatter(milliseconds, [row + 0.04 * (i % 7 - 3) for i in range(len(milliseconds))], s=14, alpha=0.6)
        axes.plot([1000 * one["median"]] * 2, [row - 0.3, row + 0.3], color="black", linewidth=1.5)
    axes.set_yticks(range(len(variants)), [label(name, one) for name, one in variants.items()])
    axes.set_ylim(-0.6, len(variants) - 0.4)
    # One iteration that was held up would press all others together.
    most = 1000 * max(one["quartiles"][1] for one in variants.values())
    beyond = sum(1000 * s > 1.25 * most for one in variants.values() for s in one["seconds"])
    if beyond:
        axes.set_xlim(right=1.25 * most)
        axes.text(1, 0, f"{beyond} beyond", transform=axes.transAxes, ha="right", va="bottom", color="0.4")
    axes.set_xlabel("milliseconds an iteration (line: median, grey: middle half; %: beside blocks without it)")
    if max(one["median"] for one in variants.values()) > 5 * variants["off"]["median"]:
        axes.set_xscale("log")
    title = f"{result['model']} on {result['machine']['device']}"
    if result["slots"]:
        title += f": W={result['slots']['window']} {result['mode']}"
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
