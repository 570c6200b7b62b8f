"""Shapes in annotations are checked while the tests run; the library itself pays nothing for them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["CLINOMETER_LANG"] = "en"
os.environ["COLUMNS"] = "100"  # where there is no terminal; a worker of pytest-xdist finds one of 80

from jaxtyping import install_import_hook

install_import_hook("clinometer.lm.functional", "beartype.beartype")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the tensors are tiny, and threads that wait for each other make tests slow

# Two shared cores: the first call of a kernel can take a second, and that is not what a test is about.
settings.register_profile("clinometer", deadline=None, max_examples=25)
settings.load_profile("clinometer")


pytest_plugins = ["tests.limits"]


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


RANKS = (
    "gradients/test_ranks.py",
    "monitoring/test_watch_meshes.py",
    "monitoring/test_watch_ranks.py",
    "distributed/test_sharding.py",
    "training/test_parallel.py",
)
"""Their fixtures start ranks, for up to a minute: first in the queue, where no second worker repeats them."""


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: not item.path.as_posix().endswith(RANKS))
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "soak" in item.keywords:
            item.add_marker(pytest.mark.timeout(0))  # hours
        if "soak" in item.keywords and "soak" not in (config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="run by `make soak`"))
