"""The line between an agent and one worker process: small JSON messages over a Unix socket, in order.

It is no TCP socket, so that what frees a worker from gloo leaves it alone; and its end tells either side that the
other one is gone.
"""

from __future__ import annotations

import json
import select
import socket
from typing import Any

Message = dict[str, Any]
# What the agent puts into a worker's environment.
CHANNEL_VARIABLE = "MOEVEMENT_AGENT_CHANNEL"
MARKS_VARIABLE = "MOEVEMENT_AGENT_MARKS"
STORE_VARIABLE = "MOEVEMENT_AGENT_STORE"
GENERATION_VARIABLE = "MOEVEMENT_GENERATION"
# EX_TEMPFAIL: the job did not finish and can go on from what is persisted; a scheduler may requeue it.
EXIT_AGAIN = 75
# A worker asks for a fresh process in its place: another has failed, and there is nothing to roll back to.
EXIT_REPLACE_ME = 76
_LARGEST_BYTES = 1 << 17


class Channel:
    """One end.

    Args:
        end: a connected Unix socket that keeps messages apart.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """The agent's end, and the socket for the worker."""
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(mine), other

    @classmethod
    def adopt(cls, descriptor: int) -> Channel:
        """The end that this process has inherited."""
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """For `select`."""
        return self._end.fileno()

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> bool:
        """Sends, with copies of descriptors; False if the other side is gone or doesn't read."""
        try:
            socket.send_fds(self._end, [json.dumps(message).encode()], descriptors, socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def receive(self) -> tuple[Message | None, list[int]]:
        """Waits for a message and the descriptors that came with it; no message: the other side is gone."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._end, _LARGEST_BYTES, 4)
        except OSError:
            return None, []
        return (json.loads(data) if data else None), descriptors

    @property
    def pending(self) -> bool:
        """Whether something can be received at once."""
        return bool(select.select([self._end], [], [], 0)[0])

    def release(self) -> int:
        """Leaves the descriptor open, for another owner in this process; returns it."""
        return self._end.detach()

    def close(self) -> None:
        """Closes this end."""
        self._end.close()
