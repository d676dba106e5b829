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
        "replayed": False,
        "interrupted": False,
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
        events.append(event("recovery_started", time, rank, first=4, last=7, replays=3, source="own host memory"))
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


def phase(name: str, time: float, rank: int, done: int = 0, of: int = 0, **values: Any) -> Event:
    return event("recovery_phase", time, rank, phase=name, done=done, of=of, **values)


def _advance(name: str, times: list[float], rank: int, first: int, of: int) -> list[Event]:
    return [
        phase(name, time, rank, done, of, iteration=first + done - 1, seconds=0.5)
        for done, time in enumerate(times, start=1)
    ]


def _decided(time: float, rank: int, generation: int, scope: list[int], feeders: list[int]) -> Event:
    segment = {"stages": scope, "run": [1, 4], "feeders": feeders}
    facts = {"source": "local", "target": 5, "scope": scope, "segments": [segment], "replaced": scope}
    return event("decision", time, rank, generation=generation, roll_forward=[], reasons=[], **facts)


def _resumed(rank: int, replayed: int) -> list[Event]:
    seconds = {"leave": 0.1, "join": 2.5, "convert": 3.5, "catch_up": 0.9, "serve": 3.6}
    facts = {"step": 5, "source": "local", "scope": [1, 2], "replayed": replayed, "seconds": 7.7}
    return [
        event("resumed", 113.2, rank, generation=2, phase_seconds=seconds, longest_phase_seconds=seconds, **facts),
        phase("train", 113.21, rank),
    ]


LOCAL_KILLS = ((1, 105.4, False), (2, 108.2, True))


def local_run() -> list[Event]:
    """Three ranks of three stages: rank 1 is killed in iteration 6, and rank 2 while rank 1's stage replays."""
    events: list[Event] = []
    for rank in range(3):
        events += [
            event("process", 99.0, rank, pid=1000 + rank, replacement=False, stage=rank),
            start(100.0, rank=rank),
        ]
        events += life(0, 5, 100.0, rank)
        events += _resumed(rank, 5)
        events += life(5, 9, 114.0, rank)
    for rank in (0, 2):
        events += [event("failure_noticed", 105.5 + rank / 100, rank, step=5, reason="closed")]
        events += [phase("leave", 105.51 + rank / 100, rank), phase("join", 105.6, rank)]
        events += [
            phase("agree", 107.2, rank),
            _decided(107.3, rank, 1, [1], [0, 2]),
            phase("serve", 107.4, rank, of=4),
        ]
        events += _advance("serve", [107.9], rank, 1, 4)
    events += [event("process", 107.0, 1, pid=2001, replacement=True, stage=1), phase("join", 107.0, 1)]
    events += [phase("agree", 107.2, 1), _decided(107.3, 1, 1, [1], [0, 2]), phase("load", 107.4, 1)]
    events += [phase("convert", 107.5, 1, of=3), *_advance("convert", [108.0], 1, 1, 3)]
    for rank in (0, 1):
        events += [event("failure_noticed", 108.3 + rank / 100, rank, step=5, reason="closed")]
        events += [phase("leave", 108.32, rank), phase("join", 108.4, rank)]
    events += [event("process", 109.0, 2, pid=3002, replacement=True, stage=2), phase("join", 109.0, 2)]
    for rank in range(3):
        events += [phase("agree", 109.2, rank), _decided(109.3, rank, 2, [1, 2], [0])]
    events += [phase("serve", 109.4, 0, of=4), *_advance("serve", [110.0, 111.0, 112.0, 112.9], 0, 1, 4)]
    for rank in (1, 2):
        events += [phase("load", 109.4, rank), phase("convert", 109.5, rank, of=3)]
        events += _advance("convert", [110.0, 111.0, 112.0], rank, 1, 3)
        events += [phase("catch_up", 112.2, rank, of=1), *_advance("catch_up", [113.0], rank, 4, 1)]
        events.append(iteration(4, 113.0, rank, replayed=True))
    events += [phase("meet", 113.1, rank) for rank in range(3)]
    return sorted(events, key=lambda e: float(e["time"]))
