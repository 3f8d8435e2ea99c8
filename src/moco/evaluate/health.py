"""The health of an encoder, from its features of two views of each image; needs no labels.

Alignment and uniformity are those of Wang and Isola 2020 (arXiv:2005.10242, equations 6 and 7), the effective rank is
RankMe of Garrido et al. 2023 (arXiv:2210.02885, equations 1 and 2).
"""

import logging
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from moco.data import BadImage, Images, some_of
from moco.embeddings.features import Report, encode, evaluating, resolve_precision
from moco.evaluate.contract import Outcome, Protocol, Task
from moco.evaluate.knn import projected
from moco.method.encoder import ImageEncoder
from moco.views.specs import VIEWS
from moco.views.two_views import TwoViews

Vectors = Float[Tensor, "n d"]

MAX_IMAGES = 5_000
"""Most training images that are used, evenly spaced in a larger set. An effective rank is at most their number."""
SMALL = 64
"""Images with sides up to this many pixels are not blurred."""
PAIRS_AT_ONCE = 2**24
"""Similarities held in memory at a time."""
FEW_TO_RANK = 4
"""With fewer images than this many times the features, the effective rank says as much about them as the encoder."""
# Rules of thumb: no paper gives any. They are set far from what was measured on encoders that work.
COLLAPSED_SPREAD, COLLAPSED_RANK = 0.1, 2.0
COLLAPSE_ADVICE = "Lower --optim.base_lr, raise --model.momentum, and leave --model.batchnorm on auto."
LOW_RANK = 5.0
"""Effective rank below which few dimensions are used, in percent of the dimensions."""
DEAD = 0.01
"""Standard deviation below which a dimension is dead, as a fraction of that of features uniform on the sphere."""


def evaluate(task: Task) -> Outcome:
    """Run the protocol on two views of training images, made as in the run or by the recipe `v2`; uses no labels.

    Raises:
        ValueError: there is only one training image.
    """
    encoder, images = task.encoder, some_of(task.splits.train, MAX_IMAGES)
    if len(images) < 2:
        raise ValueError("there is only one training image; health needs at least 2: give more with --data")
    small = encoder.input_size <= SMALL and task.views is None
    first, second = (replace(spec, mean=encoder.mean, std=encoder.std) for spec in task.views or VIEWS["v2"]())
    if small:
        first, second = (replace(spec, blur_p=0.0) for spec in (first, second))
    views = TwoViews((first, second), encoder.input_size, task.settings.seed)
    pair = view_features(
        encoder,
        images,
        views,
        precision=task.settings.precision,
        on_progress=lambda done, total: task.report("features of two views", done, total),
    )
    figures = measure(*pair)
    notes = [f"Two views of {len(images):,} training images, {_made(task, small)}."]
    notes.append(f"Features: {verdict(figures, num_images=len(images), num_dims=pair[0].shape[1])}")
    if task.projector is not None:
        pair = tuple(projected(task.projector, vectors) for vectors in pair)
        of_head = measure(*pair)
        figures |= {f"projection_{name}": value for name, value in of_head.items()}
        notes.append(f"Projections: {verdict(of_head, num_images=len(images), num_dims=pair[0].shape[1])}")
    return Outcome(figures, notes=tuple(notes))


PROTOCOL = Protocol(evaluate, frozenset(), wants_projector=True)


def alignment(x: Vectors, y: Vectors, *, alpha: float = 2.0) -> float:
    """Mean distance between two views of an image, to the power `alpha`: 0 if views do not matter.

    Args:
        x: unit vectors of one view of each image.
        y: unit vectors of the other view.
        alpha: exponent; 2 in the paper.

    Example:
        >>> alignment(torch.eye(2), torch.eye(2).flip(0))
        2.0
    """
    return _wide(x - y).norm(dim=1).pow(alpha).mean().item()


