"""Has the transcripts of the next iteration on their way while the one before is replayed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from megatron.moevement.errors import MoevementError, RecoveryError
from megatron.moevement.transcript.packing import Bundle

Fetch = Callable[[int], Sequence[Bundle]]


class Ahead:
    """Fetches iterations in their order, each on a thread that ends with it, one ahead of who asks.

    Args:
        fetch: asks the neighbours for an iteration; nobody else may use their connections meanwhile.
        iterations: those that will be asked for.
    """

    def __init__(self, fetch: Fetch, iterations: Iterable[int]) -> None:
        self._fetch, self._left = fetch, deque(iterations)
        self._coming: tuple[int, Future[Sequence[Bundle]]] | None = None
        self._start()

    def __call__(self, iteration: int) -> Sequence[Bundle]:
        """The bundles of the next iteration; raises what fetching them raised."""
        if self._coming is None or self._coming[0] != iteration:
            raise RecoveryError(f"iteration {iteration} is replayed out of turn")
        found = self._coming[1].result()
        self._start()
        return found

    def _start(self) -> None:
        self._coming = (self._left.popleft(), Future()) if self._left else None
        if self._coming is not None:
            # A daemon: a process that ends doesn't wait for what a neighbour never sends.
            threading.Thread(target=self._run, args=self._coming, name="moevement-fetch", daemon=True).start()

    def _run(self, iteration: int, future: Future[Sequence[Bundle]]) -> None:
        try:
            future.set_result(self._fetch(iteration))
        except (MoevementError, RuntimeError, ValueError) as error:
            future.set_exception(error)
        finally:
            if not future.done():
                future.set_exception(RecoveryError(f"iteration {iteration}: its transcripts could not be fetched"))
