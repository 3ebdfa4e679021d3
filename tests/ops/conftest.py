"""An op is tested in mode check, which finds more; whole runs are for mode fast."""

import pytest
from availability import open_runtime


@pytest.fixture(scope="session")
def emulator():
    return open_runtime("check")
