"""Runs that end in time, by the signal that a cluster sends, and tell somebody."""

import json
import os
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest
from resuming import SAVES, Run, assert_same, slow_steps

from nndist.errors import UserError
from nndist.training.stopping import SLURM_END, Deadline, preempt_signal, seconds_of
from nndist.training.trainer import TIME_IS_UP, Trainer


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("8h", 28_800),
        ("1h30m", 5400),
        ("90 minutes", 5400),
        ("45 s", 45),
        ("2 days 3 hours", 183_600),
        ("1-12:00:00", 129_600),
        ("1-12:30", 131_400),
        ("1-12", 129_600),
        ("2:30:00", 9000),
        ("30:00", 1800),
        ("0.5h", 1800),
        ("1hr 5mins 3secs", 3903),
    ],
)
def test_times_as_people_and_slurm_write_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "soon", "0h", "-3h", "8 h of work", "1:2:3:4", "5 ms", "3 months"])
def test_other_times_are_refused(text):
    with pytest.raises(UserError, match=r"--time .*such as 8h"):
        seconds_of(text)


def test_the_slurm_jobs_end_counts_unless_another_time_is_given():
    soon, later = {SLURM_END: str(int(time.time()) + 50)}, {SLURM_END: str(int(time.time()) + 5000)}
    assert Deadline("auto", soon).has_come(), "the last minute is for saving"
    assert not Deadline("auto", later).has_come()
    assert Deadline("auto", later).has_come(longest_save=2500.0), "a save that takes long begins earlier"
    assert not Deadline("none", soon).has_come() and not Deadline("8h", soon).has_come()
    assert not Deadline("auto", {}).has_come()


def test_every_exit_code_is_a_signals():
    trainer = SimpleNamespace(deadline=Deadline("8h"))
    assert Trainer.asked_by(trainer, TIME_IS_UP) == ("--time 8h", signal.SIGTERM)
    assert Trainer.asked_by(trainer, signal.SIGINT) == ("Ctrl-C", 2)
    assert Trainer.asked_by(trainer, signal.SIGUSR1) == ("signal 10", 10)


def test_signals_by_name():
    assert preempt_signal("USR1") == preempt_signal("sigusr1") == signal.SIGUSR1
    assert preempt_signal("none") is None
    for name in ("KILL", "SIGSTOP", "WHAT", "SIG_DFL"):
        with pytest.raises(UserError, match="--preempt-signal"):
            preempt_signal(name)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_run_out_of_time_is_saved_and_resumes_to_the_same_bits(tmp_path, uninterrupted, world_size):
    run = Run(tmp_path, *SAVES, world_size=world_size)
    launched = run.launch("--time", "1s", patch=partial(slow_steps, 0.05))
    assert launched.wait() == [128 + signal.SIGTERM] * world_size, launched.said()
    (line,) = [line for line in launched.said().splitlines() if line.startswith("stopped ")]
    assert "by --time 1s after step" in line and "saved" in line
    described = json.loads((run.place / "run.json").read_text())
    assert described["status"] == "preempted" and 0 < described["step"] < 33
    assert "by --time 1s" in described["problem"]
    assert_same(run.finish(), uninterrupted(world_size, *SAVES))


def _signal_in_step(rank):
    """SIGUSR2 in the fifth step."""
    from nndist.training.trainer import Trainer

    take_step = Trainer.take_step

    def signalled(trainer, batch):
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGUSR2)
        return take_step(trainer, batch)

    Trainer.take_step = signalled


def test_a_clusters_own_signal_and_a_command_that_is_told(tmp_path):
    run = Run(tmp_path, *SAVES)
    told = tmp_path / "told"
    command = f'echo "$NNDIST_STATUS at $NNDIST_STEP: $NNDIST_PROBLEM" > {told}; echo my-secret-token >&2; exit 3'
    launched = run.launch("--preempt-signal", "USR2", "--notify", command, patch=_signal_in_step)
    assert launched.wait() == [128 + signal.SIGUSR2]
    assert told.read_text().startswith("preempted at 5: stopped by signal 12 after step 5; saved")
    assert "--notify: the command failed (code 3: my-secret-token)" in launched.said()
    assert "my-secret-token" not in (run.place / "run.json").read_text(), "a command may hold a secret address"


@pytest.mark.parametrize(
    "fault, status, problem",
    [(None, "finished at 33", ""), ("0 14 raise", "failed at 13", "ValueError: the disk with the pictures is gone")],
)
def test_a_command_is_told_of_the_end_and_of_a_failure(tmp_path, fault, status, problem):
    run = Run(tmp_path, *SAVES)
    told = tmp_path / "told"
    command = (
        f'printf "%s\\n" "$NNDIST_STATUS at $NNDIST_STEP" "$NNDIST_RUN" "$NNDIST_SCORES" "$NNDIST_PROBLEM" > {told}'
    )
    launched = run.launch("--notify", command, fault=fault)
    assert any(launched.wait()) == bool(fault), launched.said()
    first, place, scores, *why = told.read_text().splitlines()
    assert first == status and place == str(run.place)
    assert problem in "".join(why) and bool(problem) == bool("".join(why))
    assert json.loads(scores).keys() == {"test/realness"}


def test_a_trace_of_the_steps_asked_for_on_the_processes_asked_for(tmp_path, uninterrupted):
    import gzip

    run = Run(tmp_path, *SAVES, world_size=3).finish("--profile", "3:5", "--profile-ranks", "0,2")
    found = sorted((run.place / "profile").iterdir())
    assert [path.name for path in found] == ["rank-0-steps-3-4.json.gz", "rank-2-steps-3-4.json.gz"]
    events = json.loads(gzip.decompress(found[1].read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::linear" for event in events)
    assert_same(run, uninterrupted(3, *SAVES))


def test_a_trace_is_written_although_the_run_is_stopped_in_its_midst(tmp_path):
    run = Run(tmp_path, *SAVES)
    launched = run.launch("--profile", "3:30", fault="0 8 term")
    assert launched.wait() == [143], launched.said()
    (trace,) = (run.place / "profile").iterdir()
    assert f"profile  {trace}" in launched.said() and trace.name.startswith("rank-0-steps-3-")
