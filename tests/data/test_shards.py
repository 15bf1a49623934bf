"""Data in shards: one order for every number of processes, exact resume, and a server that fails in every way."""

import json
import re
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import ROOT, Processes, accelerate, command, succeeded
from safetensors.torch import load_file

from nndist.cli.commands import shard_command
from nndist.data import shard_store
from nndist.data.feed import Feed, micro_slices
from nndist.data.sets import ExampleRandom, Streamed
from nndist.data.shard_store import Fetched, Index, Shard
from nndist.data.shards import Sharded, windowed_order
from nndist.datasets.imagenet import CROP_ATTEMPTS, Pictures, decode, random_part, shard_folder
from nndist.errors import UserError
from nndist.runs.records import without_times

CLASSES = ("ant", "bee", "cow")
NUM_TRAIN, NUM_VAL = 120, 24
WORKER = ROOT / "tests/workers/sharded.py"
RECIPE = ROOT / "recipes/imagenet_resnet.py"
WINDOW = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A made-up folder in ImageNet's layout; no two pictures are equal."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for number in range(count):
            label = number % len(CLASSES)
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            height, width = draw.integers(24, 48, 2)
            pixels = draw.integers(0, 60, (height, width, 3)) + 120 * np.eye(3, dtype=int)[label] + number % 40
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"n{number:04d}.x.JPEG")
    return root


@pytest.fixture(scope="module")
def place(images, tmp_path_factory):
    """Its shards, made by the command."""
    out = tmp_path_factory.mktemp("shards") / "pictures"
    done = succeeded(command(ROOT / "launch/shard.py", images, out, "--shard-size", 0.04))
    assert re.fullmatch(rf"{out}: 144 images in \d+ shards, [\d.]+ MB\n", done.stdout)
    return out


class Server:
    """A web server of a folder; `faults` holds what befalls the next requests for a file's name."""

    def __init__(self, folder: Path, port: int = 0):
        self.asked: list[str] = []
        self.faults: dict[str, list[str]] = {}
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(folder))

            def log_message(self, *arguments):
                pass

            def do_GET(self):
                name = self.path.rpartition("/")[2]
                server.asked.append(name)
                faults = server.faults.get(name, [])
                fault = faults.pop(0) if faults else ""
                if fault.isdigit():
                    return self.send_error(int(fault))
                if fault == "closed":
                    return self.connection.close()
                if not fault:
                    return super().do_GET()
                data = bytearray((folder / name).read_bytes())
                if fault == "flipped":
                    data[len(data) // 2] ^= 1
                self.send_response(200)
                if fault != "short":
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if fault in ("truncated", "short") else data)

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                """A client that goes away is none of the test's business."""

        self.http = Quiet(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def shards_asked(self) -> list[str]:
        return [name for name in self.asked if name.endswith(".tar")]


@pytest.fixture
def server(place):
    started = Server(place)
    yield started
    started.stop()


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    monkeypatch.setattr(shard_store, "FIRST_PAUSE_SECONDS", 0.01)


def sharded(place, cache="unused", *, name="train", num_workers=0, window=WINDOW, cache_bytes=10**9, side=8):
    read = partial(decode, side=side)
    cache = Path(cache)
    return Sharded(str(place), name, read, num_workers=num_workers, window=window, cache=cache, cache_bytes=cache_bytes)


def fed(examples, *, world_size=1, rank=0, epoch=1, start=0, batch_size=8):
    """What one process is fed in an epoch: [(numbers that count, pixels, labels)]."""
    feed = Feed(examples, batch_size=batch_size, seed=4, rank=rank, world_size=world_size)
    return [
        (micro.numbers[: micro.size].tolist(), micro.raw[0], micro.raw[1])
        for batch in feed.epoch(epoch, start)
        for micro in batch.micro_batches
    ]


# The order.


class Even:
    """An index of equally large shards, without files."""

    def __init__(self, num_shards, each):
        self.shards = [None] * num_shards
        self.shard_of_example = torch.arange(num_shards).repeat_interleave(each)

    def __len__(self):
        return len(self.shard_of_example)


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    # a change of these numbers would change every run that is resumed
    order = partial(windowed_order, Even(5, 3), 2, batch_size=4)
    assert order(seed=0, epoch=0).tolist() == FIRST_ORDER
    assert order(seed=0, epoch=0).equal(order(seed=0, epoch=0))
    assert not order(seed=0, epoch=1).equal(order(seed=0, epoch=0))
    assert not order(seed=1, epoch=0).equal(order(seed=0, epoch=0))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    order(seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), state)


