"""Images in .npy, .npz and .pt files."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moco
from moco.cli import main
from moco.config import DataConfig, PretrainConfig, merge
from moco.data import ArrayImages, FileImages, load_data
from moco.data.places.array_rows import planes
from moco.doctor import num_images
from moco.embeddings.embed import embed_to
from moco.explore.thumbnails import sheet
from moco.storage.run import Run
from moco.training.automatic import auto_config
from small import TINY

TINY_MEMORY = 1e-9


pytestmark = pytest.mark.usefixtures("no_pictures")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def load(path: Path, **settings: Any) -> Any:
    return load_data(DataConfig.model_validate({"source": str(path)} | settings))


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), path.name)


@pytest.mark.parametrize("memory", [2.0, TINY_MEMORY])
@pytest.mark.parametrize("layout", ["n c h w", "n h w c", "fortran"])
@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_an_npy_gives_its_images_whatever_its_layout_held_or_mapped(
    channels: int, layout: str, memory: float, tmp_path: Path
) -> None:
    pixels = noise(10, channels, 12, 9)
    array = {"n c h w": pixels, "n h w c": np.moveaxis(pixels, 1, -1), "fortran": np.asfortranarray(pixels)}[layout]
    train, test = load(saved(tmp_path / "x.npy", array), channels=channels, memory=memory)
    assert test is None and train.labels is None and len(train) == 10
    assert isinstance(train, ArrayImages if memory == 2.0 else FileImages)
    for i in (0, 7):
        assert np.array_equal(train.decode(i).numpy(), pixels[i])
    assert train.paths[7] == f"{tmp_path / 'x.npy'}/7"


@pytest.mark.parametrize("memory", [2.0, TINY_MEMORY])
def test_grey_is_repeated_and_colour_averaged_and_other_channels_are_refused(memory: float, tmp_path: Path) -> None:
    grey, colour = noise(4, 9, 8), noise(4, 9, 8, 3)
    found = load(saved(tmp_path / "grey.npy", grey), memory=memory).train.decode(2)
    assert np.array_equal(found.numpy(), np.stack([grey[2]] * 3))
    found = load(saved(tmp_path / "colour.npy", colour), memory=memory, channels=1).train.decode(2)
    assert np.abs(found[0].numpy() - colour[2] @ (0.299, 0.587, 0.114)).max() < 1
    line = refusal(saved(tmp_path / "bands.npy", noise(4, 6, 30, 30)), memory=memory)
    assert line == "images have 6 channels; expected 3: see --data.channels"


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((2, 5, 6, 3), 3, (3, 5, 6)),
        ((2, 3, 5, 6), 3, (3, 5, 6)),
        ((2, 5, 6, 1), 3, (1, 5, 6)),
        ((2, 4, 5, 6), 4, (4, 5, 6)),
        ((2, 5, 6, 4), 4, (4, 5, 6)),
        ((2, 3, 3, 3), 3, (3, 3, 3)),
        ((2, 7, 5, 6), 3, (6, 7, 5)),
        ((2, 5, 6, 7), 3, (5, 6, 7)),
        ((2, 5, 6), 3, (1, 5, 6)),
    ],
)
def test_the_axis_of_the_channels_is_told_by_their_number(
    shape: tuple[int, ...], channels: int, expected: tuple[int, ...]
) -> None:
    assert planes(noise(*shape), channels).shape[1:] == expected


def test_a_mapped_file_streams_through_the_loader_and_equals_one_that_is_held(tmp_path: Path) -> None:
    listed = saved(tmp_path / "x.npy", noise(64, 16, 16, 4))
    settings = TINY | {"batch_size": 16, "model": TINY["model"] | {"queue_size": 32}, "steps": 2}
    losses = []
    for memory, workers in ((2.0, 0), (TINY_MEMORY, 0), (TINY_MEMORY, 2)):
        data = {"source": str(listed), "channels": 4, "size": 8, "memory": memory, "workers": workers}
        out = tmp_path / f"{memory}-{workers}"
        config = merge(PretrainConfig(), settings | {"data": data})
        moco.pretrain(config, out=out)
        losses.append(Run.open(out).metrics[-1]["loss"])
    assert losses[1] == losses[2]
    assert abs(losses[0] - losses[1]) < 0.1  # crops of files are rounded to whole numbers


@pytest.mark.parametrize(
    ("names", "num_test"),
    [
        (("images", "labels"), 0),
        (("x", "y"), 0),
        (("x_train", "y_train", "x_test", "y_test"), 6),
        (("Train_Images", "train_labels", "test_images", "test_labels"), 6),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "pt", "pth"])
def test_an_archive_gives_images_labels_and_the_test_part(
    names: tuple[str, ...], num_test: int, suffix: str, tmp_path: Path
) -> None:
    parts = noise(20, 8, 8, 3), np.array([10, 2] * 10)[:, None], noise(6, 8, 8, 3), np.array([2, 10, 2, 10, 2, 2])
    content: dict[str, Any] = dict(zip(names, parts, strict=False)) | {"notes": np.zeros(3)}
    path = tmp_path / f"x.{suffix}"
    if suffix == "npz":
        np.savez_compressed(path, **content)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in content.items()}, path)
    train, test = load(path)
    assert np.array_equal(train.images.numpy(), np.moveaxis(parts[0], -1, 1))
    assert train.classes == ("2", "10") and train.labels.tolist() == [1, 0] * 10
    assert train.paths[3] == f"{path}/train/3"
    assert (0 if test is None else len(test)) == num_test
    if test is not None:
        assert test.labels.tolist() == [0, 1, 0, 1, 0, 0] and test.classes == train.classes


def test_names_may_be_labels_and_a_tensor_alone_or_an_array_without_name_are_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=noise(3, 8, 8), labels=np.array(["dog", "ant", "dog"]))
    train = load(tmp_path / "x.npz").train
    assert train.classes == ("ant", "dog") and train.labels.tolist() == [1, 0, 1]
    torch.save(torch.from_numpy(noise(3, 4, 8, 9)), tmp_path / "x.pt")
    assert load(tmp_path / "x.pt", channels=4).train.images.shape == (3, 4, 8, 9)
    np.savez(tmp_path / "bare.npz", noise(3, 8, 8))
    assert len(load(tmp_path / "bare.npz").train) == 3


def test_labels_below_zero_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "x.npz", x=noise(3, 8, 8), y=np.array([1, -1, 0]))
    assert load(tmp_path / "x.npz").train.labels is None
    assert "1 of 3 train images have no label" in caplog.text


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(in_header: int, in_directory: int, value: int, method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of one array with a wrong byte at these places of its header and of the directory."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x.npy", npy(noise(3, 8, 8)))
    content = bytearray(file.getvalue())
    content[in_header] = content[content.index(b"PK\1\2") + in_directory] = value
    return bytes(content)


class _Hostile:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("suffix", ["npy", "npz", "pt", "pickle as npy"])
def test_a_file_with_code_in_it_is_refused_and_not_run(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"x.{suffix.rpartition(' ')[2]}"
    if suffix == "npy":
        np.save(path, np.array([_Hostile()], dtype=object), allow_pickle=True)
    elif suffix == "npz":
        np.savez(path, images=np.array([_Hostile()], dtype=object))
    elif suffix == "pt":
        torch.save({"images": _Hostile()}, path)
    else:
        path.write_bytes(pickle.dumps(_Hostile()))
    assert f"'{path.name}' cannot be read as " in refusal(path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.npy", noise(3, 8, 8).astype(np.uint16), "holds uint16 of shape (3, 8, 8); expected uint8 [n, h, w], [n,"),
        ("x.npy", noise(8, 8), "holds uint8 of shape (8, 8); expected uint8"),
        ("x.npy", noise(0, 8, 8), "(0, 8, 8); expected uint8"),
        ("x.npy", b"", "'x.npy' cannot be read as an array ("),
        ("x.npy", b"\x93NUMPY\x01\0", "'x.npy' cannot be read as an array ("),
        ("x.npz", b"PK\x03\x04 cut off", "'x.npz' cannot be read as arrays ("),
        ("x.npz", b"", "'x.npz' cannot be read as arrays ("),
        ("x.npz", npz(6, 8, 1), "'x.npz' cannot be read as arrays (File 'x.npy' is encrypted, password required"),
        ("x.npz", npz(8, 10, 99), "'x.npz' cannot be read as arrays (That compression method is not supported)"),
        ("x.npz", npz(39, 5, 255, zipfile.ZIP_LZMA), "'x.npz' cannot be read as arrays (Invalid or unsupported"),
        ("x.npz", npy(noise(3, 8, 8)), "'x.npz' cannot be read as arrays (it is a single array, not an archive"),
        (
            "x.npz",
            {"pictures": noise(3, 8, 8)},
            "holds no images, it has pictures; expected an array called images, x,",
        ),
        ("x.npz", {"x": noise(3, 8, 8) / 255}, "'x.npz': images are float64 of shape (3, 8, 8); expected uint8"),
        ("x.npz", {"x": noise(3, 8, 8, 5)}, "'x.npz': images have 5 channels; expected 3: see --data.channels"),
        (
            "x.npz",
            {"x": noise(3, 8, 8), "y": np.zeros(2, int)},
            "has labels of int64 (2,) for 3 train images; expected",
        ),
        ("x.npz", {"x": noise(3, 8, 8), "y": np.zeros(3)}, "has labels of float64 (3,) for 3 train images"),
        ("x.pt", b"\x80\x02no", "'x.pt' cannot be read as tensors alone ("),
        ("x.pt", torch.zeros(3, 8, 8), "'x.pt': images are float32 of shape (3, 8, 8); expected uint8"),
        ("x.pt", torch.zeros(3, 8, 8, dtype=torch.bfloat16), "'x.pt': images are torch.bfloat16"),
        ("x.pt", [1], "it holds a list, expected a tensor or a dictionary of tensors"),
        ("x.pth", {"conv1.weight": torch.zeros(3)}, "holds no images, it has conv1.weight; expected an array called"),
    ],
)
def test_a_bad_file_is_one_clear_line(name: str, content: Any, line: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        torch.save(content, path)
    assert line in refusal(path)


def test_a_test_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    x, y = noise(3, 8, 8), np.array([0, 1, 0])
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x, y_test=y + 1)
    assert "has the test class '2', which training does not have" in refusal(tmp_path / "x.npz")


def test_a_file_that_was_written_anew_is_read_anew_and_one_that_is_gone_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    assert int(load(path, memory=TINY_MEMORY).train.decode(3).max()) == 0
    path.unlink()
    saved(path, np.full((9, 8, 8), 7, np.uint8))
    train = load(path, memory=TINY_MEMORY).train
    assert len(train) == 9 and int(train.decode(8).max()) == 7
    gone = FileImages((f"{path}/9", f"{tmp_path}/gone.npy/1"), None, None)
    for i, why in ((0, "out of bounds"), (1, "No such file")):
        with pytest.raises(ValueError, match=f"cannot be read as an image: .*{why}"):
            gone.decode(i)


@pytest.mark.parametrize("suffix", ["npy", "npz", "pt"])
def test_settings_are_chosen_for_an_array_file_and_it_trains_and_embeds(suffix: str, tmp_path: Path) -> None:
    pixels, labels = noise(60, 12, 12, 4), np.arange(60) % 3
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, pixels)
    elif suffix == "npz":
        np.savez(path, images=pixels, labels=labels)
    else:
        torch.save({"x": torch.from_numpy(pixels), "y": torch.from_numpy(labels)}, path)
    data = DataConfig(source=str(path), channels=4)
    config, _ = auto_config(data)
    assert config.views.size == 8 and config.data.channels == 4 and num_images(data) == 60
    run = moco.pretrain(
        merge(config, {"engine": TINY["engine"], "model": {"backbone": "resnet-tiny"}, "steps": 2}),
        out=tmp_path / "run",
    )
    table = embed_to(tmp_path / "emb", tmp_path / "run", path)
    assert len(table) == 60 and np.isfinite(table.vectors).all()
    assert np.allclose(table.vectors, moco.embed(moco.load_encoder(tmp_path / "run"), pixels).vectors, atol=1e-4)
    if suffix == "npy":
        copy = saved(tmp_path / "copy.npy", pixels)
        assert moco.search(tmp_path / "emb", f"{copy}/7", k=1).paths == ((f"{path}/7",),)
    else:
        assert run.results
        for protocol in ("knn", "linear"):
            assert 0 <= moco.evaluate(tmp_path / "run", protocol, data=str(path)).figures["top1"] <= 100


def test_the_command_chooses_settings_for_an_array_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "x.npy", noise(20, 12, 12, 4))
    assert main(["pretrain", "--data", str(path), "--data.channels", "4", "--print_config"]) == 0
    assert "channels: 4" in capsys.readouterr().out
    assert main(["pretrain", "--data", str(path), "--print_config"]) == 2
    assert "images have 4 channels; expected 3: see --data.channels" in capsys.readouterr().err


def test_mapped_images_have_thumbnails(tmp_path: Path) -> None:
    train = load(saved(tmp_path / "x.npy", noise(3, 20, 20, 4)), channels=4, memory=TINY_MEMORY).train
    assert sheet(train, [0, 2])["sizes"] == [[40, 40], [40, 40]]
