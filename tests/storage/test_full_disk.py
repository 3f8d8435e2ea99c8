"""What is written is whole or not there at all, also when the disk is full."""

import errno
import os
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from moco.cli import main
from moco.config import parse_config, to_yaml
from moco.files import write_atomically
from moco.storage import checkpoint
from small import TINY


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "file"
    for content in (b"first", b"second, and longer", b"3"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_a_failure_while_writing_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file) -> None:
        file.write(b"new")
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(path, fail)
    assert caught.value is error
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["file"])


def test_it_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "file", []
    path.write_text("old")
    fsync = os.fsync

    def watched(handle: int) -> None:
        seen.append(path.read_text())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    write_atomically(path, lambda file: file.write(b"new"))
    assert seen == ["old", "new"]  # the file, then the folder's entry


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not mount or os.geteuid() or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(small_disk: Path) -> None:
    path = small_disk / "last.ckpt"
    checkpoint.save(path, {"step": 1, "weights": torch.zeros(200_000)})
    with pytest.raises(OSError, match="No space left on device; earlier files are intact") as caught:
        checkpoint.save(path, {"step": 2, "weights": torch.zeros(900_000)})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert checkpoint.load(path)["step"] == 1
    assert os.listdir(small_disk) == ["last.ckpt"]


def test_the_command_says_that_the_disk_is_full_in_one_line(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(to_yaml(parse_config(TINY)))
    (small_disk / "ballast").write_bytes(bytes(2_000_000))
    run = small_disk / "run"
    assert main(["pretrain", str(recipe), "--out", str(run), "--steps", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("moco: No space left on device; earlier files are intact; free some space and resume")
    assert not [line for line in lines if "Error" in line or "Traceback" in line]
    assert not list(run.rglob("*.partial"))
    # Not even room for a line of the log, or of the table.
    with (small_disk / "more").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(512))
    assert main(["pretrain", str(recipe), "--out", str(small_disk / "other"), "--steps", "1"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("moco: No space left on device")
