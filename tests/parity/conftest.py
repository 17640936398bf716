"""A parity module sets METHOD, the name of its golden folder, and takes `golden`: once for each case found."""

from __future__ import annotations

import pytest

from tests.parity._golden import Golden, collect


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    method = getattr(metafunc.module, "METHOD", None)
    if method is not None and "golden" in metafunc.fixturenames:
        metafunc.parametrize("golden", collect(metafunc.config, method), indirect=True)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    if isinstance(request.param, str):
        pytest.fail(request.param, pytrace=False)
    return Golden(request.param)
