"""Where an iteration's time goes on a GPU: kernels that got slower, or gaps between them that got longer.

Snapshots can slow training in two ways: what it computes takes longer (the clock, the memory), or the device waits
longer for what it is to compute (launches, small copies that the host awaits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

# What a slot needs of the device, by the names of kernels and copies; all else is training's.
OF_SLOTS = ("digest_leaves", "move_pieces", "Memcpy DtoH")
# A copy to the host that takes no longer is one that training waits for.
READ_BACK_US = 10.0


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def awaited(spans: Iterable[tuple[float, float, bool]]) -> float:
    """How long nothing ran before copies that training waits for; spans: begin, end, whether it is such a copy."""
    total, reached = 0.0, float("inf")
    for begin, end, read_back in sorted(spans):
        total += max(0.0, begin - reached) if read_back else 0.0
        reached = end if reached == float("inf") else max(reached, end)
    return total


def idle_before(spans: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """How long nothing ran before kernels of each name; spans: begin, end, name."""
    found, reached = dict[str, float](), float("inf")
    for begin, end, name in sorted(spans):
        if begin > reached:
            found[name] = found.get(name, 0.0) + begin - reached
        reached = end if reached == float("inf") else max(reached, end)
    return found


def profiled(run: Callable[[], object], iterations: int) -> dict[str, Any]:
    """Runs `iterations` under torch's profiler, and tells seconds of an iteration on the device.

    `busy_seconds`: at least one kernel of training runs. `kernel_seconds`: their sum. `idle_seconds`: none runs.
    `awaited_seconds`: none runs, and a small copy to the host comes next, which waits until the link is free.
    `idle_before`: the twenty kinds of kernels that nothing ran before for the longest, with those seconds.
    `longest`: the forty kinds of kernels that take most, with how many there are and their seconds.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if str(event.device_type).endswith("CUDA")]
    spans, named, kinds = [], [], dict[str, tuple[float, float]]()
    read_backs = []
    for event in events:
        if "Memcpy DtoH" in event.name and event.time_range.elapsed_us() <= READ_BACK_US:
            read_backs.append((event.time_range.start, event.time_range.end, True))
        if not any(name in event.name for name in OF_SLOTS):
            spans.append((event.time_range.start, event.time_range.end))
            named.append((event.time_range.start, event.time_range.end, event.name[:400]))
            # Long names differ behind their beginning as well.
            count, taken = kinds.get(event.name, (0.0, 0.0))
            kinds[event.name] = count + 1 / iterations, taken + event.time_range.elapsed_us() * 1e-6 / iterations
    if not spans:
        return {}
    whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
    busy, scale = covered(spans), 1e-6 / iterations
    return {
        "kernels": len(spans) / iterations,
        "busy_seconds": busy * scale,
        "kernel_seconds": sum(end - begin for begin, end in spans) * scale,
        "idle_seconds": (whole - busy) * scale,
        "awaited_seconds": awaited(read_backs + [(*span, False) for span in spans]) * scale,
        "idle_before": {
            name: seconds * scale
            for name, seconds in sorted(idle_before(named).items(), key=lambda item: -item[1])[:20]
        },
        "longest": {name[:400]: numbers for name, numbers in sorted(kinds.items(), key=lambda item: -item[1][1])[:40]},
    }
