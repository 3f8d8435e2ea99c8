"""Pictures of a run that need its images or its encoder; they lie in its folder, where the report finds them."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from moco.data import ArrayImages, BadImage, FileImages, Images, resized
from moco.embed import features
from moco.encoder import ImageEncoder
from moco.evaluate import HeldOut
from moco.evaluate.health import evenly, two_crops, view_features
from moco.evaluate.knn import projected
from moco.figures import (
    Neighbours,
    Views,
    apart,
    coordinates,
    curves,
    embedding_map,
    neighbours,
    save,
    similarities,
    views,
)
from moco.run import Run
from moco.variants import loss_range
from moco.views import TwoViews, ViewSpec, view_specs

NUM_VIEWED, PIXELS = 8, 160
"""Images whose views are drawn, and the most pixels that a side is drawn with."""
MAX_SEARCHED, NUM_QUERIES, NUM_NEIGHBOURS = 5_000, 5, 5
"""Images that neighbours are looked for among; queries drawn, and neighbours of each at either end."""
MAX_MAPPED, THUMBNAIL, SIDE = 1_000, 64, 0.042
"""Points of the map, evenly spaced images of a larger set; pixels of a thumbnail, and its share of the map's side."""
MAX_COMPARED = 1_000
"""Images whose views are compared with each other."""


def draw_results(run: Run, encoder: ImageEncoder, projector: nn.Module, images: Images, held: HeldOut | None) -> None:
    """Writes all that a trained encoder has to show: curves, neighbours, map, similarities.

    Args:
        run: whose settings and folder these are.
        encoder: of the run, on the device that is to do the work.
        projector: its head, likewise.
        images: that it was trained on.
        held: images that are asked about, and among which their neighbours are looked for; None without labels.
    """
    draw_curves(run)
    draw_neighbours(run, encoder, *(held or (images, images)))
    draw_map(run, encoder, images)
    draw_similarities(run, encoder, projector, images)


def draw_curves(run: Run) -> None:
    """Writes curves.png from metrics.csv."""
    chance, floor = loss_range(run.config.model, run.config.batch_size)
    levels = {
        who: row["knn_top1"] for who, row in run.results.items() if who != "trained encoder" and "knn_top1" in row
    }
    save(curves(run.metrics, chance=chance, floor=floor, baselines=levels), run.path / "curves.png")


def draw_neighbours(run: Run, encoder: ImageEncoder, images: Images, asked: Images) -> None:
    """Writes neighbours.png and .svg: a few images with those that the encoder finds most and least like them.

    Args:
        run: whose settings and folder these are.
        encoder: of the run, on the device that is to do the work.
        images: among which neighbours are looked for.
        asked: from which a few are chosen; the same object if an image may not be its own neighbour.
    """
    bank = evenly(images, MAX_SEARCHED)
    same = asked is images
    asked = bank if same else asked
    chosen = asked.select(torch.linspace(0, len(asked) - 1, 2 * NUM_QUERIES + 1).long()[1::2])
    vectors, queries = (
        F.normalize(features(encoder, each, precision=run.config.engine.precision), dim=1) for each in (bank, chosen)
    )
    rows = []
    for number, similarity in enumerate(queries @ vectors.T):
        order = similarity.argsort(descending=True)[1 if same else 0 :]  # not the query itself
        near, far = order[:NUM_NEIGHBOURS].tolist(), order[-NUM_NEIGHBOURS:].tolist()
        titled = [
            [(_whole(bank, i), f"{_class(bank, i)[:12]} {similarity[i]:.2f}".strip()) for i in part]
            for part in (near, far)
        ]
        rows.append(Neighbours(_whole(chosen, number), _class(chosen, number)[:12], *titled))
    for suffix in ("png", "svg"):
        save(neighbours(rows), run.path / f"neighbours.{suffix}")


