"""What the overhead benchmark changes between blocks of one run: digests, chunks, spreading, pauses.

One manager serves all of these variants, because two would need twice the host memory.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from megatron.moevement.config import MIB
from moevement_ext import CopyEngine, DeviceDigests, DigestPool

MOST_RANGES = 100_000
# Among the arguments of `CopyEngine.submit`.
_PRIORITY_PLACE = 5
# What DeviceDigests has by default.
DEVICE_BLOCKS = 16


class SwitchedPool(DigestPool):
    """A digest pool that can be told to use another number of threads, or to give zeros for digests."""

    threads_wanted: int | None = None

    def __init__(self, threads: int = 1) -> None:
        super().__init__(threads)
        self._others: dict[int, DigestPool] = {}
        self._tickets: dict[int, tuple[DigestPool, int, int]] = {}
        self._last = 0

    def submit(self, addresses: Any, sizes: Any) -> int:
        """Queues ranges."""
        wanted, pool = SwitchedPool.threads_wanted, None
        if wanted == 0:
            addresses, sizes = addresses[:0], sizes[:0]
        elif wanted is not None:
            if wanted not in self._others:
                self._others[wanted] = DigestPool(wanted)
            pool = self._others[wanted]
        ticket = super().submit(addresses, sizes) if pool is None else pool.submit(addresses, sizes)
        self._last += 1
        self._tickets[self._last] = (pool or super(), ticket, len(sizes))  # type: ignore[assignment]
        return self._last

    def wait(self, ticket: int, timeout_seconds: float) -> bytes | None:
        """The digests."""
        pool, its_ticket, count = self._tickets[ticket]
        found = pool.wait(its_ticket, timeout_seconds)
        return found if count or found is None else bytes(16 * MOST_RANGES)

    def close(self) -> None:
        """Ends all threads."""
        for pool in self._others.values():
            pool.close()
        super().close()


class SwitchedDigests(DeviceDigests):
    """Digests of the device that can be told to make none, which leaves them to the pool, or with other blocks.

    `made` is whether there is a device that makes digests in this process.
    """

    made = False
    wanted = True
    blocks_wanted: int | None = None
    _NO_TICKET = 0

    def __init__(self, *arguments: Any, **limits: Any) -> None:
        super().__init__(*arguments, **limits)
        SwitchedDigests.made = True

    def submit(self, addresses: Any, sizes: Any, stream: int = 0, label: str = "") -> int:
        """Starts a batch."""
        if not SwitchedDigests.wanted:
            return self._NO_TICKET
        self.set_blocks(SwitchedDigests.blocks_wanted or DEVICE_BLOCKS)
        return super().submit(addresses, sizes, stream, label)

    def wait(self, ticket: int, timeout_seconds: float) -> bytes | None:
        """The digests; nothing, which the pool makes up for, where none were started."""
        return b"" if ticket == self._NO_TICKET else super().wait(ticket, timeout_seconds)

    def cancel(self, ticket: int) -> bool:
        """Gives up a batch."""
        return ticket == self._NO_TICKET or super().cancel(ticket)


class SwitchedEngine(CopyEngine):
    """A copy engine that can be told to spread what it is given, or to copy next to nothing of it.

    `made` are all engines of this process.
    """

    spread_seconds = 0.0
    copies = True
    made: ClassVar[list[SwitchedEngine]] = []

    def __init__(self, *arguments: Any, **limits: Any) -> None:
        super().__init__(*arguments, **limits)
        self.own_chunks: tuple[int, int] = (limits["chunk_bytes"], limits["chunks_in_flight"])
        SwitchedEngine.made.append(self)

    def set_chunks(self, chunk_bytes: int, chunks_in_flight: int) -> None:
        """Sets chunks, as the calibration does, and remembers them."""
        self.own_chunks = (chunk_bytes, chunks_in_flight)
        self.set_switched(chunk_bytes, chunks_in_flight)

    def set_switched(self, chunk_bytes: int, chunks_in_flight: int) -> None:
        """Sets chunks until somebody else does."""
        super().set_chunks(chunk_bytes, chunks_in_flight)

    def submit(self, *arguments: Any, **options: Any) -> int:
        """Queues a batch; the transcript's, of higher priority than the slots', is not switched."""
        if len(arguments) > _PRIORITY_PLACE and arguments[_PRIORITY_PLACE]:
            return super().submit(*arguments, **options)
        if not self.copies:
            arguments, options = tuple(array[:1] for array in arguments), {**options, "groups": [("nothing", 1)]}
        return super().submit(*arguments, **{"spread_seconds": self.spread_seconds, **options})


class Switched:
    """Hooks with their own settings around those of the manager.

    Args:
        inner: the manager's hooks.
        engine: the manager's copy engine.
        text: with `:` in between, `digests=off`, `device`, `host`, or `8` (threads of the host), `blocks=16` (of the
            device's digests), `chunks=4x2` (MiB, in flight),
            `spread=0.9` (of the time until the fence), `pauses`, `copies=off` (one piece: the cost of all else).
    """

    def __init__(self, inner: Any, engine: SwitchedEngine, text: str) -> None:
        words = dict(word.partition("=")[::2] for word in text.split(":") if word)
        unknown = set(words) - {"digests", "blocks", "chunks", "spread", "pauses", "copies"}
        if unknown:
            raise ValueError(f"--variants: {text}: unknown {unknown.pop()}")
        self._inner, self._engine = inner, engine
        digests = words.get("digests", "on")
        if (digests == "device" or "blocks" in words) and not SwitchedDigests.made:
            raise ValueError(f"--variants: {text}: no device makes digests here")
        self._on_device = digests in ("on", "device")
        self._threads = {"on": None, "device": None, "host": None, "off": 0}.get(digests, -1)
        if self._threads == -1:
            self._threads = int(digests)
        self._blocks = int(words["blocks"]) if "blocks" in words else None
        size, _, flight = words["chunks"].partition("x") if "chunks" in words else ("", "", "")
        self._chunks = (int(float(size) * MIB), int(flight)) if size else None
        self._spread = float(words.get("spread", 0))
        on_or_off = {"on": True, "": True, "off": False}
        self._pauses, self._copies = on_or_off[words.get("pauses", "off")], on_or_off[words.get("copies", "on")]
        self._seconds: deque[float] = deque(maxlen=5)
        self._started = 0.0

    def before_forward(self, iteration: int) -> None:
        """Sets the switches, and begins the slot."""
        SwitchedPool.threads_wanted = self._threads
        SwitchedDigests.wanted, SwitchedDigests.blocks_wanted = self._on_device, self._blocks
        self._engine.set_switched(*(self._chunks or self._engine.own_chunks))
        self._engine.spread_seconds = self._spread * statistics.median(self._seconds or [0.0])
        self._engine.copies = self._copies
        if self._pauses:
            Pauses.engine = self._engine
        self._started = time.perf_counter()
        self._inner.before_forward(iteration)

    def before_optimizer_step(self, iteration: int) -> None:
        """The fence."""
        self._seconds.append(time.perf_counter() - self._started)
        self._inner.before_optimizer_step(iteration)
        # A transcript without slots uses the same engine.
        self._engine.set_switched(*self._engine.own_chunks)
        # The pool is switched by whoever comes next: this slot's digests begin now.
        self._engine.spread_seconds, Pauses.engine = 0.0, None

    def after_optimizer_step(self, iteration: int, outcome: Any) -> None:
        """Hands over the record."""
        self._inner.after_optimizer_step(iteration, outcome)


class Pauses:
    """Keeps the link free from where the device comes to a MoE layer until the host has read what it waits for.

    Core's MoE layers read back how many tokens go to which expert before they launch the experts. Chunks in flight when
    a pause begins are to be over before the router is, so that it begins a module earlier.
    """

    engine: CopyEngine | None = None

    @staticmethod
    @contextlib.contextmanager
    def installed(chunks: Iterable[Any]) -> Iterator[None]:
        """Hooks on the model's MoE layers; they do nothing while `engine` is None."""
        with contextlib.ExitStack() as stack:
            for layer in (module for chunk in chunks for module in chunk.modules() if hasattr(module, "mlp")):
                if hasattr(layer.mlp, "experts"):
                    before, after = _pair_of_hooks()
                    for module, hook in ((layer.pre_mlp_layernorm, before), (layer.mlp.experts, after)):
                        stack.callback(module.register_forward_pre_hook(hook).remove)
            yield


def _pair_of_hooks() -> tuple[Callable[..., None], Callable[..., None]]:
    """Of one layer: what begins a pause, and what ends it."""
    import torch

    begun: list[tuple[CopyEngine, int]] = []

    def before(*_: Any) -> None:
        if Pauses.engine is not None:
            stream = torch.cuda.current_stream().cuda_stream if torch.cuda.is_available() else None
            begun.append((Pauses.engine, Pauses.engine.pause(stream)))

    def after(*_: Any) -> None:
        while begun:
            engine, pause = begun.pop()
            engine.resume(pause)

    return before, after
