"""What the tests of `deploy/` share: the wheel, and the sidecar's environment made of it."""

from pathlib import Path

import pytest

from tests.deploy.installed import build_wheel, install


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, as the images install it."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def sidecar(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment like that of the monitor's image."""
    return install(wheel, tmp_path_factory.mktemp("sidecar") / "venv")