FIRST_ORDER = [10, 11, 9, 0, 13, 12, 14, 1, 2, 3, 4, 5, 8, 7, 6]


@pytest.mark.parametrize("num_shards, each, window", [(1, 7, 4), (3, 5, 16), (40, 50, 8), (40, 50, 1), (9, 1, 3)])
def test_an_epoch_has_each_example_once_and_reads_from_a_window_of_shards(num_shards, each, window):
    index = Even(num_shards, each)
    order = windowed_order(index, window, 3, 2, batch_size=16)
    assert order.sort().values.tolist() == list(range(num_shards * each))
    # of the same order in batches of one: which shards lie between their first and their last example at any time
    visited = index.shard_of_example[windowed_order(index, window, 3, 2, batch_size=1)].tolist()
    last = {shard: place for place, shard in enumerate(visited)}
    begun, most = set(), 0
    for place, shard in enumerate(visited):
        begun.add(shard)
        most = max(most, sum(last[other] >= place for other in begun))
    assert most <= min(window, num_shards)


def test_the_window_mixes():
    index = Even(40, 50)
    visited = index.shard_of_example[windowed_order(index, 8, 0, 0, batch_size=40)]
    assert min(len(set(batch.tolist())) for batch in visited.split(40)) >= 5
    in_turn = sum(a + 1 == b for a, b in pairwise(windowed_order(index, 8, 0, 0, batch_size=1).tolist()))
    assert in_turn < 40  # of 2,000; 6 are expected by chance


def test_the_batch_size_does_not_change_which_examples_come_until_when():
    index = Even(20, 30)
    small, large = (windowed_order(index, 4, 0, 0, batch_size) for batch_size in (10, 60))
    for stop in range(60, 600, 60):
        assert set(small[:stop].tolist()) == set(large[:stop].tolist())


def test_each_of_several_processes_needs_a_part_of_the_shards():
    index, batch_size = Even(200, 100), 128
    batches = windowed_order(index, 16, 0, 0, batch_size).split(batch_size)
    for world_size, most in ((2, 140), (4, 100), (8, 80)):
        for rank in range(world_size):
            ((start, stop),) = micro_slices(batch_size, rank, world_size, 1)
            assert len({s for batch in batches for s in index.shard_of_example[batch[start:stop]].tolist()}) < most


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_process_count_sees_the_same_examples(place, world_size, num_workers):
    alone = fed(sharded(place))
    shares = [fed(sharded(place, num_workers=num_workers), world_size=world_size, rank=r) for r in range(world_size)]
    for (numbers, pixels, labels), *parts in zip(alone, *shares, strict=True):
        assert [number for part in parts for number in part[0]] == numbers
        assert torch.cat([part[1] for part in parts]).equal(pixels) and torch.cat([p[2] for p in parts]).equal(labels)
    assert sorted(number for step in alone for number in step[0]) == list(range(NUM_TRAIN))


# What is read.


def test_shards_hold_the_pictures_of_the_folder(images, place):
    """As training augments them too: the crop is a function of (seed, epoch, number), and nothing else."""
    for name in ("train", "val"):
        pictures = Pictures(images / name)
        index = Index(str(place), name)
        assert index.classes == list(CLASSES) and len(index) == len(pictures)
        assert len(index.shards) > 1
        found = sharded(place, name=name).dataset
        stored = sorted((e.files["jpeg"], e.files["cls"]) for e in map(found.__getitem__, range(len(found))))
        assert stored == sorted((e.files["jpeg"], e.files["cls"]) for e in map(pictures.__getitem__, range(len(found))))
        of_folder = Streamed(pictures, 0, partial(decode, side=8))
        everything = [torch.arange(len(pictures))]
        ((folder_pixels, _),) = of_folder.batches(everything)
        ((shard_pixels, _),) = sharded(place, name=name).batches(everything)
        assert sorted(map(bytes, folder_pixels.numpy())) == sorted(map(bytes, shard_pixels.numpy()))


def test_any_tool_reads_the_shards(place, tmp_path):
    import tarfile

    listed = json.loads((place / "train.json").read_text())["shards"][0]
    with tarfile.open(place / listed["file"]) as tar:
        tar.extractall(tmp_path, filter="data")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == ["00000000.cls", "00000000.jpeg"] and len(names) == 2 * listed["examples"]


