"""Settings from and to plain values: validated, merged, listed, written as YAML."""

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from moco.config.sections import EvaluateConfig, PretrainConfig
from moco.messages import explain


def parse_config(data: dict[str, Any]) -> PretrainConfig:
    """Turn nested plain settings into a validated configuration.

    Args:
        data: the content of a YAML file, or part of it; the rest takes its defaults.

    Raises:
        ValueError: one line with the dotted name, what was given and what was expected; for an unknown name, the
            closest known one.

    Example:
        >>> parse_config({"epochs": 5, "optim": {"base_lr": 0.06}}).optim.base_lr
        0.06
    """
    try:
        return PretrainConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain(error, list(fields()))) from None


def parse_evaluation(data: dict[str, Any]) -> EvaluateConfig:
    """Validate the settings of an evaluation; raises the same errors as `parse_config`."""
    try:
        return EvaluateConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError(explain(error, list(EvaluateConfig.model_fields))) from None


def fields(section: type[BaseModel] = PretrainConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """All settings by dotted name, in the order in which they are declared."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def merge(config: PretrainConfig, overrides: dict[str, Any]) -> PretrainConfig:
    """Replace some settings of a configuration and validate the result.

    Args:
        config: the configuration to start from.
        overrides: the settings to replace, nested: `{"optim": {"base_lr": 0.06}}`.

    Raises:
        ValueError: as in `parse_config`.
    """
    # Only what was given: a default that were given would count as a choice when a run is resumed.
    return parse_config(_merged(config.model_dump(exclude_unset=True), overrides))


def to_yaml(config: PretrainConfig) -> str:
    """Write every setting as YAML, without comments; `load_recipe` reads it back to an equal configuration."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        result[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
