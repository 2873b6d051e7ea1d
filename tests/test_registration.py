"""Assignment of ranks to agents, and messages about ranks that end."""

import urllib.error
import urllib.request

import pytest

from spark_mnist.core import channel
from spark_mnist.launch import registration, rendezvous


def numbers(hosts):
    names = ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    return [tuple(slot[f"HOROVOD_{name}"] for name in names) for slot in registration.assign(hosts)]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["a"], [(0, 0, 1, 0, 1)]),
        (["a", "a"], [(0, 0, 2, 0, 1), (1, 1, 2, 0, 1)]),
        (["a", "b"], [(0, 0, 1, 0, 2), (1, 0, 1, 1, 2)]),
        (["a", "b", "a"], [(0, 0, 2, 0, 2), (2, 0, 1, 1, 2), (1, 1, 2, 0, 1)]),
        (
            ["b", "a", "a", "a"],
            [(0, 0, 1, 0, 2), (1, 0, 3, 1, 2), (2, 1, 3, 0, 1), (3, 2, 3, 0, 1)],
        ),
    ],
)
def test_ranks_of_a_host_follow_each_other(hosts, expected):
    assert numbers(hosts) == expected
    assert {slot["HOROVOD_SIZE"] for slot in registration.assign(hosts)} == {len(hosts)}


class Driver:
    """Agents that hear made-up events, and what they are told."""

    def __init__(self, count):
        self.told, self.now = [], 100.0
        settings = {"HOROVOD_CONTROLLER": "gloo"}
        self.agents = registration.Agents(count, self.tell, settings, lambda: self.now)

    def tell(self, link, **message):
        self.told.append((link, message))
        return True

    def ready(self, index, host="h", boot="1"):
        event = {"agent": index, "link": 10 + index, "host": host}
        self.agents.hear(event)
        self.agents.hear({**event, "ready": True, "boot": boot})


def test_nobody_gets_a_rank_before_all_are_there():
    driver = Driver(2)
    driver.ready(1)
    assert driver.told == []
    driver.ready(0)
    assert [(link, message["rank"]) for link, message in driver.told] == [(10, 0), (11, 1)]
    environment = driver.told[1][1]["environment"]
    assert (environment["HOROVOD_LOCAL_RANK"], environment["HOROVOD_CONTROLLER"]) == ("1", "gloo")


def test_hosts_of_one_name_are_told_apart():
    driver = Driver(2)
    driver.ready(0, "localhost", "one")
    driver.ready(1, "localhost", "another")
    slots = [message["environment"] for _, message in driver.told]
    assert [slot["HOROVOD_LOCAL_SIZE"] for slot in slots] == ["1", "1"]
    assert len({slot["HOROVOD_HOSTNAME"] for slot in slots}) == 2


def test_the_first_rank_that_ends_without_a_report_is_kept_and_the_last_output():
    driver = Driver(2)
    driver.ready(0)
    driver.ready(1)
    ended = {"agent": 1, "link": 11, "rank": 1, "reported": False}
    driver.agents.hear({"agent": 1, "link": 11, "output": "one\ntwo\n"})
    driver.agents.hear({**ended, "exited": 137})
    driver.agents.hear({**ended, "agent": 0, "link": 10, "rank": 0, "exited": 134})
    assert driver.agents.exit.rank == 1
    assert str(driver.agents.exit) == (
        "exit code 137, as of a process that was killed, often for lack of memory"
    )
    assert driver.agents.tail == "\nLast output of the ranks:\none\ntwo"


def test_what_the_driver_ends_is_no_loss():
    driver = Driver(1)
    driver.ready(0)
    driver.agents.end()
    assert driver.told[-1] == (10, {"end": True})
    ended = {"agent": 0, "link": 10, "rank": 0, "reported": False, "exited": 137}
    driver.agents.hear(ended)
    assert driver.agents.exit is None


def test_an_agent_may_come_back_over_another_connection():
    driver = Driver(2)
    driver.ready(0)
    driver.ready(1)
    driver.agents.hear({"agent": 1, "hung_up": True, "link": 11})
    driver.agents.hear({"agent": 1, "host": "h", "link": 12})
    driver.agents.hear({"agent": 1, "hung_up": True, "link": 11})
    driver.now += registration.AGENT_RECONNECT_S + 1
    assert driver.agents.lost() is None
    driver.agents.hear({"agent": 1, "hung_up": True, "link": 12})
    assert driver.agents.lost() is None
    driver.now += registration.AGENT_RECONNECT_S + 1
    assert driver.agents.lost() == 1


def test_ranks_find_what_others_left():
    with channel.HeartbeatServer(
        "127.0.0.1", "127.0.0.1", print, rendezvous.Rendezvous().answer
    ) as server:
        url = f"http://127.0.0.1:{server.address.port}/global/0"

        def ask(method, content=None):
            request = urllib.request.Request(url, data=content, method=method)
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.read()

        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask("GET")
        ask("PUT", b"\x00address")
        assert ask("GET") == b"\x00address"
        ask("PUT", b"x" * rendezvous.MAX_VALUE_BYTES)
        assert len(ask("GET")) == rendezvous.MAX_VALUE_BYTES
        ask("DELETE")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask("GET")
    with pytest.raises(OSError, match="refused"):
        ask("GET")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /global/0 HTTP/1.1\r\nHost: h\r\n\r\n", 404),
        (b"PUT /global/0 HTTP/1.1\r\nContent-Length: 2\r\n\r\nab", 200),
        (b"PUT /global/0 HTTP/1.1\r\ncontent-length:2\r\n\r\na", None),
        (b"PUT /global/0 HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n", 413),
        (b"GET /global/0 HT", None),
        (b"POST /global/0 HTTP/1.1\r\n", 400),
        (b"something else\n", 400),
        (b"x" * 20_000, 400),
        (b"", None),
    ],
)
def test_a_request_is_answered_once_it_is_whole(request_bytes, status):
    response = rendezvous.Rendezvous().answer(request_bytes)
    assert (response and int(response.split()[1])) == status
