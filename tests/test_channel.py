import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from spark_mnist.core import channel
from tests.conftest import PROGRAMS


def received(found, count):
    deadline = time.monotonic() + 10
    while len(found) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_events_of_several_ranks_arrive():
    found = []
    with channel.HeartbeatServer("localhost", "127.0.0.1", found.append) as server:
        boxes = [channel.HeartbeatClient(server.address, rank) for rank in range(3)]
        for box in boxes:
            box.tick()
            assert box.send(loss=0.5)
        assert sorted(event["rank"] for event in received(found, 3)) == [0, 1, 2]
    assert (found[0]["loss"], found[0]["moves"]) == (0.5, 1)
    assert found[0]["cpu"] > 0


@pytest.mark.parametrize(
    "line", [b"guess {}\n", b"\n", b"x" * 100_000, b'{"epoch": 1}\n', b"\xff\x00 \n"]
)
def test_a_stranger_without_the_key_is_not_heard_and_disturbs_nobody(line):
    found = []
    with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", found.append) as server:
        address = (server.address.host, server.address.port)
        with (
            socket.create_connection(address) as silent,
            socket.create_connection(address) as stranger,
        ):
            stranger.sendall(line)
            channel.HeartbeatClient(server.address).send(epoch=1)
            assert [event["epoch"] for event in received(found, 1) if "epoch" in event] == [1]
            assert silent.fileno() > 0


def test_a_message_of_another_fit_is_not_heard():
    found = []
    with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", found.append) as server:
        channel.HeartbeatClient(dataclasses.replace(server.address, key=b"other")).send(epoch=1)
        channel.HeartbeatClient(server.address).send(epoch=2)
        assert [event["epoch"] for event in received(found, 1) if "epoch" in event] == [2]


def test_what_may_be_left_out_is_sent_seldom(monkeypatch):
    now = [100.0]
    box = channel.HeartbeatClient(None, clock=lambda: now[0])
    sent = []
    monkeypatch.setattr(box, "send", lambda **event: sent.append(event["step"]))
    for step in range(6):
        box.send_throttled(step=step)
        now[0] += 0.6 * channel.EVENT_INTERVAL_S
    assert sent == [0, 2, 4]


def test_a_driver_that_is_gone_does_not_matter_to_a_rank():
    with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", print) as server:
        box = channel.HeartbeatClient(server.address)
    for _ in range(3):
        box.send(epoch=1)
    assert not channel.HeartbeatClient(server.address).send(epoch=1)
    assert not channel.HeartbeatClient(None).send(epoch=1)


def test_the_driver_hears_when_a_connection_ends_and_when_a_rank_does():
    found = []
    with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", found.append) as server:
        with channel.HeartbeatClient(server.address, rank=3):
            received(found, 1)
        received(found, 3)
    assert found[0]["pid"] == os.getpid()
    assert found[1]["ended"]
    assert found[2] == {"rank": 3, "hung_up": True, "link": found[1]["link"]}


def test_a_rank_shows_that_it_lives_and_connects_again(monkeypatch):
    found = []
    with (
        channel.HeartbeatServer("127.0.0.1", "127.0.0.1", found.append) as server,
        channel.HeartbeatClient(server.address, disconnect_timeout=0.5) as box,
    ):
        received(found, 4)
        box._link.socket.shutdown(socket.SHUT_RDWR)
        before = len(found)
        received(found, before + 4)
    assert len(found) >= before + 4
    assert sum("hung_up" in event for event in found) >= 1
    assert len({event["link"] for event in found}) == 2


def test_a_rank_whose_driver_is_gone_ends_itself():
    found = []
    server = channel.HeartbeatServer("127.0.0.1", "127.0.0.1", found.append)
    with server:
        address = (str(server.address.port), server.address.key.hex())
        rank = subprocess.Popen([sys.executable, PROGRAMS / "orphan.py", *address])
        received(found, 2)
    assert found
    with rank:
        assert rank.wait(30) == channel.ORPHAN_EXIT_CODE


def test_the_inbox_ends_with_its_block():
    with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", print) as server:
        address = (server.address.host, server.address.port)
        socket.create_connection(address).close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(address)


def test_a_long_warning_arrives_in_any_script():
    found = []
    with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", found.append) as server:
        box = channel.HeartbeatClient(server.address)
        assert box.send(warning="\U0001f525" * channel.MAX_WARNING_CHARS)
        assert box.send(epoch=1)
        assert [list(event)[-2] for event in received(found, 2)] == ["warning", "epoch"]


def test_lines_go_both_ways():
    found = []
    with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", found.append) as server:
        link = channel.Link(server.address)
        link.send({"agent": 3})
        (event,) = received(found, 1)
        assert server.tell(event["link"], rank=7)
        assert server.tell(event["link"], end=True)
        messages = []
        while len(messages) < 2:
            messages += link.read()
        assert messages == [{"rank": 7}, {"end": True}]
        link.close()
        assert received(found, 2)[1] == {"agent": 3, "hung_up": True, "link": event["link"]}
        assert not server.tell(event["link"], rank=7)


def test_a_captured_line_is_worth_nothing_a_second_time():
    found = []
    with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", found.append) as server:
        link = channel.Link(server.address)
        sent = []

        class Tapped:
            def sendall(self, line):
                sent.append(line)
                link_socket.sendall(line)

        link_socket, link.socket = link.socket, Tapped()
        link.send({"rank": 0, "step": 1})
        received(found, 1)
        link_socket.sendall(sent[0])  # again on the same connection
        received(found, 2)
        other = channel.Link(server.address)
        other.socket.sendall(sent[0])  # and on another
        assert other.socket.recv(1) == b""
        assert [event.get("step") for event in found] == [1, None]
        assert found[1]["hung_up"]


def test_a_message_that_another_signs_ends_the_agents_connection():
    found = []
    with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", found.append) as server:
        link = channel.Link(server.address)
        link.send({"agent": 0})
        (event,) = received(found, 1)
        server.address = dataclasses.replace(server.address, key=b"other")
        server.tell(event["link"], end=True)
        assert link.read() is None


def test_silent_strangers_cost_no_thread_and_not_all_stay(monkeypatch):
    monkeypatch.setattr(channel, "MAX_UNSIGNED_CONNECTIONS", 50)
    found = []
    with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", found.append) as server:
        threads = threading.active_count()
        address = (server.address.host, server.address.port)
        silent = [socket.create_connection(address) for _ in range(300)]
        deadline = time.monotonic() + 10
        while len(server._peers) != 50 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(server._peers) == 50
        assert threading.active_count() == threads
        assert channel.HeartbeatClient(server.address).send(epoch=1)
        assert [event["epoch"] for event in received(found, 1) if "epoch" in event] == [1]
        for one in silent:
            one.close()


def test_the_first_free_port_of_a_range_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with channel.HeartbeatServer("127.0.0.1", "127.0.0.1", print, ports=(taken, 0)) as server:
            assert server.address.port != taken
        with pytest.raises(OSError, match="in use"):
            channel.HeartbeatServer("127.0.0.1", "127.0.0.1", print, ports=(taken, taken))
