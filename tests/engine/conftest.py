"""The compiled search, compiled before the first test's clock starts."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _compiled(compiled_search: None) -> None:
    pass
