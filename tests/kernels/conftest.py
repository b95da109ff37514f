from __future__ import annotations

import pytest

from tests.kernels.backends import BACKENDS, made


@pytest.fixture(scope="module", params=BACKENDS, ids="-".join)
def backend(request):
    return made(*request.param)
