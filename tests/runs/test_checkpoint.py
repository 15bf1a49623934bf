"""The format on disk: whole or not at all, and every byte checked."""

import hashlib
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from nndist import files
from nndist.runs import checkpoint, checkpoint_writer, network_state
from nndist.runs.checkpoint import Checkpoint, DamagedCheckpoint


def example(step=10) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {"conv.weight": torch.randn(4, 3, 3, 3, generator=generator), "conv.bias": torch.zeros(4)}
    return Checkpoint(step, {"model.safetensors": weights}, {"epoch": 0.1 + 0.2, "scores": {"test/loss": 1e-17}})


@pytest.fixture
def published(tmp_path):
    return checkpoint_writer.publish(tmp_path, example())


def test_what_is_read_is_what_was_written(published):
    found = checkpoint.read(published)
    expected = example()
    assert found.step == 10 and found.state == expected.state
    for name, tensor in expected.tensors["model.safetensors"].items():
        assert torch.equal(found.tensors["model.safetensors"][name], tensor)


def test_any_tool_can_open_the_weights(published):
    network = nn.Sequential()
    network.add_module("conv", nn.Conv2d(3, 4, 3))
    found = network.load_state_dict(load_file(published / "model.safetensors"))
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(network.conv.weight, example().tensors["model.safetensors"]["conv.weight"])


def test_the_manifest_names_every_file_with_its_hash(published):
    manifest = json.loads((published / "manifest.json").read_text())
    (entry,) = manifest["files"].values()
    data = (published / "model.safetensors").read_bytes()
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_same_state_gives_the_same_bytes_under_any_umask(tmp_path):
    first = checkpoint_writer.publish(tmp_path / "a", example())
    kept = os.umask(0o077)
    try:
        second = checkpoint_writer.publish(tmp_path / "b", example())
    finally:
        os.umask(kept)
    for name in ("model.safetensors", "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (second / "model.safetensors").stat().st_mode & 0o777 == 0o600


def sign_anew(published, change):
    path = published / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps({**manifest, "sha256": checkpoint.own_hash(manifest)}))


def test_a_file_that_the_manifest_no_longer_names_is_noticed(tmp_path):
    """Without its moving average a checkpoint would be taken for one that never had any."""
    whole = example()
    published = checkpoint_writer.publish(
        tmp_path, Checkpoint(10, {**whole.tensors, "ema.safetensors": {}}, whole.state)
    )
    sign_anew(published, lambda manifest: manifest["files"].pop("ema.safetensors"))
    with pytest.raises(DamagedCheckpoint, match=r"does not name ema\.safetensors, which is there"):
        checkpoint.read(published)


def test_a_seal_whose_name_was_changed_is_noticed(tmp_path):
    """Else the file would be taken for one of an earlier version or of another program, which has none."""
    path, tensors = tmp_path / "file.safetensors", {"answers": torch.arange(4.0)}
    checkpoint_writer.publish_file(path, tensors, sealed=True)
    path.write_bytes(path.read_bytes().replace(b"sha256", b"rha256"))
    with pytest.raises(ValueError, match="not what was written"):
        checkpoint.read_tensors(path)
    for metadata in (None, {"format": "pt"}):
        save_file(tensors, path, metadata)
        assert torch.equal(checkpoint.read_tensors(path)["answers"], tensors["answers"])


