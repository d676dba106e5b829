"""Compares two runs bit for bit: the digests of their final states, and the losses and norms of all iterations."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.moevement.report.read_events import Event

_FIGURES = ("loss", "grad_norm")
Digests = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How many things were compared, and the names of those that differ or that only one of the runs has."""

    tensors: int
    different_tensors: tuple[str, ...]
    figures: int
    different_figures: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether there was something to compare and nothing differed."""
        return bool(self.tensors and self.figures and not self.different_tensors and not self.different_figures)


def read_digests(prefix: Path) -> dict[int, dict[str, Any]]:
    """The files of `--state-digest PREFIX`, by rank.

    Raises:
        OSError, json.JSONDecodeError: a file can't be read.
    """
    paths = sorted(prefix.parent.glob(f"{prefix.name}.rank*.json"))
    return {int(path.name.split(".rank")[1].removesuffix(".json")): json.loads(path.read_text()) for path in paths}


def losses(digests: Digests) -> dict[int, float]:
    """The loss of every iteration that the processes which wrote the digests ran."""
    first = digests[min(digests)]["history"] if digests else {}
    return {int(number): float.fromhex(figures["loss"]) for number, figures in first.items()}


def compare_runs(one: Digests, other: Digests, other_iterations: Iterable[Event]) -> Comparison:
    """Compares an undisturbed run with a disturbed one.

    Args:
        one: digests of the undisturbed run, whose history is complete.
        other: digests of the disturbed run; its history begins at the last restart.
        other_iterations: the `iteration` events of the disturbed run on all ranks. Each iteration counts as often as
            it ran, so that those that ran again after a kill are compared again.
    """
    tensors, different = 0, []
    for rank in sorted({*one, *other}):
        left, right = (side.get(rank, {}).get("state", {}) for side in (one, other))
        for name in sorted({*left, *right}):
            tensors += 1
            if left.get(name) != right.get(name):
                different.append(f"rank {rank}: {name}")
    figures, unequal = 0, []
    seen: set[tuple[int, int]] = set()
    for rank, number, values in _figures(other, other_iterations):
        expected = one.get(rank, {}).get("history", {}).get(str(number), {})
        seen.add((rank, number))
        for key in _FIGURES:
            figures += 1
            if key not in expected or expected[key] != values[key]:
                unequal.append(f"rank {rank}, iteration {number + 1}: {key}")
    for rank, digest in one.items():
        missing = sorted(int(n) for n in digest["history"] if (rank, int(n)) not in seen)
        unequal += [f"rank {rank}, iteration {number + 1}: never ran" for number in missing]
    return Comparison(tensors, tuple(different), figures, tuple(unequal))


def _figures(digests: Digests, iterations: Iterable[Event]) -> list[tuple[int, int, Mapping[str, str | None]]]:
    """(rank, iteration, exact figures) of the events, and of the digests' histories where they say anything else."""
    found: list[tuple[int, int, Mapping[str, str | None]]] = [
        (
            int(e["rank"]),
            int(e["iteration"]),
            {key: None if e[key] is None else float(e[key]).hex() for key in _FIGURES},
        )
        for e in iterations
    ]
    known = {(rank, number, *values.values()) for rank, number, values in found}
    for rank, digest in digests.items():
        for number, values in digest["history"].items():
            if (rank, int(number), *(values[key] for key in _FIGURES)) not in known:
                found.append((rank, int(number), values))
    return found
