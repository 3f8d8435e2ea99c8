"""Our own format, which can hold every encoder; the card says how to load it without this package."""

from pathlib import Path

from moco.export.contract import Subject, Written
from moco.export.networks import standalone
from moco.storage.encoder_files import save_encoder

ABOUT = """\
With this package, `moco.load_encoder("FOLDER")` returns an encoder that also prepares images. Without it, the code
below builds the same network with `{library}`."""


def write(subject: Subject, folder: Path) -> Written:
    """Write any encoder that `load_encoder` can build."""
    network, library = standalone(subject.encoder)
    save_encoder(folder, subject.encoder)
    code = "\n".join(
        [
            "from safetensors.torch import load_file",
            network,
            'model.load_state_dict(load_file(f"{folder}/encoder.safetensors"))',
            "features = model.eval()(images)",
        ]
    )
    return Written(code, ABOUT.format(library=library), library, (library, "safetensors"))
