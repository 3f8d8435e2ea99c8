"""The image sets known by name: digits, CIFAR and ImageNet. Reading one runs no code from its files."""

import io
import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from moco.config import DataConfig
from moco.data.decode import luma
from moco.data.images import ArrayImages, Splits
from moco.data.sources.folder import load_folder
from moco.files import wait_for_lock


def digits(config: DataConfig) -> Splits:
    """1,797 handwritten digits of 8x8 pixels that come with scikit-learn (UCI Optical Recognition, test part).

    Test is the last fifth of each class, floor(n / 5) images, in scikit-learn's order; both parts keep that order.
    Grey levels 0 to 16 become 0 to 255.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)  # n 1 8 8
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        is_test[members[len(members) - len(members) // 5 :]] = True

    def part(name: str, mask: Tensor) -> ArrayImages:
        images = grey[mask].repeat(1, config.channels, 1, 1)
        return ArrayImages(images, labels[mask], tuple("0123456789"), _names(f"digits/{name}", len(images)))

    return Splits(part("train", ~is_test), part("test", is_test))


class _Cifar(NamedTuple):
    """Where the authors' python version keeps what (https://www.cs.toronto.edu/~kriz/cifar.html)."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str


_CIFAR = {
    "cifar10": _Cifar(
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        labels="labels",
        names="label_names",
    ),
    "cifar100": _Cifar("cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names"),
}


def cifar10(config: DataConfig) -> Splits:
    """CIFAR-10 from `$MOCO_DATA` or `~/.cache/moco`, else downloaded to the latter.

    Raises:
        ValueError: it is not there and could not be downloaded, or a file is not what it should be.
    """
    return _cifar("cifar10", config)


def cifar100(config: DataConfig) -> Splits:
    """CIFAR-100 with its fine labels; where from and what it raises: as `cifar10`."""
    return _cifar("cifar100", config)


def imagenet(config: DataConfig) -> Splits:
    """ImageNet of 1,000 classes (ILSVRC 2012) from `$MOCO_DATA/imagenet` or `~/.cache/moco/imagenet`.

    There `train/` and `val/` hold a folder per class, as torchvision's `ImageNet` unpacks the archives.

    Raises:
        ValueError: it is not there (its licence does not let a program download it), or its images are not in classes.
    """
    places = _places("imagenet")
    place = next((place for place in places if (place / "train").is_dir()), None)
    if place is None:
        tar = next((tar for place in places for tar in sorted(place.glob("ILSVRC2012*.tar"))), None)
        why = f"{str(tar)!r} is not unpacked here" if tar else "its licence (image-net.org) allows no download here"
        raise ValueError(
            f"imagenet: no folder {' nor '.join(str(place / 'train') for place in places)}; {why}: put train/ and val/"
            " there with a folder of images per class, or give theirs with --data FOLDER"
        )
    splits = load_folder(place, config)
    for name, images in (("train", splits.train), ("val", splits.test)):
        if images is not None and images.labels is None:
            raise ValueError(
                f"imagenet: {str(place / name)!r} has no class folders; expected one per class, named as in both parts:"
                f" sort the images into them, or give --data {place / 'train'}, which needs no labels"
            )
    return splits


def cifar_folder(folder: Path) -> Callable[[DataConfig], Splits] | None:
    """Return a loader of the CIFAR python files in this folder or directly below; None for any other folder."""
    for name, layout in _CIFAR.items():
        for place in (folder, folder / layout.folder):
            if all((place / file).is_file() for file in (*layout.train, layout.test, layout.meta)):
                return lambda config, name=name, place=place: _read_cifar(name, place, config)
    return None


def _cifar(name: str, config: DataConfig) -> Splits:
    import torchvision.datasets as tv

    return _read_cifar(name, found(name, {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]), config)


def found(name: str, source: Any) -> Path:
    """Return the folder of a set in `$MOCO_DATA` or `~/.cache/moco`; download it to the latter if it is in neither.

    Args:
        name: of the set, for the message.
        source: torchvision's class of it, which says from where, and what is to come.

    Raises:
        ValueError: it is not there and could not be downloaded.
    """
    places = _places(source.base_folder)
    place = next((place for place in places if place.is_dir()), None)
    return place or _download(name, source, places[-1].parent)


def _places(folder: str) -> list[Path]:
    """Where a set is looked for: `$MOCO_DATA`, then the cache."""
    cache = Path("~/.cache/moco").expanduser()
    return [Path(root) / folder for root in (os.environ.get("MOCO_DATA"), cache) if root]


def _download(name: str, source: Any, cache: Path) -> Path:
    from torchvision.datasets.utils import download_and_extract_archive

    target, log = cache / source.base_folder, logging.getLogger("moco")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One process downloads, the others wait for it; in a folder of its own, for it may be stopped half-way.
        with (cache / f".{source.base_folder}.lock").open("wb") as lock, tempfile.TemporaryDirectory(dir=cache) as own:
            wait_for_lock(lock)
            if not target.is_dir():
                log.info("downloading %s from %s to %s", name, source.url, target)
                download_and_extract_archive(source.url, own, filename=source.filename, md5=source.tgz_md5)
                _put(Path(own) / source.base_folder, target)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name} is neither in $MOCO_DATA nor in {cache}, and downloading it failed"
            f" ({' '.join(str(error).split())}); give a folder that holds {source.base_folder} as the data source"
        ) from None
    return target


def _put(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:  # where there are no locks another process may have been faster
        if not target.is_dir():
            raise


def _read_cifar(name: str, folder: Path, config: DataConfig) -> Splits:
    layout = _CIFAR[name]
    classes = tuple(str(word) for word in _unpickle(folder / layout.meta).get(layout.names, ()))

    def part(split: str, files: tuple[str, ...]) -> ArrayImages:
        read = [_read_cifar_file(folder / file, layout.labels, len(classes)) for file in files]
        images = torch.from_numpy(np.concatenate([pixels for pixels, _ in read]))
        labels = torch.from_numpy(np.concatenate([labels for _, labels in read]))
        if config.channels == 1:
            images = luma(images)
        return ArrayImages(images, labels, classes, _names(f"{name}/{split}", len(images)))

    return Splits(part("train", layout.train), part("test", (layout.test,)))


def _read_cifar_file(path: Path, key: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(path)
    pixels, labels = batch.get("data"), np.asarray(batch.get(key, ()))
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3072)):
        raise ValueError(f"{str(path)!r} does not hold uint8 'data' of 3072 columns with as many {key!r}; get it anew")
    if not (labels.dtype.kind == "i" and 0 <= labels.min(initial=0) and labels.max(initial=-1) < num_classes):
        raise ValueError(f"{str(path)!r} has labels outside 0 to {num_classes - 1}; get it anew")
    return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _names(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem}/{i}" for i in range(count))


@final
class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain values; whatever else a pickle names is refused, so no code of its own is run."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name == "ndarray":
            return np.ndarray
        if module == "numpy" and name == "dtype":
            # The files of 2009 give 0 and 1 for the flags after the name, which numpy 2.4.0 to 2.4.4 warn about.
            return lambda name, align=False, copy=False: np.dtype(name, align=bool(align), copy=bool(copy))
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        # latin1 is how numpy asks for arrays that Python 2 has written.
        loaded = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}); get the folder anew") from None
    except Exception as error:
        raise ValueError(f"{str(path)!r} is refused: not a pickle of arrays and plain values ({error})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{str(path)!r} holds a {type(loaded).__name__}, expected a dictionary; get it anew")
    return loaded