def test_a_file_that_memory_cannot_hold_is_not_read(published):
    """It may be a sparse one, which takes no room on a disk."""
    os.truncate(published / "model.safetensors", 2**42)
    sign_anew(published, lambda manifest: manifest["files"]["model.safetensors"].update(bytes=2**42))
    with pytest.raises(DamagedCheckpoint, match="more than this machine's memory"):
        checkpoint.read(published)


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_one_flipped_bit_anywhere_is_noticed(published, file):
    path = published / file
    data = path.read_bytes()
    draw = random.Random(0)
    places = {0, 1, 7, 8, 9, len(data) - 1} | {draw.randrange(len(data)) for _ in range(200)}
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedCheckpoint, match=file):
            checkpoint.read(published)
    path.write_bytes(data)
    checkpoint.read(published)


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_truncated_file_is_noticed_at_every_length(published, file):
    path = published / file
    data = path.read_bytes()
    for length in [*range(min(64, len(data))), *range(64, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(DamagedCheckpoint, match=file):
            checkpoint.read(published)


def test_a_missing_file_is_noticed(published):
    (published / "model.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors: No such file"):
        checkpoint.read(published)


def test_files_swapped_between_checkpoints_are_noticed(tmp_path):
    first, second = checkpoint_writer.publish(tmp_path, example(10)), checkpoint_writer.publish(tmp_path, example(20))
    shutil.copy(second / "model.safetensors", first / "model.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"step-00000010/model.safetensors.*SHA-256"):
        checkpoint.read(first)
    shutil.copytree(second, tmp_path / "step-00000030")
    with pytest.raises(DamagedCheckpoint, match="belongs to step 20"):
        checkpoint.read(tmp_path / "step-00000030")


def rewrite(folder, change):
    """Changes a manifest and makes its own hash right again: an attacker's work, not an accident."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = checkpoint.own_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def describe(path):
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.fixture
def in_parts(tmp_path):
    """A checkpoint whose weights lie in two files, with an index that maps tensors to files."""
    tensors = example().tensors["model.safetensors"]
    names = [checkpoint_writer.part_name("model.safetensors", number, 2) for number in (1, 2)]
    temporary = checkpoint_writer.begin(tmp_path, 10)
    written = {
        name: checkpoint_writer.write_file(temporary / name, save({key: tensors[key]}))
        for name, key in zip(names, tensors, strict=True)
    }
    index = checkpoint_writer.index_file(tensors, dict(zip(tensors, names, strict=True)))
    written[INDEX] = checkpoint_writer.write_file(temporary / INDEX, index)
    return checkpoint_writer.finish(temporary, 10, written, example().state)


INDEX = "model.safetensors.index.json"


def test_weights_in_several_files_are_read_as_one(in_parts):
    assert checkpoint.read(in_parts).tensors["model.safetensors"].keys() == {"conv.weight", "conv.bias"}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"conv.weight": 3}}',
        '{"weight_map": {"conv.weight": "../x.safetensors"}}',
        '{"weight_map": {}}',
        "[" + "[]," * 3_000_000 + "[]]",
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_an_index_that_is_none_is_refused(in_parts, text, signed):
    (in_parts / INDEX).write_text(text)
    if signed:
        rewrite(in_parts, lambda m: m["files"].update({INDEX: describe(in_parts / INDEX)}))
    with pytest.raises(DamagedCheckpoint, match=r"index\.json"):
        checkpoint.read(in_parts)


@pytest.mark.parametrize("kind", ["a pipe", "a link", "a folder", "nothing"])
@pytest.mark.parametrize("name", [INDEX, "manifest.json", "model-00002-of-00002.safetensors"])
def test_what_is_no_file_is_refused_at_once(in_parts, name, kind):
    path = in_parts / name
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    with pytest.raises(DamagedCheckpoint, match=name.replace(".", r"\.")):
        checkpoint.read(in_parts)


def test_a_name_that_leaves_the_folder_is_refused(published, tmp_path):
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.zeros(1)}, outside)
    rewrite(published, lambda m: m["files"].update({"../outside.safetensors": describe(outside)}))
    with pytest.raises(DamagedCheckpoint, match="not a file of this folder"):
        checkpoint.read(published)


def test_a_symbolic_link_is_refused(published, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(published / "model.safetensors", outside)
    (published / "model.safetensors").symlink_to(outside)
    with pytest.raises(DamagedCheckpoint, match="not a file of this folder"):
        checkpoint.read(published)


def test_a_pickle_named_safetensors_is_not_opened(published):
    import pickle

    (published / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    rewrite(published, lambda m: m["files"].update({"model.safetensors": describe(published / "model.safetensors")}))
    with pytest.raises(DamagedCheckpoint, match="not a safetensors file"):
        checkpoint.read(published)


@pytest.mark.parametrize("text", ['{"format": 1, "format": 1}', '{"format": NaN}', "[]", "null", "{}", ""])
def test_a_manifest_that_is_none_is_refused(published, text):
    (published / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        checkpoint.read(published)


def test_newest_is_by_number(tmp_path):
    for step in (99_999_999, 100_000_000, 9, 10):
        checkpoint_writer.publish(tmp_path, example(step))
    os.utime(tmp_path / checkpoint.folder_name(9))  # the clock says nothing
    (tmp_path / "step-abc").mkdir()
    (tmp_path / ".step-00000099.1.part").mkdir()
    assert [step for step, _ in checkpoint.checkpoints_in(tmp_path)] == [9, 10, 99_999_999, 100_000_000]


@pytest.mark.parametrize("point", ["write", "sync_folder", "replace"])
def test_a_save_that_fails_leaves_the_previous_one_and_nothing_else(tmp_path, monkeypatch, point):
    before = checkpoint_writer.publish(tmp_path, example(10))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((type(tmp_path), "replace") if point == "replace" else (files, point)), full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint_writer.publish(tmp_path, example(20))
    assert [path for _, path in checkpoint.checkpoints_in(tmp_path)] == [before]
    assert list(tmp_path.iterdir()) == [before]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("bias"), "lacks bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds extra, which this recipe does not have"),
        (lambda t: t.update(weight=torch.zeros(4, 3)), r"weight has shape \[4, 3\] where \[3, 4\] is expected"),
        (lambda t: t.update(bias=torch.zeros(3, dtype=torch.int32)), "bias has dtype torch.int32"),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(change, message):
    network = nn.Linear(4, 3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    change(tensors)
    with pytest.raises(DamagedCheckpoint, match=message):
        network_state.load({"model": network}, {"model.safetensors": tensors})
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_unusual_tensors_come_back(tmp_path):
    shared = torch.randn(3, 3)
    tensors = {
        "tied.first": shared,
        "tied.second": shared,
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).t(),
        "bf16": torch.randn(3).bfloat16(),
        "bool": torch.tensor([True, False]),
        "int": torch.tensor(2**60),
    }
    path = checkpoint_writer.publish(tmp_path, Checkpoint(1, {"model.safetensors": tensors}))
    found = checkpoint.read(path).tensors["model.safetensors"]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
