"""Shutting the sockets of this process: what frees a thread that is blocked in a gloo collective.

Gloo has no abort: `abort`, `shutdown` and `destroy_process_group` return at once and the collective stays blocked
until its time-out. A shut socket fails it within a millisecond.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

_CONNECT_SECONDS = 1.0


def shut_down_sockets(keep_ports: Collection[int] = ()) -> int:
    """Shuts every connected TCP socket of this process for reading, except where either end has one of the given ports.

    Not for writing: gloo loses an operation whose write fails before its thread has seen the end of the connection.

    Args:
        keep_ports: ports of connections that stay, such as that of a store.

    Returns:
        How many were shut.
    """
    count = 0
    for descriptor in descriptors():
        with _tcp(descriptor) as connection:
            if connection is None:
                continue
            try:
                ports = (connection.getpeername()[1], connection.getsockname()[1])
                if not any(port in keep_ports for port in ports):
                    connection.shutdown(socket.SHUT_RD)
                    count += 1
            except OSError:
                pass  # a listening socket, or one that its owner or its peer closes at this moment
    return count


def break_gloo_listeners(ranks: int) -> int:
    """Frees a thread that builds a gloo group and waits for a rank that has died.

    Such a thread waits for the other rank's connection, so it has no socket that could be shut. It gets that connection
    here, closed: a rank that connects says which of the awaited connections it is, by a number of 8 bytes that a group
    counts from 0.

    Args:
        ranks: of the largest group.

    Returns:
        How many listening sockets of this process were connected to.
    """
    count = 0
    for descriptor in descriptors():
        with _tcp(descriptor) as listener:
            if listener is None or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            count += 1
            try:
                for number in range(ranks):
                    with socket.socket(listener.family) as connection:
                        connection.settimeout(_CONNECT_SECONDS)
                        connection.connect(listener.getsockname())
                        connection.sendall(number.to_bytes(8, sys.byteorder))
            except OSError:
                pass  # its owner closes it at this moment, or accepts nothing any more
    return count


def local_ports_to(port: int) -> frozenset[int]:
    """Local ports of this process's connections to `port`."""
    found = set()
    for descriptor in descriptors():
        with _tcp(descriptor) as connection:
            if connection is None:
                continue
            try:
                if connection.getpeername()[1] == port:
                    found.add(connection.getsockname()[1])
            except OSError:
                pass  # not connected
    return frozenset(found)


def shut_down_local_ports(ports: Collection[int]) -> None:
    """Shuts this process's connections that have one of these local ports."""
    for descriptor in descriptors():
        with _tcp(descriptor) as connection:
            if connection is None:
                continue
            try:
                connection.getpeername()
                if connection.getsockname()[1] in ports:
                    connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # a listening socket, or gone


def descriptors() -> list[int]:
    """Open file descriptors of this process."""
    return [int(name) for name in os.listdir("/proc/self/fd")]


@contextmanager
def _tcp(descriptor: int) -> Iterator[socket.socket | None]:
    """A second handle on a TCP socket; None for anything else."""
    try:
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
            yield None
            return
        handle = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        yield None  # closed since it was listed
        return
    with handle:
        tcp = handle.family in (socket.AF_INET, socket.AF_INET6) and handle.type == socket.SOCK_STREAM
        yield handle if tcp else None
