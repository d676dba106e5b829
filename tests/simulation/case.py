"""What one simulated job is: its shape, its disturbances, and the states of a run that nothing disturbs."""

import dataclasses
import json
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron.moevement.recovery.phases import DIRTY, Phase
from megatron.moevement.recovery.scope import Grid
from megatron.moevement.schedule.slots import SlotSchedule, longest_run, ring_slots
from megatron.moevement.types import SlotSpec
from tests.support.grids import line

MODULUS = (1 << 61) - 1
TIED = "tied"


class Violation(Exception):
    """A promise that the simulated job broke. `kind` stays the same while a schedule is made smaller."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank dies when it passes its `point`-th message boundary in a phase of a generation.

    `lost`: its node is lost with it, and all that was in its host memory.
    """

    rank: int
    generation: int
    phase: str
    point: int
    lost: bool = False


@dataclass(frozen=True)
class Case:
    """A job of `stages` x `width` ranks.

    `jitter` lists the ranks whose messages and commits take random times. The copies of `failed_slots` (rank, step)
    fail; `damaged` ones are found so when they are verified for an offer. At each of the `probes`, numbers of events,
    every single stage is asked whether it could recover alone.
    """

    seed: int
    stages: int
    width: int
    tied: bool
    wraps: bool
    mode: str
    window: int
    reorder: bool
    iterations: int
    micro_batches: int
    dense_every: int
    jitter: tuple[int, ...]
    failures: tuple[Failure, ...]
    failed_slots: tuple[tuple[int, int], ...] = ()
    damaged: tuple[tuple[int, int], ...] = ()
    probes: tuple[int, ...] = ()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.stages * self.width

    @property
    def chunks(self) -> int:
        """Model chunks of a rank."""
        return 2 if self.wraps else 1

    @property
    def loses_slots(self) -> bool:
        """Whether slots get lost without a rank."""
        return bool(self.failed_slots or self.damaged)

    @property
    def longest_run(self) -> int:
        """Slots of the longest run."""
        return longest_run(self.window, self.mode, self.reorder)

    @property
    def ring(self) -> int:
        """Slots that a rank's memory has room for."""
        return ring_slots(self.window, self.mode, self.reorder)

    @property
    def replay_bound(self) -> int:
        """Iterations that a stage replays at most; a change of order needs as much as fixed windows do."""
        return self.window + 1 if self.longest_run == self.window else 2 * self.window + 1

    @cached_property
    def grid(self) -> Grid:
        """The ranks."""
        return line(self.stages, self.width, self.tied, self.wraps)

    @cached_property
    def tied_ranks(self) -> frozenset[int]:
        """Ranks that hold a copy of the shared parameter."""
        return self.grid.ranks_of(frozenset().union(*self.grid.sharing))

    @cached_property
    def operators(self) -> tuple[tuple[str, ...], ...]:
        """Names of each rank's operators, the shared one last."""
        own = tuple(f"o{i}" for i in range(self.window))
        return tuple((*own, TIED) if rank in self.tied_ranks else own for rank in range(self.world))

    def spec(self, rank: int, step: int) -> SlotSpec:
        """What the slot of a step holds. With `reorder` the order turns by one every second window."""
        turn = step // self.window // 2 % self.window if self.reorder else 0
        names = self.operators[rank][: self.window]
        groups: list[tuple[str, ...]] = [(name,) for name in names[turn:] + names[:turn]]
        groups[-1] += self.operators[rank][self.window :]
        return SlotSchedule(tuple(groups), self.mode).spec(step)

    def to_json(self) -> str:
        """One line that `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Case":
        """Reads what `to_json` wrote; raises ValueError, TypeError or KeyError for anything else."""
        values: dict[str, Any] = json.loads(text)
        values["failures"] = tuple(Failure(**failure) for failure in values["failures"])
        for name in ("jitter", "probes"):
            values[name] = tuple(values[name])
        for name in ("failed_slots", "damaged"):
            values[name] = tuple((rank, step) for rank, step in values[name])
        return cls(**values)


def generate(seed: int) -> Case:
    """The case of a seed."""
    draw = random.Random(seed)
    stages = draw.choice((1, 2, 2, 3, 3, 4, 4))
    width = draw.choice((1, 1, 2, 2, 3)) if stages < 4 else draw.choice((1, 1, 2))
    window = draw.randint(1, 4)
    iterations = 2 * window + draw.randint(5, 12)
    wraps = stages > 1 and draw.random() < 0.3
    world = stages * width
    failures: list[Failure] = []
    lost_nodes = draw.random() < 0.15
    points = iterations * (4 * (2 if wraps else 1) + 14)
    for number in range(draw.choice((0, 1, 1, 1, 2, 2, 2, 3, 3))):
        generation = draw.choice((number, max(0, number - 1))) if number else 0
        lost = lost_nodes and draw.random() < 0.5
        rank = draw.randrange(world)
        if generation == 0:
            # Mostly when the first window is complete; before that nothing but the beginning is left.
            failures.append(Failure(rank, 0, Phase.TRAIN, draw.randint(draw.choice((1, points // 3)), points), lost))
            continue
        phase = draw.choice([Phase.TRAIN, *Phase])
        point = draw.choice((1, 2, draw.randint(1, 10)))
        if phase is Phase.TRAIN:
            point = draw.randint(1, 40)
        if phase in (Phase.LEAVE, Phase.JOIN):
            # A rank leaves the generation that has failed.
            generation, point = generation - 1, 1
        if phase in DIRTY or draw.random() < 0.4:
            # The replacement dies in its turn.
            rank = failures[0].rank
        failures.append(Failure(rank, generation, phase, point, lost))
    slots = [(draw.randrange(world), draw.randrange(iterations)) for _ in range(3)] if draw.random() < 0.15 else []
    split = draw.choice((0, 0, 3))
    return Case(
        seed=seed,
        stages=stages,
        width=width,
        tied=stages > 1 and draw.random() < 0.3,
        wraps=wraps,
        mode=draw.choice(("fixed", "rolling")),
        window=window,
        reorder=draw.random() < 0.3,
        iterations=iterations,
        micro_batches=draw.choice((1, 1, 2)),
        dense_every=draw.choice((0, 0, 3, 5)),
        jitter=tuple(range(world)) if draw.random() < 0.9 else (),
        failures=tuple(failures),
        failed_slots=tuple(slots[split:]),
        damaged=tuple(slots[:split]),
        probes=tuple(sorted(draw.randrange(50, 2500) for _ in range(12))),
    )


# ------------------------------------------------------------------------------------- the arithmetic of training


def initial(case: Case, rank: int) -> dict[str, int]:
    """Full state of every operator at Step 0; copies of a shared parameter begin equal."""
    return {n: hash((7, 0 if n == TIED else rank, len(n), i)) for i, n in enumerate(case.operators[rank])}


def weight_of(full: int) -> int:
    """The compute weight that belongs to a full state."""
    return hash((11, full))


def updated(full: int, iteration: int, gradient: int, norm: int) -> int:
    """The full state after an update."""
    return hash((13, full, iteration, gradient, norm))


def received_data(rank: int, iteration: int, micro_batch: int) -> int:
    """What the first stage reads from the data set."""
    return hash((17, rank, iteration, micro_batch))


def forward(x: int, weights: int, key: tuple[int, int, int]) -> int:
    """Output of a model chunk."""
    return hash((19, x, weights, key))


def backward(gradient: int, x: int, weights: int) -> int:
    """Gradient of a model chunk's input."""
    return hash((23, gradient, x, weights))


