"""Snapshot age: for how many steps an operator has not been captured in full."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron.moevement.errors import AgreementError


@dataclass(slots=True)
class SnapshotAge:
    """Tracks the last step at which each operator was captured in full.

    `bound` is the largest legal age in steps: W for a fixed order, 2W-1 across a change of order, since an operator
    that moves from the front of the window to its end waits longest.
    """

    operators: frozenset[str]
    bound: int
    first_step: int
    _captured: dict[str, int] = field(default_factory=dict)

    def capture(self, step: int, full: Iterable[str]) -> None:
        """Notes that `full` were captured in the slot of `step`, and asserts the bound for all operators.

        Raises:
            AgreementError: an operator is older than the bound; the schedule is broken.
        """
        self.note(step, full)
        name, age = self.oldest(step)
        if age > self.bound:
            raise AgreementError(f"operator {name} was last captured {age} steps ago, the bound is {self.bound}")

    def note(self, step: int, full: Iterable[str]) -> None:
        """Notes captures of an earlier step, found in slots at a recovery."""
        for name in full:
            self._captured[name] = step

    def age(self, name: str, step: int) -> int:
        """Steps since the last full capture, counted from the first step if there was none."""
        return step - self._captured.get(name, self.first_step)

    def oldest(self, step: int) -> tuple[str, int]:
        """The operator with the largest age, and that age; ("", 0) without operators."""
        if not self.operators:
            return "", 0
        name = min(self.operators, key=lambda n: (self._captured.get(n, self.first_step), n))
        return name, self.age(name, step)

    def restart(self, step: int) -> None:
        """Forgets captures that were lost: ages count from `step` again."""
        self._captured.clear()
        self.first_step = step
