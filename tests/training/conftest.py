"""What the tests of a training share."""

import pytest
from resuming import Run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One undisturbed run per kind, made when it is first asked for."""
    made: dict = {}

    def get(world_size=1, *flags) -> Run:
        key = (world_size, *flags)
        if key not in made:
            made[key] = Run(tmp_path_factory.mktemp("undisturbed"), *flags, world_size=world_size).finish()
        return made[key]

    return get
