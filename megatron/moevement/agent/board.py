"""What agents and the head write to each other in the head's store: events, orders, signs of life.

Events and orders are numbered, so that each side reads all of them once and in order. Keys: `event/<n>` and
`order/<agent>/<n>` (deleted once read), `life/<agent>`.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

Message = dict[str, Any]


def connect(host: str, port: int, timeout: timedelta) -> Store:
    """A new connection to the head's store."""
    store: Store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
    return store


def serve(host: str, port: int) -> tuple[Store, int]:
    """The head's store, and the port that it listens on (the given one, unless that is 0).

    It listens on the address of `host` alone.

    Raises:
        OSError: it can't listen there.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(1024)
    bound = int(listener.getsockname()[1])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, bound, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, bound


class Board:
    """One agent's view of the store.

    Args:
        store: a connection of its own.
        patience_seconds: after how long an announced event that doesn't come is given up: its sender is gone.
    """

    def __init__(self, store: Store, patience_seconds: float) -> None:
        self._store, self._patience = store, patience_seconds
        self._next_event, self._missing_since = 1, 0.0
        self._sent: dict[int, int] = {}
        self._next_order = 1
        self._renewals = 0

    def enter(self) -> int:
        """A number of its own for this agent."""
        return int(self._store.add("agents", 1)) - 1

    def post(self, agent: int, event: Message) -> None:
        """An agent tells the head something."""
        number = self._store.add("events", 1)
        self._store.set(f"event/{number}", json.dumps({**event, "agent": agent}))

    def events(self) -> Iterator[Message]:
        """What the head hasn't read yet."""
        announced = self._store.add("events", 0)
        while self._next_event <= announced:
            key = f"event/{self._next_event}"
            if not self._store.check([key]):
                self._missing_since = self._missing_since or time.monotonic()
                if time.monotonic() - self._missing_since < self._patience:
                    return
            else:
                yield self._take(key)
            self._next_event, self._missing_since = self._next_event + 1, 0.0

    def order(self, agent: int, message: Message) -> None:
        """The head tells an agent what to do."""
        number = self._sent[agent] = self._sent.get(agent, 0) + 1
        self._store.set(f"order/{agent}/{number}", json.dumps(message))

    def orders(self, agent: int) -> Iterator[Message]:
        """What this agent hasn't read yet."""
        while self._store.check([key := f"order/{agent}/{self._next_order}"]):
            self._next_order += 1
            yield self._take(key)

    def renew(self, agent: int, reports: list[Message]) -> None:
        """A sign of life, with what the agent's workers do."""
        self._renewals += 1
        self._store.set(f"life/{agent}", json.dumps([self._renewals, reports]))

    def lives(self, agents: Iterable[int]) -> dict[int, tuple[int, list[Message]]]:
        """The last sign of life of each agent: its number, and the reports."""
        listed = list(agents)
        if not listed:
            return {}
        values = self._store.multi_get([f"life/{agent}" for agent in listed])
        return {agent: tuple(json.loads(value)) for agent, value in zip(listed, values, strict=True)}

    def _take(self, key: str) -> Message:
        message: Message = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return message
