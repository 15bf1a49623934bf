"""metrics.jsonl: what was written is what is read, in little memory, and every change is noticed."""

import json
import time
import tracemalloc

import pytest

from nndist.errors import TrainingError, UserError
from nndist.runs.records import Records, Seals, lines_of, rebuild, sealed, verified
from nndist.runs.tracking import History, Tracker

RECORDS = [
    {"step": 1, "epoch": 0.5, "train/loss": 0.1 + 0.2, "lr": 0.1},
    {"step": 1, "epoch": 0.5, "test/loss": None, "data": "MNIST"},
    {"step": 2, "epoch": 1.0, "train/loss": 1e-300, "lr": 0.1},
    {"step": 2, "epoch": 1.0, "test/loss": 0.25, "data": "MNIST"},
    {"step": 3, "epoch": 1.5, "train/loss": None, "lr": 2},
    {"step": 2**70, "note": [1, {"a": True}]},
]


def written(path, records=RECORDS, chain=""):
    with path.open("ab") as file:
        for record in records:
            line, chain = sealed(chain, record)
            file.write(line)
    return chain


def problem_of(path) -> str:
    seals = Seals()
    for lines in lines_of(path):
        for line in lines:
            seals.check(line)
    return seals.problem()


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    chain = written(path)
    read = Records.of_file(path)
    assert read.rows() == Records(RECORDS).rows() == RECORDS and read.problem == "" and read.chain == chain
    assert verified(path, path.stat().st_size).chain == chain
    read.append({"step": 9, "epoch": 2.0})
    assert read.rows() == [*RECORDS, {"step": 9, "epoch": 2.0}]
    history = History(read)
    assert history.series("test/loss") == ([2], [0.25]) and history.series("lr") == ([1, 2, 3], [0.1, 0.1, 2])
    assert history.names() == ["step", "epoch", "train/loss", "lr", "test/loss"]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [r["step"] for r in RECORDS]


@pytest.mark.parametrize("third", [0.75, None, 3, "none"])
def test_a_metric_of_records_with_different_keys_is_in_the_order_of_the_records(third):
    history = History(
        [
            {"step": 1, "loss": 0.25},
            {"step": 2, "loss": 0.5, "lr": 0.1},
            {"step": 3, "loss": third},
            {"step": 4, "loss": 1.0, "lr": 0.1},
            {"step": 5, "lr": 0.1},
            {"step": 6, "loss": 1.5},
        ]
    )
    expected = [(1, 0.25), (2, 0.5), (3, third), (4, 1.0), (6, 1.5)]
    steps, values = history.series("loss")
    assert list(zip(steps, values, strict=True)) == [pair for pair in expected if pair[1] is not None]


def test_a_record_that_is_added_before_the_file_is_read_comes_last(tmp_path):
    written(tmp_path / "metrics.jsonl")
    read = Records.of_file(tmp_path / "metrics.jsonl")
    read.append({"step": 9})
    assert read.rows() == [*RECORDS, {"step": 9}]


@pytest.mark.parametrize("place", range(len(RECORDS)))
def test_every_changed_line_is_named(tmp_path, place):
    path = tmp_path / "metrics.jsonl"
    written(path)
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    for at in range(len(lines[place])):
        damaged = bytearray(lines[place])
        damaged[at] ^= 1
        if damaged[at] == ord("\n"):
            continue
        path.write_bytes(b"\n".join([*lines[:place], bytes(damaged), *lines[place + 1 :]]))
        found = problem_of(path)
        assert f"{place + 1:,}" in found or (place == 0 and "2" in found), (
            "the first may look like an earlier version's"
        )
    path.write_bytes(b"\n".join([*lines[:place], *lines[place + 1 :]]))
    assert bool(problem_of(path)) == (place < len(RECORDS) - 1), "of the last one only the checkpoint knows"
    if place == len(RECORDS) - 1:
        assert verified(path, path.stat().st_size).chain != written(tmp_path / "whole")


def test_lines_of_an_earlier_version_are_read_and_covered_by_those_that_follow(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert Records.of_file(path).rows() == RECORDS and problem_of(path) == ""
    written(path, [{"step": 4}], verified(path, path.stat().st_size).chain)
    assert problem_of(path) == "" and Records.of_file(path).rows() == [*RECORDS, {"step": 4}]
    path.write_text(path.read_text().replace("0.25", "0.26"))
    assert "line 7" in problem_of(path)


def test_what_is_whole_of_a_damaged_file_can_be_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path)
    damaged = path.read_bytes().replace(b"0.25", b"0.99")
    path.write_bytes(damaged)
    kept = rebuild(path, len(damaged))
    assert (kept.kept, kept.lost, kept.size) == (5, 1, path.stat().st_size)
    assert Records.of_file(path).rows() == [*RECORDS[:3], *RECORDS[4:]] and problem_of(path) == ""
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damaged


def test_a_seal_costs_microseconds():
    record = {"step": 1, "epoch": 0.1, "train/loss": 0.5, "lr": 0.1, "gradient_norm": 1.0, "examples_per_second": 9.0}
    began = time.thread_time()
    chain = ""
    for _ in range(10_000):
        chain = sealed(chain, record)[1]
    assert (time.thread_time() - began) / 10_000 < 50e-6


def test_columns_take_a_tenth_of_the_memory_of_dicts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, ({"step": n, "epoch": n / 9, "train/loss": 1 / n, "lr": 0.1 / n} for n in range(1, 30_001)))
    tracemalloc.start()
    records = Records.of_file(path).load()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 60 * 30_000 and peak < held + 40e6
    assert History(records).series("lr")[1][29_999] == 0.1 / 30_000


def tracker(folder, **options):
    return Tracker(folder, title="it", steps=9, progress=False, **options)


def test_a_file_that_is_removed_while_it_is_written_is_written_anew(tmp_path, capsys):
    tracked = tracker(tmp_path)
    for record in RECORDS[:4]:
        tracked.log(record)
    (tmp_path / "metrics.jsonl").unlink()
    tracked.log(RECORDS[4])
    (tmp_path / "metrics.jsonl").rename(tmp_path / "elsewhere")
    assert tracked.sync() == (tmp_path / "metrics.jsonl").stat().st_size
    tracked.log(RECORDS[5])
    tracked.close()
    assert capsys.readouterr().out.count("was removed during training; rewritten") == 2
    assert Records.of_file(tmp_path / "metrics.jsonl").rows() == RECORDS and not problem_of(tmp_path / "metrics.jsonl")


def test_a_file_that_is_cut_short_or_whose_folder_is_gone_stops_the_run(tmp_path):
    folder = tmp_path / "it"
    folder.mkdir()
    tracked = tracker(folder)
    tracked.log(RECORDS[0])
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(TrainingError, match=r"was truncated during training.*--resume rebuild"):
        tracked.log(RECORDS[0])
    tracked.close()
    tracked = tracker(folder)
    tracked.log(RECORDS[0])
    folder.rename(tmp_path / "other")
    with pytest.raises(TrainingError, match="the run's folder was removed or moved"):
        tracked.sync()
    tracked.close()


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: Is a directory; remove it"):
        tracker(tmp_path)
