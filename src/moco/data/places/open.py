"""Opens an image by its path: a file, a file in a tar (`shards/0000.tar/cat.jpg`), or a row of a Hugging Face set.

That a path alone says where the image is lets everything that reads images read these too: training, embedding,
search, figures. Tars are opened by each process for itself, when it first needs them, and each read is one `pread`,
which threads and forked processes may do at the same time.
"""

import io

from moco.data.places.hub_rows import HUGGING_FACE, facts_of_row, read_row
from moco.data.places.local_file import facts_of_file, open_file
from moco.data.places.remote import is_remote
from moco.data.places.tars import BUFFER, TarMember, facts_of_tar, open_tar, place_of, read_copy


def open_image(path: str) -> io.BufferedReader | io.BytesIO:
    """The file, to be read and closed.

    Raises:
        OSError: there is none, or it cannot be read.
        Unavailable: its tar is elsewhere and cannot be had.
        ValueError: its tar is none.
    """
    if path.startswith(HUGGING_FACE):
        return io.BytesIO(read_row(path))
    begin = path.find(".tar/")
    while begin >= 0:
        tar, name = path[: begin + 4], path[begin + 5 :].encode("utf-8", "surrogateescape")
        if is_remote(tar):
            return io.BytesIO(read_copy(tar, name, path))
        try:
            opened = open_tar(tar)
        except IsADirectoryError:  # a folder may be called so
            begin = path.find(".tar/", begin + 1)
            continue
        return io.BufferedReader(TarMember(opened, *place_of(opened.index, tar, name, path), path), BUFFER)
    return open_file(path)


def read_image(path: str) -> bytes:
    """All bytes of an image; errors as `open_image`."""
    with open_image(path) as file:
        return file.read()


def facts_of(path: str) -> str:
    """Size and time of change of an image's file, or of the tar or set that holds it; empty of what is not there."""
    if path.startswith(HUGGING_FACE):
        return facts_of_row(path)
    begin = path.find(".tar/")
    return facts_of_file(path) or (facts_of_tar(path[: begin + 4]) if begin >= 0 else "")