def draw_views(run: Run, images: Images) -> None:
    """Writes views.svg: a handful of images with their two views of the first epoch, as the model sees them.

    Args:
        run: whose settings and folder these are.
        images: that it trains on.
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
    """Writes map.svg: images at places where those that the encoder finds alike lie near each other.

    Args:
        run: whose settings and folder these are.
        encoder: of the run, on the device that is to do the work.
        images: any of the run's.
    """
    shown = evenly(images, MAX_MAPPED)
    # Which thumbnail is drawn where there is room for one only is left to chance, not to the order of the classes.
    shown = shown.select(torch.randperm(len(shown), generator=torch.Generator().manual_seed(0)))
    places = coordinates(features(encoder, shown, precision=run.config.engine.precision).numpy())
    chosen = apart(places, SIDE).tolist()
    side = min(THUMBNAIL, encoder.input_size)
    thumbnails = resized(shown, chosen, size=side).movedim(1, 3).numpy()
    figure = embedding_map(
        places,
        [_bare(each) for each in thumbnails],
        labels=None if shown.labels is None else shown.labels.numpy(),
        classes=shown.classes or (),
        title=f"{len(shown):,} images; those that the encoder finds alike lie near each other",
        side=SIDE,
    )
    save(figure, run.path / "map.svg")


def draw_similarities(run: Run, encoder: ImageEncoder, projector: nn.Module, images: Images) -> None:
    """Writes similarities.svg: how alike projections are, of two views of an image and of views of two images.

    Args:
        run: whose settings and folder these are.
        encoder: of the run, on the device that is to do the work.
        projector: its head, likewise.
        images: that it trains on.
    """
    made = TwoViews(view_specs(run.config.views), run.config.views.size, run.config.seed)
    shown = evenly(images, MAX_COMPARED)
    pair = view_features(encoder, shown, made, precision=run.config.engine.precision)
    x, y = (F.normalize(projected(projector, vectors), dim=1) for vectors in pair)
    cosine = x @ y.T
    other = ~torch.eye(len(cosine), dtype=torch.bool)
    save(similarities(cosine.diagonal().numpy(), cosine[other].numpy()), run.path / "similarities.svg")


def _pair(images: Images, ids: Tensor, made: TwoViews) -> tuple[Tensor, Tensor]:
    if isinstance(images, ArrayImages):
        return made(images.images[ids], ids, epoch=0)
    assert isinstance(images, FileImages)
    return made.finish(two_crops(images, ids, made), ids, epoch=0)


def _seen(view: Float[Tensor, "n c s s"], spec: ViewSpec) -> UInt8[Tensor, "n s s c"]:
    """A normalised view as it looks."""
    channels = view.shape[1]
    mean, std = (_per_channel(values, channels).to(view.device) for values in (spec.mean, spec.std))
    pixels = view * std[:, None, None] + mean[:, None, None]
    return (255 * pixels).round().clamp(0, 255).to(torch.uint8).movedim(1, 3).cpu()


def _per_channel(values: tuple[float, ...], channels: int) -> Float[Tensor, " c"]:
    known = torch.tensor(values)
    return known if len(known) == channels else known.mean().expand(channels)


def _whole(images: Images, index: int) -> np.ndarray:
    """An image in its own proportions."""
    try:
        image = images.decode(index)
    except BadImage:  # it has been named
        image = torch.zeros(images.channels if isinstance(images, FileImages) else 1, 16, 16, dtype=torch.uint8)
    height, width = image.shape[1:]
    if max(height, width) > PIXELS:
        size = [max(1, round(PIXELS * side / max(height, width))) for side in (height, width)]
        image = resize(image, size, antialias=True)
    return _bare(image.movedim(0, 2).numpy())


def _bare(picture: np.ndarray) -> np.ndarray:
    """Without an axis for the one channel of a grey picture."""
    return picture[:, :, 0] if picture.shape[2] == 1 else picture


def _class(images: Images, index: int) -> str:
    return "" if images.labels is None or images.classes is None else images.classes[int(images.labels[index])]
