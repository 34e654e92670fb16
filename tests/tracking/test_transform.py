import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax.tracking import Tracker, tracked
from tests.layers.models import normal

PARAMS = {"w": normal(8, 6), "b": jnp.ones(6), "hole": None}


def test_a_use_sees_the_spaces_of_the_step_after_their_refresh():
    seen = []

    def use(step):
        seen.append(step)
        return step.updates, step.spectral

    tx = tracked(Tracker(rank=2), use)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0, refresh=True)
    assert updates is PARAMS
    (step,) = seen
    assert step.extra == {"value": 1.0}
    assert step.refresh is True
    (space,) = step.spaces["w"]
    np.testing.assert_array_equal(space.vectors, state.spaces()["w"][0].vectors)
    assert space.solved


def test_params_are_asked_for_by_name():
    tx = tracked(Tracker(rank=2), lambda step: (), needs_params="my_transform")
    with pytest.raises(ValueError, match="my_transform needs params: call update"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_an_inert_tracker_tracks_nothing():
    assert Tracker(rank=2, inert=True).init(PARAMS).entries() == {}
