"""The map of images as one file that opens from disk, without a server."""

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path

from moco.data.decode import quiet_pillow
from moco.explore.atlas import Atlas, page_data
from moco.files import write_atomically

SCRIPTS = tuple(
    f"{name}.js"
    for name in ("document", "images", "tints", "points", "thumbnails", "view", "panel", "pointer", "keyboard", "page")
)
"""Scripts of the page, in the order in which they run."""


def save_page(atlas: Atlas, path: str | Path) -> None:
    """Save the map as one file that opens from disk, with its thumbnails and each image's neighbours.

    Args:
        atlas: the map to save.
        path: file to write; an existing one is replaced.

    Example:
        >>> save_page(open_atlas("runs/first", most=2000), "map.html")                         # doctest: +SKIP
    """
    style, scripts = read_page("page.css"), {name: read_page(name) for name in SCRIPTS}
    with quiet_pillow():
        data = json.dumps(page_data(atlas, whole=True), separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # no name can close the element that contains it
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts.values()))}; style-src {_hash(style)}; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'"
    )
    html = read_page("index.html")
    for before, after in (
        (
            '<meta charset="utf-8">',
            f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">',
        ),
        ('<link rel="stylesheet" href="page.css">', f"<style>{style}</style>"),
        ("<noscript>", f'<script type="application/json" id="data">{data}</script>\n<noscript>'),
        *((f'<script src="{name}" defer></script>', f"<script>{script}</script>") for name, script in scripts.items()),
    ):
        assert html.count(before) == 1
        html = html.replace(before, after)
    write_atomically(Path(path), lambda file: file.write(html.encode()))


def read_page(name: str) -> str:
    """Read one of the page's own files."""
    return (files("moco.explore") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
