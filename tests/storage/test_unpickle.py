"""Files that somebody sent: nothing in them is run or imported, and what is no checkpoint gets one line."""

import io
import os
import pickle
import random
import struct
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moco.storage import unpickle
from moco.storage.unpickle import StandIn


class Reduced:
    """Pickled as a call of whatever it is given."""

    def __init__(self, *call: Any):
        self.call = call

    def __call__(self) -> None:
        """So that it may be pickled as what is called."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Strange:
    """Of a class that torch does not know."""

    def __init__(self) -> None:
        self.inside = {"weight": torch.ones(2)}


class Growing(list):
    """Pickled with items and a state, for a class that is not there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Growing, ("argument",), {"state": 1}, iter([1, 2]), iter([("a", 3)])

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("this is code of the file's choosing")


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        unpickle.read(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    return str(caught.value)


def with_pickle(path: Path, data: bytes) -> None:
    """A file of torch with another pickle in it, and a tensor of three numbers for it to use."""
    torch.save(torch.arange(3.0), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_values_are_read_beside_classes_unknown(zipped: bool, tmp_path: Path) -> None:
    tied = torch.arange(6.0)
    state = {
        "state_dict": OrderedDict(a=tied.view(2, 3).T, b=tied[2:], half=torch.ones(2, dtype=torch.bfloat16)),
        "parameter": nn.Parameter(torch.ones(3)),
        "plain": [1, -2.5, "three", None, True, (4, {5}), b"six", frozenset([7]), 2**80],
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "device": torch.device("cuda", 1),
        "counts": defaultdict(int, x=1),
        "strange": Strange(),
        "called": Growing([1]),
    }
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    read = unpickle.read(tmp_path / "x.pth")
    for name, tensor in state["state_dict"].items():
        assert torch.equal(read["state_dict"][name], tensor)
    assert read["state_dict"]["b"].untyped_storage().data_ptr() == read["state_dict"]["a"].untyped_storage().data_ptr()
    assert torch.equal(read["parameter"], torch.ones(3))
    for name in ("plain", "size", "dtype", "device"):
        assert read[name] == state[name]
    assert read["counts"] == {"x": 1}
    for name in ("strange", "called"):
        assert type(read[name]) is StandIn
    assert repr(read["strange"]) == f"<{__name__}.Strange, not loaded>"


@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_numbers_become_tensors(protocol: int, tmp_path: Path) -> None:
    arrays = {
        "floats": np.arange(6.0).reshape(2, 3),
        "by columns": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "of another machine": np.arange(3, dtype=">i4"),
        "empty": np.zeros((0, 2), np.float32),
        "none": np.array(True),
    }
    names = np.array(["a", "b"])
    state = {**arrays, "scalar": np.float32(2.5), "names": names, "objects": np.array([{}, None]), "x": Strange()}
    torch.save(state, tmp_path / "x.pth", pickle_protocol=protocol)
    read = unpickle.read(tmp_path / "x.pth")
    for name, array in arrays.items():
        assert isinstance(read[name], Tensor) and np.array_equal(read[name].numpy(), array), name
    assert read["scalar"] == 2.5
    assert isinstance(read["names"], StandIn) and isinstance(read["objects"], StandIn)


def test_safetensors_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.arange(3)}, tmp_path / "x.safetensors")
    assert torch.equal(unpickle.read(tmp_path / "x.safetensors")["a"], torch.arange(3))
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    assert "is damaged, or not a checkpoint" in refusal(tmp_path / "x.safetensors")


