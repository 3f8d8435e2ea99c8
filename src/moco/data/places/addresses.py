"""What the address of an image says about where the image is.

photos/cat.jpg             a file of its own
shards/0000.tar/cat.jpg    a file in a tar, which may be at a URL: s3://bucket/0000.tar/cat.jpg
bands.npy/17               a row of an array file
hf:NAME/PART/17            a row of a Hugging Face set
"""

from collections.abc import Iterator

HUGGING_FACE = "hf:"
NPY, STL10 = ".npy", "_X.bin"
"""How the names of array files end: NumPy's, and those of STL-10's authors."""
_IN_TAR = ".tar/"


def is_remote(address: str) -> bool:
    """Whether it is a URL."""
    return "://" in address


def is_hub(address: str) -> bool:
    """Whether it is a Hugging Face set, `hf:NAME`, or a row of one."""
    return address.startswith(HUGGING_FACE)


def hub_row(address: str) -> tuple[str, str, str] | None:
    """Return name, part and row number, as written, of a row of a Hugging Face set; None for every other address.

    Raises:
        ValueError: it has no part or no row.
    """
    if not is_hub(address):
        return None
    name, part, number = address.removeprefix(HUGGING_FACE).rsplit("/", 2)
    return name, part, number


def array_row(address: str) -> tuple[str, int] | None:
    """Return file and row number of a row of an array file; None for every other address."""
    file, _, number = address.rpartition("/")
    return (file, int(number)) if file.endswith((NPY, STL10)) and number.isdecimal() else None


def in_tars(address: str) -> Iterator[tuple[str, str]]:
    """Split at each `.tar/` in turn into a tar and a name in it, because a folder may be called x.tar, too."""
    begin = address.find(_IN_TAR)
    while begin >= 0:
        yield address[: begin + 4], address[begin + 5 :]
        begin = address.find(_IN_TAR, begin + 1)


def tar_of(address: str) -> str:
    """Return the first tar of `in_tars`; empty if there is none."""
    return next(in_tars(address), ("", ""))[0]


def name_in_tar(address: str) -> str:
    """Return what follows the last `.tar/`; the whole address if there is none."""
    return address.rpartition(_IN_TAR)[2]
