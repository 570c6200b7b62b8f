"""Good folders for the readers of strangers' files, made once."""

import pytest

from tests.fuzz import readers
from tests.fuzz.asking import Asking


@pytest.fixture(scope="package")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("good")


@pytest.fixture(scope="package")
def made(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLINOMETER_CACHE", str(root / "cache"))
        yield readers.make(root)


@pytest.fixture(scope="package")
def asking(made, root):
    """A process of its own for what reads the files of strangers: limits are set there, and it may die."""
    process = Asking(root)
    yield process
    process.close()