def test_the_same_folder_gives_the_same_shards(images, place, tmp_path, capsys):
    shard_folder(images, tmp_path, shard_bytes=40_000, progress=False)
    for path in place.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        shard_command([str(images), str(tmp_path)])
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path}/train.json: exists already; remove that set, or write to another folder\n"


def test_a_training_crop_is_torchvisions(images):
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import hflip, pil_to_tensor, resized_crop

    pictures = Pictures(images / "train")
    flipped = 0
    for number in range(40):
        found, _ = decode(pictures[number], ExampleRandom(1, 2, torch.tensor([number]), purpose="decode"), side=16)
        drawn = ExampleRandom(1, 2, torch.tensor([number]), purpose="decode").uniform(1 + 4 * CROP_ATTEMPTS)[0].tolist()
        image = Image.open(pictures.folder / pictures.files[number][0]).convert("RGB")
        left, top, right, bottom = random_part(*image.size, drawn[1:])
        expected = resized_crop(image, top, left, bottom - top, right - left, [16, 16], InterpolationMode.BILINEAR)
        expected = hflip(expected) if drawn[0] < 0.5 else expected
        flipped += drawn[0] < 0.5
        assert pil_to_tensor(expected).permute(1, 2, 0).equal(found)
    assert 8 < flipped < 32


def test_crops_are_spread_as_torchvisions():
    draw = torch.rand(4000, 4 * CROP_ATTEMPTS, generator=torch.Generator().manual_seed(0)).tolist()
    parts = torch.tensor([random_part(300, 200, drawn) for drawn in draw]).double()
    left, top, right, bottom = parts.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 300 and bottom.max() <= 200
    area, ratio = (right - left) * (bottom - top) / 60_000, (right - left) / (bottom - top)
    assert area.min() >= 0.075 and area.max() > 0.87 and 0.74 < ratio.min() < ratio.max() < 1.35
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(torch.zeros(3, 200, 300), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)]
    assert abs(area.mean() - np.mean([h * w for _, _, h, w in theirs]) / 60_000) < 0.02
    assert abs(left.mean() - np.mean([left for _, left, _, _ in theirs])) < 6
    assert random_part(300, 20, [0.999] * 40) == (136, 0, 163, 20), "no attempt fits: the middle"


def test_each_epoch_augments_anew_and_evaluation_never(place):
    examples, everything = sharded(place), [torch.arange(20)]
    first, again, later = (next(examples.in_epoch(0, e).batches(everything))[0] for e in (0, 0, 1))
    assert first.equal(again) and not first.equal(later)
    assert next(examples.batches(everything))[0].equal(next(examples.batches(everything))[0])


def test_an_epoch_can_start_at_any_batch_and_reads_only_what_follows(place, server, tmp_path):
    whole = fed(sharded(server.url, tmp_path / "a"))
    assert len(set(server.asked)) == len(Index(str(place), "train").shards) + 1
    index = Index(str(place), "train")
    server.asked.clear()
    rest = fed(sharded(server.url, tmp_path / "b"), start=11)
    for (numbers, pixels, _), (expected, expected_pixels, _) in zip(rest, whole[11:], strict=True):
        assert numbers == expected and pixels.equal(expected_pixels)
    needed = {index.shards[index.shard_of_example[n]].file for numbers, _, _ in rest for n in numbers}
    assert set(server.shards_asked()) == needed and len(needed) < len(index.shards)


def test_the_next_shard_is_fetched_ahead_and_each_only_once(place, server, tmp_path):
    examples = sharded(server.url, tmp_path, num_workers=2)
    feed = Feed(examples, batch_size=4, seed=4)
    needed = list(dict.fromkeys(examples.index.shard_of_example[feed.order(0)].tolist()))
    # the loader's two processes are four batches ahead; none of those needs the shard that was fetched ahead
    reached = set(examples.index.shard_of_example[feed.order(0)[: 5 * 4]].tolist())
    batches = feed.epoch(0)
    next(batches)
    ahead = next(shard for shard in needed if shard not in reached)
    deadline = time.monotonic() + 20
    while examples.index.shards[ahead].file not in server.asked:
        assert time.monotonic() < deadline, server.asked
        time.sleep(0.02)
    assert len(list(batches)) == NUM_TRAIN / 4 - 1
    asked = server.shards_asked()
    assert sorted(asked) == sorted(shard.file for shard in examples.index.shards)