def loss_gradient(output: int) -> int:
    """Where the backward pass begins."""
    return hash((29, output))


def gathered(weights: list[int]) -> int:
    """All weights of a stage as one value."""
    return hash((31, *weights))


def contribution(tape: list[int]) -> int:
    """A rank's gradient, before any reduction: a function of all that it received."""
    return hash((37, *tape)) % MODULUS


class Undisturbed:
    """The states of a run without failures: `full[t][rank]` at Step t, `norms[t]` of iteration t."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.full = [[initial(case, rank) for rank in range(case.world)]]
        self.norms: list[int] = []
        for iteration in range(case.iterations):
            self._advance(iteration)

    def weights(self, step: int, stage: int) -> int:
        """Gathered weights of a stage at a Step."""
        width = self._case.width
        return gathered([hash(tuple(map(weight_of, self.full[step][r].values()))) for r in _ranks(stage, width)])

    def _advance(self, iteration: int) -> None:
        case = self._case
        virtual = case.stages * case.chunks
        weights = [self.weights(iteration, stage) for stage in range(case.stages)]
        tapes: list[list[list[int]]] = [[[], []] for _ in range(case.world)]
        for line_number in range(case.width):
            for micro_batch in range(case.micro_batches):
                inputs = [received_data(line_number, iteration, micro_batch)]
                for v in range(virtual):
                    key = (iteration, v // case.stages, micro_batch)
                    inputs.append(forward(inputs[-1], weights[v % case.stages], key))
                gradient = loss_gradient(inputs[virtual])
                for v in reversed(range(virtual)):
                    tape = tapes[v % case.stages * case.width + line_number]
                    tape[0].append(hash((v // case.stages, micro_batch, inputs[v])))
                    tape[1].append(hash((v // case.stages, micro_batch, gradient)))
                    gradient = backward(gradient, inputs[v], weights[v % case.stages])
        own = [contribution(sorted(f) + sorted(b)) for f, b in tapes]
        norm = sum(own) % MODULUS
        shared = sum(own[rank] for rank in case.tied_ranks) % MODULUS
        after = []
        for rank, state in enumerate(self.full[iteration]):
            stage = sum(own[r] for r in _ranks(rank // case.width, case.width)) % MODULUS
            gradient_of = {name: shared if name == TIED else stage for name in state}
            after.append({n: updated(full, iteration, gradient_of[n], norm) for n, full in state.items()})
        self.full.append(after)
        self.norms.append(norm)


def _ranks(stage: int, width: int) -> range:
    return range(stage * width, (stage + 1) * width)
