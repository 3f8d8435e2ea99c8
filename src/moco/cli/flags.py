"""Settings as command-line flags.

Turns sections of the configuration into types for the parser, tokens into its spelling, and errors into one line.
"""

from typing import Annotated, Any, TypedDict, get_args

from cyclopts import Group, Parameter
from cyclopts.exceptions import CycloptsError, UnknownOptionError, UnusedCliTokensError
from pydantic import BaseModel, ValidationError

from moco.config import EvaluateConfig, PretrainConfig, fields
from moco.messages import closest, explain

SECTIONS: dict[str, type[BaseModel]] = {"pretrain": PretrainConfig, "evaluate": EvaluateConfig}
"""The verbs that take settings as flags, and the section those come from."""
Json = Annotated[bool, Parameter(name="--json", negative="")]
"""The flag that every verb has."""


def flags_of(section: type[BaseModel], prefix: str = "") -> Any:
    """Return a section as flags of the same names, types and help; only flags that are given become keys.

    This is a TypedDict rather than a pydantic model, for which the parser would spend half a second reading pydantic's
    source to find help.
    """
    typed: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        dotted = prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            group = Group(f"{dotted}: {(field.annotation.__doc__ or '').rstrip('.')}", sort_key=len(typed))
            inner = flags_of(field.annotation, f"{dotted}.")
            typed[name] = Annotated[inner, Parameter(group=group)]  # ty: ignore[invalid-type-form]
        elif dotted != "recipe":
            names = [f"--{dotted}", "--data"] if dotted == "data.source" else None
            typed[name] = Annotated[field.annotation, Parameter(name=names, help=field.description)]
    return TypedDict(section.__name__, typed, total=False)  # ty: ignore[invalid-argument-type]


def normalise(tokens: list[str]) -> list[str]:
    """Return tokens in the parser's spelling: with `--data X`, hyphens and `--model.symmetric false`."""
    if not tokens or tokens[0] not in SECTIONS:
        return tokens
    hints = {name: field.annotation for name, field in fields(SECTIONS[tokens[0]]).items()}
    hints |= {"print_config": None}
    result: list[str] = []
    for token in tokens:
        last = result[-1][2:] if result and result[-1].startswith("--") else ""
        if token.lower() in ("true", "false", "none", "null") and bool in (hints.get(last), *get_args(hints.get(last))):
            result[-1] += "=" + token.lower().replace("none", "null")
            continue
        flag, equals, value = token.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        name = "data.source" if name == "data" and tokens[0] == "pretrain" else name
        result.append(f"--{name}{equals}{value}" if name in hints else token)
    return result


def error_line(error: Exception) -> str:
    """Return an error as one line for the user of the command."""
    text, flag, known = str(error), "", [*fields(), *EvaluateConfig.model_fields]
    if isinstance(error, CycloptsError) and isinstance(error.__cause__, ValidationError):
        # The parser validates some values one by one: pydantic then does not know which setting they belong to.
        flag = error.argument.name.lstrip("-") if error.argument and not error.__cause__.errors()[0]["loc"] else ""
        error = error.__cause__
    if isinstance(error, ValidationError):
        text = flag + explain(error, known)
    elif isinstance(error, UnknownOptionError) and "." in (
        flag := (error.token.keyword or error.token.value)[2:].partition("=")[0]
    ):
        text = f"--{flag} is not a setting{closest(flag, list(fields())).replace('mean ', 'mean --')}"
    elif isinstance(error, UnusedCliTokensError):
        text = f"unexpected {' '.join(error.unused_tokens or ())}; see `moco VERB --help` for what a verb takes"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    elif isinstance(error, RuntimeError | ImportError | MemoryError):
        text = f"{text or type(error).__name__} (MOCO_TRACEBACK=1 shows where)"
    return " ".join(text.split())
