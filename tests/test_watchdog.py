import pytest

from spark_mnist.launch import watchdog


class Clock:
    """A watchdog of two ranks and the seconds that it is told."""

    def __init__(self, timeout=60.0):
        self.now = 1000.0
        self.watch = watchdog.Watchdog(2, timeout, clock=lambda: self.now)
        self.cpu = [0.0, 0.0]
        self.moves = [0, 0]

    def hear(self, rank, cpu=0.0, moved=False, **event):
        self.cpu[rank] += cpu
        self.moves[rank] += moved
        signs = {"rank": rank, "moves": self.moves[rank], "cpu": self.cpu[rank], "link": 1}
        self.watch.hear({**signs, "pid": 40 + rank, "host": "node", **event})

    def failure_reason(self, seconds=0.0):
        """Look each second, as the driver does; returns the last reason."""
        while seconds > 0:
            self.now += min(1.0, seconds)
            seconds -= 1.0
            self.watch.failure_reason()
        return self.watch.failure_reason()


@pytest.fixture
def clock():
    clock = Clock()
    for rank in range(2):
        clock.hear(rank, moved=True, epoch=2, step=5)
    return clock


def beats(clock, seconds, ranks=(0, 1), every=5.0, **event):
    """Let time pass with heartbeats; returns the first reason and when it came."""
    passed = 0.0
    while passed < seconds:
        passed += every
        found = clock.failure_reason(every)
        for rank in ranks:
            clock.hear(rank, **event)
        if found or (found := clock.failure_reason()):
            return found, passed
    return None, passed


def test_before_the_first_sign_horovod_has_the_word_but_not_for_ever():
    clock = Clock()
    assert clock.failure_reason(watchdog.START_TIMEOUT_S) is None
    assert clock.failure_reason(1) == "no rank was heard of for 361 seconds"


def test_a_rank_that_falls_silent_is_named_after_the_timeout(clock):
    found, seconds = beats(clock, 200, ranks=(0,), moved=True)
    assert found == (
        "rank 1 (process 41 on node) has not been heard of for 65 seconds; it was in epoch 2, step 5"
    )
    assert seconds == 65


def test_a_rank_may_start_later_than_another_but_not_for_ever():
    late = Clock(timeout=5.0)
    assert late.failure_reason(300) is None
    late.hear(0, moved=True)
    assert beats(late, 55, ranks=(0,), moved=True)[0] is None
    assert "rank 1 (did not start) has not" in beats(late, 55, ranks=(0,), moved=True)[0]


def test_ranks_that_wait_without_a_step_are_ended_after_the_timeout(clock):
    found, seconds = beats(clock, 200, cpu=0.1)
    assert found.startswith("no rank has taken a step for 65 seconds: rank 0 in epoch 2, step 5, ")
    assert seconds == 65


@pytest.mark.parametrize("sign", [{"cpu": 4.0}, {"busy": True}])
def test_a_rank_that_is_at_work_may_take_ten_times_as_long(clock, sign):
    found, _ = beats(clock, 2000, **sign)
    assert found.startswith("no rank has taken a step for 605 seconds")


def test_work_before_a_standstill_does_not_lengthen_it(clock):
    assert beats(clock, 100, cpu=20.0)[0] is None
    _, seconds = beats(clock, 200, cpu=0.1)
    assert seconds == 65


def test_steps_on_any_rank_are_enough(clock):
    for _ in range(10):
        assert beats(clock, 50, cpu=0.1)[0] is None
        clock.hear(0, moved=True)


def hang_up(clock, rank, link=1):
    clock.watch.hear({"rank": rank, "hung_up": True, "link": link})


def test_a_rank_that_goes_away_without_a_word_is_lost_after_the_others_had_time_to_report(clock):
    hang_up(clock, 1)
    assert clock.failure_reason(watchdog.RECONNECT_GRACE_S) is None
    assert clock.failure_reason(0.1) == "rank 1 (process 41 on node) went away in epoch 2, step 5"


def test_the_first_that_went_away_is_named(clock):
    hang_up(clock, 1)
    assert clock.failure_reason(2) is None
    hang_up(clock, 0)
    assert clock.failure_reason(watchdog.RECONNECT_GRACE_S).startswith("rank 1 ")


def test_a_rank_that_ends_or_connects_again_is_not_lost(clock):
    hang_up(clock, 1)
    clock.hear(1)
    hang_up(clock, 1, link="the connection before")
    clock.hear(0, ended=True)
    hang_up(clock, 0)
    assert clock.failure_reason(30) is None


def test_an_ended_rank_does_not_shorten_the_time_of_another(clock):
    clock.hear(0, ended=True)
    hang_up(clock, 0)
    assert clock.failure_reason(30) is None
    clock.hear(1)
    hang_up(clock, 1)
    assert clock.failure_reason(watchdog.RECONNECT_GRACE_S) is None


def test_the_driver_can_wait_for_the_last_process(clock):
    clock.hear(0, ended=True)
    hang_up(clock, 0)
    assert not clock.watch.all_gone()
    hang_up(clock, 1)
    assert clock.watch.all_gone()


def test_while_the_driver_stood_still_the_ranks_were_not_silent(clock):
    clock.failure_reason()
    clock.now += 500
    assert clock.failure_reason() is None
    assert "has not been heard of" in clock.failure_reason(61)


def test_ended_ranks_may_take_their_time_but_not_for_ever():
    clock = Clock(timeout=5.0)
    for rank in range(2):
        clock.hear(rank, moved=True, ended=True)
    assert clock.failure_reason(watchdog.START_SLACK_S) is None
    assert "no rank has taken a step" in clock.failure_reason(1)


def test_a_sign_of_life_that_was_late_does_not_take_back_an_end(clock):
    clock.hear(0, ended=True)
    clock.hear(0)
    hang_up(clock, 0)
    assert clock.failure_reason(watchdog.RECONNECT_GRACE_S + 1) is None


def test_a_rank_may_connect_again_after_the_driver_stood_still(clock):
    hang_up(clock, 1)
    clock.now += 20
    assert clock.failure_reason() is None
    assert clock.failure_reason(watchdog.RECONNECT_GRACE_S + 1).startswith("rank 1 ")


@pytest.mark.parametrize(("device", "expected"), [("CPU", 65.0), ("GPU 0", 605.0)])
def test_a_rank_that_waits_for_its_gpu_counts_as_at_work(clock, device, expected):
    """Compiling a large model keeps a GPU rank from its first step, and its process idle."""
    for rank in range(2):
        clock.hear(rank, device=device)
    found, seconds = beats(clock, 700)
    assert "no rank has taken a step" in found
    assert seconds == expected
