"""Forward and backward of one simulated rank, live or fed by its neighbours' transcripts, and the update."""

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

from tests.simulation.case import (
    MODULUS,
    TIED,
    Violation,
    backward,
    contribution,
    forward,
    loss_gradient,
    received_data,
    updated,
    weight_of,
)
from tests.simulation.kernel import Steps
from tests.simulation.memory import Transcript

if TYPE_CHECKING:
    from tests.simulation.worker import RankProgram

Part = dict[tuple[str, int, int], int]
# By neighbour outside the segment: what it sent here, and what it received from here.
Feeds = Mapping[int, tuple[Part, Part]]


class Model:
    """State on the device. `state` holds operators in full; `frozen` only the weights of those not loaded yet."""

    def __init__(self, program: "RankProgram") -> None:
        self._program = program
        self._case, self._rank = program.case, program.rank
        self.state: dict[str, int] = {}
        self.frozen: dict[str, int] = {}
        self.weights = self.own = self._stage = self._tied = 0

    def own_weights(self) -> int:
        """The weights of all own operators as one value."""
        names = self._case.operators[self._rank]
        return hash(tuple(weight_of(self.state[n]) if n in self.state else self.frozen[n] for n in names))

    def update(self, iteration: int, norm: float | None, frozen: frozenset[str]) -> None:
        """Updates every operator that isn't frozen."""
        for name in self.state.keys() - frozen:
            gradient = self._tied if name == TIED else self._stage
            self.state[name] = updated(self.state[name], iteration, gradient, int(norm or 0))

    def passes(self, step: int, feeds: Feeds) -> Steps:
        """Forward and backward of iteration `step` with the reduction of gradients; writes the transcript."""
        case, program = self._case, self._program
        stage, line = divmod(self._rank, case.width)
        last = case.stages * case.chunks - 1
        log = program.memory.transcript[step] = Transcript()
        inputs: dict[tuple[int, int], int] = {}
        outputs: dict[int, int] = {}
        tapes: tuple[list[int], list[int]] = ([], [])

        def peer(virtual: int) -> int:
            return virtual % case.stages * case.width + line

        for chunk in range(case.chunks):
            virtual = chunk * case.stages + stage
            for mb in range(case.micro_batches):
                if virtual == 0:
                    x = received_data(line, step, mb)
                else:
                    x = yield from self._take(step, peer(virtual - 1), ("f", chunk, mb), feeds, log)
                inputs[chunk, mb] = x
                out = forward(x, self.weights, (step, chunk, mb))
                if virtual == last:
                    outputs[mb] = out
                else:
                    key = ("f", (virtual + 1) // case.stages, mb)
                    self._send(step, peer(virtual + 1), key, out, feeds, log)
        for chunk in reversed(range(case.chunks)):
            virtual = chunk * case.stages + stage
            for mb in range(case.micro_batches):
                if virtual == last:
                    gradient = loss_gradient(outputs[mb])
                else:
                    gradient = yield from self._take(step, peer(virtual + 1), ("b", chunk, mb), feeds, log)
                tapes[0].append(hash((chunk, mb, inputs[chunk, mb])))
                tapes[1].append(hash((chunk, mb, gradient)))
                if virtual:
                    key = ("b", (virtual - 1) // case.stages, mb)
                    value = backward(gradient, inputs[chunk, mb], self.weights)
                    self._send(step, peer(virtual - 1), key, value, feeds, log)
        self.own = contribution(sorted(tapes[0]) + sorted(tapes[1]))
        yield from self._reduce(step)

    def _reduce(self, step: int) -> Steps:
        program = self._program
        self._stage = yield from program.collective(("gradient", step), program.stage_ranks(), self.own, _sum)
        if self._rank in self._case.tied_ranks:
            # A frozen copy computes no gradient of its weights.
            part = self.own if TIED in self.state else 0
            members = tuple(sorted(self._case.tied_ranks))
            self._tied = yield from program.collective(("tied", step), members, part, _sum)

    def _send(self, step: int, to: int, key: tuple[str, int, int], value: int, feeds: Feeds, log: Transcript) -> None:
        self._program.at()
        log.sent[(to, *key)] = value
        if to not in feeds:
            self._program.process.post(to, (step, self._rank, *key), value)
        elif feeds[to][1].get(key) != value:
            raise Violation("inexact", f"rank {self._rank} sends rank {to} other bits than before: {step} {key}")

    def _take(
        self, step: int, source: int, key: tuple[str, int, int], feeds: Feeds, log: Transcript
    ) -> Generator[None, None, int]:
        self._program.at()
        if source in feeds:
            value = feeds[source][0][key]
        else:
            value = yield from self._program.process.take((step, source, *key))
        log.received[(source, *key)] = value
        return value


def _sum(parts: list[int]) -> int:
    return sum(parts) % MODULUS
