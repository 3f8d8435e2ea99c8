"""The model card: README.md beside the files of an export."""

import html
import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

from moco.data import GIVEN
from moco.export.contract import Subject, Written
from moco.method.backbones import num_heads
from moco.packages import version_of
from moco.storage.run import Run

PAPERS = {"v1": "1911.05722", "v2": "2003.04297", "v3": "2104.02057"}
PREPARATION = """\
from PIL import Image
from torchvision import transforms

prepare = transforms.Compose(
    [
        transforms.Resize({size}),
        transforms.CenterCrop({size}),
        transforms.ToTensor(),
        transforms.Normalize({mean}, {std}),
    ]
)
images = prepare(Image.open("photo.jpg").convert("{mode}"))[None]"""
CARD = """\
---
{front}---

# {title}

{what}

{training}{measured}## Preparing images

Resize the short side to {size} pixels (bilinear, antialiased), crop the centre and normalise the channels:

```python
{preparation}
```

## Loading

{about}

```python
folder = "."  # the folder of this file

{code}
```

This code was run when the files were written. On {counts} random images, its features matched the encoder's: the
largest difference was {difference:.1e}, the largest feature {largest:.1e}.

## Licence

To be filled in by whoever publishes this, here and as `license` at the top. Weights are derived from the training
images, so the licence of those may limit how these may be used.

## Versions

{versions}
"""


class Check(NamedTuple):
    """Comparison of an export with the encoder.

    Attributes:
        difference: largest absolute difference between features of the encoder and of the export.
        largest: largest absolute feature of the encoder.
        counts: images in each of the batches compared.
    """

    difference: float
    largest: float
    counts: tuple[int, ...]


def model_card(subject: Subject, form: str, written: Written, check: Check) -> str:
    """Return the model card: Markdown with the YAML header that Hugging Face reads.

    Args:
        subject: what was exported.
        form: format of the export.
        written: what the exporter says about its files.
        check: result of comparing the export with the encoder.
    """
    encoder, run = subject.encoder, subject.run
    variant = run.config.model.variant if run else None
    tags = ["image-feature-extraction", "self-supervised-learning", "contrastive-learning", "moco", form]
    front: dict[str, Any] = {
        "license": "other",
        "license_name": "to-be-filled-in",
        "library_name": written.library,
        "pipeline_tag": "image-feature-extraction",
        "tags": list(dict.fromkeys([*tags, *([f"moco-{variant}"] if variant else [])])),
    }
    heads = num_heads(encoder.backbone)
    learnt = "." if variant is None else f", trained on unlabelled images by momentum contrast, {_method(variant)}."
    return CARD.format(
        # JSON is valid YAML, with every special character escaped.
        front="".join(f"{name}: {json.dumps(value)}\n" for name, value in front.items()),
        title=plain(f"{run.path.resolve().name}: {encoder.name}" if run else encoder.name),
        what=f"An image encoder: it maps normalised images to {encoder.num_features} features{learnt}"
        + (f" It has {heads} attention heads, which its tensors do not show." if heads else ""),
        training=_training(run) if run else "",
        measured=_measured(run) if run else "",
        size=encoder.input_size,
        preparation=PREPARATION.format(
            size=encoder.input_size, mean=subject.mean, std=subject.std, mode="L" if encoder.channels == 1 else "RGB"
        ),
        about=written.about,
        code=written.code,
        counts=" and ".join(map(str, check.counts)),
        difference=check.difference,
        largest=check.largest,
        versions=", ".join(f"{name} {number}" for name, number in versions(written.packages).items()),
    )


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of this package, Python, torch and the given distributions."""
    found = {"python": platform.python_version()}
    for name in dict.fromkeys(("moco-ssl", "torch", *packages)):
        found[name] = version_of(name) or "(not installed as a package)"
    return found


def plain(text: str) -> str:
    """Escape untrusted text, so that Markdown shows it unchanged on one line, also in a table."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return "".join("\\" + c if c in "\\`*_[]|#!~$" else html.escape(c, quote=False) for c in line)


def _method(variant: str) -> str:
    paper = PAPERS.get(variant)
    return f"MoCo {variant} ([arXiv:{paper}](https://arxiv.org/abs/{paper}))" if paper else plain(variant)


def _training(run: Run) -> str:
    config = run.config
    model, optim = config.model, config.optim
    rows = {
        "images": source(config.data.source),
        "recipe": config.recipe,
        "backbone": f"{model.backbone}, {model.stem} stem" + (", from published weights" if model.pretrained else ""),
        "views": f"{config.views.recipe}, {config.views.size} pixels",
        "epochs": f"{config.epochs}" + (f", stopped at step {config.steps}" if config.steps else ""),
        "batch size": f"{config.batch_size}",
        "optimizer": f"{optim.name}, learning rate {optim.base_lr:g} per 256 images, {optim.schedule}",
        "temperature": f"{model.temperature:g}",
        "key momentum": f"{model.momentum:g}, {model.momentum_schedule}",
        "queue": f"{model.queue_size} keys" if model.queue_size else "none",
        "seed": f"{config.seed}",
    }
    return _table("How it was trained", ("", ""), [(name, plain(value)) for name, value in rows.items()])


def _measured(run: Run) -> str:
    """Results at the end of training, and of every evaluation in the run."""
    rows = []
    for subject, figures in run.results.items():
        if isinstance(figures, dict):
            rows += [(plain(f"{subject}, {name}"), "", each) for name, each in _numbers(figures)]
    for path in sorted((run.path / "evaluations").glob("*.json")):
        record = _record(path)
        name, data, figures = record.get("name", path.stem), record.get("data", ""), record.get("figures")
        if isinstance(figures, dict):
            told = plain(source(str(data)))
            rows += [(plain(f"{name}, {each}"), told, value) for each, value in _numbers(figures)]
    return _table("How good it is", ("measure", "images", ""), rows) if rows else ""


def source(given: str) -> str:
    """Where images came from; for an absolute path, only the name of the folder."""
    if given == GIVEN:
        return "passed in by a program"
    return Path(given).name if Path(given).is_absolute() or given.startswith("~") else given


def _numbers(figures: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"{value:.2f}") for name, value in figures.items() if isinstance(value, int | float)]


def _record(path: Path) -> dict[str, Any]:
    """Empty if the file is not an evaluation: the card then omits it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
