"""Serves an emulator of each store to the tests of this folder that ask for one."""

import pytest

from tests.helpers.stores import served


@pytest.fixture(scope="module", params=["gs", "s3"])
def server(request):
  with pytest.MonkeyPatch.context() as patch, served(request.param, patch) as found:
    yield found
