"""What a person gives to trained networks and what they answer: every shipped recipe, images, numbers, texts."""

import io
import json
import wave

import numpy as np
import pytest
import torch
from conftest import RECIPES
from making import data_of, is_drawn, make
from PIL import Image, ImageOps

import nndist
from nndist.cli.run_commands import predict_command
from nndist.config import RunConfig
from nndist.datasets.mnist import load_sample
from nndist.datasets.weather import PATH as WEATHER
from nndist.prediction.answers import Answers, Predictions
from nndist.prediction.framing import Framing, framing_of
from nndist.prediction.inputs import Inputs, NothingToAnswer
from nndist.training.evaluation import evaluating

SMALL = {
    "char_bert": {"num_layers": 1, "width": 16, "length": 32},
    "char_gpt": {"num_layers": 1, "width": 16, "context": 32},
    "char_rnn": {"width": 16, "length": 32},
    "date_transformer": {"num_train": 10, "width": 16, "layers": 1},
    "digits_detector": {"num_train": 10, "num_test": 10},
    "digits_unet": {"num_train": 10, "num_test": 10},
    "mnist_gan": {"width": 4},
    "mnist_vit": {"width": 16, "depth": 1},
}
DIGITS = ("mnist_cnn", "mnist_cnn_pool", "mnist_mlp", "mnist_rnn", "mnist_simple_cnn", "mnist_vit")
GIVEN = {
    **dict.fromkeys(DIGITS, (["image"], ["answer", "probability", "or"])),
    "char_bert": (["It is a tr_th"], ["filled in", "probability"]),
    "char_gpt": (["It is"], ["continuation"]),
    "char_rnn": (["It is"], ["continuation"]),
    "date_transformer": (["3. März 2024"], ["ISO 8601", "probability"]),
    "digits_detector": (["image"], ["digits"]),
    "digits_embedding": (["image"], ["cosine with the first"]),
    "digits_unet": (["image"], [f"of {digit}" for digit in range(10)]),
    "gan_augment": (["image"], ["answer", "probability", "or"]),
    **dict.fromkeys(("imagenet_resnet", "image_folder"), (["image"], ["answer", "probability", "or"])),
    "mnist_autoencoder": (["image"], ["error per pixel"]),
    "mnist_gan": ([], ["probability real"]),
    "descent": (["0.5"], ["hills", "line"]),
    "sentiment_rnn": (["a fine film"], ["answer", "probability", "or"]),
    "spoken_digits": (["sound"], ["answer", "probability", "or"]),
    "stock_rnn": (["prices"], ["after", "price", "change percent", "usual size percent"]),
    "translation_rnn": (["tots els drets"], ["translation"]),
    "optimizers": (["0.5"], ["sgd", "momentum", "nag", "adagrad", "adadelta", "rmsprop", "adam"]),
    "quadratic_regression": (["0.5"], ["answer"]),
    "sine_regression": (["0.5"], ["answer"]),
    "superres_gan": (["image"], ["PSNR", "PSNR of bicubic"]),
    "style_transfer": (["image"], ["ink given", "ink in italics", "ink in plain"]),
    "sum_mlp": ([" ".join(map(str, range(1, 31)))], ["sum"]),
    "table_mlp": (["2015/06/01,0,25,,2"], ["answer", "probability", "or", "missing"]),
    "text_file": (["alle Menschen sind frei"], ["answer", "probability", "or"]),
    "text_classifier_mlp": (["alle Menschen sind frei"], ["answer", "probability", "or"]),
    "two_clusters": (["1, 1"], ["answer", "probability", "or"]),
    "weather_rnn": ([WEATHER], ["tomorrow", "degrees Celsius"]),
}


def asked(name, items, **options):
    """A recipe's networks, freshly initialised, and the inputs that they answer; with the predictions."""
    torch.manual_seed(0)
    recipe = make(name, **SMALL.get(name, {}))
    data = recipe.data(RunConfig(data_source="sample").data_config(download=False))
    networks = recipe.networks()
    inputs = Inputs(items, data=lambda: data, classes=data.classes, **options)
    found = Predictions("title")
    with evaluating(networks):
        found.add(recipe.predict(networks, inputs), inputs)
    return recipe, networks, data, found


