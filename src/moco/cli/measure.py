"""Commands that evaluate, report on and export an encoder."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moco import config as settings
from moco.cli.console import report_evaluation, stderr, working
from moco.cli.flags import Json, flags_of
from moco.config import EvaluateConfig
from moco.parallel.launch import launched

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

    The results, with accuracy per class and a confusion matrix, are written to `evaluations/` in the run's folder.

    Args:
        source: Folder of a run, or a checkpoint from any supported program.
        protocol: `knn`, `linear`, `finetune`, `health` (needs no labels), or `package.module:function`.
        data: Images to evaluate on; not given: those the run was trained on.
        backbone: Name of the network, if it cannot be told from the checkpoint.
        out: Folder for the results, instead of the run's.
        flags: Settings of the protocol.
        as_json: Print the results as JSON.
    """
    chosen = settings.parse_evaluation(dict(flags or {}))  # reports a wrong value before torch is loaded
    from moco.evaluate import evaluate as measure

    with working(stderr()) as show:
        result = measure(source, protocol, data=data, backbone=backbone, out=out, settings=chosen, on_progress=show)
    if launched().rank:  # only the first of several processes reports
        return
    if as_json:
        print(json.dumps(result.record(), indent=2))
    else:
        written = result.folder / result.name if result.folder else None
        title, wrong = f"{result.name} of {source}", result.mixups()
        report_evaluation(title, result.figures, result.per_class, result.notes, written, wrong)


def report(runs: list[Path], /, *, out: Path | None = None, as_json: Json = False) -> None:
    """Write an HTML report on one run, or on several runs side by side.

    Args:
        runs: Folders of one or more runs.
        out: File to write; not given: `report.html` in the run's folder, or `comparison.html` here for several.
        as_json: Print the location of the report as JSON.
    """
    from moco.report import page as pages

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
    """Write an encoder in another program's format, load it there and compare its features.

    Args:
        source: Folder of a run, or a checkpoint from any supported program.
        format: `timm`, `torchvision`, `safetensors`, `onnx`, `detectron2` or `official`.
        backbone: Name of the network, if it cannot be told from the checkpoint.
        out: Folder to write, which must not exist yet; not given: `exports/FORMAT` in the run's folder.
        as_json: Print the location and the comparison as JSON.
    """
    if out is None and not (Path(source) / "config.yaml").is_file():
        raise ValueError(f"{source} is not the folder of a run; give --out, the folder to write the export to")
    from moco.export import export as write
    from moco.storage.encoder_files import load_encoder

    encoder = load_encoder(source, backbone=backbone) if backbone else source
    where = write(encoder, out or Path(source) / "exports" / format, format=format)
    if as_json:
        print(json.dumps({"folder": str(where)} | json.loads((where / "export.json").read_text()), indent=2))
    else:
        print(
            f"{where} holds the encoder for {format}; its features there are the same. README.md says how to load it."
        )
