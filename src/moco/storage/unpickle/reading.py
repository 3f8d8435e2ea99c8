"""Reading files of tensors: recognising their format, checking them, and returning their content."""

import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from moco.storage.unpickle import pickles

SLACK = 2**20
"""Bytes that a file may unpack to beyond twice its size; more is refused, because checkpoints are not compressed."""


def read(path: Path) -> Any:
    """Read the content of a checkpoint onto the CPU.

    Args:
        path: a file in one of torch's formats, or a `.safetensors`.

    Returns:
        What was saved, with a `StandIn` for everything that is not a tensor, container or plain value.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, in a format that is not supported, or holds no tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint")
    held = _refuse_unread(path)
    try:
        value = _load(path)
        every = [tensor for tensor in tensors_in(value) if tensor.layout == torch.strided and not tensor.is_meta]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in every}
    except OSError:
        raise
    except Exception as error:  # on bytes that are not a checkpoint, readers may raise anything
        raise ValueError(f"{path} is damaged, or not a checkpoint ({first_line(error)})") from None
    if sum(storages.values()) > held:
        raise ValueError(f"{path} is damaged, or not a checkpoint (its tensors are larger than the file)")
    if not every:
        raise ValueError(
            f"{path} holds no tensors that can be read without running code; save `model.state_dict()` instead of the "
            "model itself"
        )
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers; each container is visited once, however often it occurs."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            waiting += each.values() if isinstance(each, dict) else each


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for messages of one line."""
    return str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__


def _refuse_unread(path: Path) -> int:
    """Return the number of bytes in the file when unpacked; raise an error if its format is not supported."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:1] == b"\n" and re.search(rb"\x12.?(Float|Int|BFloat)\d+", head, re.DOTALL):
        raise ValueError(
            f"{path} is a MindSpore checkpoint, which is not supported; convert it there: save a dictionary of its "
            "parameters with PyTorch's names, using torch.save"
        )
    if tarfile.is_tarfile(path):
        raise ValueError(f"{path} is a tar archive; expected a file that torch.save wrote, or a .safetensors")
    if head[:4] != b"PK\x03\x04":
        return size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or not a checkpoint ({first_line(error)})") from None
    if any(member.filename.endswith("constants.pkl") for member in members):
        raise ValueError(f"{path} is a TorchScript program, which is not run; save `model.state_dict()` instead")
    held = sum(member.file_size for member in members)
    if held > 2 * size + SLACK:
        raise ValueError(f"{path} is damaged, or not a checkpoint (it would unpack to {held / 2**30:.1f} GiB)")
    return held


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_safetensors(path.read_bytes())
    with warnings.catch_warnings():
        # If a file is a program after all, torch warns before it runs it.
        warnings.filterwarnings("error", message=".*TorchScript archive")
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        except OSError:
            raise
        except Exception:  # most often for a class that torch does not know
            # It takes `Unpickler` and `load` from there in place of pickle's.
            state = torch.load(path, map_location="cpu", weights_only=False, pickle_module=pickles, mmap=False)
            return pickles.plain(state)