@pytest.mark.parametrize("name", [path.stem for path in RECIPES])
def test_every_recipe_answers(name, tmp_path):
    items, columns = GIVEN[name]
    named = {
        "image": Image.fromarray(load_sample().test_images[0].numpy()),
        "sound": tmp_path / "sound.wav",
        "prices": tmp_path / "prices.csv",
    }
    with wave.open(str(named["sound"]), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(range(256)) * 50)
    named["prices"].write_text("".join(f"2013-03-{day:02d},{20 + day / 7:.2f}\n" for day in range(1, 22)))
    _, _, _, found = asked(name, [named.get(item, item) for item in items], num=3)
    assert list(found.columns) == columns
    count = {"mnist_gan": 3, "weather_rnn": 1448}.get(name, 1)
    assert len(found) == len(found.rows()) == count
    assert max(map(len, found.table(80))) <= 80
    json.dumps(found.rows())


def test_what_is_drawn_in_colours_is_drawn_beside_what_was_given():
    _, _, _, found = asked("digits_unet", [Image.fromarray(load_sample().test_images[0].numpy())])
    assert found.shown[0].shape == (48, 48) and found.made[0].shape == (48, 48, 3)
    (image,) = found.figure().axes[0].images
    pixels = torch.from_numpy(image.get_array().data)
    assert pixels.shape == (48, 96, 3) and not torch.equal(pixels[:, :48], pixels[:, 48:])


@pytest.mark.parametrize("name", DIGITS)
def test_a_digit_of_the_set_is_answered_as_an_evaluation_sees_it(name):
    images = load_sample().test_images[:5]
    _, networks, data, found = asked(name, [Image.fromarray(image.numpy()) for image in images])
    with evaluating(networks):
        expected = networks["model"](data.inputs(data.test, 0, 5)[0]).softmax(1)
    assert found.columns["probability"] == pytest.approx(expected.max(1).values.tolist(), rel=1e-5)
    assert found.columns["answer"] == [str(c) for c in expected.argmax(1).tolist()]
    assert list(found.rows()[0]["probabilities"].values()) == pytest.approx(expected[0].tolist(), rel=1e-5)
    assert not any(found.prepared)


def test_the_weather_is_forecast_as_an_evaluation_sees_it():
    recipe, networks, data, found = asked("weather_rnn", [WEATHER])
    with evaluating(networks):
        batch = data.inputs(data.test)
        expected = batch[2][:, 0] + networks["model"](batch[0]).squeeze(1)
    answers = dict(zip(found.columns["tomorrow"], found.columns["degrees Celsius"], strict=True))
    days = [f"2015-01-{day:02}" for day in range(recipe.days + 1, 29)]
    assert [answers[day] for day in days] == pytest.approx(expected[: len(days)].tolist(), abs=1e-3)


def test_numbers_mean_what_they_mean_in_the_set():
    _, networks, data, found = asked("sum_mlp", [data_of("sum_mlp").test.tensors[0][:4].tolist()][0])
    with evaluating(networks):
        expected = 100 * networks["model"](data.inputs(data.test, 0, 4)[0]).squeeze(1)
    assert found.columns["sum"] == pytest.approx(expected.tolist(), rel=1e-5)


def test_texts_are_answered_one_by_one():
    _, _, _, found = asked("date_transformer", ["3. März 2024", "im Mai 1999"])
    _, _, _, alone = asked("date_transformer", ["im Mai 1999"])
    assert found.columns["ISO 8601"][1] == alone.columns["ISO 8601"][0]
    _, _, _, filled = asked("char_bert", ["It _s a tr_th"])
    (text,) = filled.columns["filled in"]
    assert len(text) == 13 and [c for c, g in zip(text, "It _s a tr_th", strict=True) if g != "_"] == list(
        "It s a trth"
    )
    _, _, _, one = asked("char_rnn", ["It is"], num=30, seed=1)
    _, _, _, other = asked("char_rnn", ["It is"], num=30, seed=2)
    assert len(one.columns["continuation"][0]) == 30 and one.columns != other.columns


