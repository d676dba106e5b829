"""A recovery in words, from the events of one rank."""

from megatron.moevement.recovery.phases import Phase
from megatron.moevement.report.read_events import Event
from megatron.moevement.report.recoveries import listed

RECOVERY_KINDS = frozenset(
    {
        *("process", "failure_noticed", "decision", "recovery_phase", "recovery_started"),
        *("conversion", "recovery_finished", "resumed"),
    }
)
PHASE_WORDS = {
    Phase.LEAVE: "leaving",
    Phase.JOIN: "joining",
    Phase.AGREE: "agreeing",
    Phase.LOAD: "loading slots",
    Phase.CONVERT: "converting",
    Phase.CATCH_UP: "catching up",
    Phase.SERVE: "serving",
    Phase.ROLL_FORWARD: "rolling forward",
    Phase.MEET: "waiting for the others",
}
# Phases whose iterations are worth a line each; those of a conversion have the lines of their slots.
_COUNTED = {Phase.CATCH_UP: "replayed", Phase.SERVE: "served its transcript of"}


class RecoveryNarration:
    """Takes the events of a rank in order.

    Attributes:
        now: what the rank does in a recovery, empty in training.
        progress: iterations done, and of how many; (0, 0) in phases without any.
        last: the last recovery in short.
    """

    def __init__(self) -> None:
        self.now, self.progress, self.last = "", (0, 0), "none"
        self._run: tuple[int, int] | None = None

    def lines(self, event: Event) -> list[str]:
        """What there is to say about an event of `RECOVERY_KINDS`."""
        kind = event["kind"]
        if kind == "process":
            if not event["replacement"]:
                return []
            return [f"recovery: process {event['pid']} has taken over rank {event['rank']}"]
        if kind == "failure_noticed":
            where = f"in iteration {event['step'] + 1}" if not self.now else f"while {self.now}"
            return [f"recovery: another rank is lost {where}; a new process is to take over"]
        if kind == "decision":
            return _decision_lines(event)
        if kind == "recovery_phase":
            return self._phase(event)
        if kind == "resumed":
            return self._resumed(event)
        return self._conversion(event)

    def _phase(self, event: Event) -> list[str]:
        phase, done, of = event["phase"], int(event["done"]), int(event["of"])
        self.now, self.progress = PHASE_WORDS.get(phase, ""), (done, of)
        if done and phase in _COUNTED:
            return [f"  {self.now} {done}/{of}: {_COUNTED[phase]} iteration {event['iteration'] + 1}"]
        if phase == Phase.ROLL_FORWARD:
            return ["  rolling forward: the update is finished from the recorded decision"]
        return []

    def _conversion(self, event: Event) -> list[str]:
        kind = event["kind"]
        if kind == "recovery_started":
            self._run = (int(event["first"]), int(event["last"]))
            return [
                (
                    f"recovery: converting slots of steps {event['first']} to {event['last']} from {event['source']}, "
                    f"{_iterations(event['replays'])} to replay"
                )
            ]
        if kind == "recovery_finished":
            self._run = None
            self.last = f"step {event['step']}, {event['replays']} replays, {event['seconds']:.1f} s"
            verdict = "nothing recorded to compare with"
            if event["compared"]:
                equal = f"{event['different']} DIFFERENT" if event["different"] else "all bitwise equal"
                verdict = f"{event['compared']} recorded values compared, {equal}"
            return [
                f"recovery: dense state of step {event['step']} after {event['replays']} replays in "
                f"{event['seconds']:.2f} s; {verdict}"
            ]
        # Without a run it is a replay behind the conversion, which is narrated by its phase.
        return [] if self._run is None else [_slot_line(event, *self._run)]

    def _resumed(self, event: Event) -> list[str]:
        self.now, self.progress = "", (0, 0)
        self.last = f"step {event['step']}, {event['replayed']} replays, {event['seconds']:.1f} s"
        longest = event["longest_phase_seconds"]
        seconds = ", ".join(f"{phase} {longest[phase]:.1f}" for phase in Phase if phase in longest)
        return [
            (
                f"recovery: training goes on at step {event['step']} after {event['seconds']:.1f} s; "
                f"{_iterations(event['replayed'])} replayed"
            ),
            f"  seconds, of the slowest rank: {seconds}",
        ]


def _decision_lines(event: Event) -> list[str]:
    target, source = event["target"], event["source"]
    replaced = f"{listed('rank', event['replaced'])} replaced" if event["replaced"] else "nobody replaced"
    if source == "none":
        lines = [f"recovery: {replaced}; no stage has to roll back, training goes on at step {target}"]
    elif source == "local":
        lines = [f"recovery: {replaced}; training goes on at step {target}"]
        lines += [_segment_line(segment, target) for segment in event["segments"]]
    else:
        lines = [f"recovery: {replaced}; all stages roll back, to {_SOURCES[source]}"]
    if event["roll_forward"]:
        lines.append(f"  {listed('rank', event['roll_forward'])} first: update of iteration {target}")
    return [*lines, *(f"  {reason}" for reason in event["reasons"])]


_SOURCES = {"global": "slots", "dense": "a dense checkpoint", "scratch": "the beginning"}


def _segment_line(segment: Event, target: int) -> str:
    first, last = segment["run"]
    conversion, rest = last - first, target - last
    served = f", served by {listed('rank', segment['feeders'])}" if segment["feeders"] else ""
    return (
        f"  {listed('stage', segment['stages'])} alone: back to step {first}, {_iterations(conversion)} to replay in "
        f"the conversion and {rest} to catch up{served}"
    )


def _iterations(count: int) -> str:
    return f"{count} iteration{'' if count == 1 else 's'}"


def _slot_line(event: Event, first: int, last: int) -> str:
    done = f"replayed iteration {event['step'] + 1}" if event["replayed"] else "dense"
    return (
        f"  slot {event['step'] - first + 1}/{last - first + 1}: {event['loaded_full']} operators loaded, "
        f"{event['frozen']} still frozen, {done}, {event['seconds']:.2f} s"
    )
