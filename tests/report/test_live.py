"""`nndist watch`: the pages of runs that are being trained, in a real browser and by plain requests."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from browser import EXECUTABLE, Browser
from conftest import ROOT
from launching import python
from made_runs import FASTER, VISIBLE, make_run, png, records

import nndist
from nndist.errors import UserError
from nndist.report.live import Pages, Server, is_plain
from nndist.training.trainer import Trainer


@contextlib.contextmanager
def served(root, host="127.0.0.1"):
    """A server in a thread of its own; yields it."""
    with Server(Pages(root), host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server, path="/", *, method="GET", hosts=None, **headers):
    """(status, headers, text) of a request; hosts: the lines of Host (default: one, as a browser writes it)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for host in [f"localhost:{server.port}"] if hosts is None else hosts:
        connection.putheader("Host", host)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.headers), answer.read().decode()
    connection.close()
    return found


def data_of(text) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))


def append(folder, *lines):
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def describe(folder, **about):
    """Changes a run's run.json as the training does, in one rename."""
    part = folder / "part"
    part.write_text(json.dumps(json.loads((folder / "run.json").read_text()) | about))
    part.replace(folder / "run.json")


# Requests.


def test_the_pages_are_those_of_the_report_and_say_304_while_nothing_changes(tmp_path):
    folder = make_run(tmp_path, figures={"table.csv": b"a,b\n1,2\n", "a.png": png()})
    with served(tmp_path) as server:
        status, headers, index = asked(server)
        assert status == 200 and './digits/first/report.html"' in index, "though no report.html was written"
        status, headers, text = asked(server, "/digits/first/report.html")
        assert status == 200 and data_of(text)["version"] == headers["ETag"].strip('"')
        assert '"../../index.html"' in text and headers["X-Content-Type-Options"] == "nosniff"
        assert asked(server, "/digits/first/report.html", If_None_Match=headers["ETag"])[0] == 304
        append(folder, {"step": 101, "epoch": 4.04, "train/loss": 0.5})
        status, _, text = asked(server, "/digits/first/report.html", If_None_Match=headers["ETag"])
        assert status == 200 and data_of(text)["panels"][0]["series"][0]["step"][-1] == 101
        status, headers, text = asked(server, "/digits/first/figures/table.csv")
        assert (status, text) == (200, "a,b\n1,2\n") and headers["Content-Type"].startswith("text/plain")
        status, headers, text = asked(server, "/digits/first/report.html", method="HEAD")
        assert status == 200 and int(headers["Content-Length"]) > 1000 and not text
    with served(folder) as server:
        status, _, text = asked(server)
        assert status == 200 and data_of(text)["page"] == "run" and "all runs</a>" not in text
        assert asked(server, "/figures/table.csv")[0] == 200