def test_a_byte_order_mark_is_not_part_of_a_text(tmp_path):
    (tmp_path / "lines.txt").write_bytes("\ufeffim Mai 1999\n".encode())
    assert Inputs([tmp_path / "lines.txt"], data=lambda: None).texts() == ["im Mai 1999"]


# Images.


def test_how_the_images_of_a_set_lie():
    images = load_sample().test_images
    framing = framing_of(images)
    assert (framing.height, framing.width, framing.background, framing.box) == (28, 28, 0, 20)
    assert framing.centre == pytest.approx((14, 14), abs=0.6)
    assert framing_of(255 - images).background == 255
    assert framing_of(torch.randint(256, (50, 32, 32, 3), dtype=torch.uint8)) == Framing(32, 32, "hwc")
    assert framing_of(torch.rand(50, 30)) is None and framing_of(torch.zeros(9, 28, 28, dtype=torch.int64)) is None


@pytest.mark.parametrize("page", ["photograph", "transparent", "sixteen bits", "black"])
def test_a_digit_on_a_page_is_laid_as_the_set_has_it(page):
    """Enlarged, moved, on a larger page: what the network sees must be the digit of the set again, but for blur."""
    images = load_sample().test_images[:1000:40]
    framing = framing_of(load_sample().test_images)
    likeness = []
    for image in images:
        digit = Image.fromarray(image.numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        if page == "photograph":  # uneven light on paper, grey ink
            x = np.linspace(170, 235, 640)
            sheet = np.broadcast_to(x, (480, 640)).copy()
            sheet[100:324, 30:254] -= 0.6 * np.asarray(digit, dtype=float)
            given = Image.fromarray(sheet.clip(0, 255).astype("uint8")).convert("RGB")
        elif page == "transparent":
            given = Image.new("RGBA", (300, 500))
            given.paste(Image.new("RGBA", (224, 224), "black"), (60, 200), digit)
        elif page == "sixteen bits":
            sheet = np.zeros((300, 300), dtype=np.uint16)
            sheet[20:244, 70:294] = 200 * np.asarray(digit, dtype=np.uint16)
            given = Image.fromarray(sheet)
        else:
            given = Image.new("L", (500, 300))
            given.paste(digit, (200, 10))
        (inputs := Inputs([given], data=lambda: None)).images(framing.see)
        seen = inputs.shown[0].float()
        shifted = [torch.roll(seen, (down, right), (0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        alike = [float(torch.corrcoef(torch.stack([s.flatten(), image.float().flatten()]))[0, 1]) for s in shifted]
        likeness.append(alike[4])
        assert max(alike) > 0.85, "but for a pixel's shift, which rounding may bring"
        assert ("inverted" in inputs.prepared[0]) == (page in ("photograph", "transparent"))
        assert "scaled" in inputs.prepared[0]
    assert sum(likeness) / len(likeness) > 0.88


def test_paper_is_no_ink():
    """Noise and shadows of a photograph's paper, between the strokes too, must not reach the network."""
    digits = load_sample()
    ring = digits.test_images[int((digits.test_labels == 0).nonzero()[0])]  # it has paper inside
    digit = np.asarray(Image.fromarray(ring.numpy()).resize((224, 224), Image.Resampling.BICUBIC), dtype=float)
    sheet = np.random.default_rng(0).normal(np.linspace(175, 215, 640), 3, (480, 640))
    sheet[100:324, 30:254] -= 0.6 * digit
    seen, _ = framing_of(digits.test_images).see(Image.fromarray(sheet.clip(0, 255).astype("uint8")))
    assert int(seen[13:16, 13:16].max()) < 8 and int(seen.max()) > 200


def test_an_image_of_the_right_size_is_only_inverted():
    images = load_sample().test_images
    framing = framing_of(images)
    same, done = framing.see(Image.fromarray(images[0].numpy()))
    assert torch.equal(same, images[0]) and done == ""
    inverted, done = framing.see(ImageOps.invert(Image.fromarray(images[0].numpy())))
    assert torch.equal(inverted, images[0]) and done == "inverted"
    empty, _ = framing.see(Image.new("L", (300, 200), 200))
    assert empty.shape == (28, 28)


def test_photographs_keep_their_shape():
    framing = Framing(32, 32, "hwc")
    picture = Image.new("RGB", (64, 16), (10, 200, 30))
    seen, done = framing.see(picture)
    assert seen.shape == (32, 32, 3) and seen[16, 16].tolist() == [10, 200, 30] and done == "64x16 scaled"


def test_a_user_recipe_with_images_needs_no_more_than_its_data():
    data = nndist.Data(
        train=nndist.Resident(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
        test=nndist.Resident(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
    )
    inputs = Inputs([Image.new("RGB", (80, 80), "red")], data=lambda: data)
    images, _ = inputs.batch()
    assert images.shape == (1, 3, 8, 8) and images[0, :, 4, 4].tolist() == [255, 0, 0]


# Numbers.


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1,2\n3,4\n", [[1, 2], [3, 4]]),
        ("width,height\n1,2\n\n3,4", [[1, 2], [3, 4]]),
        ("1;2\n", [[1, 2]]),
        ("1 2\n-3e1\t4\n", "line 2"),
        ("1,2\n1,2,3\n", "line 2: 3 columns; expected 2 numbers"),
        ("1,2\nx,2\n", "line 2: 'x' is not a number"),
        ("1,nan\n", "line 1: 'nan' is not a number"),
        ("a,b\nc,d\n", "line 2: 'c' is not a number"),
        ("", "no inputs"),
    ],
)
def test_rows(tmp_path, monkeypatch, text, expected):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    for item in (file, "-"):
        inputs = Inputs([item], data=lambda: None)
        if isinstance(expected, str) and expected != "line 2":
            with pytest.raises(nndist.UserError, match=expected):
                inputs.rows(2)
        elif expected != "line 2":
            assert inputs.rows(2).tolist() == expected and len(inputs.names) == len(expected)


def test_weather_with_a_gap_or_too_little_of_it_is_refused(tmp_path):
    lines = WEATHER.read_text().splitlines()
    for kept, why in ((lines[:20], None), (lines[:10], "9 days of weather"), (lines[:8] + lines[9:30], "9:.*consec")):
        (file := tmp_path / "weather.csv").write_text("\n".join(kept))
        if why is None:
            assert len(asked("weather_rnn", [file])[3]) == 6
        else:
            with pytest.raises(nndist.UserError, match=why):
                asked("weather_rnn", [file])


# The command.


@pytest.fixture(scope="module")
def digits(trained):
    return trained("mnist_mlp", max_steps=8, figures=False, report=False, run="digits")


def predicted(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        predict_command([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return int(stopped.value.code or 0), printed.out, printed.err.splitlines()


@pytest.fixture
def folder(tmp_path):
    """Three digits, and a file that is none."""
    for number in range(3):
        Image.fromarray(load_sample().test_images[number].numpy()).save(tmp_path / f"digit{number}.png")
    return tmp_path


def test_a_table_and_a_picture(digits, folder, capsys):
    code, said, errors = predicted(capsys, digits.folder, folder, "--picture", folder / "answers.png")
    assert code == 0 and errors == []
    assert "last weights" in said or "best weights" in said
    assert [line.split()[0].rpartition("/")[2] for line in said.splitlines()[3:6]] == [
        f"digit{n}.png" for n in range(3)
    ]
    assert is_drawn(folder / "answers.png")


def test_json_has_every_probability_and_nothing_else_is_printed(digits, folder, capsys):
    code, said, _ = predicted(capsys, digits.folder, folder / "digit1.png", "--json", "--picture", folder / "p.png")
    (row,) = json.loads(said)["predictions"]
    assert code == 0 and sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert row["answer"] == max(row["probabilities"], key=row["probabilities"].get)


def test_what_cannot_be_read_is_said_and_the_others_answered(digits, folder, capsys):
    (folder / "broken.png").write_bytes((folder / "digit0.png").read_bytes()[:60])
    code, said, errors = predicted(capsys, digits.folder, folder, folder / "nowhere.png")
    assert code == 2 and sum(f"digit{n}.png" in said for n in range(3)) == 3
    assert len(errors) == 2 and "broken.png" in errors[0] and "nowhere.png: No such file" in errors[1]
    code, said, errors = predicted(capsys, digits.folder, folder / "nowhere.png")
    assert code == 2 and len(errors) == 1


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "no inputs; give images"),
        (["EMPTY"], "holds no images"),
        (["digit.png", "--picture", "out.jpg"], "--picture out.jpg: the file's name must end in .png"),
        (["digit.png", "--num", "0"], "--num 0: must be at least 1"),
        (["digit.png", "--weights", "newest"], "--weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(digits, tmp_path, capsys, arguments, expected):
    code, _, errors = predicted(capsys, digits.folder, *[tmp_path if word == "EMPTY" else word for word in arguments])
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0]


def test_nothing_to_answer_is_no_crash():
    inputs = Inputs(["Ω"], data=lambda: None)
    with pytest.raises(NothingToAnswer):
        inputs.texts(lambda text: text.encode("ascii") if text.isascii() else (_ for _ in ()).throw(ValueError("no")))
    assert inputs.failures == ["no"]


def test_records_name_the_answers(tmp_path):
    (file := tmp_path / "houses.csv").write_text("city,area\nBerlin,20\nKyiv,30\n")
    for answer in (
        lambda inputs: inputs.measured({"price": torch.ones(2)}),
        lambda inputs: inputs.classified(torch.ones(2, 3)),
        lambda inputs: Answers({"city": ["a", "b"]}),
    ):
        inputs, found = Inputs([file], data=lambda: None), Predictions("")
        assert [cells for _, cells in inputs.records(["area", "city"])] == [["20", "Berlin"], ["30", "Kyiv"]]
        found.add(answer(inputs), inputs)
        assert found.names == [f"{file}, line 2", f"{file}, line 3"] and len(found.rows()) == 2
    inputs, found = Inputs([file], data=lambda: None), Predictions("")
    inputs.names += [cells[0] for _, cells in inputs.records(["city"])]  # its own names
    found.add(inputs.measured({"price": torch.ones(2)}), inputs)
    assert found.names == ["Berlin", "Kyiv"]
    inputs = Inputs([[1, 2], [3, 4]], data=lambda: None)
    assert [place for place, _ in inputs.records(["a", "b"])] == ["row 1", "row 2"]


def test_answers_that_do_not_match_the_inputs_are_one_line():
    inputs = Inputs([[1.0], [2.0]], data=lambda: None)
    inputs.rows(1)
    with pytest.raises(nndist.UserError, match="3 answers 'price' for 2 inputs"):
        Predictions("").add(Answers({"price": [1, 2, 3]}), inputs)


@pytest.mark.parametrize(
    "output, expected",
    [
        ({"logits": torch.ones(2, 3)}, "returns a dict and not a tensor: define predict"),
        ((torch.ones(2), torch.ones(2)), "returns a tuple and not a tensor: define predict"),
        (torch.ones(2, dtype=torch.complex64), "returns complex numbers: define predict"),
        (torch.ones(()), r"returns tensors of shape \[\]: define predict"),
    ],
)
def test_outputs_that_are_no_numbers_of_each_input_are_one_line(output, expected):
    inputs = Inputs([[1.0], [2.0]], data=lambda: None)
    inputs.rows(1)
    with pytest.raises(nndist.UserError, match=expected):
        inputs.measured({"model": output})


def test_no_answers_are_printed():
    nothing = Predictions("the run", columns={"answer": []}, failures=["a.png: is no image"])
    assert str(nothing) == "the run\ninput  answer\na.png: is no image"
