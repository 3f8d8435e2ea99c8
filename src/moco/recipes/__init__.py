"""Recipes: the complete settings of an experiment, as YAML with a header that says what it is and what to expect.

Like `moco.config`, this does not import torch.
"""

import re
from pathlib import Path

from moco.config import PretrainConfig, parse_config
from moco.messages import closest, shown


def load_recipe(name_or_path: str) -> PretrainConfig:
    """Load a recipe by name, or a configuration from a YAML file, such as a run's `config.yaml`.

    Raises:
        ValueError: there is no such recipe (the message lists the known names), the file is not YAML, or as in
            `parse_config`.
        FileNotFoundError: there is no such file.
    """
    import yaml

    text, path = recipe_text(name_or_path), _recipe_path(name_or_path)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {shown(data)}; expected lines such as `epochs: 100`")
    try:
        return parse_config({"recipe": path.stem} | data)
    except ValueError as error:
        raise ValueError(f"{error} (in {path.name})") from None


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, in natural order (300 before 1000)."""
    names = (path.stem for path in Path(__file__).parent.glob("*.yaml"))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def recipe_text(name_or_path: str) -> str:
    """Return a recipe's YAML as written, including the header; raises the same errors as `load_recipe`."""
    path = _recipe_path(name_or_path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text; expected a YAML file") from None


def recipe_record(name_or_path: str) -> dict[str, str]:
    """Read what a recipe's header says about the experiment.

    Returns:
        `about`, `source`, `expected` and `cost`, as far as the header has them.
    """
    record: dict[str, str] = {}
    key = None
    for line in recipe_text(name_or_path).splitlines():
        if not line.startswith("#"):
            break
        start, colon, rest = line[1:].partition(":")
        if colon and start.strip() in ("about", "source", "expected", "cost"):
            key = start.strip()
            record[key] = rest.strip()
        elif key:
            record[key] = f"{record[key]} {line[1:].strip()}".strip()
    return record


def _recipe_path(name_or_path: str) -> Path:
    if name_or_path in recipe_names():
        return Path(__file__).parent / f"{name_or_path}.yaml"
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise FileNotFoundError(
            f"no file {name_or_path}; expected a recipe's YAML or one of {', '.join(recipe_names())}"
        )
    raise ValueError(
        f"no recipe {name_or_path!r}{closest(name_or_path, recipe_names())}; expected one of "
        f"{', '.join(recipe_names())}, or a path to a YAML file"
    )
