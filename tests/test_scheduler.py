import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion import scheduler
from guided_diffusion.scheduler import count_steps, get_schedule_jump

ROOT = Path(scheduler.__file__).resolve().parent.parent
GOLDEN = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())


def naive_schedule(
    t_T,
    n_sample=1,
    jump_length=10,
    jump_n_sample=10,
    jump2_length=1,
    jump2_n_sample=1,
    jump3_length=1,
    jump3_n_sample=1,
    start_resampling=100_000_000,
):
    """The walk as it is described in words, kept apart from the code that is tested."""

    def full(length, count):
        return {j: count - 1 for j in range(t_T) if j % length == 0 and j < t_T - length}

    left1 = full(jump_length, jump_n_sample)
    left2 = full(jump2_length, jump2_n_sample)
    left3 = full(jump3_length, jump3_n_sample)
    position, walked = t_T, []

    def go(step):
        nonlocal position
        position += step
        walked.append(position)

    while position > 0:
        go(-1)
        if n_sample > 1 and position + 1 < t_T - 1 and position <= start_resampling:
            for _ in range(n_sample - 1):
                go(+1)
                go(-1)
        if left3.get(position, 0) > 0 and position <= start_resampling - jump3_length:
            left3[position] -= 1
            for _ in range(jump3_length):
                go(+1)
        if left2.get(position, 0) > 0 and position <= start_resampling - jump2_length:
            left2[position] -= 1
            for _ in range(jump2_length):
                go(+1)
            left3 = full(jump3_length, jump3_n_sample)
        if left1.get(position, 0) > 0 and position <= start_resampling - jump_length:
            left1[position] -= 1
            for _ in range(jump_length):
                go(+1)
            left2 = full(jump2_length, jump2_n_sample)
            left3 = full(jump3_length, jump3_n_sample)
    go(-1)
    return walked


@pytest.mark.parametrize(
    "case", GOLDEN, ids=lambda case: "-".join(map(str, case["params"].values()))
)
def test_golden(case):
    assert get_schedule_jump(**case["params"]) == case["times"]


def test_the_default_walk_has_the_published_cost():
    times = get_schedule_jump(250)
    assert len(times) == 4571
    assert count_steps(times) == (2410, 2160)
    assert times == get_schedule_jump(250, 1, 10, 10)


@st.composite
def walks(draw):
    length = st.integers(1, 9)
    count = st.integers(1, 3)
    return {
        "t_T": draw(st.integers(1, 24)),
        "n_sample": draw(count),
        "jump_length": draw(length),
        "jump_n_sample": draw(count),
        "jump2_length": draw(length),
        "jump2_n_sample": draw(count),
        "jump3_length": draw(length),
        "jump3_n_sample": draw(count),
        "start_resampling": draw(st.sampled_from([0, 3, 7, 12, 100_000_000])),
    }


@settings(max_examples=150, deadline=None)
@given(walks())
def test_equals_the_description(params):
    times = get_schedule_jump(**params)
    assert times == naive_schedule(**params)
    t_T, start = params["t_T"], params["start_resampling"]
    assert times[0] == t_T - 1
    assert times[-1] == -1
    assert -1 not in times[:-1]
    assert all(abs(after - before) == 1 for before, after in pairwise(times))
    assert max(times) == t_T - 1
    # Above start_resampling the walk only goes down (n_sample's own step may end just above it).
    assert all(after <= start + 1 for before, after in pairwise(times) if after > before)
    calls, undos = count_steps(times)
    assert calls - undos == t_T
    assert calls + undos == len(times) - 1


@pytest.mark.parametrize("key", list(GOLDEN[-2]["params"])[:-1])
def test_impossible_counts(key):
    for value in (0, scheduler.MAX_TRANSITIONS + 1):
        with pytest.raises(ValueError, match="between 1 and"):
            get_schedule_jump(**{"t_T": 10, key: value})


def test_endless_walks_are_refused(monkeypatch):
    monkeypatch.setattr(scheduler, "MAX_TRANSITIONS", 2000)
    assert len(get_schedule_jump(200, jump_n_sample=5)) < 2000
    with pytest.raises(ValueError, match="more than 2,000 transitions"):
        get_schedule_jump(200, 1, 2, 1000, 2, 1000, 2, 1000)


def test_importing_the_schedule_loads_no_plotting():
    code = (
        "import sys, guided_diffusion.scheduler;"
        "print([m for m in ('matplotlib', 'torch', 'yaml', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
