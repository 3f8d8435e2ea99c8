import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes share the cores. Set before torch is loaded, so that processes which tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"

import json
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

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


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train without drawing: pictures take seconds of each run, and have tests of their own."""
    from doubles import leave_out_pictures

    leave_out_pictures(monkeypatch)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of two classes, and one beside them."""
    from doubles import picture

    folder = tmp_path_factory.mktemp("photos")
    for seed in range(12):
        picture(folder / "in" / ("cats" if seed < 5 else "dogs") / f"{seed:02}.png", seed, (30 + seed, 20))
    picture(folder / "new.png", 100, (16, 40))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained encoder."""
    import torch

    from moco.method.backbones import build_backbone
    from moco.method.encoder import ImageEncoder
    from moco.storage.encoder_files import save_encoder

    torch.manual_seed(0)
    network = build_backbone("resnet-tiny", stem="small")
    about: dict[str, Any] = {"channels": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": 16}
    folder = tmp_path_factory.mktemp("run")
    save_encoder(folder, ImageEncoder(network, name="resnet-tiny", stem="small", **about).eval())
    return folder


SPAWNER = """
import json, os, random, sys
import matplotlib.figure, numpy, sklearn.cluster, sklearn.datasets, sklearn.manifold, torch
import moco.training.automatic, moco.explore.server, moco.explore.single_file, moco.training.pretrain
from moco.cli import main

# Pictures take seconds of each run, and have tests of their own.
around = sys.modules["moco.training.pretrain"]
around.draw_start = around.draw_results = lambda *_, **__: None

for line in sys.stdin:
    folder, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        random.seed(), numpy.random.seed(), torch.seed()  # as chance would have it, and not as the parent has it
        sys.exit(main(arguments))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Command:
    """The command line in a process of its own, one at a time.

    It is a copy of a process that has loaded torch already, which spares seconds at each start.
    """

    def __init__(self, process: subprocess.Popen[str], folder: Path):
        self._process, self._folder = process, folder
        self.pid = 0

    def start(self, *arguments: str | Path) -> None:
        assert self._process.stdin and self._process.stdout
        for name in ("stdout", "stderr"):  # what the last one said is not what this one says
            (self._folder / name).write_text("")
        self._process.stdin.write(json.dumps([str(self._folder), [str(each) for each in arguments]]) + "\n")
        self._process.stdin.flush()
        self.pid = int(self._process.stdout.readline())

    def signal(self, signum: int) -> None:
        if self.pid:
            with suppress(ProcessLookupError):  # it may have ended just now
                os.kill(self.pid, signum)

    def wait(self) -> int:
        """Its exit code; minus the signal that killed it."""
        assert self._process.stdout
        code = int(self._process.stdout.readline())
        self.pid = 0
        return code

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Generator[Command]:
    with subprocess.Popen(
        [sys.executable, "-c", SPAWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        command = Command(process, tmp_path_factory.mktemp("command"))
        yield command
        command.signal(signal.SIGKILL)
        assert process.stdin
        process.stdin.close()
