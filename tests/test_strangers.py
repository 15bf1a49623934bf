"""Files of strangers, from disk or a server: refused at once, in a line that names them, in little memory."""

import contextlib
import hashlib
import io
import json
import os
import random
import socket
import struct
import tarfile
import threading
import time
import zlib

import pytest
import torch
from PIL import Image

from nndist import machine
from nndist.data import shard_store
from nndist.data.sets import Data, Resident
from nndist.data.shard_store import Index, Local, Shard, fetch
from nndist.data.shards import Example, contents
from nndist.datasets import imagenet
from nndist.errors import UserError
from nndist.prediction.framing import framing_of
from nndist.prediction.inputs import Inputs, NothingToAnswer


def png_that_says(width: int, height: int) -> bytes:
    """A small file that claims so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n%%EOF\n"
BAD = [
    (png_that_says(300_000, 1), "300,000 x 1 pixels, more than 100 times as long"),
    (png_that_says(13_000, 13_000), "13,000 x 13,000 pixels; the limit is 100 million"),
    (EPS, "is not a readable image"),
    (b"", "is not a readable image"),
]


@pytest.mark.parametrize("data, reason", BAD, ids=["long", "large", "EPS", "empty"])
def test_an_image_that_must_not_be_decoded_is_named(tmp_path, monkeypatch, data, reason):
    import subprocess

    monkeypatch.setattr(subprocess, "check_call", lambda *arguments, **named: pytest.fail("Ghostscript was started"))
    path = tmp_path / "x.png"
    path.write_bytes(data)
    images = torch.zeros(3, 8, 8, dtype=torch.uint8)
    inputs = Inputs([path], data=lambda: Data(Resident(images), Resident(images), "it"))
    with pytest.raises(NothingToAnswer):
        inputs.images(lambda image: (torch.zeros(8, 8), ""))
    (failure,) = inputs.failures
    assert failure.startswith(f"{path}: ") and reason in failure
    with pytest.raises(UserError, match=r"train/cat/x.png: .*; replace or remove it") as caught:
        imagenet.decode(Example("train/cat/x.png", {"png": data, "cls": b"0"}), None, side=8)
    assert reason in str(caught.value)


def test_a_large_photograph_is_framed_in_little_memory():
    grey = torch.arange(256, dtype=torch.uint8).repeat(3, 28, 4)[:, :, :28]
    framing = framing_of(grey)
    image = Image.linear_gradient("L").resize((6000, 6000))
    machine.give_back_memory()
    machine.reset_peak_memory()
    before = machine.used_memory()
    seen, done = framing.see(image)
    assert machine.peak_memory() - before < 300e6, "36 million pixels take 144 MB as floats, several times"
    expected, _ = framing.see(image.reduce(3))
    assert done.startswith("6000x6000 scaled") and (seen.int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_every_usual_format_is_read(kind):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, kind)
    pixels, label = imagenet.decode(Example("it", {"png": file.getvalue(), "cls": b"3"}), None, side=16)
    assert pixels.shape == (16, 16, 3) and label == 3 and pixels[8, 8, 0] > 240


@pytest.mark.filterwarnings("ignore")
def test_damaged_images_are_refused_or_read(tmp_path):
    """Whatever Pillow raises: bits, numbers and lengths of images with EXIF data are changed."""
    grey = torch.arange(256, dtype=torch.uint8).repeat(3, 28, 4)[:, :, :28]
    data = Data(Resident(grey, grey), Resident(grey, grey), "it")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8825] = 6, "a text", {1: "N", 2: (1.0, 2.0, 3.0)}  # orientation, title, place
    wholes = []
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        file = io.BytesIO()
        Image.linear_gradient("L").resize((40, 30)).save(
            file, kind, **({"exif": exif.tobytes()} if kind[0] in "PJW" else {})
        )
        wholes.append(file.getvalue())
    draw, path = random.Random(0), tmp_path / "x.png"
    for number in range(600):
        damaged = bytearray(wholes[number % len(wholes)])
        for _ in range(draw.randrange(1, 6)):
            place = draw.randrange(min(len(damaged), 300))
            change = draw.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f", b"", bytes([draw.randrange(256)])])
            damaged[place : place + len(change) + (not change)] = change
        path.write_bytes(damaged)
        inputs = Inputs([path], data=lambda: data)
        with contextlib.suppress(NothingToAnswer):
            inputs.batch()
        assert len(inputs.failures) + len(inputs.names) == 1
        with contextlib.suppress(UserError):
            imagenet.decode(Example("it", {"png": bytes(damaged), "cls": b"0"}), None, side=8)


@pytest.mark.parametrize("what", ["a pipe", "/dev/zero", "a NUL"])
def test_an_image_that_is_no_file_is_named(tmp_path, what):
    path = str(tmp_path / "x.png")
    if what == "a pipe":
        os.mkfifo(path)
    elif what == "/dev/zero":
        (tmp_path / "x.png").symlink_to("/dev/zero")
    else:
        path += "\0"
    inputs = Inputs([path], data=lambda: None)
    with pytest.raises(NothingToAnswer):
        inputs.images(lambda image: (torch.zeros(8, 8), ""))
    assert "x.png" in inputs.failures[0] and "\0" not in inputs.failures[0]


@pytest.mark.parametrize("text", [b"7", b"-1", b"", b"x\0", b"9" * 5000])
def test_a_class_that_is_none_is_named(text):
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    with pytest.raises(UserError, match=r"a.tar, 0.png: class .*recreate the shards"):
        imagenet.decode(Example("a.tar, 0.png", {"png": file.getvalue(), "cls": text}), None, side=8, num_classes=7)


def tar_of(members) -> bytes:
    data = b""
    for name, size, pax in members:
        info = tarfile.TarInfo(name)
        info.size = size
        info.pax_headers = pax
        data += info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) + b"x" * 512
    return data + bytes(1024)


@pytest.mark.parametrize(
    "members",
    [
        [("0.jpg", 2**62, {})],
        [("0.jpg", 5, {"size": str(2**50)})],
        [("0.jpg", 5, {"size": "9" * 100})],
        [("0.jpg", 5, {"size": "-7"})],
        [("0.jpg", 5, {"GNU.sparse.map": "x", "GNU.sparse.size": "y"})],
    ],
)
def test_a_tar_file_with_absurd_sizes_is_named(tmp_path, members):
    data = tar_of(members)
    path = tmp_path / "train-0.tar"
    path.write_bytes(data)
    with path.open("rb") as file:
        try:
            (example,) = contents(file, Shard("train-0.tar", 1, len(data), ""), str(path))
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert all(member.size <= len(data) for member in example)


def listing(**changes):
    shard = {"file": "train-0.tar", "examples": 1, "bytes": 1024, "sha256": "0" * 64, **changes}
    return {"format": shard_store.FORMAT, "classes": ["a"], "shards": [shard]}


@pytest.mark.parametrize(
    "change",
    [
        {"examples": "1"},
        {"examples": 2**62},
        {"examples": True},
        {"bytes": None},
        {"bytes": 2**80},
        {"file": "a\0.tar"},
        {"file": "../x.tar"},
        {"file": 3},
        {"sha256": []},
    ],
)
def test_a_list_of_shards_of_wrong_types_is_named(tmp_path, change):
    (tmp_path / "train.json").write_text(json.dumps(listing(**change)))
    with pytest.raises(UserError, match=r"train.json: is not a list of shards \(shards\[0\]"):
        Index(str(tmp_path), "train")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"format": 1}', "{" + '"a": 1,' * 10])
def test_a_list_of_shards_that_is_none_is_named(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(UserError, match=r"train.json: is not a list of shards"):
        Index(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["train.json", "train-0.tar"])
@pytest.mark.parametrize("kind", ["a pipe", "a device", "larger than memory"])
def test_a_shard_or_list_that_is_no_file_is_named_at_once(tmp_path, name, kind):
    (tmp_path / "train.json").write_text(json.dumps(listing()))
    (tmp_path / "train-0.tar").write_bytes(bytes(1024))
    index = Index(str(tmp_path), "train")
    there, path = Local(index), tmp_path / name
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 2**42)
    with pytest.raises(UserError, match=f"{name}: "):
        Index(str(tmp_path), "train") if name == "train.json" else there.open(0)
    if name == "train-0.tar" and kind != "larger than memory":
        with pytest.raises(OSError, match="pipe or a device"):
            shard_store.kept(path, index.shards[0])  # in the cache


def test_a_list_of_shards_that_is_right_is_read(tmp_path):
    data = bytes(1024)
    (tmp_path / "train-0.tar").write_bytes(data)
    (tmp_path / "train.json").write_text(json.dumps(listing(sha256=hashlib.sha256(data).hexdigest())))
    index = Index(str(tmp_path), "train")
    Local(index).open(0).close()
    assert len(index) == 1


class Server:
    """Answers each connection by a function of its socket."""

    def __init__(self, answer):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.answer = answer
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def place(self) -> str:
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def _serve(self):
        while True:
            try:
                found, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(found,), daemon=True).start()

    def _one(self, found):
        with found:
            found.recv(10_000)
            with contextlib.suppress(OSError):
                self.answer(found)


HEADER = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"


def drip(start, each):
    def answer(found):
        found.sendall(start)
        while True:
            found.sendall(each)
            time.sleep(0.05)

    return answer


def silence(start):
    def answer(found):
        found.sendall(start)
        time.sleep(30)

    return answer


@pytest.mark.parametrize(
    "answer, reason",
    [
        (drip(HEADER, b"x"), "bytes in"),
        (drip(b"HTTP/1.1 200 OK\r\n", b"x"), "no answer within"),
        (silence(HEADER), "timed out"),
        (silence(b""), "timed out"),
        (silence(HEADER + b"some"), "timed out"),
    ],
    ids=["body by drops", "header by drops", "nothing after the header", "nothing", "nothing more"],
)
def test_a_server_that_is_slow_or_hangs_is_given_up(monkeypatch, answer, reason):
    monkeypatch.setattr(shard_store, "READ_TIMEOUT_SECONDS", 0.4)
    monkeypatch.setattr(shard_store, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(shard_store, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(shard_store, "ATTEMPTS", 2)
    server = Server(answer)
    began = time.monotonic()
    with pytest.raises(OSError, match=reason):
        fetch(f"{server.place}/train.json")
    assert time.monotonic() - began < 5
    server.socket.close()


def test_a_list_by_url_has_a_bound(monkeypatch):
    monkeypatch.setattr(shard_store, "MAX_LIST_BYTES", 100_000)

    def endless(found):
        found.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            found.sendall(b" " * 65536)

    server = Server(endless)
    with pytest.raises(UserError, match=r"train.json: is not a list of shards \(it has more than 100,000 bytes"):
        Index(server.place, "train")
    server.socket.close()
