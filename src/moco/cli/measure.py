"""What an encoder is worth, said in numbers and pages, and handed to other programs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moco import config as settings
from moco.config import EvaluateConfig
from moco.console import report_evaluation, stderr, working
from moco.flags import Json, flags_of
from moco.launch import launched

if TYPE_CHECKING:
    Flags = dict[str, Any]
else:
    Flags = flags_of(EvaluateConfig)


def evaluate(
    source: str,
    /,
    *,
    protocol: str = "knn",
    data: str | None = None,
    backbone: str | None = None,
    out: Path | None = None,
    as_json: Json = False,
    flags: Annotated[Flags | None, Parameter(name="*")] = None,
) -> None:
    """Measure how good an encoder is.

    The figures, accuracies by class and a picture of what is taken for what go into `evaluations/` of the run.

    Args:
        source: Folder of a run, or a checkpoint of anybody's.
        protocol: `knn`, `linear`, `finetune`, `health`, which needs no labels, or `package.module:function`.
        data: Images to evaluate on; not given: those that the run was trained on.
        backbone: The network, where a foreign checkpoint does not say which it is.
        out: Folder for the results, in place of the run's.
        flags: Settings of the protocol.
        as_json: Print the results as JSON.
    """
    given = settings.parse_evaluation(dict(flags or {}))  # a wrong value is answered before torch is loaded
    from moco.evaluate import evaluate as measure

    with working(stderr()) as show:
        found = measure(source, protocol, data=data, backbone=backbone, out=out, settings=given, on_progress=show)
    if launched().rank:  # the first of several processes tells
        return
    if as_json:
        print(json.dumps(found.record(), indent=2))
    else:
        written = found.folder / found.name if found.folder else None
        title, wrong = f"{found.name} of {source}", found.mixups()
        report_evaluation(title, found.figures, found.per_class, found.notes, written, wrong)


def report(runs: list[Path], /, *, out: Path | None = None, as_json: Json = False) -> None:
    """Write a run as one HTML page, or several side by side.

    Args:
        runs: Folders of runs.
        out: The file; not given: `report.html` of the run, or `comparison.html` here.
        as_json: Print where it is as JSON.
    """
    from moco.explore import report as pages

    path = pages.report(runs[0], out) if len(runs) == 1 else pages.compare(runs, out or "comparison.html")
    print(json.dumps({"report": str(path)}) if as_json else path)


def export(
    source: str,
    /,
    *,
    format: str = "timm",
    backbone: str | None = None,
    out: Path | None = None,
    as_json: Json = False,
) -> None:
    """Write an encoder as another program wants it; it is loaded there and compared before this says done.

    Args:
        source: Folder of a run, or a checkpoint of anybody's.
        format: `timm`, `torchvision`, `safetensors`, `onnx`, `detectron2` or `official`.
        backbone: The network, where a foreign checkpoint does not say which it is.
        out: Folder to write, which must not exist yet; not given: `exports/FORMAT` of the run.
        as_json: Print where it is as JSON.
    """
    if out is None and not (Path(source) / "config.yaml").is_file():
        raise ValueError(f"{source} is not the folder of a run; say with --out where to write the export")
    from moco.checkpoint import load_encoder
    from moco.export import export as write

    encoder = load_encoder(source, backbone=backbone) if backbone else source
    where = write(encoder, out or Path(source) / "exports" / format, format=format)
    if as_json:
        print(json.dumps({"folder": str(where)} | json.loads((where / "export.json").read_text()), indent=2))
    else:
        print(
            f"{where} holds the encoder for {format}; it gives the same features there. README.md says how to load it."
        )
