import os

from megatron.moevement.agent.channel import Channel


def test_messages_arrive_whole_and_in_order() -> None:
    mine, other = Channel.pair()
    theirs = Channel.adopt(other.detach())
    assert not theirs.pending
    long = {"environment": {"A": "x" * 50_000}}
    assert mine.send({"do": "open", "generation": 1}) and mine.send(long)
    assert theirs.pending
    assert theirs.receive() == ({"do": "open", "generation": 1}, [])
    assert theirs.receive() == (long, [])
    mine.close()
    assert theirs.receive() == (None, [])
    assert not theirs.send({})
    theirs.close()


def test_descriptors_travel() -> None:
    mine, other = Channel.pair()
    theirs = Channel.adopt(other.detach())
    readable, writable = os.pipe()
    assert mine.send({"is": "fork"}, (writable,))
    os.close(writable)
    _, (copy,) = theirs.receive()
    os.write(copy, b"here")
    assert os.read(readable, 10) == b"here"
    for descriptor in (readable, copy):
        os.close(descriptor)
    number = theirs.release()
    os.close(number)
    assert mine.receive()[0] is None
    mine.close()
