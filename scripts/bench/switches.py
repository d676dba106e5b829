"""What the overhead benchmark turns on and off between blocks of one run: digests, chunks, spreading, pauses.

One manager serves all of these variants, because two would need twice the host memory.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar

from megatron.moevement.config import MIB
from moevement_ext import CopyEngine, DigestPool


class SwitchedPool(DigestPool):
    """A digest pool that gives zeros for digests while it is off."""

    on = True

    def submit(self, addresses: Any, sizes: Any) -> int:
        """Queues ranges; with the pool off only their number."""
        if SwitchedPool.on:
            return super().submit(addresses, sizes)
        return super().submit(addresses[:0], sizes[:0])

    def wait(self, ticket: int, timeout_seconds: float) -> bytes | None:
        """The digests."""
        found = super().wait(ticket, timeout_seconds)
        return found or (None if found is None else bytes(16 * 100_000))


class SwitchedEngine(CopyEngine):
    """A copy engine that can be told to spread what it is given; `made` are all engines of this process."""

    spread_seconds = 0.0
    made: ClassVar[list[SwitchedEngine]] = []

    def __init__(self, *arguments: Any, **limits: Any) -> None:
        super().__init__(*arguments, **limits)
        SwitchedEngine.made.append(self)

    def submit(self, *arguments: Any, **options: Any) -> int:
        """Queues a batch."""
        return super().submit(*arguments, **{"spread_seconds": self.spread_seconds, **options})


class Switched:
    """Hooks with their own settings around those of the manager.

    Args:
        inner: the manager's hooks.
        engine: the manager's copy engine.
        text: `digests=off`, `chunks=4x2` (MiB, in flight), `spread=0.9` (of the time until the fence) or `pauses`,
            with `:` in between.
    """

    def __init__(self, inner: Any, engine: SwitchedEngine, text: str) -> None:
        words = dict(word.partition("=")[::2] for word in text.split(":") if word)
        unknown = set(words) - {"digests", "chunks", "spread", "pauses"}
        if unknown:
            raise ValueError(f"--variants: {text}: unknown {unknown.pop()}")
        self._inner, self._engine = inner, engine
        self._digests = words.get("digests", "on") == "on"
        size, _, flight = words["chunks"].partition("x") if "chunks" in words else ("4", "", "2")
        self._chunks = int(float(size) * MIB), int(flight)
        self._spread, self._pauses = float(words.get("spread", 0)), "pauses" in words
        self._seconds: deque[float] = deque(maxlen=5)
        self._started = 0.0

    def before_forward(self, iteration: int) -> None:
        """Sets the switches, and begins the slot."""
        SwitchedPool.on = self._digests
        self._engine.set_chunks(*self._chunks)
        self._engine.spread_seconds = self._spread * statistics.median(self._seconds or [0.0])
        if self._pauses:
            Pauses.engine = self._engine
        self._started = time.perf_counter()
        self._inner.before_forward(iteration)

    def before_optimizer_step(self, iteration: int) -> None:
        """The fence."""
        self._seconds.append(time.perf_counter() - self._started)
        self._inner.before_optimizer_step(iteration)
        # The pool is switched by whoever comes next: this slot's digests begin now.
        self._engine.spread_seconds, Pauses.engine = 0.0, None

    def after_optimizer_step(self, iteration: int, outcome: Any) -> None:
        """Hands over the record."""
        self._inner.after_optimizer_step(iteration, outcome)


class Pauses:
    """Pauses the engine from where a MoE layer starts its small copies to where it has them."""

    engine: CopyEngine | None = None

    @staticmethod
    @contextlib.contextmanager
    def installed() -> Iterator[None]:
        """Wraps the dispatcher's one function that starts and awaits small copies."""
        from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher

        name = "_maybe_dtoh_and_synchronize"
        original = vars(Dispatcher)[name]

        def paused(self: Any, point: str, *arguments: Any) -> Any:
            engine = Pauses.engine
            if engine is not None and point == self.cuda_dtoh_point:
                engine.pause()
            result = original(self, point, *arguments)
            if engine is not None and point == self.cuda_sync_point:
                engine.resume()
            return result

        setattr(Dispatcher, name, paused)
        try:
            yield
        finally:
            setattr(Dispatcher, name, original)
