"""Pictures, each returned as a figure; `save` writes one as PNG or SVG."""

from moco.figures.grids import Alike, Neighbours, Views, neighbours, views
from moco.figures.lines import curve_panels, curves, overlay, similarities
from moco.figures.maps import embedding_map, thumbnail_places
from moco.figures.matrix import confusion_matrix
from moco.figures.saving import save, svg
from moco.figures.theme import CLASS_COLOURS_DARK, CLASS_COLOURS_LIGHT, DARK, LIGHT, Theme

__all__ = [
    "CLASS_COLOURS_DARK",
    "CLASS_COLOURS_LIGHT",
    "DARK",
    "LIGHT",
    "Alike",
    "Neighbours",
    "Theme",
    "Views",
    "confusion_matrix",
    "curve_panels",
    "curves",
    "embedding_map",
    "neighbours",
    "overlay",
    "save",
    "similarities",
    "svg",
    "thumbnail_places",
    "views",
]
