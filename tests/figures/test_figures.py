"""Figures say what they should, and are legible: panels, confusion matrix, errors, Chinese titles."""

import csv
import os

import pytest
import torch
from launching import python, succeeded

from nndist import figures
from nndist.data.sets import Data, Resident
from nndist.runs.tracking import History


def classified(images=True, classes=("a", "b", "c")):
    """Four examples of three classes; the logits are in the inputs: 0 and 3 are right, 1 is worse than 2."""
    logits = torch.tensor([[3.0, 0, 0], [5.0, 0, 0], [0, 1.0, 0], [0, 0, 9.0]])
    labels = torch.tensor([0, 1, 2, 2])
    inputs = torch.zeros(4, 1, 8, 8)
    inputs[:, 0, 0, :3] = logits
    if not images:
        inputs = logits
    data = Data(Resident(inputs, labels), Resident(inputs, labels), source="four <examples>", classes=classes)
    network = (lambda x: x[:, 0, 0, :3]) if images else (lambda x: x)
    return figures.classification(network, data, "net")


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_a_confusion_matrix_counts():
    drawn = classified()
    found = texts(drawn["confusion_matrix"])
    assert "net on four <examples>, 4 test examples\n2 of 4 right" in found
    assert found.count("1") == 4 and "true class" in found and "predicted class" in found
    assert {"100.0 %", "0.0 %", "50.0 %"} <= set(found)


@pytest.mark.parametrize("largest, pixels", [(98, 10), (1135, 9)])
def test_the_numbers_of_a_confusion_matrix_can_be_read_in_half_of_a_page(largest, pixels):
    from matplotlib.text import Text

    counts = torch.eye(10, dtype=torch.int64) * largest
    figure = figures.confusion_matrix(counts, [str(digit) for digit in range(10)], "net on MNIST")
    (size,) = {text.get_fontsize() for text in figure.findobj(Text) if text.get_text() == f"{largest:,}"}
    inches = figure.get_figwidth()  # shown 530 pixels wide
    assert size / 72 * 530 / inches >= pixels
    cell = 0.7 * inches / 10 * 72  # the axes' share of the width
    assert 0.62 * size * len(f"{largest:,}") < cell


def test_the_worst_errors_come_first():
    drawn = classified()
    shown = [text for text in texts(drawn["worst_errors"]) if "%" in text]
    assert shown == ["a 99%\nis b", "b 58%\nis c"]
    rows = list(csv.reader(figures.csv_text(drawn["prediction_list"]).splitlines()))
    assert rows[0] == ["test example", "label", "prediction", "confidence", "loss"]
    assert [row[0] for row in rows[1:]] == ["1", "2", "0", "3"]
    assert float(rows[1][4]) == pytest.approx(5.013386, abs=1e-5)


def test_an_uncertain_right_answer_is_no_error_however_large_its_loss():
    inputs, labels = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    inputs[:, 0, 0, :3] = torch.tensor([[0.1, 0, 0], [0.1, 0, -5.0]])  # losses of 1.03 and 0.75
    data = Data(Resident(inputs, labels), Resident(inputs, labels), classes=("a", "b", "c"))
    drawn = figures.classification(lambda x: x[:, 0, 0, :3], data, "net")
    assert [text for text in texts(drawn["worst_errors"]) if "%" in text] == ["a 52%\nis b"]
    assert [row[0] for row in drawn["prediction_list"].rows] == [1, 0]


def test_inputs_that_are_no_images_have_no_pictures():
    assert list(classified(images=False)) == ["confusion_matrix", "by_class", "prediction_list"]


def test_a_network_whose_answers_are_known_is_not_asked_again():
    labels = torch.tensor([0, 1, 1])
    data = Data(Resident(torch.zeros(3, 4), labels), Resident(torch.zeros(3, 4), labels))
    history = History(outputs={"logits": torch.tensor([[9.0, 0], [0, 9.0], [9.0, 0]])})
    drawn = figures.classification(lambda x: pytest.fail("asked"), data, "net", history)
    assert "net on generated, 3 test examples\n2 of 3 right" in texts(drawn["confusion_matrix"])
    history.outputs["logits"] = history.outputs["logits"][:2]  # of another set
    drawn = figures.classification(lambda x: torch.tensor([[9.0, 0]]).expand(len(x), 2), data, "net", history)
    assert "net on generated, 3 test examples\n1 of 3 right" in texts(drawn["confusion_matrix"])


def test_a_perfect_network_has_no_errors_to_show():
    labels = torch.arange(3)
    inputs = torch.eye(3).reshape(3, 1, 1, 3).expand(3, 1, 8, 3).contiguous() * 9
    data = Data(Resident(inputs, labels), Resident(inputs, labels))
    drawn = figures.classification(lambda x: x[:, 0, 0], data, "net")
    assert "worst_errors" not in drawn and drawn["prediction_list"].rows


def test_the_first_training_images_are_shown_with_their_classes():
    images, labels = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    named, unnamed = (
        Data(Resident(images, labels), Resident(images, labels), classes=c) for c in (("a", "b", "c"), ())
    )
    found = texts(figures.training_images(named, "net")["training_images"])
    assert found[:20] == list("abcabcabcabcabcabcab") and "net on generated: the first 20 training images" in found
    assert texts(figures.training_images(unnamed, "net")["training_images"])[:4] == ["0", "1", "2", "0"]
    flat = Resident(images.flatten(1), labels)
    assert figures.training_images(Data(flat, flat), "net")
    ignored = Resident(images[:3], torch.tensor([-100, 7, 1]))
    drawn = figures.training_images(Data(ignored, ignored, classes=("a", "b")), "net")["training_images"]
    assert texts(drawn)[:3] == ["-100", "7", "b"]
    masks = Resident(images[:2], torch.zeros(2, 8, 8))
    drawn = figures.training_images(Data(masks, masks), "net")["training_images"]
    assert texts(drawn)[:2] == ["example 0", "example 1"]


