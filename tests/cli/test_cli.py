import errno
import json
import logging
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moco.cli import main
from moco.config import PretrainConfig, fields, merge, parse_config, to_yaml
from moco.recipes import load_recipe, recipe_names, recipe_text

MOCO = [sys.executable, "-c", "import sys; from moco.cli import main; sys.exit(main())"]
RESULTS = {
    "raw pixels": {"knn_top1": 96.25, "one_label": 50.0, "five_labels": 77.0},
    "untrained encoder": {"knn_top1": 90.0, "one_label": 45.5, "five_labels": 70.0},
    "trained encoder": {"knn_top1": 98.0, "one_label": 81.04, "five_labels": 93.0},
}


class Progress(NamedTuple):
    step: int
    total_steps: int
    epoch: int
    metrics: dict[str, float]


class Stopped(Exception):  # noqa: N818
    def __init__(self, signum: int):
        super().__init__("stopped")
        self.signum, self.path = signum, Path("my runs/x")


class Library:
    """Stands in for training: remembers how it was called, and does what a test wants."""

    def __init__(self) -> None:
        self.config: PretrainConfig | None = None
        self.given: dict[str, Any] = {}
        self.act: Callable[[Callable[[Progress], None]], None] = lambda show: None
        self.results: dict[str, dict[str, float]] = RESULTS

    def pretrain(self, config, *, out=None, data=None, resume=None, on_progress=None):
        assert on_progress
        self.config, self.given = config, {"out": out, "data": data, "resume": resume}
        self.act(on_progress)
        return types.SimpleNamespace(path=Path("runs/my first"), config=config, results=self.results)

    def auto_config(self, data):
        config = load_recipe("cifar10-laptop")
        return config.model_copy(update={"recipe": "auto", "data": data}), ["resnet18, because the images are small"]

    def evaluate(self, source, protocol, *, data, backbone, out, settings, on_progress):
        self.given = {"source": source, "protocol": protocol, "data": data, "backbone": backbone, "out": out}
        self.given |= settings.model_dump(exclude_unset=True)
        on_progress("epochs", 1, 2)
        figures, per_class = {"top1": 81.25, "rank": 3.14159}, {"cat": 70.0, "dog": 92.5}
        return types.SimpleNamespace(
            name=protocol,
            figures=figures,
            per_class=per_class,
            notes=("two classes only",),
            folder=Path("runs/x/evaluations"),
            record=lambda: {"figures": figures, "per_class": per_class},
            mixups=lambda: [("cat", "dog", 30)],
        )


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    for name, attributes in {
        "moco.training.pretrain": {"pretrain": fake.pretrain, "Progress": Progress},
        "moco.training.automatic": {"auto_config": fake.auto_config},
        "moco.parallel.signals": {"Stopped": Stopped},
        "moco.parallel.device": {
            "BF16_UNITS": ("amx_bf16", "avx512_bf16", "bf16"),
            "choose_precision": lambda accelerator: "fp32",
            "cpu_flags": lambda: frozenset({"avx512_bf16"}),
        },
        "moco.evaluate": {"evaluate": fake.evaluate},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return fake


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line on stderr that a command ends with."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moco: ") and err.count("\n") == 1, err
    return err.strip()


def resolved(capsys: pytest.CaptureFixture[str], *arguments: str) -> PretrainConfig:
    assert main(["pretrain", *arguments, "--print_config"]) == 0
    import yaml

    return parse_config(yaml.safe_load(capsys.readouterr().out))


# Help


def test_help_needs_neither_torch_nor_a_second(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    check = "import sys; from moco.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for arguments in (["--help"], ["pretrain", "--help"]):
        seconds = []
        for _ in range(3):  # the first compiles
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, "-c", check, *arguments], env=environment, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert done.returncode == 0
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(seconds) < 1.0


