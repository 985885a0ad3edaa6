"""What all tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parent.parent