@pytest.mark.parametrize("inputs", [torch.rand(3, 4), torch.zeros(3, 64, dtype=torch.int64)])
def test_other_training_inputs_are_not_drawn(inputs):
    examples = Resident(inputs, torch.arange(3))
    assert figures.training_images(Data(examples, examples), "net") == {}


def test_only_so_many_test_examples_are_looked_at(monkeypatch):
    monkeypatch.setattr(figures.plots, "MAX_OUTPUTS", 3)
    drawn = classified()
    assert "net on four <examples>, first 3 test examples\n1 of 3 right" in texts(drawn["confusion_matrix"])
    assert drawn["by_class"].columns[:2] == ("class", "examples of the first 3")


def test_panels_hold_what_belongs_together():
    names = [
        "step",
        "epoch",
        "train/loss",
        "lr",
        "examples_per_second",
        "test/loss",
        "test/accuracy",
        "gradient_norm",
        "odd",
    ]
    assert figures.panels_of(names) == {
        "loss": ["train/loss", "test/loss"],
        "accuracy": ["test/accuracy"],
        "odd": ["odd"],
        "lr": ["lr"],
        "gradient_norm": ["gradient_norm"],
        "examples_per_second": ["examples_per_second"],
    }


def test_the_training_figure_has_every_kind():
    records = [{"step": s, "train/loss": 1 / s, "lr": 0.1, "examples_per_second": 100.0} for s in range(1, 6)]
    records += [{"step": 5, "test/loss": None, "test/accuracy": 0.5}]
    figure = figures.training(History(records), "net on nothing")
    labels = {axes.get_ylabel() for axes in figure.axes}
    assert labels == {"loss", "accuracy", "learning rate", "examples per second"}
    assert all(axes.get_xlabel() == "optimizer step" for axes in figure.axes)


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    drawn = {"one": figures.new_figure(), "text": "a\nb", "table": figures.Table(("x", "y"), [(1, 'a "b"')])}
    paths = figures.save(drawn, tmp_path / "figures")
    assert [path.name for path in paths] == ["one.png", "text.txt", "table.csv"]
    assert (tmp_path / "figures/table.csv").read_text() == 'x,y\n1,"a ""b"""\n'
    assert (tmp_path / "figures/text.txt").read_text() == "a\nb\n"
    assert not [*(tmp_path / "figures").glob(".*")]


TITLE = """
import sys
from nndist import figures
figure = figures.new_figure()
axes = figure.add_subplot()
axes.set_title("{title}")
figures.save({{"it": figure}}, __import__("pathlib").Path(sys.argv[1]))
"""


def titled(folder, title, fonts=None):
    """What saving a figure with such a title says, in a process that finds only these fonts besides matplotlib's."""
    home = folder / "home"
    (home / ".local/share").mkdir(parents=True, exist_ok=True)
    if fonts is not None:
        (home / ".local/share/fonts").symlink_to(fonts)
    env = {"HOME": str(home), "XDG_DATA_HOME": str(home / ".local/share"), "MPLCONFIGDIR": str(home)}
    done = succeeded(python("-W", "error", "-c", TITLE.format(title=title), folder / "out", env={**os.environ, **env}))
    return done.stdout, (folder / "out/it.png").read_bytes()


def font_with(characters, path):
    """A font file that has only these characters, each a filled square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    names = [".notdef", *(f"uni{ord(c):04X}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    builder.save(path)


def test_chinese_is_drawn_by_a_font_that_has_it(tmp_path):
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    font_with("\u9f98\u9f99", fonts / "squares.ttf")  # rare enough that no font of the machine comes first
    (tmp_path / "with").mkdir()
    said, _ = titled(tmp_path / "with", "loss of \u9f98\u9f99", fonts)
    assert said == ""


def test_where_no_font_has_a_character_it_is_said(tmp_path):
    said, _ = titled(tmp_path, "loss of \U000e0101")  # a private sign that no font draws
    assert said.startswith("figure it: no font on this machine has ") and "fonts-noto-cjk" in said
    assert titled(tmp_path, "loss of sin(\u03c0)")[0] == "", "matplotlib's own font has Greek"


@pytest.mark.parametrize("layout", ["constrained", "tight", None])
def test_a_figure_has_the_pixels_that_savefig_gives_it(tmp_path, layout):
    """With what is laid out as it is drawn: equal axes, a colour bar, a surface, titles over ticks, the best corner."""
    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image

    def drawn():
        figure = Figure(figsize=(7, 5), layout=layout)
        line = figure.add_subplot(221)
        line.plot([1, 2, 3], [4, 1, 9], label="a line")
        line.xaxis.tick_top()
        line.set(title="over its ticks", xlabel="x", aspect="equal")
        line.legend(loc="best")
        shown = figure.add_subplot(222)
        figure.colorbar(shown.imshow(np.eye(3)), ax=shown)
        figure.add_subplot(223, projection="3d").plot_surface(*np.meshgrid([0, 1], [0, 1]), np.eye(2))
        figure.suptitle("all of them")
        return figure

    expected = tmp_path / "savefig.png"
    drawn().savefig(expected, dpi=figures.plots.DPI)
    figure = drawn()
    canvas = figure.canvas
    (written,) = figures.save({"it": figure}, tmp_path)
    assert np.array_equal(np.asarray(Image.open(written)), np.asarray(Image.open(expected)))
    assert figure.canvas is canvas