GADGETS = [
    lambda trace: (os.system, (f"touch {trace}",)),
    lambda trace: (eval, (f"open({str(trace)!r}, 'w')",)),
    lambda trace: (exec, (f"open({str(trace)!r}, 'w')",)),
    lambda trace: (open, (str(trace), "w")),
    lambda trace: (getattr, (Reduced(__import__, ("os",)), "mkdir")),
    lambda trace: (Reduced(getattr, (Reduced(__import__, ("os",)), "mkdir")), (str(trace),)),
    lambda trace: (map, (os.mkdir, [str(trace)])),
    lambda trace: (torch.load, (str(trace.parent / "hostile.pt"), None, None)),
    lambda trace: (torch.storage._load_from_bytes, ((trace.parent / "hostile.pt").read_bytes(),)),
    lambda trace: (torch.hub.load, (str(trace), "x")),
    lambda trace: (torch.UntypedStorage.from_file, (str(trace), True, 100)),
    lambda trace: (torch.from_file, (str(trace), True, 100)),
    lambda trace: (np.load, (str(trace.parent / "hostile.pt"),)),
    lambda trace: (pickle.loads, (pickle.dumps(Reduced(os.mkdir, (str(trace),))),)),
]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("gadget", range(len(GADGETS)))
def test_nothing_that_a_file_names_is_called(gadget: int, zipped: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save(Reduced(os.mkdir, (str(trace),)), tmp_path / "hostile.pt", _use_new_zipfile_serialization=False)
    state = {"weight": torch.ones(2), "x": Reduced(*GADGETS[gadget](trace)), Reduced(str, ("key",)): 1}
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    read = unpickle.read(tmp_path / "x.pth")
    assert torch.equal(read["weight"], torch.ones(2))
    assert isinstance(read["x"], StandIn)
    assert not trace.exists()
    # and nothing at all is left of the hostile value alone
    torch.save(state["x"], tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert "holds no tensors that can be read without running code" in refusal(tmp_path / "x.pth")
    assert not trace.exists()


def test_nothing_that_a_file_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "importable.py").write_text("raise SystemExit('imported')\n")
    module, thing = types.ModuleType("importable"), type("Thing", (), {"__module__": "importable"})
    vars(module)["Thing"] = thing
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "importable", module)
        torch.save({"weight": torch.ones(2), "x": thing()}, tmp_path / "x.pth")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    assert repr(unpickle.read(tmp_path / "x.pth")["x"]) == "<importable.Thing, not loaded>"
    assert set(sys.modules) == before


def test_every_instruction_on_a_stand_in_is_without_effect(tmp_path: Path) -> None:
    """By hand: class, call, keywords, state, items, attributes of shared objects, each on a thing that is not there."""
    thing = b"cimportable\nThing\n"
    parts = [
        thing,
        thing + b")R",
        thing + b")\x81",
        thing + b")}(X\x01\x00\x00\x00ak\x4b\x01u\x92".replace(b"k\x4b", b"\x4b"),
        thing + b")R}(X\x01\x00\x00\x00aK\x01ub",
        thing + b")R(K\x01K\x02e",
        thing + b")RK\x01a",
        thing + b")R(K\x01K\x02u",
        thing + b")RK\x01K\x02s",
        thing + b")R)R)R",
        b"(" + thing + b"K\x01o",
        b"(K\x01iimportable\nThing\n",
        b"Pan identity\n",
        b"X\x02\x00\x00\x00idQ",
        # Attributes of what all files share are not set: `BUILD` with a pair means that in Python's own.
        b"ctorch._utils\n_rebuild_tensor_v2\n(N}(X\x04\x00\x00\x00makeK\x01utb",
        b"ccollections\nOrderedDict\n}(X\x06\x00\x00\x00updateK\x01ub",
    ]
    with_pickle(tmp_path / "x.pth", b"\x80\x02(" + b"".join(parts) + b"l.")
    assert "holds no tensors" in refusal(tmp_path / "x.pth")
    weight = b"X\x06\x00\x00\x00weight" + tensor_of_three()
    with_pickle(tmp_path / "x.pth", b"\x80\x02}(K\x00(" + b"".join(parts) + b"l" + weight + b"u.")
    read = unpickle.read(tmp_path / "x.pth")
    assert torch.equal(read["weight"], torch.arange(3.0)) and len(read[0]) == len(parts)


def tensor_of_three(numel: int = 3, size: int = 3, key: bytes = b"0") -> bytes:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX" + struct.pack("<I", len(key)) + key
    storage += b"X\x03\x00\x00\x00cpuJ" + struct.pack("<i", numel) + b"tQ"
    shape = b"J" + struct.pack("<i", size) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + b"K\x01\x85\x89}tR"


STRANGE = b"\x80\x02}(K\x00cimportable\nThing\nK\x01"