def uniformity(x: Vectors, *, t: float = 2.0) -> float:
    """Log of the mean Gaussian potential exp(-t |a - b|^2) over all pairs: 0 if collapsed, lower if more uniform.

    For t = 2 and many dimensions d, vectors uniform on the sphere give about -4 + 8 / d.

    Args:
        x: unit vectors, at least two.
        t: scale of the potential; 2 in the paper.

    Example:
        >>> uniformity(torch.eye(2))
        -4.0
    """
    wide, n = _wide(x), len(x)
    square = wide.square().sum(dim=1)
    sums = []
    rows = max(1, PAIRS_AT_ONCE // n)
    for start in range(0, n - 1, rows):
        part, rest = wide[start : start + rows], wide[start:]
        distance = square[start : start + rows, None] + square[start:] - 2 * part @ rest.T
        own = torch.ones_like(distance, dtype=torch.bool).triu(diagonal=1)  # each pair once, none with itself
        sums.append((-t * distance.clamp(min=0)[own]).logsumexp(dim=0))
    return torch.stack(sums).logsumexp(dim=0).item() - math.log(n * (n - 1) / 2)


def rank_me(z: Vectors, *, eps: float = 1e-7) -> float:
    """Effective rank: exp of the entropy of the singular values divided by their sum; 1 to the number of dimensions.

    The vectors are neither centred nor normalised. The result is NaN if one of them is not finite.

    Args:
        z: features; with fewer vectors than dimensions, the rank is at most their number.
        eps: added to each share.

    Example:
        >>> round(rank_me(torch.eye(4)), 3)
        4.0
    """
    if not z.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(_wide(z))
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + eps
    return torch.exp(-(shares * shares.log()).sum()).item()


@torch.inference_mode()
def measure(first: Vectors, second: Vectors) -> dict[str, float]:
    """Compute health figures from features of two views of the same images, row by row.

    Args:
        first: features of the first views, of any length; rank, spread and uniformity are computed from these alone.
        second: features of the second views.

    Returns:
        `effective_rank`, and `effective_rank_share` in percent of the dimensions; `alignment`; `uniformity`; `spread`,
        the standard deviation of unit vectors relative to uniform ones, averaged over the dimensions, and its minimum
        `spread_min`; `dead`, the percentage of dimensions that hardly vary; `consistency`, the percentage of images
        whose own second view is the nearest of all; `positive` and `negative`, the mean cosine of views of the same
        image and of different images.
    """
    x, y = F.normalize(first, dim=1), F.normalize(second, dim=1)
    n, d = x.shape
    rank, spreads = rank_me(first), x.std(dim=0) * math.sqrt(d)
    nearest = [(part @ y.T).argmax(dim=1) for part in x.split(max(1, PAIRS_AT_ONCE // n))]
    positive = (x * y).sum(dim=1).double().mean().item()
    together = (x.double().sum(dim=0) @ y.double().sum(dim=0)).item()
    return {
        "effective_rank": rank,
        "effective_rank_share": 100 * rank / d,
        "alignment": alignment(x, y),
        "uniformity": uniformity(x),
        "spread": spreads.mean().item(),
        "spread_min": spreads.min().item(),
        "dead": 100 * (spreads < DEAD).double().mean().item(),
        "consistency": 100 * (torch.cat(nearest).cpu() == torch.arange(n)).double().mean().item(),
        "positive": positive,
        "negative": (together - n * positive) / (n * (n - 1)),
    }


def is_collapsed(*, spread: float = 1.0, effective_rank: float = math.inf) -> bool:
    """Return whether all images look alike to the encoder; a figure that was not measured is left out."""
    return spread < COLLAPSED_SPREAD or effective_rank <= COLLAPSED_RANK


def verdict(figures: dict[str, float], *, num_images: int, num_dims: int) -> str:
    """Say what the figures of `measure` mean, and what to do. The limits are rules of thumb."""
    spread, rank = figures["spread"], figures["effective_rank"]
    most = min(num_dims, num_images)
    share = 100 * rank / most
    if not math.isfinite(spread + rank):
        return "broken: they are NaN or infinite; go back to an earlier checkpoint and lower --optim.base_lr."
    if is_collapsed(spread=spread, effective_rank=rank):
        return (
            f"collapsed: all images look alike (spread {spread:.3f}, effective rank {rank:.1f}; expected over "
            f"{COLLAPSED_SPREAD} and {COLLAPSED_RANK:g}). An encoder that is hardly trained can look like this too. "
            f"{COLLAPSE_ADVICE}"
        )
    if share < LOW_RANK:
        return (
            f"few dimensions are used: effective rank {rank:.1f} of {most}, {share:.1f} %; expected over {LOW_RANK:g} "
            "%. Lower --model.temperature, make the views differ more (--views.recipe, --views.crop_min), or go back "
            "to an earlier checkpoint."
        )
    words = (
        f"not collapsed: effective rank {rank:.1f} of {num_dims}, spread {spread:.2f}; {figures['consistency']:.1f} % "
        f"of the images have their own other view as nearest neighbour ({100 / num_images:.2g} % by chance)."
    )
    if figures["dead"] >= 1:
        words += f" {figures['dead']:.0f} % of the dimensions are the same for every image."
    if num_images < FEW_TO_RANK * num_dims:
        words += f" With only {num_images:,} images, compare the rank only between encoders measured on the same ones."
    return words


@torch.inference_mode()
def view_features(
    encoder: ImageEncoder,
    images: Images | UInt8[Tensor, "n 2 c s s"],
    views: TwoViews,
    *,
    epoch: int = 0,
    batch_size: int = 256,
    precision: str = "auto",
    on_progress: Report | None = None,
) -> tuple[Vectors, Vectors]:
    """Compute float32 features of two views of each image, on the CPU; the encoder's mode is restored.

    Args:
        encoder: on the device to use.
        images: images, or their crops as `two_crops` makes them.
        views: how the two views are made; they depend only on its seed, `epoch` and an image's position.
        epoch: a different one gives different views.
        batch_size: images per forward pass.
        precision: precision of the encoder.
        on_progress: called with (images done, images in all).
    """
    device, precision = next(encoder.parameters()).device, resolve_precision(encoder, precision)
    features: tuple[list[Tensor], list[Tensor]] = [], []
    with evaluating(encoder):
        for ids in torch.arange(len(images)).split(batch_size):
            if not isinstance(images, Tensor) and images.in_memory is not None:
                pair = views(images.in_memory[ids].to(device), ids, epoch=epoch)
            else:
                crops = images[ids] if isinstance(images, Tensor) else two_crops(images, ids, views, epoch=epoch)
                pair = views.finish(crops.to(device), ids, epoch=epoch)
            for batch, parts in zip(pair, features, strict=True):
                parts.append(encode(encoder, batch, precision).float().cpu())
            if on_progress:
                on_progress(int(ids[-1]) + 1, len(images))
    first, second = (torch.cat(parts) for parts in features)
    return first, second


def two_crops(
    images: Images, ids: Int64[Tensor, " n"], views: TwoViews, *, epoch: int = 0
) -> UInt8[Tensor, "n 2 c s s"]:
    """Crops of image files for two views, to be passed to `views.finish`; those of unreadable files are black."""
    out = torch.zeros(len(ids), 2, images.channels, views.size, views.size, dtype=torch.uint8)
    places, bad = torch.arange(len(ids)), []
    for part in places.split(32):  # decoded images, which may be camera-sized, in memory at a time
        for place, each in zip(part.tolist(), images.decode_many(ids[part].tolist()), strict=True):
            if isinstance(each, BadImage):
                bad.append(each)
            else:
                out[place] = views.crop(each, int(ids[place]), epoch)
    if bad:
        logging.getLogger("moco").warning("%d of %d images are black: %s", len(bad), len(out), bad[0])
    return out


def _made(task: Task, small: bool) -> str:
    return "made as for training" if task.views else f"by the recipe v2{' without blur' if small else ''}"


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
