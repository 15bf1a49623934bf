"""W&B as a sink, with the real client: everything is there once, and nothing that happens to it harms the training."""

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import RECIPES
from launching import ROOT, Processes, alive, command, python, succeeded

import nndist
from nndist.runs import wandb
from nndist.runs.records import without_times
from nndist.runs.sink import PATIENCE_SECONDS, patience_of
from nndist.runs.wandb import WandbProcess, choose_mode
from nndist.runs.wandb import records as sent_records

CLUSTERS = ROOT / "recipes/two_clusters.py"
CNN = ROOT / "recipes/mnist_simple_cnn.py"
SHORT = ["--threads", 1, "--no-progress", "--no-report", "--run", "it"]
SLOW = [*SHORT, "--data-source", "sample", "--epochs", 4, "--no-figures"]  # some seconds


def offline(folder: Path) -> list[dict]:
    """The records of the only offline run in a run's folder, as the client's own reader gives them."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    done = succeeded(python("-m", "wandb", "leet", "inspect", "--json", run))
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: list[dict]) -> list[dict]:
    """What was logged, without the client's own names and the figures at the end."""
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [
        {name: value for name, value in item.items() if name[0] != "_"}
        for item in items
        if not any(name.startswith("figures/") for name in item)
    ]


def summary_of(records: list[dict]) -> dict:
    """The run's summary, as its updates have left it."""
    summary = {}
    for record in records:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    return summary


def metrics(folder: Path) -> list[dict]:
    """The numbers of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in ("data", "chain")} for line in lines
    ]


def start(arguments, env=None) -> subprocess.Popen:
    """A training that goes on in the background."""
    return subprocess.Popen(
        [sys.executable, ROOT / "launch/train.py", *map(str, arguments)],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition, what: str, seconds: float = 60.0):
    """What `condition` gives, once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.05)
    return found


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def service_of(training: int) -> tuple[int, int]:
    """(process of the sink, the client's service) of a training that has begun to send."""
    for sink in children(training):
        for child in children(sink):
            if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
                return sink, child
    return 0, 0


def test_every_value_is_there_once_at_its_step(tmp_path):
    flags = [
        "--runs-dir",
        tmp_path,
        "--wandb",
        "offline",
        "--wandb-artifact",
        "--wandb-project",
        "mine",
        "--wandb-alert",
    ]
    done = succeeded(command(ROOT / "launch/train.py", CLUSTERS, *flags, *SHORT))
    folder = tmp_path / "two_clusters/it"
    assert f"W&B      offline; later: wandb login && nndist sync {folder}" in done.stdout
    records = offline(folder)
    assert history(records) == metrics(folder)
    (run,) = (record["run"] for record in records if record["type"] == "run")
    description = json.loads((folder / "run.json").read_text())
    config = run["config"]["update"]
    assert run["project"] == "mine" and run["display_name"] == "two_clusters/it"
    assert description["fields"].items() <= config.items()
    assert config["nndist"]["versions"] == description["versions"]
    assert config["nndist"]["data"]["source"] == "generated points"
    metric = next(r["metric"] for r in records if r["type"] == "metric" and r["metric"].get("glob_name") == "*")
    assert metric["step_metric"] == "step"
    summary = summary_of(records)
    assert summary["final/test/accuracy"] == description["scores"]["test/accuracy"]
    assert summary["status"] == "finished"
    (alert,) = (record["alert"] for record in records if record["type"] == "alert")
    assert alert["title"] == "two_clusters/it: finished" and "test/accuracy" in alert["text"]
    figures = next(
        record["history"]["item"]
        for record in records
        if record["type"] == "history" and any(name.startswith("figures/") for name in record["history"]["item"])
    )
    assert figures["step"] == 100
    kinds = {name.removesuffix("._type"): value for name, value in figures.items() if name.endswith("._type")}
    assert kinds["figures/decision_boundary"] == kinds["figures/confusion_matrix"] == "image-file"
    assert kinds["figures/prediction_list"] == "table-file"
    contents = [
        entry["path"] for r in records if r["type"] == "artifact" for entry in r["artifact"]["manifest"]["contents"]
    ]
    assert {"model.safetensors", "manifest.json"} <= set(contents)
    assert records[-1]["type"] == "exit" and records[-1]["exit"].get("exit_code", 0) == 0


