"""When the next server process is started: pure."""

from __future__ import annotations

import signal

from tinker_server.restarts import MAX_DELAY, MAX_FAILED_STARTS, Life, RestartPolicy

READY_THEN_KILLED = Life(status=-signal.SIGKILL, accepted=True, was_ready=True)
KILLED_WHILE_LOADING = Life(status=-signal.SIGKILL, accepted=True, was_ready=False)
KILLED_WHILE_STARTING = Life(status=-signal.SIGKILL, accepted=False, was_ready=False)
MODEL_DOES_NOT_START = Life(status=1, accepted=True, was_ready=False)


def delays(*lives: Life) -> list[float | None]:
    policy = RestartPolicy()
    return [policy.delay(life) for life in lives]


def test_a_server_that_was_ready_comes_back_at_once_however_often_it_dies() -> None:
    assert delays(*[READY_THEN_KILLED] * 100) == [0.0] * 100


def test_what_says_itself_that_it_cannot_start_is_not_started_again() -> None:
    assert delays(Life(status=2, accepted=False, was_ready=False)) == [None]
    assert delays(MODEL_DOES_NOT_START) == [None]
    assert delays(Life(status=0, accepted=False, was_ready=False)) == [None]  # --help
    assert delays(KILLED_WHILE_STARTING, MODEL_DOES_NOT_START) == [0.0, None]


def test_once_it_was_ready_a_failure_may_pass_but_not_for_ever() -> None:
    found = delays(READY_THEN_KILLED, *[MODEL_DOES_NOT_START] * MAX_FAILED_STARTS)
    assert found == [0.0, 0.0, 0.5, 1.0, 2.0, None]


def test_deaths_before_it_accepts_are_counted_and_being_ready_makes_up_for_them() -> None:
    four = [KILLED_WHILE_STARTING] * (MAX_FAILED_STARTS - 1)
    assert delays(*four, KILLED_WHILE_STARTING)[-1] is None
    assert delays(*four, READY_THEN_KILLED, *four)[-5:] == [0.0, 0.0, 0.5, 1.0, 2.0]


def test_deaths_while_models_load_wait_longer_and_longer_but_never_give_up() -> None:
    found = delays(*[KILLED_WHILE_LOADING] * 12)
    assert found[:4] == [0.0, 0.5, 1.0, 2.0]
    assert found[-1] == MAX_DELAY


def test_how_a_life_ended_is_told() -> None:
    assert READY_THEN_KILLED.describe() == "was killed by signal 9"
    assert MODEL_DOES_NOT_START.describe() == "ended with status 1"
