import atexit
import os
import socket
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from lightning_fabric.accelerators import CUDAAccelerator

from moco.config import EngineConfig
from moco.parallel import device, fabric
from moco.parallel.device import choose_precision, cpu_has_bf16, own_device
from moco.parallel.fabric import build_fabric, loss_named, processes, resolve
from moco.parallel.launch import Launch, check_started, launched, sharing_cores

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
    with pytest.raises(ValueError, match=rf"^engine.accelerator is '{name}', but .*; use --engine.accelerator cpu$"):
        resolve(EngineConfig(accelerator=name))
    assert device.choose_accelerator("auto") == "cpu"


# Fabric


@pytest.fixture
def threads() -> Generator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def built_fabric(folder: Path, **chosen):
    return build_fabric(resolve(EngineConfig(accelerator="cpu", **chosen)), (), folder)


def test_one_process_on_the_processor_is_the_default(threads: None, tmp_path: Path) -> None:
    built = built_fabric(tmp_path, threads=1)
    assert (built.world_size, built.device) == (1, CPU)
    assert torch.get_num_threads() == 1
    assert not list(tmp_path.iterdir())


def test_bf16_multiplies_in_bf16_and_keeps_its_weights(
    threads: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    built = built_fabric(tmp_path, precision="bf16", threads=1)
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
        built_fabric(tmp_path, deterministic=True, threads=1)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("known", ["in use", "nobody there"])
def test_processes_that_do_not_meet_say_why(known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in (("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
            monkeypatch.setenv(name, value)
        if known == "in use":
            with pytest.raises(ValueError, match=rf"^port {port} is in use; .* set MASTER_PORT, or torchrun's"):
                built_fabric(tmp_path, devices=2, threads=1)
            return

        def unreached(*arguments: object, **named: object) -> None:
            raise torch.distributed.DistNetworkError("timed out\nand more")

        monkeypatch.setattr(torch.distributed, "init_process_group", unreached)
        with pytest.raises(
            ValueError, match=rf"^the processes could not connect at 127.0.0.1:{port} \(timed out\); check that all"
        ):
            built_fabric(tmp_path, devices=2, threads=1)


def test_what_goes_wrong_among_several_is_not_ended_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning_fabric.utilities import distributed

    dropped: list[object] = []
    monkeypatch.setattr(atexit, "unregister", dropped.append)
    for world, expected in ((1, []), (2, [distributed._destroy_dist_connection])):
        monkeypatch.setattr("moco.parallel.collectives.world_size", lambda world=world: world)
        with pytest.raises(KeyError), loss_named(tmp_path):
            raise KeyError
        assert dropped == expected


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}
SALLOC = {"SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": "0"}
SLURM = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, Launch("alone", 0)),
        (TORCHRUN, Launch("torchrun", 9, 8, 2)),
        (SLURM | {"SLURM_STEP_ID": "0"}, Launch("slurm", 3, 8, 2)),
        (SLURM | {"SLURM_STEP_ID": "0"} | TORCHRUN, Launch("torchrun", 9, 8, 2)),
        (SLURM | {"SLURM_JOB_NAME": "bash"}, Launch("alone", 0)),
        # srun below salloc, whose shell the job is named after; and a step that has fewer nodes than the job.
        (SLURM | SALLOC | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}, Launch("slurm", 3, 4, 1)),
        (SLURM | SALLOC | {"SLURM_STEP_NUM_TASKS": "1"}, Launch("alone", 0)),
        (SLURM | {"SLURM_NTASKS": "1"}, Launch("alone", 0)),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, Launch("first", 1)),
    ],
)
def test_who_started_a_process_is_known_from_its_environment(environment: dict[str, str], launch: Launch) -> None:
    assert launched(environment) == launch
    check_started(environment)


def test_a_job_of_slurms_without_srun_is_told_to_use_it() -> None:
    with pytest.raises(ValueError, match="^SLURM gave this job 16 tasks and started this process once; put srun"):
        check_started(SLURM)


def test_torchrun_overrules_the_settings_and_threads_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = EngineConfig(accelerator="cpu", devices=3)
    assert (processes(config), resolve(config).threads) == ((3, 1), 4)
    assert processes(EngineConfig(accelerator="cpu")) == (1, 1)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert (processes(config), resolve(config).threads) == ((8, 2), 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    assert resolve(config).threads == 12


def test_a_process_of_slurms_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SLURM | {"SLURM_STEP_ID": "0", "SLURM_LOCALID": "5"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device("cpu") == "cpu"
    for seen, expected in ((8, "cuda:5"), (1, "cuda:0")):  # all GPUs of the machine, or each task its own
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        assert own_device("cuda") == expected


def test_more_processes_than_gpus_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = EngineConfig(accelerator="cuda", devices=2, threads=1)
    with pytest.raises(ValueError, match="^2 processes on this machine, and torch sees 1 GPUs; start one for each$"):
        build_fabric(config, (), tmp_path)
    for name, value in (SLURM | {"SLURM_STEP_ID": "0"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="^8 processes .* 1 GPUs; .* ask for --gpus-per-node, since --gpus-per-task"):
        build_fabric(config, (), tmp_path)


def test_srun_need_not_be_told_how_many_tasks_a_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SLURM | {"SLURM_STEP_ID": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    assert type(fabric._environment(launched())).__name__ == "SLURMEnvironment"
    assert os.environ.pop("SLURM_NTASKS_PER_NODE") == "8"


def test_a_notebook_trains_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDAAccelerator, "auto_device_count", staticmethod(lambda: 4))
    assert processes(EngineConfig(accelerator="cuda")) == (4, 1)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert processes(EngineConfig(accelerator="cuda")) == (1, 1)
    assert processes(EngineConfig(accelerator="cuda", devices=2)) == (2, 1)  # as asked for: Fabric says why it cannot


def test_cores_are_shared_unless_slurm_gave_each_process_its_own() -> None:
    started = SLURM | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
    assert sharing_cores(8, {}) == sharing_cores(8, TORCHRUN) == sharing_cores(8, started) == 8
    assert sharing_cores(8, started | {"SLURM_CPUS_PER_TASK": "4"}) == 1
    assert sharing_cores(8, {"SLURM_CPUS_PER_TASK": "32"}) == 8  # a job, but none of its tasks
