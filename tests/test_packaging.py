import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moco
from moco.config import fields

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
UV = PYPROJECT["tool"]["uv"]
PINS = [Requirement(pin) for pin in UV["constraint-dependencies"]]
BUILD_PINS = [Requirement(pin) for pin in UV["build-constraint-dependencies"]]
FIRST_COMMAND = "pip install uv && uv run moco pretrain"
TEST_COMMAND = "pip install uv && uv run --group dev pytest"


def declared() -> list[Requirement]:
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    groups = PYPROJECT["dependency-groups"].values()
    return [Requirement(line) for lines in (PYPROJECT["project"]["dependencies"], *extras, *groups) for line in lines]


def installed_and_reachable() -> dict[str, str]:
    """Name and version of every installed distribution that our dependencies lead to, from here, direct or not."""
    versions: dict[str, str] = {}
    todo, seen = [(need.name, frozenset(need.extras)) for need in declared()], set()
    while todo:
        name, extras = node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # part of an extra that is not installed
        versions[canonicalize_name(name)] = distribution.version
        for need in map(Requirement, distribution.requires or []):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append((need.name, frozenset(need.extras)))
    return versions


def test_every_pin_is_one_exact_version() -> None:
    for pin in PINS + BUILD_PINS:
        specifiers = list(pin.specifier)
        assert len(specifiers) == 1, pin
        assert specifiers[0].operator == "==" and "*" not in specifiers[0].version, pin
        assert pin.url is None and not pin.extras, pin


def test_every_declared_dependency_is_pinned_at_a_version_it_allows() -> None:
    for need in declared():
        versions = [next(iter(pin.specifier)).version for pin in PINS if pin.name == canonicalize_name(need.name)]
        assert versions, f"{need.name} has no pin: run .ci/pin"
        assert all(need.specifier.contains(version, prereleases=True) for version in versions), need


def test_every_installed_dependency_direct_or_not_is_pinned_at_its_version() -> None:
    in_force = {pin.name: pin.specifier for pin in PINS if pin.marker is None or pin.marker.evaluate()}
    found = installed_and_reachable()
    assert len(found) > len(PYPROJECT["project"]["dependencies"])
    wrong = [
        f"{name} {version}"
        for name, version in found.items()
        if name not in in_force or not in_force[name].contains(version, prereleases=True)
    ]
    assert not wrong, f"not at a pinned version: {', '.join(wrong)}; run `uv sync`, or .ci/pin if a dependency is new"


def test_the_build_backend_is_pinned_at_a_version_that_is_allowed() -> None:
    pins = {pin.name: next(iter(pin.specifier)).version for pin in BUILD_PINS}
    for need in map(Requirement, PYPROJECT["build-system"]["requires"]):
        assert need.specifier.contains(pins[canonicalize_name(need.name)])


def test_no_dependency_file_names_a_host() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    kind = re.compile(r"requirements|constraints|lock|\.cfg$|(^|/)(uv|pylock.*|pyproject)\.toml$")
    for name in {"pyproject.toml", *filter(kind.search, listing.splitlines())}:
        assert not re.search(r"://|--(extra-)?index|--find-links|@\s*git\+", (ROOT / name).read_text()), name
    assert "index" not in UV and "sources" not in UV
    assert "uv.lock" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_wheel_carries_the_recipes_the_pages_and_the_licence(tmp_path: Path) -> None:
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", tmp_path, ROOT], check=True)
    [wheel] = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"moco/recipes/{path.name}" for path in (ROOT / "src/moco/recipes").glob("*.yaml")}
    pages = {
        path.relative_to(ROOT / "src").as_posix()
        for kind in ("explore/page", "report/templates")
        for path in (ROOT / "src/moco" / kind).iterdir()
    }
    assert recipes and recipes <= inside and pages and pages <= inside
    assert any(name.endswith("/licenses/LICENSE") for name in inside)
    assert {name.split("/")[0] for name in inside if not name.split("/")[0].endswith(".dist-info")} == {"moco"}


def test_the_readme_gives_the_two_commands_and_ci_runs_the_second() -> None:
    readme = README.read_text().splitlines()
    assert FIRST_COMMAND in readme
    assert TEST_COMMAND in readme
    assert TEST_COMMAND in (ROOT / ".ci/run").read_text().splitlines()


def test_the_changelog_has_an_entry_for_this_version() -> None:
    assert f"## {PYPROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_links_between_the_documents_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_results_in_the_readme_are_the_rows_of_results() -> None:
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    block = README.read_text().split(tables["START"])[1].split(tables["END"])[0]
    assert block == tables["block"]()


def test_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeCheckError):
        moco.info_nce(torch.zeros(3), torch.zeros(4, 5), temperature=0.1)


def test_a_test_process_keeps_to_one_thread() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("not one of several test processes")
    assert torch.get_num_threads() == 1


def test_every_setting_that_the_documents_name_exists() -> None:
    known = {name for name in fields() if "." in name}
    for page in PAGES:
        named = set(re.findall(r"--([a-z]+\.[a-z_0-9]+)", page.read_text()))
        assert named <= known, f"{page.name}: {', '.join(sorted(named - known))}"


def test_the_training_loop_in_the_readme_runs() -> None:
    [loop] = [b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "in loader" in b]
    names: dict[str, Any] = {"loader": [(torch.rand(16, 3, 32, 32), torch.rand(16, 3, 32, 32)) for _ in range(2)]}
    exec(loop, names)
    assert int(names["model"].queue.pointer) == 32


def test_the_idea_fits_on_a_page_and_needs_little() -> None:
    text = (ROOT / "src" / "moco" / "method" / "model.py").read_text()
    assert len(text.splitlines()) <= 150
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"torch", "jaxtyping", "moco", "abc", "copy", "typing"}
    assert re.findall(r"^from moco.*", text, re.M) == ["from moco.parallel import collectives"]
