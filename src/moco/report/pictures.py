"""Pictures of a run that need its images or its encoder; they are in its folder, where the report finds them.

pictures.json, beside them, records what each shows.
"""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from moco.data import BadImage, Images, Splits, resized, some_of, with_labels
from moco.embeddings.coordinates import coordinates
from moco.embeddings.features import features
from moco.evaluate import HeldOut
from moco.evaluate.health import two_crops, view_features
from moco.evaluate.knn import projected
from moco.figures import (
    Alike,
    Neighbours,
    Views,
    curves,
    embedding_map,
    neighbours,
    save,
    similarities,
    thumbnail_places,
    views,
)
from moco.method.encoder import ImageEncoder
from moco.method.variants import loss_range
from moco.storage.run import Run
from moco.views.specs import ViewSpec, view_specs
from moco.views.two_views import TwoViews

FACTS = "pictures.json"
NUM_VIEWED, PIXELS = 8, 160
"""Number of images whose views are drawn, and most pixels along a side."""
MAX_SEARCHED, NUM_QUERIES, NUM_NEIGHBOURS = 5_000, 5, 5
"""Most images that are searched for neighbours; number of queries drawn, and of neighbours of each at either end."""
MAX_MAPPED, THUMBNAIL = 1_000, 48
"""Most points on the map, evenly spaced in a larger set; pixels of a thumbnail."""
SIDES = 0.03, 0.08
"""Smallest and largest side of a thumbnail as a fraction of the map's: larger if there are fewer images."""
MAX_COMPARED = 1_000
"""Most images whose views are compared with each other."""


def draw_start(run: Run, splits: Splits) -> None:
    """Write what can be shown before the first step: which images are classified, and views.

    Args:
        run: the run, for its settings and folder.
        splits: the run's images.
    """

    def tell() -> None:
        train, test = splits
        labelled = with_labels(train).labels is not None
        parts = "test" if test is not None and test.labels is not None else "tenth"
        _tell(run, "images", trained=len(train), asked=parts if labelled else None)

    _each({FACTS: tell, "views.svg": lambda: draw_views(run, splits.train)})


def draw_results(run: Run, encoder: ImageEncoder, projector: nn.Module, images: Images, held: HeldOut | None) -> None:
    """Write the pictures of a trained encoder: curves, neighbours, map, similarities.

    A picture that cannot be drawn is reported in the log, and the others are drawn.

    Args:
        run: the run, for its settings and folder.
        encoder: the run's encoder, on the device to use.
        projector: its head, on the same device.
        images: the training images.
        held: the images to search for neighbours, and those to take queries from; None without labels.
    """
    _each(
        {
            "curves.png": lambda: draw_curves(run),
            "neighbours.svg": lambda: draw_neighbours(run, encoder, *(held or (images, images))),
            "map.svg": lambda: draw_map(run, encoder, images),
            "similarities.svg": lambda: draw_similarities(run, encoder, projector, images),
        }
    )


def _each(drawings: Mapping[str, Callable[[], None]]) -> None:
    for name, draw in drawings.items():
        try:
            draw()
        except Exception as error:  # a picture is not worth hours of training
            words = " ".join(str(error).split())
            logging.getLogger("moco").warning("%s could not be drawn: %s: %s", name, type(error).__name__, words)


def _tell(run: Run, picture: str, **facts: Any) -> None:
    path = run.path / FACTS
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        known = {}
    run.write_json(FACTS, (known if isinstance(known, dict) else {}) | {picture: facts})


def draw_curves(run: Run) -> None:
    """Write curves.png from metrics.csv."""
    chance, floor = loss_range(run.config.model, run.config.batch_size)
    levels = {
        who: row["knn_top1"] for who, row in run.results.items() if who != "trained encoder" and "knn_top1" in row
    }
    save(curves(run.metrics, chance=chance, floor=floor, baselines=levels), run.path / "curves.png")


def draw_neighbours(run: Run, encoder: ImageEncoder, images: Images, asked: Images) -> None:
    """Write neighbours.png and .svg: a few images with those that the encoder finds most and least similar.

    Args:
        run: the run, for its settings and folder.
        encoder: the run's encoder, on the device to use.
        images: the images to search for neighbours.
        asked: the images to take queries from; the same object if an image may not be its own neighbour.
    """
    bank = some_of(images, MAX_SEARCHED)
    same = asked is images
    asked = bank if same else asked
    places = torch.linspace(0, len(asked) - 1, 2 * NUM_QUERIES + 1).long()[1::2].unique()
    chosen = asked.select(places)
    vectors, queries = (
        F.normalize(features(encoder, each, precision=run.config.engine.precision), dim=1) for each in (bank, chosen)
    )
    rows = []
    for number, similarity in enumerate(queries @ vectors.T):
        order = [i for i in similarity.argsort(descending=True).tolist() if not (same and i == int(places[number]))]
        nearest, farthest = (
            [Alike(_whole(bank, i), _class(bank, i), float(similarity[i])) for i in part]
            for part in (order[:NUM_NEIGHBOURS], order[-NUM_NEIGHBOURS:])
        )
        rows.append(Neighbours(_whole(chosen, number), _class(chosen, number), nearest, farthest))
    figure = neighbours(rows)
    for suffix in ("png", "svg"):
        save(figure, run.path / f"neighbours.{suffix}")
    _tell(run, "neighbours", asked="same" if same else "other", among=len(bank), total=len(images))