def test_the_best_evaluation_stands_in_the_summary_beside_the_last(tmp_path):
    # steps so large that the loss of the test points soon rises again
    flags = ["--best", "test/loss", "--best-is", "lowest", "--lr", 2, "--epochs", 30, "--no-figures"]
    succeeded(command(ROOT / "launch/train.py", CLUSTERS, "--runs-dir", tmp_path, "--wandb", "offline", *flags, *SHORT))
    folder = tmp_path / "two_clusters/it"
    evaluations = [record for record in metrics(folder) if "test/loss" in record]
    best = min(evaluations, key=lambda record: record["test/loss"])
    last = evaluations[-1]
    assert best["step"] < last["step"]
    summary = summary_of(offline(folder))
    assert summary["best/step"] == best["step"]
    for name in ("test/loss", "test/accuracy"):
        assert summary[f"best/{name}"] == best[name] and summary[f"final/{name}"] == last[name]


def test_two_processes_make_one_run(tmp_path):
    flags = ["--runs-dir", tmp_path, "--wandb", "offline", "--no-figures"]
    launched = Processes(2, [CLUSTERS, *flags, *SHORT], folder=tmp_path)
    assert launched.wait() == [0, 0], launched.said()
    folder = tmp_path / "two_clusters/it"
    assert history(offline(folder)) == metrics(folder)
    assert [*tmp_path.rglob("offline-run-*")] == [*(folder / "wandb").glob("offline-run-*")]


def test_a_run_that_was_killed_is_sent_as_one(tmp_path):
    """kill -9; what was recorded past the last save is recorded again, and sent once."""
    folder = tmp_path / "mnist_simple_cnn/it"
    arguments = [CNN, *SLOW, "--runs-dir", tmp_path, "--wandb", "offline", "--save-every", "50 steps"]
    training = start([*arguments, "--log-every", 3])
    sink, _ = until(lambda: any(found := service_of(training.pid)) and found, "sink")
    until(lambda: len([*(folder / "checkpoints").glob("step-*")]) and lines(folder) > 20, "record")
    training.kill()
    training.wait()
    until(lambda: not Path(f"/proc/{sink}").exists(), "end of the sink", 45)
    done = succeeded(command(ROOT / "launch/train.py", *arguments, "--log-every", 3))
    assert "resumed from step" in done.stdout
    found = history(offline(folder))
    assert found == metrics(folder)
    assert [record["step"] for record in found if "lr" in record] == sorted(
        {record["step"] for record in found if "lr" in record}
    )
    assert found[-1]["step"] == 252
    shutil.rmtree(folder / "wandb")
    done = succeeded(command(ROOT / "launch/sync.py", folder, "--offline"))
    (run,) = (folder / "wandb").glob("offline-run-*")
    assert f"{run} is the complete run; send it with: wandb sync {run}" in done.stdout
    assert history(offline(folder)) == metrics(folder)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_service_that_is_killed_leaves_the_training_whole(tmp_path, undisturbed):
    check_harm(tmp_path, "service", "SIGKILL", undisturbed)


