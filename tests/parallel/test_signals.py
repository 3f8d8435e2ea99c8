import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from moco.cli.console import heard
from moco.parallel import signals
from moco.parallel.signals import Stopped, StopSignal, part_in_order, queued_again


def test_a_job_whose_time_is_nearly_over_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = tmp_path / "told"
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {told}\n[ "$2" != 8 ] || {{ echo no such job >&2; exit 1; }}\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with StopSignal() as signals:
        signal.raise_signal(signal.SIGUSR1)
    assert signals.received == signal.SIGUSR1
    part_in_order(Stopped(signal.SIGUSR1, tmp_path))  # not of SLURM's
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    part_in_order(Stopped(signal.SIGTERM, tmp_path))  # SLURM itself queues what it has preempted
    assert not told.exists()
    with caplog.at_level(logging.INFO, logger="moco"):
        part_in_order(Stopped(signal.SIGUSR1, tmp_path))
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        part_in_order(Stopped(signal.SIGUSR1, tmp_path))
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
        part_in_order(Stopped(signal.SIGUSR1, tmp_path))
    assert told.read_text() == "requeue 7\nrequeue 8\nrequeue 5_2\n"
    assert [record.getMessage() for record in caplog.records] == [
        "job 7 is queued again",
        "job 8 could not be put back into the queue: no such job",
        "job 5_2 is queued again",
    ]


def test_a_job_that_is_not_training_is_queued_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "told"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    before = signal.getsignal(signal.SIGUSR1)
    with queued_again():  # not in SLURM
        assert signal.getsignal(signal.SIGUSR1) == before
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with queued_again():
        with StopSignal() as signals:
            signal.raise_signal(signal.SIGUSR1)
        assert signals.received and not told.exists()
        signal.raise_signal(signal.SIGUSR1)
        assert told.read_text() == "requeue 7\n"
        monkeypatch.setenv("SLURM_LOCALID", "1")
        signal.raise_signal(signal.SIGUSR1)  # another process of this machine: the first is told, too
    assert told.read_text() == "requeue 7\n"
    assert signal.getsignal(signal.SIGUSR1) == before


def handlers() -> list[object]:
    return [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_interrupts_nothing(signum: signal.Signals) -> None:
    before = handlers()
    with StopSignal() as signals:
        assert signals.agreed(1, due=False) == (0, False)
        assert signals.agreed(1, due=True) == (0, True)
        os.kill(os.getpid(), signum)
        time.sleep(0.01)
        assert signals.agreed(2, due=False) == (signum, True)
    assert handlers() == before


@pytest.mark.parametrize(("seconds", "asked"), [(0.001, [1, 2, 10, 20]), (0.6, [1, 2, 3, 4, 5])])
def test_ranks_ask_each_other_every_ten_steps_or_at_every_one_if_steps_are_slow(
    seconds: float, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = 0.0, []

    def agree(words: tuple[int, ...]) -> tuple[int, ...]:
        seen.append(step)
        return words

    monkeypatch.setattr("moco.parallel.collectives.world_size", lambda: 2)
    monkeypatch.setattr("moco.parallel.consensus.agree", agree)
    monkeypatch.setattr("moco.parallel.signals.time.monotonic", lambda: now)
    signals = StopSignal()
    for step in range(1, 26):
        now += seconds
        assert signals.agreed(step, due=False) == (0, False)
    assert seen[: len(asked)] == asked
    signals.received = signal.SIGTERM
    assert signals.agreed(30, due=False) == (signal.SIGTERM, True)


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
            seen.extend([handlers() == before, signals.agreed(0, due=True)])

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [True, (0, True)]


def test_stopped_says_by_what_and_where() -> None:
    stopped = Stopped(signal.SIGTERM, Path("runs/x"))
    assert (stopped.signum, stopped.path) == (signal.SIGTERM, Path("runs/x"))
    assert str(stopped) == "stopped by SIGTERM; runs/x is saved"


def test_one_that_the_first_process_started_ends_with_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(signals, "PARTING", 0.0)
    monkeypatch.setattr(os, "_exit", end)
    with heard(), pytest.raises(SystemExit, match="^1$"):
        logging.getLogger("moco").warning("this is for the first process to say")
        signals._end_with(os.getpid())  # which is not the parent any more
    said = "the first process of the run has ended, and this one, which it started, with it\n"
    assert capsys.readouterr().err == said
