"""Preparing names for drawing: no control characters, not too wide, in fonts that have their letters."""

import logging
import re
import warnings
from functools import cache

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import TextToPath

OWN = "DejaVu Sans"
"""The font that comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew and more."""
WIDE = re.compile(
    r"CJK|Noto Sans|Source Han|Droid Sans Fallback|WenQuanYi|Unifont|Hiragino|PingFang|Heiti|Yu Gothic|Meiryo"
    r"|MS Gothic|YaHei|SimHei|SimSun|JhengHei|Malgun|Nanum|Apple SD Gothic|IPA.*Gothic|TakaoGothic|VL Gothic"
    r"|Arial Unicode|FreeSans|Nirmala|Mangal|Lohit|Leelawadee|Thonburi|Loma|Code2000",
    re.IGNORECASE,
)
"""Names of fonts that may have the letters it lacks."""


def plain(text: str, most: int = 60) -> str:
    """Return a name that can be drawn: without control characters, and at most `most` characters long."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def fitted(text: str, width: float, size: float) -> str:
    """Return a name, shortened so that it is at most `width` points wide at a font size."""
    shown = plain(text, 200)
    if measured(shown, size) <= width:
        return shown
    low, high = 0, len(shown) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measured(shown[:middle].rstrip() + "…", size) <= width else (low, middle - 1)
    return shown[:low].rstrip() + "…"


def measured(text: str, size: float) -> float:
    """Width of a text in points."""
    if not text:
        return 0.0
    font = FontProperties(family=families(text), size=size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # it has been said
        return float(TextToPath().get_text_width_height_descent(text, font, False)[0])


def families(text: str) -> list[str]:
    """Installed fonts that together have the letters of a text, as far as possible."""
    missing, found = _lacking(text, [OWN]), [OWN]
    for name in _wide() if missing else ():
        if missing & _letters(name):
            found.append(name)
            missing -= _letters(name)
    return found


def lettered(figure: Figure, *, painted: bool) -> None:
    """Give each text of a figure the fonts that it needs.

    Args:
        figure: any figure.
        painted: whether its letters become pixels; letters that no font has are then reported once in the log.
    """
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        words = text.get_text()
        needed = families(words)
        if len(needed) > 1:
            text.set_fontfamily(needed)
        if painted and _lacking(words, needed):
            _say_once()


def _lacking(text: str, names: list[str]) -> set[int]:
    letters = {ord(letter) for letter in text if letter.isprintable()}
    return letters.difference(*map(_letters, names)) if letters else letters


@cache
def _wide() -> tuple[str, ...]:
    names = {entry.name for entry in font_manager.fontManager.ttflist if WIDE.search(entry.name)}
    return tuple(sorted(names, key=lambda name: ("CJK" not in name, name)))


@cache
def _letters(name: str) -> frozenset[int]:
    try:
        path = font_manager.findfont(name, fallback_to_default=False)
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):  # gone since the list was made, or no font
        return frozenset()


@cache
def _say_once() -> None:
    logging.getLogger("moco").warning(
        "no installed font has all letters of the names, so PNG files show boxes instead; install one that does, such "
        "as Noto Sans CJK"
    )
