"""A person's own texts: byte pairs, lines with classes, documents; exact means over tokens, on 1 and 3 processes."""

import sys

import pytest
from launching import Processes
from making import path_of
from workers import texts

import nndist
from nndist.datasets import text_files
from nndist.datasets.text_files import Codec
from nndist.errors import UserError
from nndist.recipe import load_recipe

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Grüße, 你好 🙂"] * 4
pairs = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")


@pytest.mark.parametrize("vocabulary", [256, 300])
def test_any_text_comes_back_from_its_tokens(vocabulary):
    codec = Codec.fit(TEXTS, vocabulary)
    again = Codec(codec.learned)
    for text in (*TEXTS, "never seen: ŧ\n\t«x»", "", "<|end|> is no end"):
        tokens = codec.encode(text)
        assert text_files.END not in tokens and all(0 < token < len(codec) for token in tokens)
        assert again.encode(text) == tokens and (codec.decode(tokens) == text or "<|end|>" in text)
    assert len(codec) <= vocabulary + 1
    if vocabulary > 256:
        assert len(codec.encode("the cat sat")) < 8 < len(Codec().encode("the cat sat"))


def test_without_the_package_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers; or read bytes by --vocabulary 256"):
        Codec.fit(TEXTS, 300)
    assert Codec.fit(TEXTS, 256).decode([1 + 65]) == "A"
    with pytest.raises(UserError, match="--vocabulary 100: must be at least 256"):
        Codec.fit(TEXTS, 100)


def test_parts_of_documents_hold_every_token_once_to_be_foretold():
    codec = Codec()
    parts = text_files._parts(codec, ["abcdefg", "hi"], 3)
    foretold = [token for part in parts for token in part[1:]]
    assert foretold == [*codec.encode("abcdefg"), 0, *codec.encode("hi"), 0]
    assert all(part[0] == ([0, *foretold])[sum(len(p) - 1 for p in parts[:n])] for n, part in enumerate(parts))


def test_lines_of_a_csv_are_learned_and_answered(tmp_path):
    path = tmp_path / "mail.tsv"
    lines = [
        f"{'free money now' if n % 2 else 'see you at lunch'} {n}\t{'spam' if n % 2 else 'ham'}" for n in range(60)
    ]
    path.write_text("\n".join(["body\tlabel", *lines, "nothing\t"]) + "\n")
    kind = load_recipe(path_of("text_file"))
    fields = {"csv": path, "text": "body", "target": "label", "vocabulary": 300, "width": 16, "lr": 1e-2, "epochs": 6}
    result = nndist.train(kind(**fields, warmup_steps=0), run="it", runs_dir=tmp_path, **texts.QUIET)
    assert result.scores["test/accuracy"] == 1.0
    path.unlink()
    answers = nndist.load_run(result.folder).predict("free money now 7", "see you at lunch 99")
    assert answers.columns["answer"] == ["spam", "ham"]


def test_what_can_not_be_read_is_one_line(tmp_path):
    (tmp_path / "a.tsv").write_text("body\tlabel\n" + "x\ty\n" * 3)
    for arguments, reason in {
        (tmp_path / "a.tsv", "text", "label"): "--text text: name a column of .*: body, label",
        (tmp_path / "a.tsv", "body", None): "--target: name a column",
        (tmp_path / "a.tsv", "body", "label"): "has 3 lines with a target",
    }.items():
        with pytest.raises(UserError, match=reason):
            text_files.load_lines(*arguments, 256, 8, 0.1)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no texts"):
        text_files.load_folder(tmp_path / "none", 256, 8, 0.1)
    (tmp_path / "none/a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"a\.txt can't be read \(it is not UTF-8\)"):
        text_files.load_folder(tmp_path / "none", 256, 8, 0.1)


def test_a_folders_loss_is_the_mean_over_all_tokens_on_any_number_of_processes(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(
            "".join(f"line {n} of text {number}.\n" for n in range(1 + number % 5))
        )
    found = {}
    for world_size in (1, 3):
        launched = Processes(world_size, [tmp_path, folder], folder=tmp_path, call=texts.main)
        assert not any(launched.wait()), launched.said()
        found[world_size] = texts.results(tmp_path, world_size)
    alone, three = found[1], found[3]
    assert alone["test"] == pytest.approx(alone["test by hand"], rel=1e-5), "each token counts once"
    assert alone["losses"] == pytest.approx(three["losses"], rel=1e-3) and len(alone["losses"]) == 6
    answers = nndist.load_run(tmp_path / "text_file/on1").predict("line 1", num=5)
    assert len(answers.columns["continuation"]) == 1