def test_nothing_but_pages_and_figures_is_handed_out(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    runs = tmp_path / "runs"
    folder = make_run(runs, figures={"a.txt": b"a"})
    (folder / "figures/link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "figures/page.html").write_text("<script>alert(1)</script>")
    (runs / "secret.txt").write_text("secret")
    (runs / "figures").mkdir()
    (runs / "figures/secret.txt").write_text("secret")
    addresses = [
        "/secret.txt",
        "/../secret.txt",
        "/digits/../secret.txt",
        "/digits/first/../../../secret.txt",
        "/%2e%2e/secret.txt",
        "/digits/first/figures/../../../../secret.txt",
        "/digits/first/figures/..%2f..%2f..%2f..%2fsecret.txt",
        "/digits/first/figures/%2e%2e/run.json",
        "/digits/first/figures/link.txt",
        "/digits/first/figures/page.html",
        "/digits/first/run.json",
        "/digits/first/recipe.py",
        "/digits/first/figures/",
        "/digits/first",
        "/digits/first/figures",
        "/figures/secret.txt",
        "//secret.txt",
        "/./figures/secret.txt",
        "/digits/first/figures/a.txt%00",
        "/digits//figures/secret.txt",
        "/digits/first/figures/%ff.txt",
        "/..%5csecret.txt",
        "http://localhost/digits/first/report.html",
        "digits/first/report.html",
    ]
    with served(runs) as server:
        assert asked(server, "/digits/first/figures/a.txt")[0] == 200
        for address in addresses:
            status, _, text = asked(server, address)
            assert (status, text) == (404, "there is no such page\n"), address
    assert not any(map(is_plain, ["", ".", "..", ".hidden", "a/b", "a\\b", "a\0"]))


@pytest.mark.parametrize(
    "hosts",
    [[], ["evil.example"], ["evil.example:80"], ["10.0.0.7"], ["localhost", "evil.example"], [""], ["["]],
)
def test_a_request_by_a_name_that_is_not_this_servers_is_refused(tmp_path, hosts):
    """What a page elsewhere sends after its name was pointed at 127.0.0.1."""
    make_run(tmp_path)
    with served(tmp_path) as server:
        for own in ("localhost", f"127.0.0.1:{server.port}", "[::1]:9999", "LOCALHOST"):
            assert asked(server, hosts=[own])[0] == 200
        status, _, text = asked(server, hosts=hosts)
        assert status == 421 and "digits" not in text


def test_a_server_for_others_answers_to_numbers_and_to_its_names(tmp_path):
    make_run(tmp_path)
    with served(tmp_path, "0.0.0.0") as server:
        assert [asked(server, hosts=[host])[0] for host in ("10.0.0.7", socket.gethostname(), "localhost")] == [200] * 3
        assert asked(server, hosts=["evil.example"])[0] == 421


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_it_only_reads(tmp_path, method):
    make_run(tmp_path)
    with served(tmp_path) as server:
        assert asked(server, method=method)[0] == 501


def test_runs_that_are_damaged_appear_and_vanish(tmp_path):
    (make_run(tmp_path, "digits", "broken") / "run.json").write_text("{")
    (make_run(tmp_path, "digits", "gone") / "run.json").unlink()
    make_run(tmp_path, "digits", "null", lines=["null", "[", '{"step": "x"}'])
    with served(tmp_path) as server:
        text = asked(server)[2]
        assert text.count("unreadable: run.json") == 2
        status, _, text = asked(server, "/digits/broken/report.html")
        assert status == 404 and "not JSON" in text and data_of(text)["page"] == "problem"
        assert asked(server, "/digits/null/report.html")[0] == 200
        new = make_run(tmp_path, "sums", "new")
        assert "sums / new" in asked(server)[2] and asked(server, "/sums/new/report.html")[0] == 200
        shutil.rmtree(new)
        assert "sums / new" not in asked(server)[2] and asked(server, "/sums/new/report.html")[0] == 404
        shutil.rmtree(tmp_path)
        status, _, text = asked(server)
        assert status == 200 and "no such folder" in text
        tmp_path.mkdir()
        assert "holds no runs" in asked(server)[2]
        make_run(tmp_path)
        assert data_of(asked(server)[2])["page"] == "index"


def test_a_run_of_the_index_is_read_again_only_if_it_has_changed(tmp_path, monkeypatch):
    from nndist.report import index_page

    folder = make_run(tmp_path)
    make_run(tmp_path, "digits", "second")
    pages, read = Pages(tmp_path), []
    original = index_page.read_run
    monkeypatch.setattr(index_page, "read_run", lambda one: read.append(one.name) or original(one))
    pages.answer("/")
    pages.answer("/")
    append(folder, {"step": 101, "epoch": 5, "train/loss": 0.1})
    assert data_of(pages.answer("/").content.decode())["runs"][0]["series"]["train/loss"]["step"][-1] == 101
    assert read == ["first", "second", "first"]


def test_the_pages_of_a_run_that_is_being_trained(tmp_path, monkeypatch):
    """A real training: each answer is a whole page, its steps only grow, and the run is what it would have been."""
    settings = {"epochs": 12, "runs_dir": tmp_path / "runs", "progress": False, "figures": False, "wandb": "off"}
    settings["log_every"] = 1
    take_step = Trainer.take_step

    def slow(trainer, batch):
        time.sleep(0.05)  # else the fastest machines have ended before the page is read twice
        return take_step(trainer, batch)

    monkeypatch.setattr(Trainer, "take_step", slow)
    (tmp_path / "runs").mkdir()
    pages, steps, kinds = Pages(tmp_path / "runs"), [], set()
    ended = threading.Event()

    def look():
        while not ended.wait(0.01):
            for address in ("/", "/two_clusters/run/report.html"):
                answer = pages.answer(address)
                data = data_of(answer.content.decode())
                kinds.add((answer.status, data["page"]))
                if data["page"] == "run" and data["panels"]:
                    steps.append(data["panels"][0]["series"][0]["step"][-1])

    looking = threading.Thread(target=look)
    looking.start()
    try:
        watched = nndist.train(str(ROOT / "recipes/two_clusters.py"), run="run", **settings)
    finally:
        ended.set()
        looking.join()
    alone = nndist.train(str(ROOT / "recipes/two_clusters.py"), run="alone", **settings)
    assert steps == sorted(steps) and len(set(steps)) > 1
    assert kinds <= {(200, "index"), (200, "problem"), (200, "run"), (404, "problem")}
    assert watched.scores == alone.scores


# A real browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium; `.ci/run` installs it, so that these tests can't be skipped there."""
    if EXECUTABLE is None:
        pytest.skip("there is no chromium; apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def test_new_points_appear_without_a_reload_and_what_was_chosen_stays(browser, tmp_path):
    folder = make_run(tmp_path, status="running", figures={"a.png": png(400, 900)})
    with served(tmp_path) as server:
        page = browser.open(f"{server.url}digits/first/report.html", script=FASTER)
        last = "document.querySelector('.panel .legend li:nth-child(1)').innerText"
        page.click(".panel .legend li:nth-child(2) button")
        page.hover(".plot svg", 0.99, 0.5)
        assert page.js("document.querySelector('.readout').innerText").startswith("step 100,")
        curve = page.js("document.querySelector('.plot path').getAttribute('d')")
        down = page.js("window.scrollY")
        append(folder, {"step": 101, "epoch": 4.04, "train/loss": 0.125, "test/f1": 0.5})
        page.wait(f"{last}.includes('0.125')")
        assert page.js("document.querySelector('.plot path').getAttribute('d')") != curve
        assert page.js(VISIBLE.format(0)) == ["train/loss"], "the curve that was hidden is hidden"
        assert page.js("document.querySelector('.readout').innerText").startswith("step 100,"), "it is still read"
        assert page.js("document.querySelectorAll('.panel').length") == 6, "and the new score has a panel"
        assert page.js("[...document.querySelectorAll('.panel h3')].map(h => h.innerText)")[:3] == [
            *("loss", "accuracy, %", "f1")
        ]
        assert page.js("window.scrollY") == down
        describe(folder, status="finished", seconds=99.0)
        page.wait("document.querySelector('.status').innerText === 'finished'")
        assert "1 min 39 s" in page.js("document.body.innerText")
        assert page.loads == 1 and page.complaints == []
        assert {url.partition("?")[0] for url in page.requests if not url.startswith("data:")} == {
            f"{server.url}digits/first/report.html"
        }
    page.wait("document.getElementById('live').innerText.includes('does not answer')")
    page.close()


def test_runs_appear_in_the_index_and_vanish_without_a_reload(browser, tmp_path):
    first = make_run(tmp_path, status="running")
    with served(tmp_path) as server:
        page = browser.open(server.url, script=FASTER)
        names = "[...document.querySelectorAll('.runs tbody tr')].filter(r => !r.hidden).map(r => r.cells[2].innerText)"
        page.click(".runs thead th:nth-child(3) button")  # by run
        assert page.js(names) == ["first"] and page.js(VISIBLE.format(0)) == ["digits / first"]
        second = make_run(tmp_path, "digits", "a second")
        page.wait(f"{names}.length === 2")
        assert page.js(names) == ["a second", "first"], "sorted as before"
        assert sorted(page.js(VISIBLE.format(0))) == ["digits / a second", "digits / first"]
        page.click(".runs tbody tr:nth-child(1) input")
        page.js("document.getElementById('filter').focus()")
        page.send("Input.insertText", text="digits")
        for record in records(steps=125)[-2:]:
            append(first, record)
        page.wait("document.querySelector('#comparison svg').ariaLabel.includes('to 89.28 %')")
        assert page.js(VISIBLE.format(0)) == ["digits / first"], "what was taken out stays out"
        assert page.js("document.activeElement.id + document.activeElement.value") == "filterdigits"
        (second / "run.json").write_text("{")
        page.wait("document.querySelector('.unreadable') !== null")
        shutil.rmtree(second)
        page.wait(f"{names}.length === 1")
        assert page.loads == 1 and page.complaints == []
        shutil.rmtree(tmp_path)
        page.wait("document.body.innerText.includes('no such folder')")
        make_run(tmp_path)
        page.wait(f"{names}.length === 1")
        page.close()


# The command.


def test_the_command_ends_with_one_line_at_ctrl_c_and_leaves_the_runs_as_they_were(tmp_path):
    folder = make_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    words = [sys.executable, "-m", "nndist", "watch", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = process.stdout.readline()
        port = int(re.fullmatch(r"watch    http://127\.0\.0\.1:(\d+)/   \(Ctrl-C ends it\)\n", line).group(1))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        for address in ("/", f"/digits/{folder.name}/report.html"):
            connection.request("GET", address)
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read()
        with socket.create_connection(("127.0.0.1", port)) as rude:
            rude.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")  # and is gone
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[0] == "watch    ended\n" and process.returncode == 0
    finally:
        process.kill()
        process.wait()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_mistakes_are_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: Address already in use; --port 0 takes a free one"):
            Server(Pages(tmp_path), "127.0.0.1", port)
    for host, port, said in [("no.such.invalid", 0, "--host no.such.invalid"), ("127.0.0.1", 70000, "--port 70000")]:
        with pytest.raises(UserError, match=re.escape(said)):
            Server(Pages(tmp_path), host, port)
    for place, said in [(tmp_path / "nowhere", "no such folder"), ("s3://b/runs/it", "only folders of this machine")]:
        done = python("-m", "nndist", "watch", place)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {place}: {said}")
        assert done.stderr.count("\n") == 1
