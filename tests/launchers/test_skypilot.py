"""launch/skypilot/train.yaml: against SkyPilot's own schema, offline; and its command, as a machine would run it."""

import ast
import builtins
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import yaml
from launching import ROOT, Processes, children_of

FILE = ROOT / "launch/skypilot/train.yaml"
SEEN = ROOT / "tests/workers/seen.py"


@pytest.fixture
def task():
    return yaml.safe_load(FILE.read_text())


def test_what_it_promises_is_in_it(task):
    """Spot instances, recovered by SkyPilot, with the run in a bucket under a name that stays the same."""
    resources = task["resources"]
    assert resources["use_spot"] and resources["job_recovery"]["max_restarts_on_errors"] > 0
    assert '--run-name "$RUN" --runs-dir "$RUNS"' in task["run"] and task["envs"]["RUNS"].startswith("s3://")
    assert "s3fs" in task["setup"]
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)


@pytest.fixture(scope="module")
def schemas():
    """SkyPilot's functions that return the schemas, from the wheel that `.ci/run` downloads, none of it installed."""
    folder = os.environ.get("NNDIST_SCHEMA_WHEELS")
    if folder is None:
        pytest.skip("the package with SkyPilot's schema is not in $NNDIST_SCHEMA_WHEELS")
    (wheel,) = Path(folder).glob("skypilot-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        source, constants = (archive.read(f"sky/{name}.py").decode() for name in ("utils/schemas", "skylet/constants"))
    known = {}
    for node in ast.parse(constants).body:
        if isinstance(node, ast.Assign):
            try:
                known[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                known[node.targets[0].id] = MagicMock()  # computed; the schemas of what is used here need none

    def importing(name, *rest):
        """What the module imports of SkyPilot is made up, but for its constants."""
        if not name.startswith("sky"):
            return builtins.__import__(name, *rest)
        return SimpleNamespace(**{part: MagicMock() for part in rest[2]} | {"constants": MagicMock(**known)})

    found = {"__builtins__": {**vars(builtins), "__import__": importing}, "__name__": "schemas"}
    exec(compile(source, str(wheel), "exec"), found)
    found["_task_config_schema"] = lambda: {"type": "object"}  # the file has no `config`
    return found


def mistakes(schemas, task: dict) -> list[str]:
    from jsonschema import Draft7Validator

    parts = [("get_task_schema", task), ("get_resources_schema", task["resources"])]
    errors = [error for name, part in parts for error in Draft7Validator(schemas[name]()).iter_errors(part)]
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@pytest.mark.long
def test_skypilots_schema_admits_it(schemas, task):
    assert mistakes(schemas, task) == []


@pytest.mark.long
def test_the_schema_does_find_mistakes(schemas, task):
    task["num_nodes"] = "two"
    task["setpu"] = ""
    task["resources"] |= {"spot": True, "job_recovery": {"max_restarts_on_errors": "many"}}
    found = "\n".join(mistakes(schemas, task))
    assert "'two' is not of type" in found and "'setpu' was unexpected" in found and "'spot' was unexpected" in found
    assert "resources" not in found and "many" in found


@pytest.mark.long
def test_a_job_whose_machine_is_lost_goes_on_exactly_on_another(tmp_path, task):
    """Its command on a machine for two processes; the bucket is a folder. The second machine has an empty disk."""
    flags = ["--epochs", 8, "--no-progress", "--no-figures", "--no-report", "--wandb", "off", "--threads", 1]
    flags += ["--save-every", "5 steps"]
    command = task["run"].rstrip().replace("python -m torch", f"{sys.executable} -m torch")
    command = command.replace("recipes/mnist_cnn.py", str(SEEN)).replace("--save-every '2 minutes'", "")
    command += " " + shlex.join(map(str, flags))
    env = {**os.environ, "RUN": "it", "RUNS": f"file://{tmp_path}/bucket", "SEEN": str(tmp_path / "seen.jsonl")}
    env |= {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    env |= {"SKYPILOT_NUM_GPUS_PER_NODE": "2", "OMP_NUM_THREADS": "1"}

    def start(machine: str) -> subprocess.Popen:
        (tmp_path / machine).mkdir()
        with (tmp_path / machine / "said.txt").open("w") as output:
            own = {**env, "HOME": str(tmp_path / machine)}  # where the local copy of the run is
            return subprocess.Popen(["bash", "-c", command], env=own, stdout=output, stderr=output)

    def said(machine: str) -> str:
        return (tmp_path / machine / "said.txt").read_text()[-3000:]

    lost = start("first")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "bucket").glob("seen/it/checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline and lost.poll() is None, said("first")
        time.sleep(0.1)
    for pid in [*children_of(lost.pid), lost.pid]:
        os.kill(pid, signal.SIGKILL)
    lost.wait()
    shutil.rmtree(tmp_path / "first")
    assert start("second").wait(200) == 0, said("second")
    assert "resumed from step" in (tmp_path / "second/said.txt").read_text()
    arguments = [SEEN, "--runs-dir", tmp_path / "whole", "--run", "it", *flags, "--seconds", 0]
    whole = Processes(2, arguments, env={"SEEN": str(tmp_path / "whole.jsonl")}, folder=tmp_path)
    assert whole.wait() == [0, 0], whole.said()
    weights = [tmp_path / place / "seen/it/checkpoints/step-00000064" for place in ("bucket", "whole")]
    assert len({(place / "model.safetensors").read_bytes() for place in weights}) == 1
