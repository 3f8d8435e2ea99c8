"""Image sets of the Hugging Face hub by name, `hf:NAME`, or from a folder that `save_to_disk` wrote.

A row is read by its path, `hf:NAME/PART/ROW`, and decoded by us like any file.
"""

import os
from pathlib import Path

from moco.config import DataConfig
from moco.data.images import Splits
from moco.data.places.addresses import HUGGING_FACE, is_hub
from moco.data.places.hub_rows import column_of, facts_of_part, library_of, parts_of, rows_of
from moco.data.sources.listing import HELD_OUT, Listing, first_labelled, read_listing


def is_hugging_face(source: str) -> bool:
    """Whether it is `hf:NAME`, or a folder of that kind."""
    folder = Path(source).expanduser()
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_hub(source) or saved or (folder / "dataset_dict.json").is_file()


def load_hugging_face(source: str, config: DataConfig) -> Splits:
    """Images of the first column of images, labels of the first column of classes.

    Raises:
        ValueError: the extra is not installed, there is no such set, or it has no images or too many that cannot be
            read.
    """
    name = str(Path(source).expanduser()) if not is_hub(source) else source[len(HUGGING_FACE) :]
    if Path(name).is_dir():  # it may have been written anew
        for known in (parts_of, rows_of, facts_of_part):
            known.cache_clear()
    parts = parts_of(name)
    train = "train" if "train" in parts else next(iter(parts))
    kind, budget = library_of(name).Image, config.memory * 2**30
    images = read_listing(_listing(name, train), _place(name, train), config, budget)
    budget -= images.nbytes
    others = (part for part in HELD_OUT if part in parts and part != train and column_of(parts[part], kind) is not None)
    # Many sets keep the labels of their test part to themselves.
    test = first_labelled((part, _listing(name, part)) for part in others)
    return Splits(images, None if test is None else read_listing(test[1], _place(name, test[0]), config, budget))


def _listing(name: str, part: str) -> Listing:
    """Paths of all rows of a part, and their labels if each has one."""
    rows, _ = rows_of(name, part)
    if not len(rows):
        raise ValueError(f"hf:{name} has no rows in its part {part}; expected one for each image")
    paths = [f"{HUGGING_FACE}{name}/{part}/{row}" for row in range(len(rows))]
    column = column_of(rows, library_of(name).ClassLabel)
    labels = [] if column is None else rows[column][:]
    if column is None or any(label is None or label < 0 for label in labels):  # -1 where a set keeps them to itself
        return Listing(paths, None, None)
    return Listing(paths, labels, tuple(rows.features[column].names))


def _place(name: str, part: str) -> Path:
    """Return what identifies the cache of this part: the folder, or the name on the hub."""
    return Path(name, part) if Path(name).is_dir() else Path(os.sep, HUGGING_FACE + name, part)
