"""From the notes of recovery_worker.py to figures: seconds per phase, iterations replayed, processor seconds.

Pure functions of the notes. A phase ends when the last rank that takes part in it is through; together the phases are
the time from the kill until every rank begins the interrupted iteration again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Mark = dict[str, Any]

PHASES = {
    "noticed": "failure noticed",
    "left": "survivors left their groups",
    "started": "processes started",
    "joined": "groups joined",
    "built": "job built",
    "agreed": "agreed",
    "loaded": "slots converted / checkpoint loaded",
    "replayed": "caught up / run again",
    "met": "all ranks met",
}
# The iterations between checkpoints that the paper's baselines choose for its 3-stage model (GPT-MoE, table 3).
PAPER_INTERVALS = {"Gemini, MTBF 10 min": 22, "Gemini, MTBF 1 h": 49, "CheckFreq": 78}
# The paper's example: 3 stages, 6 micro-batches; 20 slots of time instead of 26.
PAPER_GAIN = 1 - 20 / 26
WARM_UP_ITERATIONS = 5


def read(folder: Path) -> list[Mark]:
    """The notes of all ranks in the order of their times."""
    lines = [line for path in folder.glob("rank*.jsonl") for line in path.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda mark: float(mark["time"]))


def figures(marks: Sequence[Mark], ranks_of_a_stage: int, under_agent: bool, micro_batches: int) -> dict[str, Any]:
    """Every recovery, their means, and what an iteration takes without failures."""
    recoveries = [recovery(marks, kill, ranks_of_a_stage, under_agent) for kill in marks if kill["kind"] == "kill"]
    mean = {name: statistics.mean(one["phases"][name] for one in recoveries) for name in PHASES}
    return {
        "recoveries": recoveries,
        "mean_phases": mean,
        "mean_seconds": sum(mean.values()),
        "training": training(marks, ranks_of_a_stage, micro_batches),
    }


def recovery(marks: Sequence[Mark], kill: Mark, ranks_of_a_stage: int, under_agent: bool) -> dict[str, Any]:
    """The figures of one kill."""
    target, ranks = kill["iteration"], sorted({mark["rank"] for mark in marks})
    after = [mark for mark in marks if mark["time"] > kill["time"]]
    again: dict[int, Mark] = {}
    for mark in after:
        if mark["kind"] == "begins" and mark["iteration"] == target:
            again.setdefault(mark["rank"], mark)
    if set(again) != set(ranks):
        raise ValueError(f"iteration {target}: only ranks {sorted(again)} came there again")
    end = max(mark["time"] for mark in again.values())
    within = [mark for mark in after if mark["time"] <= end]
    phases = seconds_of_phases(boundaries(within, kill["rank"], under_agent), kill["time"], end)
    computed = {
        rank: sorted({mark["iteration"] for mark in within if mark["rank"] == rank and computes(mark, target)})
        for rank in ranks
    }
    stage = kill["rank"] // ranks_of_a_stage
    failed = [rank for rank in ranks if rank // ranks_of_a_stage == stage]
    others = [rank for rank in ranks if rank not in failed]
    agreed = {mark["rank"]: mark for mark in within if mark["kind"] in ("decision", "start", "built")}
    busy = {rank: again[rank]["busy"] - agreed[rank]["busy"] for rank in ranks if rank in agreed}
    replays = [mark for mark in within if mark["kind"] == "replay" and mark["rank"] in failed]
    # The wait for a stand-by process before this kill; those before earlier kills come first.
    waits = [mark["ready"] for mark in marks if mark["kind"] == "stand_by" and mark["time"] < kill["time"]]
    decisions = [mark["source"] for mark in within if mark["kind"] == "decision"]
    return {
        "iteration": target,
        "rank": kill["rank"],
        "stage": stage,
        "source": decisions[-1] if decisions else None,
        "stood_by": waits[-1] if waits else None,
        "phases": phases,
        "seconds": end - kill["time"],
        "replay_seconds": phases["loaded"] + phases["replayed"] + phases["met"],
        "iterations": len(computed[kill["rank"]]),
        "iterations_of_other_stages": max((len(computed[rank]) for rank in others), default=0),
        "busy_seconds": {str(rank): seconds for rank, seconds in busy.items()},
        "busy_seconds_of_failed_stage": sum(busy.get(rank, 0.0) for rank in failed),
        "busy_seconds_of_others": sum(busy.get(rank, 0.0) for rank in others),
        "delivery_seconds": sum(m["seconds"] for m in within if m["kind"] == "delivery" and m["rank"] == kill["rank"]),
        "replays": [
            {name: mark[name] for name in ("rank", "iteration", "frozen", "seconds", "thread_seconds")}
            for mark in replays
        ],
    }


def computes(mark: Mark, before: int) -> bool:
    """Whether an iteration before that of the kill was computed."""
    return mark["kind"] in ("replay", "iteration") and mark["iteration"] < before


def boundaries(within: Sequence[Mark], victim: int, under_agent: bool) -> list[tuple[str, float | None]]:
    """When each phase was over for the last rank, in the order in which they come under the launcher."""

    def last(*kinds: str, wanted: Callable[[Mark], bool] = lambda mark: True) -> float | None:
        return max((mark["time"] for mark in within if mark["kind"] in kinds and wanted(mark)), default=None)

    replays = [("loaded", last("recovery_finished", "loaded")), ("replayed", last("replay", "iteration"))]
    if under_agent:
        survivors = {"wanted": lambda mark: mark["rank"] != victim}
        begin = [("noticed", last("failure_noticed", **survivors)), ("left", last("left", **survivors))]
        begin += [("started", last("imported")), ("built", last("built")), ("joined", last("joined"))]
        return [*begin, ("agreed", last("decision")), *replays]
    # The launcher ends all workers before it starts new ones.
    created = min((mark["created"] for mark in within if mark["kind"] == "process"), default=None)
    begin = [("noticed", created), ("started", last("imported")), ("joined", last("groups")), ("built", last("built"))]
    return [*begin, ("agreed", last("start")), *replays]


def seconds_of_phases(ends: Iterable[tuple[str, float | None]], start: float, end: float) -> dict[str, float]:
    """Each phase's part of the time from start to end: what goes on behind another phase counts as nothing."""
    phases, now = dict.fromkeys(PHASES, 0.0), start
    for name, moment in [*ends, ("met", end)]:
        if moment is not None and moment > now:
            phases[name] = min(moment, end) - now
            now = min(moment, end)
    return phases


