"""Colours, and pictures as files.

The colours are those of Okabe and Ito (jfly.uni-koeln.de/color), told apart with any colour vision; on a dark page the
darker ones give way to lighter ones of the same family.
"""

import base64
import io
import re
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from moco.run import write_atomically


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; of `classes`, neighbours differ for every kind of colour vision."""

    paper: str
    ink: str
    muted: str
    blue: str
    orange: str
    green: str
    purple: str
    yellow: str
    sky: str
    amber: str

    @property
    def classes(self) -> tuple[str, ...]:
        return self.blue, self.amber, self.green, self.orange, self.sky, self.purple, self.yellow, self.ink


LIGHT = Theme(
    paper="#FFFFFF",
    ink="#1B1F24",
    muted="#6E7681",
    blue="#0072B2",
    orange="#D55E00",
    green="#009E73",
    purple="#CC79A7",
    yellow="#D8C400",  # theirs, #F0E442, does not show on white
    sky="#56B4E9",
    amber="#E69F00",
)
DARK = Theme(
    paper="#14171B",
    ink="#E9ECEF",
    muted="#9AA3AC",
    blue="#4AA8E0",
    orange="#F08A3C",
    green="#2CC79B",
    purple="#DD94BE",
    yellow="#F0E442",
    sky="#8FD0F5",
    amber="#F2B233",
)
SAVED: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "moco",  # the same figure gives the same file
    "image.composite_image": False,  # every picture keeps its own pixels
}
MAX_PLAIN = 2_000
"""Bytes of a picture within an SVG above which it is kept as JPEG."""


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG or SVG, as the name's ending says.

    A PNG has the colours it was drawn in. An SVG drawn in `LIGHT` has no background and takes the colours of `DARK`
    wherever the reader prefers a dark page.

    Raises:
        ValueError: another ending.
    """
    if path.suffix == ".svg":
        content = svg(figure, alone=True).encode()
    elif path.suffix == ".png":
        content = _drawn(figure, "png")
    else:
        raise ValueError(f"{path.name} ends in {path.suffix!r}; expected .png or .svg")
    write_atomically(path, lambda file: file.write(content))


def svg(figure: Figure, *, alone: bool = False, name: str = "figure") -> str:
    """A figure drawn in `LIGHT` as an SVG element whose colours follow the reader's preference.

    Args:
        figure: any; its background is left out.
        alone: for a file of its own, and not for a place within HTML. There the colours come from the page, as custom
            properties `--figure-ink` and so on (`colours`).
        name: what ids within the element begin with; no two on a page may share it.
    """
    text = _drawn(figure, "svg").decode()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    for field in fields(LIGHT):
        text = re.sub(
            rf"{getattr(LIGHT, field.name)}\b(?=[^<>]*>)", f"var(--figure-{field.name})", text, flags=re.IGNORECASE
        )
    text = re.sub(r"(font:[^;\"]*?\d+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    text = re.sub(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)", _smaller, text)
    text = re.sub(r'(\bid="|"#|url\(#)', rf"\1{name}-", text)
    if alone:
        dark = f"@media (prefers-color-scheme: dark) {{ svg {{ {colours(DARK)} }} }}"
        style = f"<style>svg {{ {colours(LIGHT)} }} {dark}</style>"
        return re.sub(r"(<svg[^>]*>)", rf"\1{style}", text, count=1)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    return re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)


def colours(theme: Theme) -> str:
    """The colours of a theme as CSS declarations."""
    return " ".join(f"--figure-{field.name}: {getattr(theme, field.name)};" for field in fields(theme))


def plain(text: str, most: int = 60) -> str:
    """A name as it can be drawn: without control characters, and not too long."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def dress(axes: Axes, theme: Theme, *, title: str = "", x: str = "", y: str = "") -> None:
    """Axes without a box around, in the theme's colours; the title stands left."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(theme.muted)
    axes.tick_params(colors=theme.ink, which="both")
    axes.tick_params(color=theme.muted, which="both")
    axes.set_title(plain(title), loc="left", color=theme.ink, fontsize=11, parse_math=False)
    axes.set_xlabel(x, color=theme.ink)
    axes.set_ylabel(y, color=theme.ink)


def legend(axes: Axes, theme: Theme) -> None:
    """What the labelled lines are, if there are any, without a frame."""
    if not axes.get_legend_handles_labels()[0]:
        return
    box = axes.legend(frameon=False, fontsize="small", labelcolor=theme.ink)
    for text in box.get_texts():
        text.set_parse_math(False)


def blank(width: float, height: float, theme: Theme, *, arranged: bool = True) -> Figure:
    """An empty figure, in inches; `arranged`: its axes find their places by themselves."""
    layout = "constrained" if arranged else None
    return Figure(figsize=(width, height), layout=layout, dpi=120, facecolor=theme.paper)


def _drawn(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(SAVED), warnings.catch_warnings():
        # A name may have letters that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        if kind == "svg":
            figure.savefig(buffer, format=kind, facecolor="none", metadata={"Date": None})
        else:
            figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def _smaller(found: re.Match[str]) -> str:
    """A picture within an SVG as JPEG, where that takes less than half the room."""
    data = base64.b64decode(found[1])
    picture = Image.open(io.BytesIO(data))
    if len(data) > MAX_PLAIN and np.asarray(picture.convert("RGBA"))[..., 3].min() == 255:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, format="jpeg", quality=88)
        if 2 * len(buffer.getvalue()) < len(data):
            return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
