"""launch/accelerate/*.yaml: how accelerate reads each, and the number of processes that really train."""

import json

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from launching import ROOT, accelerate, python, succeeded

CONFIGS = {path.stem: path for path in (ROOT / "launch/accelerate").glob("*.yaml")}
TRAIN = ROOT / "launch/train.py"
TOY = ROOT / "tests/toys.py"
ENV = {"OMP_NUM_THREADS": "1"}


def started(monkeypatch, name, *flags):
    """The launcher that accelerate chooses for a config file, its settings and its arguments for torch's launcher."""
    found = {}

    def several(args):
        launch.prepare_multi_gpu_env(args)
        found.update(launcher="several", args=args)

    monkeypatch.setattr(launch, "multi_gpu_launcher", several)
    monkeypatch.setattr(launch, "simple_launcher", lambda args: found.update(launcher="one", args=args))
    command = ["--config_file", str(CONFIGS[name]), *flags, "train.py", "recipe.py", "--epochs", "3"]
    launch.launch_command(launch.launch_command_parser().parse_args(command))
    assert found["args"].training_script_args == ["recipe.py", "--epochs", "3"]
    return found["launcher"], found["args"]


def test_there_is_a_file_for_each_way_to_train():
    assert CONFIGS.keys() == {"cpu", "cpu_ddp", "gpu", "gpu_ddp", "fsdp", "multi_node"}


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_file_and_a_comment_says_how_to_launch_it(name):
    text = CONFIGS[name].read_text()
    assert f"accelerate launch --config_file launch/accelerate/{name}.yaml" in text.split("compute_environment")[0]
    assert max(map(len, text.splitlines())) <= 120
    settings = load_config_from_file(str(CONFIGS[name])).to_dict()  # an unknown key is a ValueError
    assert settings["mixed_precision"] == "no", "precision is a flag of the run"
    assert "fsdp_config" not in settings or not settings["fsdp_config"], "the plugin becomes DDP on a CPU"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_one_process(monkeypatch, name):
    launcher, args = started(monkeypatch, name)
    assert launcher == "one" and args.num_processes == 1 and args.use_cpu == (name == "cpu")


@pytest.mark.parametrize("name", ["cpu_ddp", "gpu_ddp", "fsdp"])
def test_several_processes_of_one_machine(monkeypatch, name):
    launcher, args = started(monkeypatch, name, "--num_processes", "5")
    assert launcher == "several" and args.nproc_per_node == "5"
    assert args.use_cpu == (name == "cpu_ddp") and args.gpu_ids == "all" and not args.use_fsdp
    assert int(args.master_port) > 0, "a free port, chosen at each launch"
    assert started(monkeypatch, name, "--num_processes", "5")[1].master_port != args.master_port


def test_several_machines(monkeypatch):
    machines = ["--machine_rank", "2", "--num_machines", "4", "--num_processes", "32", "--max_restarts", "3"]
    machines += ["--main_process_ip", "head", "--rdzv_backend", "c10d"]
    assert "--rdzv_backend c10d" in CONFIGS["multi_node"].read_text(), "a flag: in the file it would be ignored"
    launcher, args = started(monkeypatch, "multi_node", *machines)
    assert launcher == "several" and (args.nnodes, args.nproc_per_node, args.node_rank) == ("4", "8", 2)
    assert (args.rdzv_backend, args.rdzv_endpoint, args.max_restarts) == ("c10d", "head:29400", 3)


@pytest.mark.parametrize("name, count", [pytest.param("cpu", 1, marks=pytest.mark.nightly), ("cpu_ddp", 2)])
def test_the_plan_says_how_many_processes_train(tmp_path, name, count):
    done = succeeded(accelerate(count, TRAIN, TOY, "--runs-dir", tmp_path, "--run", "it", "--threads", 1, env=ENV))
    described = json.loads((tmp_path / "toys/it/run.json").read_text())
    words = "1 process" if count == 1 else f"{count} processes"
    assert f"device   CPU x {words} x 1 thread" in done.stdout and f"per process x {count} x" in done.stdout
    assert described["world_size"] == count and described["launches"][0]["world_size"] == count
    assert "accelerate was asked" not in done.stdout


def ways_to_ask_in_vain(folder):
    (folder / "multi_cpu.yaml").write_text(
        CONFIGS["cpu_ddp"].read_text().replace("distributed_type: MULTI_GPU", "distributed_type: MULTI_CPU")
    )
    return {"flag": ["--cpu", "--num_processes", 2], "config": ["--config_file", folder / "multi_cpu.yaml"]}


@pytest.mark.parametrize("way", ["flag", pytest.param("config", marks=pytest.mark.nightly)])
def test_several_processes_that_were_asked_for_in_vain_are_said(tmp_path, way):
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", *ways_to_ask_in_vain(tmp_path)[way]]
    done = succeeded(python(*launcher, TRAIN, TOY, "--check", "--runs-dir", tmp_path, env=ENV))
    assert "device   CPU x 1 process x" in done.stdout
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("note ")]
    assert "asked for several processes and started 1" in note and "cpu_ddp.yaml" in note


def test_one_process_that_was_asked_for_is_no_note(tmp_path):
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", 1]
    done = succeeded(python(*launcher, TRAIN, TOY, "--check", "--runs-dir", tmp_path, env=ENV))
    assert "note " not in done.stdout
