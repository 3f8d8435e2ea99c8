"""Pictures, each returned as a figure; `save` writes one as PNG or SVG."""

from moco.figures.grids import Neighbours, Views, neighbours, views
from moco.figures.lines import curve_panels, curves, overlay, similarities
from moco.figures.maps import apart, coordinates, embedding_map
from moco.figures.matrix import confusion_matrix
from moco.figures.theme import DARK, LIGHT, Theme, save, svg

BLUE, ORANGE, GREEN, GREY = LIGHT.blue, LIGHT.orange, LIGHT.green, LIGHT.muted

__all__ = [
    "BLUE",
    "DARK",
    "GREEN",
    "GREY",
    "LIGHT",
    "ORANGE",
    "Neighbours",
    "Theme",
    "Views",
    "apart",
    "confusion_matrix",
    "coordinates",
    "curve_panels",
    "curves",
    "embedding_map",
    "neighbours",
    "overlay",
    "save",
    "similarities",
    "svg",
    "views",
]