def test_every_setting_is_a_flag_with_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    for name in fields().keys() - {"recipe"}:
        assert re.search(rf"--{re.escape(name)} .*[a-z]{{2}}", text), name
    assert "--data.source --data" in text
    assert "--recipe" not in text


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moco")


# Flags


def test_without_recipe_and_data_it_is_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved(capsys) == load_recipe("digits")


@pytest.mark.parametrize("name", recipe_names())
def test_print_config_shows_the_recipe_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", name, "--print_config"]) == 0
    assert capsys.readouterr().out == to_yaml(load_recipe(name))


def test_only_flags_that_are_given_overrule_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(capsys, "cifar10", "--epochs", "5", "--optim.base_lr", "0.5", "--model.symmetric")
    changed = {"epochs": 5, "optim": {"base_lr": 0.5}, "model": {"symmetric": True}}
    assert config == merge(load_recipe("cifar10"), changed)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["--batch_size", "64"], {"batch_size": 64}),
        (["--batch-size=64"], {"batch_size": 64}),
        (["--optim.weight-decay", "1e-3"], {"optim": {"weight_decay": 1e-3}}),
        (["--data", "my images"], {"data": {"source": "my images"}}),
        (["--data=a-b_c"], {"data": {"source": "a-b_c"}}),
        (["--data.source", "x"], {"data": {"source": "x"}}),
        (["--data.channels", "1"], {"data": {"channels": 1}}),
        (["--optim.milestones", "120", "160"], {"optim": {"milestones": [120, 160]}}),
        (["--model.no-symmetric"], {"model": {"symmetric": False}}),
        (["--model.symmetric=true"], {"model": {"symmetric": True}}),
        (["--model.symmetric", "false"], {"model": {"symmetric": False}}),
        (["--model.mask_own", "none"], {"model": {"mask_own": None}}),
        (["--model.mask-own", "True"], {"model": {"mask_own": True}}),
        (["--views.crop_min", "none"], {"views": {"crop_min": None}}),
        (["--engine.devices", "auto"], {"engine": {"devices": "auto"}}),
        (["--engine.devices", "2"], {"engine": {"devices": 2}}),
        (["--monitor.loggers", "tensorboard"], {"monitor": {"loggers": ["tensorboard"]}}),
        (["--seed", "-1"], {"seed": -1}),
    ],
)
def test_flags_are_read_as_a_yaml_would_be(arguments: list[str], changed, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved(capsys, "cifar10", *arguments) == merge(load_recipe("cifar10"), changed)


def test_data_without_a_recipe_is_the_auto_recipe(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--data", "photos", "--data.channels", "1", "--epochs", "3"]) == 0
    assert library.config is not None
    assert (library.config.recipe, library.config.epochs, library.config.batch_size) == ("auto", 3, 128)
    assert (library.config.data.source, library.config.data.channels) == ("photos", 1)
    assert "resnet18, because the images are small\n" in capsys.readouterr().err


def test_data_with_a_recipe_keeps_the_recipe(library: Library) -> None:
    assert main(["pretrain", "cifar10", "--data", "photos", "--out", "there"]) == 0
    assert library.config == merge(load_recipe("cifar10"), {"data": {"source": "photos"}})
    assert library.given["out"] == Path("there")


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrian"], 'Did you mean "pretrain"?'),
        (["pretrain", "digit"], "no recipe 'digit'; did you mean digits?"),
        (["pretrain", "mine.yaml"], "no file mine.yaml"),
        (["pretrain", "--optim.base_ler", "1"], "--optim.base_ler is not a setting; did you mean --optim.base_lr?"),
        (["pretrain", "--optim.lr", "1"], "--optim.lr is not a setting; did you mean --optim.base_lr?"),
        (["pretrain", "--optim.lr=1"], "--optim.lr is not a setting; did you mean --optim.base_lr?"),
        (["pretrain", "--epoch", "1"], "Did you mean --epochs?"),
        (["pretrain", "--optim.base_lr", "fast"], '--optim.base_lr: unable to convert "fast" into float'),
        (["pretrain", "--optim.base_lr", "-1"], "optim.base_lr is -1.0; expected greater than or equal to 0"),
        (["pretrain", "--optim.schedule", "cosin"], 'Did you mean "cosine"?'),
        (["pretrain", "--data.channels", "0"], "data.channels is 0; expected greater than 0"),
        (["pretrain", "--engine.devices", "two"], '--engine.devices: unable to convert "two"'),
        (["pretrain", "--epochs"], "--epochs requires an argument"),
        (["pretrain", "--epochs", "1", "--epochs", "2"], "--epochs specified multiple times"),
        (["pretrain", "--data", ""], "data.source is ''"),
        (["pretrain", "digits", "cifar10"], "unexpected cifar10"),
        (["pretrain", "--recipe", "digits"], "Unknown option: --recipe"),
        (["pretrain", "digits", "--batch_size", "100000"], "raise --model.queue_size or lower --batch_size"),
        (["pretrain", "--model.variant", "v3"], "--model.queue_size 0"),
        (["recipes", "imagenet"], "no recipe 'imagenet'; did you mean imagenet-v2?; expected one of cifar10"),
        (["recipes", "imagenet", "--json"], "no recipe 'imagenet'"),
        (["evaluate"], "requires an argument"),
        (["doctor", "imagenet"], "no recipe 'imagenet'"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    arguments: list[str], words: str, library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, *arguments)
    assert library.config is None


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("batch_size is 9;\nexpected 8"), 2, "moco: batch_size is 9; expected 8"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a b"),
            2,
            "moco: No such file or directory: a b",
        ),
        (FileExistsError("runs/x exists already"), 2, "moco: runs/x exists already"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "moco: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "moco: Permission denied: /x"),
        (RuntimeError("loss is nan"), 1, "moco: loss is nan (MOCO_TRACEBACK=1 shows where)"),
        (MemoryError(), 1, "moco: MemoryError (MOCO_TRACEBACK=1 shows where)"),
        (ImportError("no tensorboard"), 1, "moco: no tensorboard (MOCO_TRACEBACK=1 shows where)"),
    ],
)
def test_a_failure_while_training_is_one_line_and_a_code(
    error: Exception, code: int, line: str, library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(show) -> None:
        raise error

    library.act = fail
    assert refusal(capsys, "pretrain", "digits", code=code) == line


def test_the_traceback_is_shown_on_demand(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no recipe"):
        main(["pretrain", "nothing"])


def test_our_own_mistakes_are_not_hidden(library: Library) -> None:
    library.act = lambda show: {}["bug"]
    with pytest.raises(KeyError):
        main(["pretrain", "digits"])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_how_to_go_on(signum: int, library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(show) -> None:
        raise Stopped(signum)

    library.act = stop
    line = refusal(capsys, "pretrain", "digits", "--out", "my runs/x", code=128 + signum)
    name = signal.Signals(signum).name
    assert line == f"moco: stopped by {name}; saved; continue with: moco pretrain --resume 'my runs/x'"


def test_ctrl_c_outside_of_training_is_quiet(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(show) -> None:
        raise KeyboardInterrupt

    library.act = interrupt
    assert refusal(capsys, "pretrain", code=130) == "moco: stopped by SIGINT"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen([*MOCO, "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() in (1, 128 + signal.SIGPIPE)
    assert errors == b""


# Resuming


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(to_yaml(load_recipe("cifar10")))
    return tmp_path


def test_a_resumed_run_keeps_its_settings(library: Library, run: Path) -> None:
    assert main(["pretrain", "--resume", str(run)]) == 0
    assert library.config == load_recipe("cifar10")
    assert library.given == {"out": None, "data": None, "resume": run}


def test_a_resumed_run_may_find_its_images_and_threads_elsewhere(library: Library, run: Path) -> None:
    assert main(["pretrain", "--resume", str(run), "--data", "x", "--engine.threads", "4", "--steps", "9"]) == 0
    moved = {"data": {"source": "x"}, "engine": {"threads": 4}, "steps": 9}
    assert library.config == merge(load_recipe("cifar10"), moved)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits"], "--resume was given with digits"),
        (["--out", "x"], "--resume was given with --out x"),
        (["--epochs", "9"], "--epochs was given with --resume"),
        (["--optim.base_lr", "9"], "--optim.base_lr was given with --resume"),
        (["--data.size", "9"], "--data.size was given with --resume"),
        (["--data.cache_side", "64"], "--data.cache_side was given with --resume"),
    ],
)
def test_a_resumed_run_refuses_to_become_another(
    arguments: list[str], words: str, library: Library, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, "pretrain", "--resume", str(run), *arguments)


def test_resuming_what_is_no_run_is_refused(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{tmp_path} is not a run" in refusal(capsys, "pretrain", "--resume", str(tmp_path))


# What is shown


def test_results_stand_side_by_side_with_the_next_commands(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain"]) == 0
    out = capsys.readouterr().out
    for who, row in RESULTS.items():
        line = next(line for line in out.splitlines() if f" {who} " in line)
        assert [float(number) for number in re.findall(r"\d+\.\d", line)] == [round(value, 1) for value in row.values()]
    assert "81.0 % trained encoder" in out
    assert "The run is in runs/my first" in out
    assert "moco evaluate 'runs/my first' --protocol knn" in out


def test_commands_that_are_suggested_exist(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain"])
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  moco "):
            assert main([line.split()[1], "--help"]) == 0


def test_without_labels_no_accuracy_is_claimed(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    library.results = {}
    assert main(["pretrain"]) == 0
    out = capsys.readouterr().out
    assert "no labels" in out
    assert "%" not in out


def test_results_as_json_are_alone_on_stdout(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    library.act = lambda show: logging.getLogger("moco").info("chance is 6.9")
    assert main(["pretrain", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"run": "runs/my first", "results": RESULTS}
    assert err == "chance is 6.9\n"


def test_what_the_library_says_goes_to_stderr_and_only_while_a_command_runs(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    def speak(show) -> None:
        logger = logging.getLogger("moco.views.two_views")
        logger.debug("too much")
        logger.info("lr is %g", 0.06)
        logger.warning("queue is 71 % of the images")

    library.act = speak
    assert main(["pretrain"]) == 0
    assert capsys.readouterr().err == "lr is 0.06\nqueue is 71 % of the images\n"
    logging.getLogger("moco").info("afterwards")
    assert capsys.readouterr().err == ""
    assert not logging.getLogger("moco").handlers


def test_hostile_file_names_cannot_steer_the_terminal(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    library.act = lambda show: logging.getLogger("moco").warning("skipped \x1b[2J\r[red]x[/red]\udcff.jpg")
    assert main(["pretrain"]) == 0
    assert capsys.readouterr().err == "skipped ?[2J?[red]x[/red]?.jpg\n"


def test_progress_without_a_terminal_is_a_line_now_and_then(
    library: Library, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("moco.cli.console.time.monotonic", lambda: next(clock))

    def train(show: Callable[[Progress], None]) -> None:
        for step in range(100, 125):
            show(Progress(step, 124, 3, {"loss": 6.5, "lr": 0.06, "images_per_second": 1234.5}))

    library.act = train
    assert main(["pretrain"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "step 100/124, epoch 3, loss 6.500, lr 0.06, 1,234 images/s",
        "step 110/124, epoch 3, 14 s left, loss 6.500, lr 0.06, 1,234 images/s",
        "step 120/124, epoch 3, 4 s left, loss 6.500, lr 0.06, 1,234 images/s",
        "step 124/124, epoch 3, 0 s left, loss 6.500, lr 0.06, 1,234 images/s",
    ]


def test_progress_on_a_terminal_is_a_bar_below_what_is_said() -> None:
    code = """
import logging, sys, types
from pathlib import Path
def pretrain(config, *, out, resume, on_progress):
    on_progress((7, 10, 2, {"loss": 6.5}))
    logging.getLogger("moco").warning("mind the queue")
    on_progress((10, 10, 2, {"loss": 6.25}))
    return types.SimpleNamespace(path=Path("x"), results={})
sys.modules["moco.training.pretrain"] = types.SimpleNamespace(pretrain=pretrain)
sys.modules["moco.parallel.signals"] = types.SimpleNamespace(Stopped=KeyError)
from moco.cli import main
sys.exit(main(["pretrain"]))
"""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=follower, stdout=subprocess.DEVNULL, env=environment
    )
    os.close(follower)
    text = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not chunk:
            break
        text += chunk
    os.close(leader)
    assert process.wait() == 0
    said = text.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    assert "epoch 2" in plain and "10/10" in plain and "loss 6.250" in plain
    assert "\x1b[33mmind the queue\x1b[0m" in said


# The other verbs


def test_evaluate_passes_on_what_was_given(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data", "cifar10", "--k", "20", "--temperature", "0.5", "--layer-decay", "0.75", "--from_scratch"]
    assert main(["evaluate", "runs/x", "--out", "there", *flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["figures"] == {"top1": 81.25, "rank": 3.14159} and printed["per_class"]["dog"] == 92.5
    given = {"source": "runs/x", "protocol": "knn", "data": "cifar10", "backbone": None, "out": Path("there")}
    assert library.given == given | {"k": 20, "temperature": 0.5, "layer_decay": 0.75, "from_scratch": True}


def test_evaluate_prints_a_table(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "runs/x"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"top1.*81\.25", out) and re.search(r"rank.*3\.142", out) and re.search(r"dog.*92\.5", out)
    assert "two classes only" in out and "cat as dog 30 times" in out
    assert "runs/x/evaluations/knn.json and .png" in out


def test_recipes_lists_each_with_what_to_expect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in recipe_names())
    assert "82.6 %" in out
    assert main(["recipes", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records] == recipe_names()
    assert all(record.keys() == {"name", "about", "source", "expected", "cost"} for record in records)


def test_recipes_prints_one_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cifar10"]) == 0
    assert capsys.readouterr().out == recipe_text("cifar10")
    assert main(["recipes", "cifar10", "--json"]) == 0
    assert parse_config(json.loads(capsys.readouterr().out)["config"]) == load_recipe("cifar10")


def test_doctor_describes_the_machine_and_the_need(library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "cifar10", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"CPU cores", "memory", "disk", "Python", "torch", "accelerator", "precision auto"} <= rows.keys()
    assert rows["images"]["value"] == "50,000"
    assert rows["steps"]["value"] == "19,400"  # 97 a pass, as in the notebook's log
    assert rows["parameters"]["value"] == "11.2 million"
    assert "estimate" in rows["memory needed"]["note"]


def test_doctor_without_a_recipe_is_a_table_of_the_machine(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "CPU cores" in out
    assert "recipe" not in out


def test_doctor_counts_the_training_images_of_a_folder(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train/a/1.jpg", "train/b/2.PNG", "train/notes.txt", "test/a/3.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(to_yaml(merge(load_recipe("digits"), {"data": {"source": str(tmp_path / "photos")}})))
    assert main(["doctor", str(recipe), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["images"]["value"] == "2"
    assert "fewer images than batch_size" in rows["steps"]["note"]


def test_one_of_several_processes_leaves_a_failure_without_waiting_for_the_others() -> None:
    code = """
import atexit, sys, time
from moco.parallel import collectives
from moco.cli import main
collectives.world_size = lambda: 2
atexit.register(time.sleep, 60)
sys.exit(main(["pretrain", "no-such-recipe"]))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("moco: ") and "no-such-recipe" in found.stderr
