"""Writing pictures to files: PNG in the colours they were drawn in, SVG in light or dark as the reader prefers."""

import base64
import io
import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from moco.figures.letters import lettered
from moco.figures.theme import DARK, LIGHT, colours
from moco.files import write_atomically

SAVED: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "moco",  # the same figure gives the same file
    "image.composite_image": False,  # every picture keeps its own pixels
}
MAX_PLAIN = 1_000
"""Size in bytes above which a picture within an SVG may be stored as JPEG."""


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, according to the suffix of the path.

    A PNG has the colours it was drawn in. An SVG drawn in `LIGHT` has no background, and takes the colours of `DARK` if
    the reader prefers dark pages.

    Raises:
        ValueError: the suffix is neither .png nor .svg.
    """
    if path.suffix == ".svg":
        content = svg(figure, alone=True).encode()
    elif path.suffix == ".png":
        content = _drawn(figure, "png")
    else:
        raise ValueError(f"{path.name} ends in {path.suffix!r}; expected .png or .svg")
    write_atomically(path, lambda file: file.write(content))


def svg(figure: Figure, *, alone: bool = False, name: str = "figure") -> str:
    """Return a figure drawn in `LIGHT` as an SVG element whose colours follow the reader's preference.

    Args:
        figure: any figure; its background is left out.
        alone: whether it is for a file of its own. Embedded in HTML, the colours come from the page, as custom
            properties `--figure-ink` and so on (`colours`).
        name: prefix of the ids within the element; unique on a page.
    """
    text = _drawn(figure, "svg").decode()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], count=1, flags=re.DOTALL)
    for variable, colour in LIGHT.variables().items():
        text = re.sub(rf"{colour}\b(?=[^<>]*>)", f"var({variable})", text, flags=re.IGNORECASE)
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


def _drawn(figure: Figure, kind: str) -> bytes:
    lettered(figure, painted=kind == "png")
    buffer = io.BytesIO()
    with matplotlib.rc_context(SAVED), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # it has been said where it matters
        if kind == "svg":
            figure.savefig(buffer, format=kind, facecolor="none", metadata={"Date": None})
        else:
            figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def _smaller(found: re.Match[str]) -> str:
    """Return a picture within an SVG as JPEG, where that takes a third less room."""
    data = base64.b64decode(found[1])
    picture = Image.open(io.BytesIO(data))
    if len(data) > MAX_PLAIN and np.asarray(picture.convert("RGBA"))[..., 3].min() == 255:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, format="jpeg", quality=85)
        if 3 * len(buffer.getvalue()) < 2 * len(data):
            return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
