"""Two hosts with two processes each, joined by a network that can be cut: torchrun and accelerate, real faults."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
from cluster import Hosts, can_make_hosts, end
from differences import relative_difference
from launching import ROOT, Processes, alive, children_of
from resuming import RECIPE, Run, assert_same, over_the_network
from safetensors.torch import load_file

TRAIN = ROOT / "launch/train.py"
TOY = ROOT / "tests/toys.py"
PORT = 29400

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not can_make_hosts(), reason="network namespaces can't be made: needs root and iproute2"),
]


@pytest.fixture
def hosts():
    with Hosts() as made:
        yield made


def torchrun(number: int, *flags) -> list:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 2, "--rdzv-id", "it"]
    return [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"node0:{PORT}", *flags]


def accelerate(number: int, *flags) -> list:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", ROOT / "launch/accelerate/multi_node.yaml", "--rdzv_backend", "c10d"]
    launcher += ["--num_machines", 2, "--num_processes", 4, "--machine_rank", number]
    return [*launcher, "--main_process_ip", "node0", "--main_process_port", PORT, *flags]


class Launch:
    """The same command on both hosts."""

    def __init__(self, hosts, folder: Path, launcher, launcher_flags, arguments, env=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"host{number}.txt" for number in (0, 1)]
        arguments = ["--run-name" if argument == "--run" else argument for argument in arguments]
        self.processes = [
            hosts.start(number, [*launcher(number, *launcher_flags), TRAIN, *arguments], self.outputs[number], env)
            for number in (0, 1)
        ]

    def wait(self, timeout: float) -> list[int]:
        """The launchers' exit codes, once all processes of both hosts have ended."""
        deadline = time.monotonic() + timeout
        family = set()
        try:
            while any(process.poll() is None for process in self.processes) or any(map(alive, family)):
                family |= {child for process in self.processes for child in children_of(process.pid)}
                assert time.monotonic() < deadline, f"still running after {timeout} s\n{self.said(0)}\n{self.said(1)}"
                time.sleep(0.2)
        finally:
            end(*self.processes)
        return [process.returncode for process in self.processes]

    def said(self, number: int) -> str:
        return self.outputs[number].read_text()

    def succeed(self, timeout: float = 150) -> None:
        codes = self.wait(timeout)
        assert codes == [0, 0], f"{codes}\n{self.said(0)[-4000:]}\n{self.said(1)[-4000:]}"


def test_four_processes_on_two_hosts_train_as_one(tmp_path, hosts):
    flags = ["--no-progress", "--no-figures", "--threads", 1, "--run", "it"]
    launched = Launch(hosts, tmp_path, torchrun, [], [TOY, "--runs-dir", tmp_path / "four", *flags])
    launched.succeed()
    assert "device   CPU x 4 processes" in launched.said(0) + launched.said(1)
    assert Processes(1, [TOY, "--runs-dir", tmp_path / "one", *flags], folder=tmp_path).wait() == [0]
    weights = []
    for name in ("four", "one"):
        (path,) = (tmp_path / name / "toys/it/checkpoints").glob("step-*/model.safetensors")
        weights.append(load_file(path))
    assert relative_difference(*weights) < 1e-5


def test_a_process_that_dies_has_all_hosts_start_again_and_go_on_exactly(tmp_path, hosts):
    """The other host's launcher counts fewer restarts, which must not matter."""
    flags = ["--save-every", "5 steps"]
    run = Run(tmp_path, *flags, world_size=4)
    restarts, env = ["--max_restarts", 3], {"FAULT": "3 20 kill"}
    Launch(hosts, tmp_path / "out", accelerate, restarts, [RECIPE, *run.flags], env).succeed()
    assert_same(run, Run(tmp_path / "whole", *flags, world_size=4).finish(patch=over_the_network))
    launches = json.loads((run.place / "run.json").read_text())["launches"]
    assert [launch["world_size"] for launch in launches] == [4, 4]
    assert launches[1]["from_step"] > 0


def test_a_cut_network_ends_all_processes_and_the_run_goes_on_later(tmp_path, hosts):
    flags = ["--save-every", "5 steps", "--epochs", 2000, "--evaluate-every", "1000 epochs", "--no-report"]
    flags += ["--timeout-seconds", 6]
    run = Run(tmp_path, *flags, world_size=4)
    command = [RECIPE, *run.flags, *flags]
    launched = Launch(hosts, tmp_path / "cut", torchrun, [], command)
    deadline = time.monotonic() + 60
    while not (run.place / "metrics.jsonl").exists() or len(run.records()) < 5:
        assert time.monotonic() < deadline, launched.said(0) + launched.said(1)
        time.sleep(0.1)
    hosts.cut()
    codes = launched.wait(150)
    assert all(codes), codes
    for number in (0, 1):
        lines = [line for line in launched.said(number).splitlines() if line.startswith("error: process")]
        assert lines and all("lost another process" in line for line in lines), launched.said(number)
        assert re.search("[Tt]imed out|[Tt]imeout", lines[0]) and "the same command resumes it" in lines[0]
    hosts.mend()
    last = 4 * len(run.records()) + 10
    again = Launch(hosts, tmp_path / "again", torchrun, [], [*command, "--max-steps", last])
    again.succeed()
    assert "resumed from step" in again.said(0) + again.said(1)
    whole = Run(tmp_path / "whole", *flags, world_size=4).finish("--max-steps", last, patch=over_the_network)
    for name in ("model", "ema", "optimizer", "random"):
        file = f"{name}.safetensors"
        assert (run.newest() / file).read_bytes() == (whole.newest() / file).read_bytes(), file
