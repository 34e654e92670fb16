import functools

import pytest

from tests.layers.models import BUILDERS

_build = functools.cache(lambda builder: builder())


@pytest.fixture(params=BUILDERS, ids=lambda builder: builder.__name__)
def model(request):
    """A model of some library, with the sites that must be found in it."""
    return _build(request.param)