@pytest.mark.parametrize(
    "who, how",
    [
        pytest.param("sink", "SIGSTOP", marks=pytest.mark.long),
        pytest.param("sink", "SIGKILL", marks=pytest.mark.nightly),
        pytest.param("service", "SIGSTOP", marks=pytest.mark.nightly),
    ],
)
def test_a_sink_that_dies_or_hangs_leaves_the_training_whole(tmp_path, who, how, undisturbed):
    check_harm(tmp_path, who, how, undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The records of the same training without a sink."""
    folder = tmp_path_factory.mktemp("undisturbed")
    succeeded(command(ROOT / "launch/train.py", CNN, *SLOW, "--runs-dir", folder, "--wandb", "off"))
    return [without_times(record) for record in metrics(folder / "mnist_simple_cnn/it")]


def check_harm(tmp_path, who, how, undisturbed):
    folder = tmp_path / "mnist_simple_cnn/it"
    training = start([CNN, *SLOW, "--runs-dir", tmp_path, "--wandb", "offline"])
    sink, service = until(lambda: any(found := service_of(training.pid)) and found, "service")
    until(lambda: lines(folder) > 20, "record")
    os.kill({"service": service, "sink": sink}[who], getattr(signal, how))
    try:
        said, _ = training.communicate(timeout=120)
    finally:
        for pid in (sink, service):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert training.returncode == 0, said
    assert said.count("W&B: dropped") == 1 and "Traceback" not in said, said
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert [without_times(record) for record in metrics(folder)] == undisturbed
    succeeded(command(ROOT / "launch/sync.py", folder, "--offline"))
    assert history(offline(folder)) == metrics(folder)


@pytest.mark.long
def test_a_server_that_is_not_there_costs_the_training_nothing(tmp_path):
    """Nothing listens there; the client gives up after its time-out, and the run is whole offline."""
    env = {"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": ""}
    folder = tmp_path / "mnist_simple_cnn/it"
    training = start([CNN, *SLOW, "--runs-dir", tmp_path], env)
    until(lambda: lines(folder) > 20, "record")  # the training does not wait for the client
    said, _ = training.communicate(timeout=150)
    assert training.returncode == 0 and "W&B      online" in said
    assert said.count("W&B: online failed") == 1, said
    assert "Traceback" not in said
    assert history(offline(folder)) == metrics(folder)


class Server(http.server.ThreadingHTTPServer):
    """A W&B server that hangs: from the start, or once it has accepted a run, when it is sent the records and files."""

    daemon_threads = True

    def __init__(self, accepts: bool):
        super().__init__(("127.0.0.1", 0), Answer)
        self.accepts, self.over = accepts, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, body: bytes) -> dict:
        asked = json.loads(body)
        given = asked.get("variables") or {}
        if "upsertBucket" in asked["query"]:
            project = {"id": "p", "name": "nndist", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": given.get("name"), "displayName": "it", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in asked["query"]:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.server.accepts or self.path != "/graphql":
            self.server.over.wait()
            return
        data = json.dumps({"data": self.server.answer(body)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST


@pytest.fixture(params=["after it has accepted", pytest.param("at once", marks=pytest.mark.long)])
def hanging(request, monkeypatch):
    """A server that hangs, and settings with which the client asks it."""
    server = Server(accepts=request.param != "at once")
    for name, value in {"API_KEY": "x" * 40, "BASE_URL": server.url, "MODE": "online"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def test_a_server_that_hangs_is_said_and_ctrl_c_skips_it(tmp_path, hanging):
    training = start([CLUSTERS, *SHORT, "--no-figures", "--runs-dir", tmp_path])
    line = next(line for line in training.stdout if "W&B: waiting" in line or "W&B: dropped" in line)
    assert line == "W&B: waiting for the remaining data to be sent, 120 s at most; Ctrl-C skips it\n"
    (sink,) = children(training.pid)
    service = children(sink)
    training.send_signal(signal.SIGINT)
    began = time.monotonic()
    said, _ = training.communicate(timeout=30)
    assert time.monotonic() - began < 5 and training.returncode == 0, said
    dropped = "W&B: dropped, interrupted; the run itself is intact: nndist sync"
    assert dropped in said and "\nresult" in said  # the run's address may come before, if it was late
    assert json.loads((tmp_path / "two_clusters/it/run.json").read_text())["status"] == "finished"
    until(lambda: not any(map(alive, [sink, *service])), "end of the client")


@pytest.mark.long
def test_a_server_that_hangs_is_waited_for_no_longer_than_is_said(tmp_path, hanging, monkeypatch):
    monkeypatch.setitem(PATIENCE_SECONDS, "online", 3.0)
    flags = {"run": "it", "runs_dir": tmp_path, "progress": False, "report": False, "figures": False, "threads": 1}
    folder = nndist.train(CLUSTERS, **flags, wandb="off").folder
    said: list = []
    sink = WandbProcess(folder, "online", said.append, project="nndist")
    _, service = until(lambda: any(found := service_of(os.getpid())) and found, "service")
    began = time.monotonic()
    assert not sink.close("finished")
    assert time.monotonic() - began < 3.0 + 1.5 + 3.0
    assert any("3 s at most" in line for line in said)
    assert said[-1].startswith("W&B: dropped, it did not finish within 3 s; the run itself")
    until(lambda: not alive(service), "end of the client")


def test_auto_is_online_only_with_a_key(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run = Path("runs/r/it")
    assert choose_mode("auto", run)[0] == "offline" and "no API key" in choose_mode("auto", run)[1]
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert choose_mode("auto", run)[0] == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert choose_mode("auto", run)[0] == "offline", "the key is another server's"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert choose_mode("auto", run)[0] == "online"
    for said, mode in (("disabled", None), ("offline", "offline"), ("dryrun", "offline"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", said)
        assert choose_mode("auto", run)[0] == mode
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode("off", run) == (None, "") and choose_mode("offline", run)[0] == "offline"


def test_a_check_sends_nothing(tmp_path):
    done = succeeded(
        command(
            ROOT / "launch/train.py", RECIPES[0], "--check", "--wandb", "offline", "--runs-dir", tmp_path, *SHORT[:3]
        )
    )
    assert "W&B" not in done.stdout and not [*tmp_path.rglob("wandb")]


def test_sync_says_what_it_can_not_send(tmp_path):
    done = command(ROOT / "launch/sync.py", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/none: not a run; name a run's folder, such as runs/mnist_cnn/first\n"


def ending(process, mode, said):
    """The training's end of a sink whose process is this one."""
    sink = object.__new__(WandbProcess)
    sink.folder, sink.mode, sink.say, sink._process = Path("runs/r/it"), mode, said.append, process
    sink._reader = threading.Thread(target=lambda: None)
    sink._reader.start()
    return sink


@pytest.mark.parametrize("status", ["finished", "synced"])
def test_a_server_that_hangs_at_the_end_is_said_and_an_interrupt_skips_it(status):
    said: list = []
    process = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, start_new_session=True)
    threading.Timer(2.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    assert not ending(process, "online", said).close(status)
    assert time.monotonic() - began < 5
    process.wait(1.0)
    limit = "" if status == "synced" else ", 120 s at most"
    assert said[0] == f"W&B: waiting for the remaining data to be sent{limit}; Ctrl-C skips it"
    assert "W&B: dropped, interrupted" in said[1] and "nndist sync" in said[1]


def test_a_sync_tells_how_far_it_is(tmp_path, monkeypatch, capsys):
    class Sent(list):
        resumed, summary, dir = False, {}, "wandb/run/files"
        log = list.append

        def finish(self, exit_code):
            self.code = exit_code

    sent = Sent()
    monkeypatch.setattr(wandb, "begin", lambda folder, task: sent)
    monkeypatch.setattr(wandb, "PROGRESS_SECONDS", 0.0)
    (tmp_path / "run.json").write_text('{"recipe": "it", "status": "finished"}')
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1200)))
    ended = SimpleNamespace(status="synced", wait=lambda seconds: True)
    wandb.send(tmp_path, {"mode": "online", "artifact": False, "alert": False}, ended)
    assert len(sent) == 1200 and sent.code == 0
    assert "W&B: 1,200 records sent" in capsys.readouterr().out


def test_a_sync_has_no_limit_of_time():
    assert patience_of("offline", "synced") is patience_of("online", "synced") is None
    assert patience_of("offline", "finished") == 15 and patience_of("online", "preempted") == 2


def test_records_of_a_file_that_was_written_anew_come_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\nno record\n{"st')

    class Rounds:
        """The second round is the last one; before it the file is another."""

        def __init__(self):
            self.count = 0

        def wait(self, seconds):
            self.count += 1
            if self.count == 2:
                text = path.read_text()
                path.unlink()
                path.write_text(text + 'ep": 3}\n{"step": 4}\n')
            return self.count == 2

    assert [record["step"] for record in sent_records(path, Rounds())] == [1, 2, 3, 4]
