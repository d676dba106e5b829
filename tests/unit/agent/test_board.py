from datetime import timedelta

from megatron.moevement.agent.board import Board, connect, serve

TIMEOUT = timedelta(seconds=60)


def test_events_and_orders_are_read_once_and_in_order() -> None:
    server, port = serve("127.0.0.1", 0)
    head, one, two = (Board(connect("127.0.0.1", port, TIMEOUT), 60.0) for _ in range(3))
    assert [one.enter(), two.enter()] == [0, 1]
    assert not list(head.events()) and not list(one.orders(0))
    one.post(0, {"is": "ready"})
    two.post(1, {"is": "ended"})
    one.post(0, {"is": "gone"})
    assert [(event["agent"], event["is"]) for event in head.events()] == [(0, "ready"), (1, "ended"), (0, "gone")]
    assert not list(head.events())
    for number in range(3):
        head.order(1, {"do": number})
    head.order(0, {"do": "x"})
    assert [order["do"] for order in two.orders(1)] == [0, 1, 2]
    assert [order["do"] for order in one.orders(0)] == ["x"]
    assert not list(two.orders(1))
    # Nothing is kept that was read.
    assert server.num_keys() <= 4


def test_signs_of_life() -> None:
    _server, port = serve("127.0.0.1", 0)
    head, one = (Board(connect("127.0.0.1", port, TIMEOUT), 60.0) for _ in range(2))
    assert head.lives([]) == {}
    one.renew(0, [])
    one.renew(0, [{"rank": 3}])
    one.renew(7, [])
    assert head.lives([0, 7]) == {0: (2, [{"rank": 3}]), 7: (3, [])}


def test_an_announced_event_that_never_comes_is_given_up() -> None:
    server, port = serve("127.0.0.1", 0)
    head, one = (Board(connect("127.0.0.1", port, TIMEOUT), patience) for patience in (0.0, 60.0))
    patient = Board(connect("127.0.0.1", port, TIMEOUT), 600.0)
    server.add("events", 1)  # its agent dies before it writes the event
    one.post(0, {"is": "ready"})
    assert not list(patient.events())
    assert [event["is"] for event in head.events()] == ["ready"]
