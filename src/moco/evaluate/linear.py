"""Linear classification on a frozen encoder, in the published forms; for `fast`, see `linear_fast`.

`official` is that of MoCo v1 and v2 (arXiv:1911.05722, section 4.1), `v3` that of MoCo v3 (arXiv:2104.02057 and its
code), `leftthomas` that of a widely used CIFAR re-implementation of MoCo. Test images are cropped as published: the
short side is resized to 256 pixels and the central 224 are kept, in the same proportion at other sizes; `fast` resizes
the short side to the encoder's size and crops nothing off it.
"""

import math

from moco.evaluate.contract import Outcome, Protocol, Task, check_form, labels_of
from moco.evaluate.linear_fast import BATCH_SIZE, Settings, figures, passes, probe
from moco.evaluate.linear_published import FORMS, evaluate_published
from moco.evaluate.reading import read


def evaluate(task: Task) -> Outcome:
    """Run the protocol in the form `settings.form`, or `fast` if it is not given.

    Raises:
        ValueError: the form is unknown, images have no labels, or too many cannot be read.
        RuntimeError: the loss became NaN or infinite, or the frozen encoder has changed.
    """
    name = task.settings.form or "fast"
    check_form("linear", name, ["fast", *FORMS])
    return _fast(task) if name == "fast" else evaluate_published(task, name)


PROTOCOL = Protocol(
    evaluate,
    frozenset({"form", "labels", "epochs", "lr", "weight_decay", "batch_size"}),
    default_form=lambda encoder: "fast",
    fp32=frozenset(FORMS),
    # Statistics of a batch are not those of its shares.
    in_shares=lambda settings: settings.form not in {name for name, form in FORMS.items() if form.drifting},
)


def _fast(task: Task) -> Outcome:
    settings, held = task.settings, task.labelled()
    train, test = read(task, held.train, "training"), read(task, held.test, "test")
    requested = Settings(settings.lr, settings.weight_decay, settings.epochs, settings.batch_size, settings.seed)
    best = probe(train.vectors, labels_of(train.images), test.vectors, settings=requested, device=task.device)
    where = (
        "left at the default, because no class has two training images"
        if math.isnan(best.validation_top1)
        else "chosen on a held-out tenth of the training images of each class, then trained on all"
    )
    note = f"Learning rate {best.lr:g} and weight decay {best.weight_decay:g}: {where}; test images played no part."
    whole = "Images are resized by the short side, then centre-cropped to a square; published forms crop more off."
    chosen = {name: value for name, value in figures(best).items() if not math.isnan(value)}
    used = {
        "form": "fast",
        "lr": best.lr,
        "weight_decay": best.weight_decay,
        "epochs": passes(len(train.images), requested)[1],
        "batch_size": settings.batch_size or BATCH_SIZE,
    }
    notes = (note, whole, *train.notes, *test.notes)
    return Outcome(chosen, best.scores, notes, labels_of(test.images), settings.model_copy(update=used))