@pytest.mark.parametrize(
    "data",
    [
        STRANGE + tensor_of_three(numel=30) + b"u.",
        STRANGE + tensor_of_three(size=2**30) + b"u.",
        STRANGE + tensor_of_three(size=3000) + b"u.",
        STRANGE + tensor_of_three(numel=-1) + b"u.",
        STRANGE + tensor_of_three(key=b"../../../etc/passwd") + b"u.",
        STRANGE + b"(X\x06\x00\x00\x00module" + b"cimportable\nThing\n" * 3 + b"tQu.",
        STRANGE + b"u",
        STRANGE + b"\x82\x01u.",  # an extension that some program may have registered
        STRANGE + b"r\xff\xff\xff\xff" + b"u.",  # Python's own makes room for as many numbers
        STRANGE + b"h\x07u.",
        b"\x80\x02cimportable\nThing\n.",
        b"\x80\x02cimportable\nThing\n}]s.",
        b"\x80\x02." + bytes(20),
        b"\x80\x02cimportable\nThing\n" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x04cimportable\nThing\n\x8e" + struct.pack("<Q", 2**62) + b"ab.",
        b"\x80\x05cimportable\nThing\n\x97.",
    ],
)
def test_a_pickle_that_lies_is_refused(data: bytes, tmp_path: Path) -> None:
    with_pickle(tmp_path / "x.pth", data)
    line = refusal(tmp_path / "x.pth")
    assert "is damaged, or not a checkpoint" in line or "holds no tensors" in line


def test_many_names_for_one_list_cost_nothing(tmp_path: Path) -> None:
    """Each list holds the one before twice: 2^200 leaves for whoever counts them."""
    data = (
        STRANGE
        + tensor_of_three()
        + b"K\x02]q\x01"
        + b"".join(b"]q" + bytes([n + 1]) + b"(h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(1, 200))
    )
    # The lists lie on the stack one above the other; all but the last go into a tuple.
    with_pickle(tmp_path / "x.pth", data.replace(b"K\x02]q\x01", b"K\x02(]q\x01") + b"tu.")
    assert torch.equal(unpickle.read(tmp_path / "x.pth")[1], torch.arange(3.0))


def test_a_list_within_itself_is_read(tmp_path: Path) -> None:
    state: dict[str, Any] = {"weight": torch.ones(2), "x": Strange()}
    state["self"] = [state]
    torch.save(state, tmp_path / "x.pth")
    assert torch.equal(unpickle.read(tmp_path / "x.pth")["self"][0]["weight"], torch.ones(2))


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(4_000_000)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "x.pth", "w") as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name), zipfile.ZIP_DEFLATED)
    assert "is damaged, or not a checkpoint (it would unpack to 0.0 GiB)" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_refused(zipped: bool, tmp_path: Path) -> None:
    torch.save({"weight": torch.randn(100), "x": Strange()}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    whole, chance = (tmp_path / "x.pth").read_bytes(), random.Random(0)
    damaged = [whole[: len(whole) // 2], whole[:-1], b"", b"\x80", b"PK\x03\x04", bytes(500), b"epochs: 3\n"]
    damaged += [chance.randbytes(chance.randrange(1, 300)) for _ in range(50)]
    for content in damaged:
        (tmp_path / "x.pth").write_bytes(content)
        line = refusal(tmp_path / "x.pth")
        assert "is damaged, or not a checkpoint" in line or "is a tar archive" in line
    for _ in range(100):  # or whatever can still be read, but no traceback
        broken = bytearray(whole)
        broken[chance.randrange(min(len(broken), 600))] = chance.randrange(256)
        (tmp_path / "x.pth").write_bytes(broken)
        try:
            unpickle.read(tmp_path / "x.pth")
        except ValueError as error:
            assert "\n" not in str(error)


def test_programs_and_archives_are_refused(tmp_path: Path) -> None:
    import tarfile

    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"x/{name}", b"\x80\x02}.")
    assert "is a TorchScript program, which is not run" in refusal(tmp_path / "x.pth")
    with tarfile.open(tmp_path / "x.pth.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "is a tar archive" in refusal(tmp_path / "x.pth.tar")


def test_a_whole_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "x.pth")
    assert refusal(tmp_path / "x.pth").endswith("save `model.state_dict()` instead of the model itself")


def test_a_checkpoint_of_mindspore_is_refused_with_what_to_do(tmp_path: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    tensor = b"\x08\x04" + field(2, b"Float32") + field(3, bytes(16))
    (tmp_path / "moco.ckpt").write_bytes(field(1, field(1, b"encoder_q.bn1.gamma") + field(2, tensor)) * 3)
    assert "is a MindSpore checkpoint, which is not supported; convert it there" in refusal(tmp_path / "moco.ckpt")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        unpickle.read(tmp_path / "nowhere.pth")
