"""Where one rank stands between a failure and training again: a small state machine, for the driver and the display."""

from enum import StrEnum

from megatron.moevement.errors import RecoveryError
from megatron.moevement.recovery.decide import Decision, Position


class Phase(StrEnum):
    """What a rank is doing. CONVERT and CATCH_UP replay, with and without frozen operators."""

    TRAIN = "train"
    LEAVE = "leave"
    JOIN = "join"
    AGREE = "agree"
    LOAD = "load"
    CONVERT = "convert"
    CATCH_UP = "catch_up"
    SERVE = "serve"
    ROLL_FORWARD = "roll_forward"
    MEET = "meet"


# A failure leads from any phase to LEAVE; these are the other ways.
NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.TRAIN: frozenset(),
    Phase.LEAVE: frozenset({Phase.JOIN}),
    Phase.JOIN: frozenset({Phase.AGREE}),
    Phase.AGREE: frozenset({Phase.LOAD, Phase.ROLL_FORWARD, Phase.SERVE, Phase.MEET}),
    Phase.LOAD: frozenset({Phase.CONVERT, Phase.CATCH_UP, Phase.MEET}),
    Phase.CONVERT: frozenset({Phase.CATCH_UP, Phase.MEET}),
    Phase.CATCH_UP: frozenset({Phase.MEET}),
    Phase.ROLL_FORWARD: frozenset({Phase.SERVE, Phase.MEET}),
    Phase.SERVE: frozenset({Phase.MEET}),
    Phase.MEET: frozenset({Phase.TRAIN}),
}
# From the first byte that LOAD writes to the end of the replay, the state is of no Step.
DIRTY = frozenset({Phase.LOAD, Phase.CONVERT, Phase.CATCH_UP})


def path(decision: Decision, rank: int) -> tuple[Phase, ...]:
    """The phases that a rank goes through between AGREE and TRAIN."""
    if decision.source in ("global", "dense", "scratch"):
        converts = decision.run is not None and decision.run.replays > 0
        return (Phase.LOAD, Phase.CONVERT, Phase.MEET) if converts else (Phase.LOAD, Phase.MEET)
    for plan in decision.segments:
        if rank in plan.ranks:
            convert = (Phase.CONVERT,) if plan.run.replays else ()
            catch_up = (Phase.CATCH_UP,) if plan.run.last < decision.target else ()
            return (Phase.LOAD, *convert, *catch_up, Phase.MEET)
    forward = (Phase.ROLL_FORWARD,) if rank in decision.roll_forward else ()
    serve = (Phase.SERVE,) if any(rank in plan.feeders for plan in decision.segments) else ()
    return (*forward, *serve, Phase.MEET)


class Standing:
    """Phase, clean Step and position of one rank; every change is checked.

    A process that takes over a rank starts in LEAVE without a clean Step.

    Attributes:
        phase: where it is.
        step: its clean Step, None if its state is of no Step.
        position: in the iteration `step`, or, after `updated`, in the one before it.
    """

    def __init__(self, step: int | None, phase: Phase) -> None:
        self.phase, self.step, self.position = phase, step, Position.RUNNING

    def gradients_final(self) -> None:
        """The gradients of iteration `step` are final, and its transcript is complete."""
        self._require(self.phase is Phase.TRAIN and self.position is Position.RUNNING, "final gradients")
        self.position = Position.FINAL

    def updated(self) -> None:
        """The update of iteration `step` is done as a whole, and its record noted."""
        self._require(self.phase in (Phase.TRAIN, Phase.ROLL_FORWARD) and self.position is Position.FINAL, "an update")
        assert self.step is not None
        self.step += 1
        self.position = Position.UPDATED if self.phase is Phase.TRAIN else Position.RUNNING

    def next_iteration(self) -> None:
        """Iteration `step` begins."""
        self._require(self.phase is Phase.TRAIN and self.position is not Position.FINAL, "an iteration")
        self.position = Position.RUNNING

    def enter(self, phase: Phase) -> None:
        """Goes on to a phase. LOAD gives the clean Step up; TRAIN needs one."""
        self._require(phase in NEXT[self.phase], f"phase {phase}")
        self._require(phase is not Phase.MEET or self.step is not None, "phase meet without a clean Step")
        self.phase = phase
        if phase is Phase.LOAD:
            self.step = None
        if phase in (Phase.LOAD, Phase.TRAIN):
            self.position = Position.RUNNING

    def reached(self, step: int) -> None:
        """What was loaded and replayed is Step `step`, whole."""
        self._require(self.phase in DIRTY, "a Step")
        self.step = step

    def failed(self) -> None:
        """A failure, in whatever phase: the clean Step stays if there is one, and with it the position."""
        self.phase = Phase.LEAVE

    def _require(self, legal: bool, what: str) -> None:
        if not legal:
            raise RecoveryError(
                f"{what} in phase {self.phase} ({self.position}, step {self.step}): not in the protocol"
            )