# What goes wrong.


@pytest.mark.parametrize("fault", ["500", "503", "429", "closed", "truncated", "short", "flipped"])
def test_a_server_that_fails_now_and_then_is_asked_again(place, server, tmp_path, fault):
    name = Index(str(place), "train").shards[1].file
    server.faults = {name: [fault] * (shard_store.ATTEMPTS - 1), "train.json": ["500"]}
    expected, found = fed(sharded(place)), fed(sharded(server.url, tmp_path))
    assert all(e[0] == f[0] and e[1].equal(f[1]) for e, f in zip(expected, found, strict=True))
    assert server.asked.count(name) == shard_store.ATTEMPTS


SAID = {
    "500": "500 Internal Server Error",
    "404": "404 Not Found",
    "closed": "Remote end closed connection without response",
    "truncated": r"only [\d,]+ of [\d,]+ bytes arrived",
    "short": r"it has [\d,]+ bytes and its list says [\d,]+",
    "flipped": r"its SHA-256 is \w{12}\.\.\. and its list says \w{12}\.\.\.",
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", SAID)
def test_a_server_that_goes_on_failing_is_one_line(place, server, tmp_path, fault, num_workers):
    name = Index(str(place), "train").shards[1].file
    server.faults = {name: [fault] * 1000}
    with pytest.raises(UserError) as error:
        fed(sharded(server.url, tmp_path, num_workers=num_workers))
    assert re.fullmatch(
        rf"{server.url}/{name}: could not be fetched \({SAID[fault]}\); check the server; the same command "
        "resumes the run",
        str(error.value),
    )
    if not num_workers:  # one that is ended while it fetches leaves its part, which the next one overwrites
        assert not list(tmp_path.glob("*/.*.part"))
    if fault == "404" and num_workers == 0:
        assert server.asked.count(name) == 1, "what the server does not have is not asked for again"


def test_a_server_killed_in_the_middle_and_started_again(place, tmp_path):
    first = Server(place)
    expected = fed(sharded(place))
    examples = sharded(first.url, tmp_path)
    batches = Feed(examples, batch_size=8, seed=4).epoch(1)
    taken = [next(batches).micro_batches[0].raw[0] for _ in range(3)]
    first.stop()
    with pytest.raises(UserError, match=r"could not be fetched \(Connection refused\)"):
        list(batches)
    second = Server(place, first.port)
    try:
        rest = fed(examples, start=len(taken))
    finally:
        second.stop()
    for pixels, (_, expected_pixels, _) in zip([*taken, *(pixels for _, pixels, _ in rest)], expected, strict=True):
        assert pixels.equal(expected_pixels)
    assert not set(first.shards_asked()) & set(second.shards_asked()), "what was fetched is not fetched again"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_url_that_fsspec_knows_is_fetched_from(place, tmp_path, num_workers):
    """Also in worker processes, although clients must not outlive a fork."""
    stored = tmp_path / "store"
    shutil.copytree(place, stored)
    examples = sharded(f"file://{stored}", tmp_path / "cache", num_workers=num_workers)
    expected, found = fed(sharded(place)), fed(examples)
    assert all(e[0] == f[0] and e[1].equal(f[1]) for e, f in zip(expected, found, strict=True))
    name = examples.index.shards[2].file
    (stored / name).unlink()
    with pytest.raises(UserError) as caught:
        fed(sharded(f"file://{stored}", tmp_path / "empty", num_workers=num_workers))
    assert f"file://{stored}/{name}: could not be fetched (there is no such file)" in str(caught.value)
    with pytest.raises(
        UserError, match=r"ftp://\*\*\*@nowhere.invalid/x/train.json: the list of the shards can't be read"
    ):
        sharded("ftp://me:geheim@nowhere.invalid/x", tmp_path)


def test_no_list_of_shards_is_one_line(place, server, tmp_path):
    for where in (tmp_path, server.url + "/elsewhere"):
        with pytest.raises(UserError, match=rf"{where}/train.json: the list of the shards can't be read"):
            sharded(where)
    for text in ("{", "[]", '{"format": "else"}', '{"format": "nndist shards 1", "classes": [], "shards": []}'):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(UserError, match=rf"{tmp_path}/train.json: is not a list of shards \(.+\); nndist shard"):
            sharded(tmp_path)


def test_a_list_can_name_no_file_elsewhere(place, tmp_path):
    listed = json.loads((place / "train.json").read_text())
    for file in ("../secret.tar", "secret", "/etc/passwd"):
        listed["shards"][0]["file"] = file
        (tmp_path / "train.json").write_text(json.dumps(listed))
        with pytest.raises(UserError, match="is not a list of shards"):
            sharded(tmp_path)


def test_a_missing_short_or_damaged_shard_on_disk_is_named(place, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    path = copy / Index(str(place), "train").shards[2].file
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: is missing; copy it again, or recreate the shards"):
        sharded(copy)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"{path}: has {len(data) - 1:,} bytes and its list says {len(data):,}"):
        sharded(copy)
    path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    for num_workers in (0, 2):
        with pytest.raises(UserError, match=rf"^{path}: damaged, its SHA-256 is .*$"):
            fed(sharded(copy, num_workers=num_workers))


def test_a_damaged_shard_in_the_cache_is_fetched_again(place, server, tmp_path):
    expected = fed(sharded(server.url, tmp_path))
    (path, *_) = sorted(tmp_path.glob("*/*.tar"))
    data = path.read_bytes()
    path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    server.asked.clear()
    found = fed(sharded(server.url, tmp_path))
    assert all(e[1].equal(f[1]) for e, f in zip(expected, found, strict=True))
    assert server.shards_asked() == [path.name] and path.read_bytes() == data


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_cache_is_bounded(place, server, tmp_path, num_workers):
    listed = Index(str(place), "train").shards
    bound = sum(sorted((shard.bytes for shard in listed), reverse=True)[: WINDOW + 2])
    assert bound < 0.7 * sum(shard.bytes for shard in listed)
    stop, sizes = threading.Event(), []

    def watch():
        while not stop.is_set():
            found = 0
            for path in tmp_path.rglob("*"):
                try:
                    found += path.stat().st_size if path.is_file() else 0
                except FileNotFoundError:
                    continue
            sizes.append(found)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        examples = sharded(server.url, tmp_path, num_workers=num_workers, cache_bytes=bound)
        for epoch in (0, 1):
            found, expected = fed(examples, epoch=epoch), fed(sharded(place), epoch=epoch)
            assert all(e[1].equal(f[1]) for e, f in zip(expected, found, strict=True))
    finally:
        stop.set()
        watcher.join()
    assert 0.5 * bound < max(sizes) <= bound
    assert len(server.shards_asked()) < 3 * len(listed), "hardly a shard is fetched twice in an epoch"
    with pytest.raises(UserError, match=rf"--cache-gigabytes .*: a window of {WINDOW} shards of {server.url} takes"):
        sharded(server.url, tmp_path, cache_bytes=bound - 1)


def test_the_cache_that_an_error_asks_for_is_large_enough(tmp_path):
    index = SimpleNamespace(place="http://host/shards", shards=[Shard("a.tar", 1, 1_234_400_000, "")])
    with pytest.raises(UserError, match=r"takes 1\.235; give at least that"):
        Fetched(index, tmp_path, cache_bytes=10**9, window=1)
    Fetched(index, tmp_path, cache_bytes=1_235_000_000, window=1)


def test_a_cache_that_can_not_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"--data-dir: {tmp_path}/file/\w+ can't be created \(Not a directory\)"):
        sharded(server.url, tmp_path / "file")