def draw_views(run: Run, images: Images) -> None:
    """Write views.svg: a few images with their two views of the first epoch, as the model sees them.

    Args:
        run: the run, for its settings and folder.
        images: the training images.
    """
    ids = torch.linspace(0, len(images) - 1, 2 * min(NUM_VIEWED, len(images)) + 1).long()[1::2].unique()
    specs = view_specs(run.config.views)
    made = TwoViews(specs, run.config.views.size, run.config.seed)
    pair = [_seen(view, spec).numpy() for view, spec in zip(_pair(images, ids, made), specs, strict=True)]
    columns = []
    for place, number in enumerate(ids.tolist()):
        picture = _whole(images, number)
        columns.append(Views(picture, _class(images, number), *(_bare(view[place]) for view in pair)))
    save(views(columns), run.path / "views.svg")


def draw_map(run: Run, encoder: ImageEncoder, images: Images) -> None:
    """Write map.svg: images on a plane, on which those that the encoder finds similar are near each other.

    Args:
        run: the run, for its settings and folder.
        encoder: the run's encoder, on the device to use.
        images: images of the run.
    """
    shown = some_of(images, MAX_MAPPED)
    # Which thumbnail is drawn where there is room for one only is left to chance, not to the order of the classes.
    shown = shown.select(torch.randperm(len(shown), generator=torch.Generator().manual_seed(0)))
    placed = coordinates(features(encoder, shown, precision=run.config.engine.precision).numpy())
    least, most = SIDES
    side = min(most, max(least, (0.5 / len(shown)) ** 0.5))
    chosen = thumbnail_places(placed.xy, side).index.tolist()
    thumbnails = resized(shown, chosen, size=min(THUMBNAIL, encoder.input_size)).movedim(1, 3).numpy()
    figure = embedding_map(
        placed.xy,
        [_bare(each) for each in thumbnails],
        labels=None if shown.labels is None else shown.labels.numpy(),
        classes=shown.classes or (),
        side=side,
    )
    save(figure, run.path / "map.svg")
    _tell(run, "map", shown=len(shown), total=len(images), drawn=len(chosen), notes=list(placed.notes))


def draw_similarities(run: Run, encoder: ImageEncoder, projector: nn.Module, images: Images) -> None:
    """Write similarities.svg: similarities of projections of two views of an image, and of views of two images.

    Args:
        run: the run, for its settings and folder.
        encoder: the run's encoder, on the device to use.
        projector: its head, on the same device.
        images: the training images.
    """
    made = TwoViews(view_specs(run.config.views), run.config.views.size, run.config.seed)
    shown = some_of(images, MAX_COMPARED)
    pair = view_features(encoder, shown, made, precision=run.config.engine.precision)
    x, y = (F.normalize(projected(projector, vectors), dim=1) for vectors in pair)
    cosine = x @ y.T
    other = ~torch.eye(len(cosine), dtype=torch.bool)
    save(similarities(cosine.diagonal().numpy(), cosine[other].numpy()), run.path / "similarities.svg")
    _tell(run, "similarities", shown=len(shown), total=len(images))


def _pair(images: Images, ids: Tensor, made: TwoViews) -> tuple[Tensor, Tensor]:
    if images.in_memory is not None:
        return made(images.in_memory[ids], ids, epoch=0)
    return made.finish(two_crops(images, ids, made), ids, epoch=0)


def _seen(view: Float[Tensor, "n c s s"], spec: ViewSpec) -> UInt8[Tensor, "n s s c"]:
    """Return a normalised view, converted back to pixels."""
    channels = view.shape[1]
    mean, std = (_per_channel(values, channels).to(view.device) for values in (spec.mean, spec.std))
    pixels = view * std[:, None, None] + mean[:, None, None]
    return (255 * pixels).round().clamp(0, 255).to(torch.uint8).movedim(1, 3).cpu()


def _per_channel(values: tuple[float, ...], channels: int) -> Float[Tensor, " c"]:
    known = torch.tensor(values)
    return known if len(known) == channels else known.mean().expand(channels)


def _whole(images: Images, index: int) -> np.ndarray:
    """Return an image in its own aspect ratio."""
    try:
        image = images.decode(index)
    except BadImage:  # it has been named
        image = torch.zeros(images.channels, 16, 16, dtype=torch.uint8)
    height, width = image.shape[1:]
    if max(height, width) > PIXELS:
        size = [max(1, round(PIXELS * side / max(height, width))) for side in (height, width)]
        image = resize(image, size, antialias=True)
    return _bare(image.movedim(0, 2).numpy())


def _bare(picture: np.ndarray) -> np.ndarray:
    """In colour, of more channels the first three; or the first channel alone, without an axis for it."""
    return picture[:, :, :3] if picture.shape[2] >= 3 else picture[:, :, 0]


def _class(images: Images, index: int) -> str:
    return "" if images.labels is None or images.classes is None else images.classes[int(images.labels[index])]
