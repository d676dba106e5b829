"""Events as the manager emits them, made up."""

from typing import Any

Event = dict[str, Any]
GROUPS = [
    ["layer000.expert000", "layer000.expert001", "layer001.expert000"],
    ["layer000.expert002", "layer000.expert003"],
    ["layer001.expert001", "layer000.router", "layer001.router"],
    ["layer000.non_expert", "layer001.non_expert", "embedding"],
]


def event(kind: str, time: float, rank: int = 0, **values: Any) -> Event:
    return {"time": time, "rank": rank, "kind": kind, **values}


def iteration(number: int, time: float, rank: int = 0, seconds: float = 1.0, **values: Any) -> Event:
    figures: Event = {
        "iteration": number,
        "loss": 5.0 - 0.1 * number,
        "grad_norm": 1.0 + 0.25 * number,
        "skipped": False,
        "learning_rate": 1e-3,
        "seconds": seconds,
        "slot_bytes": 3 << 20,
        "stall_seconds": 0.0125,
        "oldest_age_steps": 3,
        "oldest_operator": "layer000.router",
        "window": 4,
        "window_index": number % 4,
        "loadable_step": number - 2,
        "memory_used_bytes": 5 << 20,
        "memory_limit_bytes": 10 << 20,
        "failed_slots": 0,
    }
    return event("iteration", time, rank, **{**figures, **values})


def start(time: float, run: list[int] | None = None, dense_step: int | None = None, rank: int = 0) -> Event:
    return event("start", time, rank, run=run, dense_step=dense_step, reasons=[])


def life(first: int, last: int, time: float, rank: int = 0) -> list[Event]:
    """Iterations `first` to `last` - 1, one a second from `time` on, each with its slot."""
    events = []
    for number in range(first, last):
        begun = time + number - first
        events.append(iteration(number, begun + 1, rank, fence_started_time=begun + 0.8))
        events.append(
            event(
                "slot",
                begun + 1.3,
                rank,
                step=number,
                data_bytes=3 << 20,
                digest_seconds=0.25,
                copy_started_time=begun + 0.05,
                copy_seconds=0.5,
            )
        )
    return sorted(events, key=lambda e: float(e["time"]))


def disturbed_run(rank: int = 0) -> list[Event]:
    """A run of 16 iterations: killed after 2, after 9, in the recovery, and gone on to the end."""

    def recovery(time: float, replays: int) -> list[Event]:
        events = [start(time, [4, 7], rank=rank)]
        events.append(event("recovery_started", time, rank, first=4, last=7, replays=3))
        for n in range(replays):
            figures = {"step": 4 + n, "loaded_full": 3, "frozen": 9 - 3 * n, "replayed": True, "seconds": 1.0}
            events.append(event("conversion", time + 1 + n, rank, **figures))
        return events

    events = [start(100.0, rank=rank), event("plan", 100.0, rank, window=4, memory_bytes=10 << 20, groups=GROUPS)]
    events += life(0, 2, 100.0, rank)
    events += [start(110.0, rank=rank), *life(0, 9, 110.0, rank)]
    events += recovery(130.0, 1)
    events += recovery(140.0, 3)
    done = {"step": 7, "replays": 3, "compared": 12, "different": 0, "seconds": 4.0}
    events.append(event("recovery_finished", 144.0, rank, **done))
    return [*events, *life(7, 16, 144.0, rank), event("finished", 160.0, rank, kept=False)]
