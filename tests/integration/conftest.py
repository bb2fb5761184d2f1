"""What whole runs share."""

from collections.abc import Iterator

import pytest

from tests.runs import Runs


@pytest.fixture
def runs() -> Iterator[Runs]:
    """A runtime folder of the test's own."""
    with Runs() as made:
        yield made
