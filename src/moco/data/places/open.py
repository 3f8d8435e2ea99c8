"""Open an image by its address, wherever it lies (`moco.data.places.addresses`).

Because an address alone says where an image is, everything that reads images can read all kinds: training, embedding,
search, figures. Each process opens a tar for itself when it first needs it, and each read is one `pread`, which threads
and forked processes may do at the same time.
"""

import io

from moco.data.places.addresses import hub_row, in_tars, is_remote, tar_of
from moco.data.places.hub_rows import facts_of_part, read_row
from moco.data.places.local_file import facts_of_file, open_file
from moco.data.places.tars import facts_of_tar, open_member, read_copy


def open_image(address: str) -> io.BufferedReader | io.BytesIO:
    """Open the file of an image, but for rows of array files, which have none.

    Raises:
        OSError: there is no such file, or it cannot be read.
        Unavailable: its tar is elsewhere and cannot be fetched.
        ValueError: its tar is not one.
    """
    if row := hub_row(address):
        return io.BytesIO(read_row(*row))
    for tar, name in in_tars(address):
        if is_remote(tar):
            return io.BytesIO(read_copy(tar, name, address))
        try:
            return open_member(tar, name, address)
        except IsADirectoryError:
            continue
    return open_file(address)


def read_image(address: str) -> bytes:
    """Read all bytes of an image; errors as `open_image`."""
    with open_image(address) as file:
        return file.read()


def facts_of(address: str) -> str:
    """Return size and time of change of an image's file, tar or set; empty if there is none."""
    if row := hub_row(address):
        return facts_of_part(*row[:2])
    return facts_of_file(address) or facts_of_tar(tar_of(address))
