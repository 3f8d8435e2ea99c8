"""Validation errors as one line: the setting's name, what was given, what was expected, the closest known name."""

import difflib

from pydantic import ValidationError


def explain(error: ValidationError, known: list[str]) -> str:
    """Pydantic's report as one line: dotted name, what was given, what was expected."""
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    name = _dotted(first["loc"], known)
    if first["type"] == "extra_forbidden":
        return f"{name} is not a setting{closest(name, known)}; `moco pretrain --help` lists them all"
    if first["type"] == "model_type":
        inside = [field for field in known if field.startswith(name + ".")]
        return f"{name} is {shown(first['input'])}; expected a group of settings, such as {', '.join(inside[:3])}"
    # A union reports each of its branches: for the same setting, join what each of them expected.
    same = [
        e["msg"].removeprefix("Input should be ").partition(",")[0] for e in found if _dotted(e["loc"], known) == name
    ]
    if first["type"] == "literal_error":
        same = [first["ctx"]["expected"]]
    line = f"{name} is {shown(first['input'])}; expected {' or '.join(dict.fromkeys(same))}"
    if first["type"] == "literal_error":
        line += closest(
            str(first["input"]), first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        )
    return line


def closest(name: str, known: list[str]) -> str:
    """`; did you mean ...?` with the known name closest to the whole dotted name or to its last part; may be empty."""
    leaves = {each.rpartition(".")[2]: each for each in reversed(known)}
    last = name.rpartition(".")[2]
    same_word = [each for leaf, each in leaves.items() if last in leaf.split("_")]
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
    match = match or difflib.get_close_matches(name, same_word, n=1, cutoff=0)
    match = match or [leaves[leaf] for leaf in difflib.get_close_matches(last, leaves, n=1)]
    match = match or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def _dotted(loc: tuple[int | str, ...], known: list[str]) -> str:
    """Return the name of a setting, without the list positions and union branches that pydantic appends to it."""
    for end in range(1, len(loc)):
        if ".".join(map(str, loc[:end])) in known:
            return ".".join(map(str, loc[:end]))
    return ".".join(map(str, loc))


def shown(value: object) -> str:
    """Return a value as quoted in an error, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
