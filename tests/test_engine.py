import os
import signal
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from moco import engine
from moco.config import EngineConfig
from moco.engine import Stopped, StopSignal, build_fabric, choose_precision, cpu_has_bf16, resolve

CPU = torch.device("cpu")


# Choices


def test_resolving_leaves_no_choice_open_and_nothing_to_resolve() -> None:
    config = resolve(EngineConfig())
    assert "auto" not in (config.accelerator, config.precision)
    assert config.channels_last is not None and config.threads
    assert resolve(config) == config


def test_what_was_chosen_stays_chosen() -> None:
    for precision in ("fp32", "bf16", "fp64"):
        for layout in (False, True):
            config = EngineConfig(accelerator="cpu", precision=precision, channels_last=layout, threads=3)
            assert resolve(config) == config


@pytest.mark.parametrize(("precision", "layout"), [("fp32", False), ("bf16", True)])
def test_channels_last_comes_with_bf16(precision, layout: bool) -> None:
    assert resolve(EngineConfig(accelerator="cpu", precision=precision)).channels_last is layout


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags : fpu avx512f avx512_bf16 amx_tile", True),
        ("flags : fpu amx_bf16", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx2 avx512f", False),
        ("model name : bf16x", False),
        (None, False),
    ],
)
def test_bf16_is_used_where_the_processor_multiplies_it(
    flags: str | None, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> str:
        if flags is None:
            raise FileNotFoundError(path)
        return f"processor : 0\n{flags}\n"

    monkeypatch.setattr(Path, "read_text", read)
    assert cpu_has_bf16() == has
    assert choose_precision("cpu") == ("bf16" if has else "fp32")


@pytest.mark.parametrize("name", ["tpu9", "", "CPU"])
def test_an_unknown_accelerator_is_told_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^engine.accelerator is '{name}'; expected one of .*cpu.*cuda.*, or auto$"):
        resolve(EngineConfig(accelerator=name))


@pytest.mark.parametrize("name", ["cuda", "gpu", "mps"])
def test_an_accelerator_that_is_not_here_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^engine.accelerator is '(cuda|mps)', but .*; use --engine.accelerator cpu$"):
        resolve(EngineConfig(accelerator=name))
    assert engine.choose_accelerator("auto") == "cpu"


# Fabric


@pytest.fixture
def threads() -> Generator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def fabric(folder: Path, **chosen):
    return build_fabric(resolve(EngineConfig(accelerator="cpu", **chosen)), (), folder)


def test_one_process_on_the_processor_is_the_default(threads: None, tmp_path: Path) -> None:
    built = fabric(tmp_path, threads=1)
    assert (built.world_size, built.device) == (1, CPU)
    assert torch.get_num_threads() == 1
    assert not list(tmp_path.iterdir())


def test_bf16_multiplies_in_bf16_and_keeps_its_weights(
    threads: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    built = fabric(tmp_path, precision="bf16", threads=1)
    layer = torch.nn.Linear(4, 4)
    wrapped = built.setup(torch.nn.Sequential(layer))
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert wrapped(torch.randn(2, 4)).dtype == torch.float32
    assert seen == [torch.bfloat16] and layer.weight.dtype == torch.float32
    assert capfd.readouterr().err == ""


def test_deterministic_asks_torch_for_it(threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        fabric(tmp_path, deterministic=True, threads=1)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


# Signals


def handlers() -> list[object]:
    return [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_interrupts_nothing(signum: signal.Signals) -> None:
    before = handlers()
    with StopSignal() as signals:
        assert signals.agreed(1, due=False, device=CPU) == (0, False)
        assert signals.agreed(1, due=True, device=CPU) == (0, True)
        os.kill(os.getpid(), signum)
        time.sleep(0.01)
        assert signals.agreed(2, due=False, device=CPU) == (signum, False)
    assert handlers() == before


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_a_signal_stops_at_once(first: signal.Signals) -> None:
    before = handlers()
    with pytest.raises(KeyboardInterrupt), StopSignal():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def test_a_second_sigterm_is_patient() -> None:
    with StopSignal() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signals.received == signal.SIGTERM


def test_training_in_another_thread_leaves_the_signals_alone() -> None:
    before, seen = handlers(), []

    def train() -> None:
        with StopSignal() as signals:
            seen.extend([handlers() == before, signals.agreed(0, due=True, device=CPU)])

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [True, (0, True)]


def test_stopped_says_by_what_and_where() -> None:
    stopped = Stopped(signal.SIGTERM, Path("runs/x"))
    assert (stopped.signum, stopped.path) == (signal.SIGTERM, Path("runs/x"))
    assert str(stopped) == "stopped by SIGTERM; runs/x is saved"
