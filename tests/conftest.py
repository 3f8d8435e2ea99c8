import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes share the cores. Set before torch is loaded, so that processes which tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

# Shapes and types of every function in the package are checked while tests run; an int will do for a float, as it does
# for Python's type checkers. The hook stays in place: the public names are imported only when they are first used.
install_import_hook("moco", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# The same examples each time, however busy the machine is.
hypothesis.settings.register_profile("moco", derandomize=True, deadline=None)
hypothesis.settings.load_profile("moco")


@pytest.fixture(scope="session")
def moco_data() -> Path:
    """Folder with the image sets `cifar10` and `photos`, each with `train/` and `test/` and a folder per class."""
    if "MOCO_DATA" not in os.environ:
        pytest.skip("needs real images: set MOCO_DATA to a folder that holds cifar10/ and photos/")
    return Path(os.environ["MOCO_DATA"])