def test_a_picture_that_is_none_is_named(images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    broken = folder / "train/bee/n0001.x.JPEG"
    broken.write_bytes(b"no")
    read = Streamed(Pictures(folder / "train"), 2, partial(decode, side=8))
    with pytest.raises(UserError, match=rf"^{broken}: is not a readable image \(.*\); replace or remove it$"):
        list(read.batches(torch.arange(NUM_TRAIN).split(10)))
    shard_folder(folder, tmp_path / "out", shard_bytes=10**6, progress=False)
    with pytest.raises(UserError, match=rf"^{tmp_path}/out/train-00000.tar, \d+.jpeg: is not a readable image"):
        fed(sharded(tmp_path / "out"))


@pytest.mark.parametrize(
    "break_it, said",
    [
        (lambda root: shutil.rmtree(root / "val"), "val: can't be read (No such file or directory); the layout is"),
        (lambda root: (root / "val/dog").mkdir(), "val: class 'dog' is not a class of the training images"),
        (lambda root: [p.unlink() for p in root.glob("val/*/*")], "val: holds no images; the layout is val/<class>"),
    ],
)
def test_a_folder_of_another_layout_is_one_line(images, tmp_path, capsys, break_it, said):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    break_it(folder)
    with pytest.raises(SystemExit, match="2"):
        shard_command([str(folder), str(tmp_path / "out")])
    trained = ended(Processes(1, [RECIPE, "--images", folder, "--runs-dir", tmp_path], folder=tmp_path), 2)
    for printed in (capsys.readouterr().err, trained.said()):
        assert printed.startswith(f"error: {folder}/{said}") and len(printed.splitlines()) == 1


# Training.


def launch(folder, place, *flags, world_size=1, fault="", recipe=WORKER, name="--place"):
    folder.mkdir(exist_ok=True)
    given = [recipe, name, place, "--runs-dir", folder, "--run", "it", "--data-dir", folder / "cache", "--threads", 1]
    given += ["--no-progress", "--no-figures", "--timeout-seconds", 20, "--log-every", 4, *flags]
    return Processes(world_size, given, env={"FAULT": fault}, folder=folder)


def ended(launched, code=0):
    codes = launched.wait()
    assert code in codes and (code or not any(codes)), f"{codes}\n{launched.said()}"
    return launched


def newest(folder, recipe="sharded"):
    return max((folder / recipe / "it/checkpoints").glob("step-*"))


def bits(folder, recipe="sharded"):
    return [(newest(folder, recipe) / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer", "random")]


@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.long)])
def test_killed_in_the_middle_of_a_window_and_gone_on_with(place, server, tmp_path, world_size):
    """From a server, into a cache that holds a part of the set; alone and on three processes, bit by bit."""
    listed = Index(str(place), "train").shards
    small = sum(shard.bytes for shard in listed) * 0.75e-9
    flags = ("--save-every", "4 steps", "--cache-gigabytes", small)
    ended(launch(tmp_path / "whole", place, *flags, world_size=world_size))
    assert newest(tmp_path / "whole").name == "step-00000030"
    for fault in (f"{world_size - 1} 11 kill", "0 6 kill"):
        codes = launch(tmp_path / "killed", server.url, *flags, world_size=world_size, fault=fault).wait()
        assert any(codes)
    ended(launch(tmp_path / "killed", server.url, *flags, world_size=world_size))
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")


