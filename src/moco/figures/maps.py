"""All images on a plane, those alike near each other."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moco.figures.theme import LIGHT, Theme, blank, plain

MAX_COLOURED = 20
"""Classes up to which points are coloured."""
MAX_ITER = 500
"""Steps of t-SNE, of which 250 are its early exaggeration: half as many as usual, for a picture as good to the eye."""


def coordinates(vectors: np.ndarray, *, method: Literal["tsne", "pca"] = "tsne", seed: int = 0) -> np.ndarray:
    """Places on a plane, `[n, 2]` float32 between 0 and 1, at which vectors of similar direction lie near each other.

    The vectors are brought to unit length and to their first 50 principal components; t-SNE (van der Maaten and Hinton
    2008) starts from the first two. With fewer than 10 vectors it is these two.

    Args:
        vectors: `[n, d]`, n at least 1.
        method: `tsne`, or `pca`: the first two principal components alone.
        seed: of t-SNE.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    number, dims = unit.shape
    kept = min(50, number, dims)
    # Equal vectors have no direction to spread along: they stay together at 0.
    spread = float(np.ptp(unit, axis=0).max()) > 1e-7
    places = np.zeros((number, 2), dtype=np.float32)
    if spread:
        reduced = PCA(n_components=kept, svd_solver="full", random_state=seed).fit_transform(unit.astype(np.float64))
        places[:, : min(2, kept)] = reduced[:, :2]
        if method == "tsne" and number >= 10 and kept >= 2:
            start = places / max(float(places[:, 0].std()), 1e-12) * 1e-4
            perplexity = min(30.0, (number - 1) / 3)
            mapping = TSNE(init=start, perplexity=perplexity, random_state=seed, n_jobs=1, max_iter=MAX_ITER)
            places = mapping.fit_transform(reduced).astype(np.float32)
    low, high = places.min(axis=0), places.max(axis=0)
    side = max(float((high - low).max()), 1e-12)
    return ((places - (low + high) / 2) / side + 0.5).astype(np.float32)


def apart(places: np.ndarray, side: float) -> np.ndarray:
    """Which of the points can bear a square of this side so that no two squares overlap: earlier ones first.

    Args:
        places: `[n, 2]`.
        side: in the same unit.

    Returns:
        Indices, in ascending order.
    """
    chosen: list[int] = []
    for number, place in enumerate(places):
        if not chosen or float(np.abs(places[chosen] - place).max(axis=1).min()) >= side:
            chosen.append(number)
    return np.asarray(chosen, dtype=np.int64)


def embedding_map(
    places: np.ndarray,
    pictures: Sequence[np.ndarray],
    *,
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    title: str = "",
    side: float = 0.042,
    theme: Theme = LIGHT,
) -> Figure:
    """Every image as a point, and as a thumbnail where there is room for one.

    Args:
        places: `[n, 2]` between 0 and 1, as `coordinates` gives.
        pictures: of the points that `apart(places, side)` chooses, in that order; uint8 `[h, w]` or `[h, w, 3]`.
        labels: class number of each image; points and frames are then coloured, and each class named where most of it
            lies, if there are at most 20.
        classes: names of the class numbers.
        title: of the figure.
        side: of a thumbnail with its frame.
        theme: colours.
    """
    figure = blank(8.0, 8.3, theme)
    axes = figure.subplots()
    axes.set_axis_off()
    coloured = labels is not None and len(np.unique(labels)) <= MAX_COLOURED
    palette = np.asarray(theme.classes)
    shades = palette[labels % len(palette)] if labels is not None and coloured else np.full(len(places), theme.muted)
    axes.scatter(places[:, 0], places[:, 1], s=7, c=shades, linewidths=0, alpha=0.65)
    chosen = apart(places, side)
    for number, picture in zip(chosen, pictures, strict=True):
        x, y = map(float, places[number])
        height, width = picture.shape[:2]
        across, up = (0.43 * side * length / max(height, width) for length in (width, height))
        smooth = "none" if min(height, width) < 32 else "antialiased"
        extent = (x - across, x + across, y - up, y + up)
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation=smooth, zorder=2)
        frame = Rectangle((x - across, y - up), 2 * across, 2 * up, fill=False, linewidth=1.6, zorder=3)
        frame.set_edgecolor(str(shades[number]))
        axes.add_patch(frame)
    if labels is not None and coloured:
        named: list[tuple[float, float, int]] = []
        for label in np.unique(labels):
            name = plain(classes[label] if label < len(classes) else str(label), 18)
            x, y = _free(places[labels == label], len(name), named)
            named.append((x, y, len(name)))
            style = {
                "boxstyle": "round,pad=0.3",
                "facecolor": theme.paper,
                "edgecolor": str(palette[label % len(palette)]),
            }
            text = axes.text(x, y, name, ha="center", va="center", fontsize=9.5, weight="bold", bbox=style, zorder=4)
            text.set(color=theme.ink, parse_math=False)
    axes.set(xlim=(-side, 1 + side), ylim=(-side, 1 + side), aspect="equal")
    axes.set_title(plain(title, 90), loc="left", color=theme.ink, fontsize=11, parse_math=False)
    return figure


def _free(places: np.ndarray, letters: int, taken: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Where a name stands: the point with most others of its kind around it at which it covers no other name."""
    distance = np.linalg.norm(places[:, None] - places[None, :200], axis=2)
    order = np.median(distance, axis=1).argsort()
    for x, y in places[order].tolist():
        # A letter is about 0.011 of the map's width, a line 0.035 of its height.
        if all(abs(y - v) > 0.035 or abs(x - u) > 0.0055 * (letters + n) + 0.02 for u, v, n in taken):
            return x, y
    x, y = places[order[0]].tolist()
    return x, y
