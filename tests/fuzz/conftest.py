"""Good folders for the readers of strangers' files, made once."""

import pytest

from tests.fuzz import readers


@pytest.fixture(scope="package")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLINOMETER_CACHE", str(root / "cache"))
        yield readers.make(root)
