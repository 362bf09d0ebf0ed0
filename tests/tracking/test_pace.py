from __future__ import annotations

import pytest

from clplatform.tracking.pace import Pace, left_text


def test_time_left_counts_the_experiences_to_come() -> None:
    now = [0.0]
    pace = Pace(3, clock=lambda: now[0])
    pace.start_experience(0, 10)
    assert pace.seconds_left() is None
    now[0] = 5.0  # preparing is not training
    for _ in range(6):
        pace.count_step()
        now[0] += 1.0
    # 6 steps took (11 − 5) s after the first: 4 left at 1.2 s, and two whole experiences
    assert pace.seconds_left() == pytest.approx(4 * 1.2 + 2 * 12.0)
    assert pace.finish_experience() == 11.0
    pace.start_experience(1, 10)
    now[0] += 1.0
    for _ in range(2):
        pace.count_step()
        now[0] += 1.0
    assert pace.seconds_left() == pytest.approx(8 * 2.0 + 11.0)
    assert [left_text(s) for s in (0.2, 59.0, 61.0)] == ["1 s", "59 s", "1:01 min"]


def test_a_resumed_experience_counts_only_what_is_left() -> None:
    now = [0.0]
    pace = Pace(4, clock=lambda: now[0])
    pace.resume([20.0, 30.0])
    pace.start_experience(2, 10)
    pace.start_stage(10, 6)
    for _ in range(2):
        pace.count_step()
        now[0] += 3.0
    # 8 of 10 are done, a step took 6 s since the first of this process; then one experience as long as the mean
    assert (pace.step, pace.n_steps) == (8, 10)
    assert pace.seconds_left() == pytest.approx(2 * 6.0 + 25.0)


def test_stages_add_up() -> None:
    pace = Pace(1)
    pace.start_experience(0, 4)
    for expected in (4, 10):
        pace.start_stage(4 if expected == 4 else 6, 0)
        while pace.step < expected:
            pace.count_step()
        assert pace.n_steps == expected
