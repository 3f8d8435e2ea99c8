"""Images that cannot be read: named, counted, and too many of them refused."""

import logging
from collections.abc import Sequence


class BadImage(ValueError):
    """A file that cannot be read as an image."""

    def __init__(self, path: str, reason: str):
        self.path, self.reason = path, " ".join(reason.split())
        super().__init__(f"{path!r} cannot be read as an image: {self.reason}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """So that workers can send it: pickle would give the message alone."""
        return BadImage, (self.path, self.reason)


NUM_NAMED = 10
"""Bad files that the log names one by one."""


def report_bad(bad: Sequence[BadImage], num_images: int, max_bad: float) -> None:
    """Names unreadable files in the log.

    Raises:
        ValueError: they are more than the fraction `max_bad` of `num_images`, or all.
    """
    if bad and (len(bad) > max_bad * num_images or len(bad) == num_images):
        raise ValueError(
            f"{len(bad)} of {num_images} files cannot be read, expected at most {max_bad:.2%}; remove them or raise"
            f" data.max_bad: " + "; ".join(f"{each.path!r} ({each.reason})" for each in bad[:5])
        )
    log = logging.getLogger("moco")
    for each in bad[:NUM_NAMED]:
        log.warning("skipped: %s", each)
    if len(bad) > NUM_NAMED:
        log.warning("skipped: %d more files, %d of %d in all", len(bad) - NUM_NAMED, len(bad), num_images)


def refuse_too_many(count: int, num_images: int, part: str, max_bad: float, named: Sequence[str]) -> ValueError:
    return ValueError(
        f"{count} of {num_images} {part} images cannot be read, expected at most {max_bad:.2%} in an evaluation: "
        f"repair or remove them: {'; '.join(named[:5])}"
    )
