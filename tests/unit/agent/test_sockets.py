import socket
import sys
import threading

from megatron.moevement.agent.sockets import (
    break_gloo_listeners,
    local_ports_to,
    shut_down_local_ports,
    shut_down_sockets,
)


def connection() -> tuple[socket.socket, socket.socket, int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        mine = socket.create_connection(("127.0.0.1", port))
        theirs, _ = listener.accept()
    return mine, theirs, port


def test_a_blocked_reader_is_freed_and_kept_ports_are_left_alone() -> None:
    mine, theirs, port = connection()
    kept, kept_end, kept_port = connection()
    read = list[bytes]()
    reader = threading.Thread(target=lambda: read.append(mine.recv(1)))
    reader.start()
    assert shut_down_sockets({kept_port}) >= 1
    reader.join(60)
    assert read == [b""]
    kept.sendall(b"x")
    assert kept_end.recv(1) == b"x"
    assert port not in {kept_port}
    for end in (mine, theirs, kept, kept_end):
        end.close()


def test_connections_to_a_port_are_found_and_shut_alone() -> None:
    mine, theirs, port = connection()
    other, other_end, _ = connection()
    ports = local_ports_to(port)
    assert ports == {mine.getsockname()[1]}
    shut_down_local_ports(ports)
    assert theirs.recv(1) == b""
    other.sendall(b"x")
    assert other_end.recv(1) == b"x"
    for end in (mine, theirs, other, other_end):
        end.close()


def test_other_sockets_are_left_alone() -> None:
    one, two = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shut_down_sockets()
        one.sendall(b"x")
        assert two.recv(1) == b"x"
        late = socket.create_connection(listener.getsockname())
        listener.accept()[0].close()
        late.close()
    one.close()
    two.close()


def test_a_listener_gets_every_awaited_connection_closed() -> None:
    heard = list[bytes]()

    def listen(listener: socket.socket) -> None:
        for _ in range(3):
            with listener.accept()[0] as connection:
                heard.append(connection.recv(8))
                assert connection.recv(1) == b""

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen, args=[listener])
        thread.start()
        assert break_gloo_listeners(3) >= 1
        thread.join(60)
    assert sorted(int.from_bytes(number, sys.byteorder) for number in heard) == [0, 1, 2]
