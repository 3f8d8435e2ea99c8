"""The settings of a run and of an evaluation.

Nothing here imports torch, so that help and errors about flags appear at once.
"""

from moco.config.reading import fields, merge, parse_config, parse_evaluation, to_yaml
from moco.config.sections import (
    CONTINUABLE,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    PretrainConfig,
    Section,
    ViewsConfig,
)

__all__ = [
    "CONTINUABLE",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "PretrainConfig",
    "Section",
    "ViewsConfig",
    "fields",
    "merge",
    "parse_config",
    "parse_evaluation",
    "to_yaml",
]
