import hypothesis
from hypothesis import strategies as st

from dsbp_jax.tracking.schedule import take_turns


@hypothesis.given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(1, 40)
)
def test_turns_are_balanced(costs, period):
    turns = take_turns(dict(enumerate(costs)), period)
    assert set(turns) == set(range(len(costs)))
    assert all(0 <= turn < period for turn in turns.values())
    loads = {}
    for leaf, turn in turns.items():
        loads[turn] = loads.get(turn, 0) + costs[leaf]
    # Graham's bound for the longest-first rule.
    best = max(max(costs), -(-sum(costs) // min(period, len(costs))))
    assert max(loads.values()) <= 4 / 3 * best + max(costs) / 3


@hypothesis.given(st.integers(1, 20), st.integers(1, 10**9))
def test_leaves_of_one_cost_are_spread_over_the_period(number, period):
    turns = sorted(take_turns(dict.fromkeys(range(number), 7), period).values())
    if number <= period:
        gap = period // number
        assert turns == [gap * i for i in range(number)]