def training(marks: Sequence[Mark], ranks_of_a_stage: int, micro_batches: int) -> dict[str, Any]:
    """Iterations without failures; and how long one takes where every rank has a core to itself, from processor
    seconds of the main threads: fill and drain of the pipeline, then the slowest stage's micro-batches."""
    first_kill = min(mark["time"] for mark in marks if mark["kind"] == "kill")
    # In these one rank has waited for a stand-by process, and the others for it.
    disturbed = {mark["iteration"] for mark in marks if mark["kind"] == "stand_by"}
    calm = [
        mark
        for mark in marks
        if mark["kind"] == "iteration"
        and mark["time"] < first_kill
        and mark["iteration"] >= WARM_UP_ITERATIONS
        and mark["iteration"] not in disturbed
    ]
    passes: dict[int, list[float]] = {}
    rest: dict[int, list[float]] = {}
    for mark in calm:
        stage = mark["rank"] // ranks_of_a_stage
        passes.setdefault(stage, []).append(mark["passes_thread_seconds"])
        rest.setdefault(stage, []).append(mark["thread_seconds"] - mark["passes_thread_seconds"])
    one = [statistics.median(values) / micro_batches for values in passes.values()]
    return {
        "seconds": statistics.median(mark["seconds"] for mark in calm),
        "micro_batch_thread_seconds_of_stages": one,
        "update_thread_seconds_of_stages": [statistics.median(values) for values in rest.values()],
        "critical_path_seconds": sum(one)
        + (micro_batches - 1) * max(one)
        + max(statistics.median(values) for values in rest.values()),
    }


def compare(result: dict[str, Any]) -> None:
    """Localized against global of each mode, and dense checkpoints at the paper's intervals; written into `result`."""
    variants, result["comparison"] = result["variants"], {}
    for mode, most in (("rolling", result["window"] + 1), ("fixed", 2 * result["window"] + 1)):
        local, together = variants.get(f"local {mode}"), variants.get(f"global {mode}")
        if local is not None:
            result["comparison"][mode] = {
                "iterations_bound": most,
                "iterations_most": max(one["iterations"] for one in local["recoveries"]),
                "all_local": all(one["source"] == "local" for one in local["recoveries"]),
                "iterations_of_other_stages": max(one["iterations_of_other_stages"] for one in local["recoveries"]),
                "busy_share_of_others": sum(one["busy_seconds_of_others"] for one in local["recoveries"])
                / sum(sum(one["busy_seconds"].values()) for one in local["recoveries"]),
                "stages": stages(local, together),
            }
    dense = variants.get("dense")
    if dense is not None:
        result["dense_computed"] = computed_dense(dense, result["dense_interval"])


def stages(local: dict[str, Any], together: dict[str, Any] | None) -> dict[str, Any]:
    """Per killed stage: seconds of an iteration that is replayed alone, and of one that all stages run again."""
    found = {}
    for stage in sorted({one["stage"] for one in local["recoveries"]}):
        replays = [mark for one in local["recoveries"] if one["stage"] == stage for mark in one["replays"]]
        thread = statistics.median([m["thread_seconds"] for m in replays if not m["frozen"]] or [0.0])
        frozen = statistics.median([m["thread_seconds"] for m in replays if m["frozen"]] or [0.0])
        # Of the same run: how fast processors are changes with what else the machine does.
        path = local["training"]["critical_path_seconds"]
        entry: dict[str, Any] = {
            "local_seconds_an_iteration": an_iteration(local, stage),
            "local_thread_seconds": thread,
            "local_thread_seconds_frozen": frozen,
            "critical_path_seconds": path,
            "gain_on_own_cores": 1 - thread / path,
        }
        if together is not None:
            own = an_iteration(together, stage)
            entry |= {"global_seconds_an_iteration": own, "gain": 1 - entry["local_seconds_an_iteration"] / own}
        found[str(stage)] = entry
    return found


def an_iteration(variant: dict[str, Any], stage: int) -> float:
    """Seconds of replay by iteration, over all kills of a stage."""
    chosen = [one for one in variant["recoveries"] if one["stage"] == stage and one["iterations"]]
    iterations = sum(int(one["iterations"]) for one in chosen)
    return float(sum(one["replay_seconds"] for one in chosen) / iterations) if iterations else float("nan")


def computed_dense(dense: dict[str, Any], measured: int) -> dict[str, dict[str, float]]:
    """What dense checkpoints at the paper's other intervals cost on average: half an interval is run again."""
    again = sum(one["phases"]["replayed"] for one in dense["recoveries"])
    each = again / sum(one["iterations"] for one in dense["recoveries"])
    fixed = dense["mean_seconds"] - dense["mean_phases"]["replayed"]
    return {
        name: {"interval": interval, "iterations": interval / 2, "fixed": fixed, "seconds": fixed + each * interval / 2}
        for name, interval in PAPER_INTERVALS.items()
        if interval != measured
    }