def test_three_processes_take_the_steps_of_one(place, tmp_path):
    flags = ("--dropout", 0.0, "--num-workers", 1)
    weights = []
    for world_size in (1, 3):
        ended(launch(tmp_path / str(world_size), place, *flags, world_size=world_size))
        weights.append(load_file(newest(tmp_path / str(world_size)) / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert (weights[1][name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name


@pytest.mark.long
def test_a_run_that_began_on_one_process_goes_on_with_three(place, tmp_path):
    weights = []
    flags = ("--dropout", 0.0)
    for name, worlds in (("alone", (1,)), ("moved", (1, 3))):
        for world_size, stop in zip(worlds, (17, 30)[-len(worlds) :], strict=True):
            ended(launch(tmp_path / name, place, *flags, "--max-steps", stop, world_size=world_size))
        weights.append(load_file(newest(tmp_path / name) / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert (weights[1][name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name


def test_other_shards_are_noticed(place, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    ended(launch(tmp_path / "run", copy, "--max-steps", 5))
    listed = json.loads((copy / "train.json").read_text())
    (copy / "train.json").write_text(json.dumps({**listed, "shards": listed["shards"][:-1]}))
    launched = ended(launch(tmp_path / "run", copy), 2)
    assert "the training examples of 'generated' have changed since the run began" in launched.said()


@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_shard_that_is_gone_in_mid_training_is_said_once(place, server, tmp_path, world_size):
    index = Index(str(place), "train")
    last = windowed_order(index, WINDOW, 0, 0, 8)[-1]
    name = index.shards[index.shard_of_example[last]].file
    server.faults = {name: ["404"] * 1000}
    launched = launch(tmp_path, server.url, world_size=world_size)
    codes = launched.wait()
    errors = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert 2 in codes and errors == [
        f"error: {server.url}/{name}: could not be fetched (404 Not Found); check the server; the same command "
        "resumes the run"
    ], launched.said()
    assert "Traceback" not in launched.said()


def _kill_at_step_4(rank):
    import os
    import signal

    from nndist.training.trainer import Trainer

    take_step = Trainer.take_step

    def counted(trainer, batch):
        taken = take_step(trainer, batch)
        if trainer.step == 4:
            trainer.saving.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return taken

    Trainer.take_step = counted


RESNET = ("--side", 16, "--batch-size", 40, "--epochs", 2, "--window", WINDOW, "--num-workers", 1, "--no-report")


@pytest.mark.parametrize(
    "world_size", [pytest.param(3, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.nightly)]
)
def test_the_recipe_killed_in_mid_epoch_goes_on_exactly(images, place, tmp_path, world_size):
    """recipes/imagenet_resnet.py on its shards, alone on the folder too, kill -9 after step 4 of 6, saved at step 2."""
    for name, where in (("--images", images), ("--shards", place))[world_size > 1 :]:
        flags = (*RESNET, "--save-every", "2 steps")
        runs = []
        for kind, patches in (("whole", [None]), ("killed", [_kill_at_step_4, None])):
            folder = tmp_path / f"{kind}{name}"
            folder.mkdir()
            for patch in patches:
                given = [RECIPE, name, where, "--runs-dir", folder, "--run", "it", "--threads", 1, "--no-progress"]
                launched = Processes(world_size, [*given, "--no-figures", *flags], folder=folder, patch=patch)
                codes = launched.wait()
                assert any(codes) == (patch is not None), launched.said()
            runs.append(bits(folder, "imagenet_resnet"))
        assert runs[0] == runs[1]


@pytest.mark.long
def test_the_recipe_takes_the_same_steps_on_one_process_and_three(place, tmp_path):
    """At a low learning rate: rounding grows fast where BatchNorm sees so few pixels."""
    said = {}
    for world_size in (1, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        given = [RECIPE, "--shards", place, "--runs-dir", folder, "--run", "it", "--threads", 1, "--no-progress"]
        flags = [*RESNET, "--no-figures", "--log-every", 1, "--lr", 0.01]
        ended(Processes(world_size, [*given, *flags], folder=folder))
        lines = (folder / "imagenet_resnet/it/metrics.jsonl").read_text().splitlines()
        said[world_size] = [json.loads(line) for line in lines]
    assert len(said[1]) == 6 + 2
    for alone, three in zip(said[1], said[3], strict=True):
        for name in without_times(alone).keys() - {"data"}:
            assert three[name] == pytest.approx(alone[name], rel=1e-3), (name, alone["step"])


@pytest.mark.nightly
def test_the_recipe_through_the_launcher(place, tmp_path):
    flags = ["--runs-dir", tmp_path, "--run", "it", "--no-progress", "--threads", 1, *RESNET, "--shards", place]
    done = succeeded(accelerate(3, ROOT / "launch/train.py", RECIPE, *flags, "--max-steps", 3))
    assert "data     shards of pictures: 120 to train on, 24 test" in done.stdout
    assert "CPU x 3 processes" in done.stdout and "(shards of pictures, 3 steps," in done.stdout
    assert (tmp_path / "imagenet_resnet/it/figures/confusion_matrix.png").exists()


def test_without_images_the_run_says_that_it_learns_textures(tmp_path):
    arguments = [RECIPE, "--runs-dir", tmp_path, "--data-dir", tmp_path / "none", "--check", "--no-progress"]
    said = ended(Processes(1, arguments, folder=tmp_path)).said()
    assert f"note     no images in {tmp_path}/none/imagenet: this run uses 192 generated textures" in said
    assert "data     generated textures: 128 to train on, 64 test" in said


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--images", "a", "--shards", "b"], "--shards b: give it or --images, not both"),
        (["--shards", "b", "--data-source", "sample"], "--shards b: give it or --data-source sample, not both"),
        (
            ["--data-source", "kmnist"],
            "--data-source kmnist: this recipe learns images; name them with --images FOLDER",
        ),
        (["--window", 0], "--window 0: must be at least 1"),
        (["--side", 4], "--side 4: must be at least 8 pixels"),
        (["--cache-gigabytes", 0], "--cache-gigabytes 0.0: must be above 0"),
    ],
)
def test_what_can_not_be_meant_is_one_line(tmp_path, flags, said):
    launched = ended(Processes(1, [RECIPE, *flags, "--runs-dir", tmp_path], folder=tmp_path), 2)
    assert launched.said() == f"error: {said}\n"
