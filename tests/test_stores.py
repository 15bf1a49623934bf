"""Files at a URL: what clients raise in one line, what is missing, and no secret in anything shown."""

import io

import fsspec
import pytest

from nndist.errors import UserError
from nndist.stores import Store, StoreError, is_url, redacted


@pytest.fixture
def store(request):
    made = Store(f"memory://{request.node.name}/runs")
    yield made
    fsspec.filesystem("memory").store.clear()


def test_what_is_a_url():
    assert all(map(is_url, ("s3://b/runs", "file:///runs", "abfs://c@a.dfs.core.windows.net/x", "hf://buckets/u/r")))
    assert not any(map(is_url, ("runs", "/runs", "s3:/b", "C:\\runs", "a b://c", "./s3://x")))


@pytest.mark.parametrize(
    "text, shown",
    [
        ("ftp://me:geheim@host/runs/x", "ftp://***@host/runs/x"),
        ("at https://token@host/runs", "at https://***@host/runs"),
        ("'az://c/blob?sv=1&sig=geheim' failed", "'az://c/blob?***' failed"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("s3://bucket/runs: key wJalrXUtnFEMI is wrong", "s3://bucket/runs: key *** is wrong"),
        ("5 steps/s at 10:20, a@b.c", "5 steps/s at 10:20, a@b.c"),
    ],
)
def test_secrets_of_urls_and_of_the_environment_are_not_shown(monkeypatch, text, shown):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    assert redacted(text) == shown


def test_files_are_written_listed_read_and_removed(store, tmp_path):
    assert store.names() == [] and store.names("checkpoints") == []
    data = bytes(range(256)) * 100
    store.write("run.json", b"{}")
    told = []
    store.send("checkpoints/one/model", io.BytesIO(data), len(data), told.append)
    assert store.names() == ["checkpoints/one/model", "run.json"] and store.names(depth=1) == ["run.json"]
    assert sum(told) == len(data)
    store.fetch("checkpoints/one/model", tmp_path / "model", told.append)
    assert (tmp_path / "model").read_bytes() == data and sum(told) == 2 * len(data)
    with pytest.raises(FileNotFoundError):
        store.read("checkpoints/one/optimizer")
    store.remove("run.json")
    store.remove("run.json")
    store.remove_folder("checkpoints/one")
    store.remove_folder("checkpoints/one")
    assert store.names() == []


def test_what_a_client_raises_is_one_line_without_secrets(store, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abcdefgh1234")

    def refuse(*arguments, **named):
        raise RuntimeError("denied for abcdefgh1234\nat https://host/x?sig=1")

    for name in ("pipe_file", "cat_file", "ls", "rm_file"):
        monkeypatch.setattr(type(store._files), name, refuse)
    for action in (lambda: store.write("x", b""), lambda: store.read("x"), store.names, lambda: store.remove("x")):
        with pytest.raises(StoreError) as caught:
            action()
        assert str(caught.value) == "RuntimeError: denied for ***"


@pytest.mark.parametrize("url, words", [("gs://bucket/runs", "pip install gcsfs"), ("nosuch://x", "nosuch")])
def test_a_missing_client_and_an_unknown_protocol_are_named(url, words):
    with pytest.raises(UserError, match=words) as caught:
        Store(url)
    assert str(caught.value).startswith(f"{url}: ")


def test_the_client_is_imported_when_a_store_is_opened():
    import subprocess
    import sys

    code = "import sys, nndist.stores, nndist.config, nndist.runs.storage; print('fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
