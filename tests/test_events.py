import dataclasses
import socket
import time

import pytest

from spark_mnist import events


def received(found, count):
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_events_of_several_ranks_arrive():
    found = []
    with events.Inbox("localhost", "127.0.0.1", found.append) as inbox:
        boxes = [events.Outbox(inbox.address) for _ in range(3)]
        for rank, box in enumerate(boxes):
            box.send(epoch=rank, loss=0.5)
        assert sorted(event["epoch"] for event in received(found, 3)) == [0, 1, 2]
    assert found[0]["loss"] == 0.5


@pytest.mark.parametrize(
    "line", [b"guess {}\n", b"\n", b"x" * 100_000, b'{"epoch": 1}\n', b"\xff\x00 \n"]
)
def test_a_stranger_without_the_key_is_not_heard_and_disturbs_nobody(line):
    found = []
    with events.Inbox("127.0.0.1", "127.0.0.1", found.append) as inbox:
        address = (inbox.address.host, inbox.address.port)
        with (
            socket.create_connection(address) as silent,
            socket.create_connection(address) as stranger,
        ):
            stranger.sendall(line)
            events.Outbox(inbox.address).send(epoch=1)
            assert received(found, 1) == [{"epoch": 1}]
            assert silent.fileno() > 0


def test_a_message_of_another_fit_is_not_heard():
    found = []
    with events.Inbox("127.0.0.1", "127.0.0.1", found.append) as inbox:
        events.Outbox(dataclasses.replace(inbox.address, key=b"other")).send(epoch=1)
        events.Outbox(inbox.address).send(epoch=2)
        assert received(found, 1) == [{"epoch": 2}]


def test_what_may_be_left_out_is_sent_seldom(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    box = events.Outbox(None)
    sent = []
    monkeypatch.setattr(box, "send", lambda **event: sent.append(event["step"]))
    for step in range(6):
        box.send_seldom(step=step)
        now[0] += 0.6 * events.SELDOM
    assert sent == [0, 2, 4]


def test_a_driver_that_is_gone_does_not_matter_to_a_rank():
    with events.Inbox("127.0.0.1", "127.0.0.1", print) as inbox:
        box = events.Outbox(inbox.address)
    for _ in range(3):
        box.send(epoch=1)
    events.Outbox(inbox.address).send(epoch=1)
    events.Outbox(None).send(epoch=1)


def test_the_inbox_ends_with_its_block():
    with events.Inbox("127.0.0.1", "127.0.0.1", print) as inbox:
        address = (inbox.address.host, inbox.address.port)
        socket.create_connection(address).close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(address)
