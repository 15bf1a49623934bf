"""A person's own images: listed, split, checked, augmented exactly, learned, and predicted as they were evaluated."""

import io
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from making import path_of
from PIL import Image
from safetensors.torch import load_file

import nndist
from nndist.data.config import DataConfig
from nndist.datasets import image_folder as folders
from nndist.errors import UserError
from nndist.recipe import load_recipe

NAMES = ("blue", "green", "red")
QUIET = {"progress": False, "threads": 1, "num_workers": 0, "wandb": "off", "report": False}


def picture(colour: int, number: int, size=(40, 30)) -> Image.Image:
    pixels = torch.randint(90, (size[1], size[0], 3), generator=torch.Generator().manual_seed(1000 * colour + number))
    pixels[..., 2 - colour] += 150
    return Image.fromarray(pixels.byte().numpy())


def fill(folder: Path, counts=(5, 10, 20), suffix="png") -> Path:
    for colour, (name, count) in enumerate(zip(NAMES, counts, strict=True)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(colour, number).save(folder / name / f"{number}.{suffix}")
    return folder


def config(tmp_path, **settings):
    return DataConfig(directory=tmp_path / "cache", progress=False, num_workers=0, **settings)


def load(tmp_path, folder, *, labels=None, test_share=0.2, broken="refuse", side=None):
    return folders.load(config(tmp_path), folder, labels, test_share, broken, side)


def refused(tmp_path, folder, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def coloured(tmp_path):
    return fill(tmp_path / "coloured")


def test_a_share_of_each_class_is_the_test_set(tmp_path, coloured):
    found = load(tmp_path, coloured)
    assert Counter(found.sets["train"].labels) == {0: 4, 1: 8, 2: 16} and len(found.sets["test"]) == 7
    names = [name for images in found.sets.values() for name, _ in images.files]
    assert len(set(names)) == len(names) == 35
    assert found.classes == list(NAMES) and found.plan["classes"] == "blue 4, green 8, red 16"
    assert found.sets["test"].files == load(tmp_path, coloured).sets["test"].files
    assert (found.side, found.whole) == (32, True)  # 30 pixels, rounded up


@pytest.mark.parametrize("others, sets", [(["test"], 2), (["val"], 2), (["val", "test"], 3)])
def test_folders_that_are_split_stay_so(tmp_path, others, sets):
    for place, counts in zip(["train", *others], [(4, 4, 4), (1, 1, 1), (2, 2, 2)], strict=False):
        fill(tmp_path / "split" / place, counts)
    found = load(tmp_path, tmp_path / "split").sets
    assert len(found) == sets and len(found["train"]) == 12
    assert all(name.startswith("test/" if "test" in others else "val/") for name, _ in found["test"].files)
    fill(tmp_path / "split/test/pink", (1, 1, 1))
    assert "class 'pink' is not a class of the training images" in refused(tmp_path, tmp_path / "split")


def test_a_csv_names_files_classes_and_split(tmp_path, coloured):
    labels = tmp_path / "labels.csv"
    labels.write_text("id,label,split\nred/0.png,warm,train\nblue/1.png,cold,train\nblue/2.png,cold,test\n")
    found = load(tmp_path, coloured, labels=labels)
    assert found.classes == ["cold", "warm"] and found.sets["test"].files == [("blue/2.png", 0)]
    assert found.plan["split"] == "as labels.csv says"
    labels.write_text("red/0.png,warm\nred/1.png,warm\nblue/1.png,cold\nblue/2.png,cold\n")  # without a header
    assert Counter(load(tmp_path, coloured, labels=labels).sets["train"].labels) == {0: 1, 1: 1}
    for text, reason in {
        "file,label\n../secret.png,x\n": "line 2: '../secret.png' is not a file in",
        "file,label,split\nred/0.png,warm,dev\n": "split 'dev' is none of train, val, test",
        "file,label\nred/0.png\n": "line 2 has 1 columns",
        "file\n": "needs columns file and label",
        "\n\n": "needs columns file and label",
        "file,label\n\nred/0.png,x\n\nred/1.png\n": "line 5 has 1 columns",
    }.items():
        labels.write_text(text)
        assert reason in refused(tmp_path, coloured, labels=labels)


def test_broken_images_are_named_and_refused_or_left_out(tmp_path, coloured, monkeypatch):
    whole = (coloured / "red/3.png").read_bytes()
    (coloured / "red/3.png").write_bytes(whole[: len(whole) // 2])
    (coloured / "green/0.png").write_text("no image")
    line = refused(tmp_path, coloured)
    assert "2 of its images can't be used" in line and "red/3.png" in line and "--broken skip" in line
    found = load(tmp_path, coloured, broken="skip")
    assert sum(map(len, found.sets.values())) == 33 and "green/0.png" in found.plan["skipped"]
    with monkeypatch.context() as patch:  # it is known from then on
        patch.setattr(folders.Images, "__getitem__", None)
        assert len(folders.broken_images(folders.Images(coloured, _all(coloured)), config(tmp_path))) == 2
    (coloured / "red/3.png").write_bytes(whole)
    assert "1 of its images can't be used" in refused(tmp_path, coloured)


def _all(folder):
    return [(f"{name}/{path.name}", 0) for name in NAMES for path in sorted((folder / name).iterdir())]


def test_what_can_not_be_learned_is_one_line(tmp_path, coloured):
    assert "is not a folder" in refused(tmp_path, tmp_path / "nowhere")
    assert "--side 4: must be at least 8" in refused(tmp_path, coloured, side=4)
    (tmp_path / "one/red").mkdir(parents=True)
    for number in range(3):
        picture(2, number).save(tmp_path / f"one/red/{number}.png")
    assert "has one class only, 'red'" in refused(tmp_path, tmp_path / "one")
    with pytest.raises(UserError, match=r"--network resnet19: torchvision has no classifier .*did you mean resnet1"):
        folders.classifier("resnet19", 3, 32)
    with pytest.raises(UserError, match="--network vit_b_16: can't be built for --side 40"):
        folders.classifier("vit_b_16", 3, 40)


def test_an_image_is_turned_as_its_camera_says_and_laid_on_white(tmp_path):
    see = folders.See(32, whole=True, augment="none", flip=False)
    image = Image.new("RGB", (64, 64), "black")
    image.paste("white", (0, 0, 64, 32))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    file = io.BytesIO()
    image.save(file, "jpeg", exif=exif)
    pixels, label = see(("photo.jpg", file.getvalue(), 1), None)
    assert pixels.shape == (32, 32, 3) and label == 1 and pixels[:12].max() < 30 and pixels[20:].min() > 220
    file = io.BytesIO()
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(file, "png")
    assert see(("clear.png", file.getvalue(), 0), None)[0].min() == 255


FIELDS = {
    "batch_size": 12,
    "epochs": 2,
    "mixup": 0.2,
    "cutmix": 1.0,
    "network": "squeezenet1_1",
    "side": 48,
    "lr": 1e-3,
}


def test_a_run_is_augmented_previewed_gone_on_with_and_used(tmp_path, coloured, capsys):
    train = load_recipe(path_of("image_folder"))
    data = {"images": coloured, "data_dir": tmp_path / "cache", "runs_dir": tmp_path, **QUIET}

    def run(name, steps, **fields):
        return nndist.train(
            train(images=coloured, **FIELDS, **fields),
            **{k: v for k, v in data.items() if k != "images"},
            run=name,
            max_steps=steps,
        )

    whole = run("whole", 6, ema_decay=0.9)
    said = capsys.readouterr().out
    assert said.index("augmentation.png") < said.index("\nepoch "), "it is shown before the first step"
    for steps in (1, 4, 6):
        run("parts", steps, ema_decay=0.9)
    for file in ("model", "ema", "optimizer"):
        ours, theirs = (
            load_file(tmp_path / f"image_folder/{name}/checkpoints/step-00000006/{file}.safetensors")
            for name in ("whole", "parts")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    drawn = {path.name for path in (whole.folder / "figures").iterdir()}
    assert {"augmentation.png", "by_class.csv", "confusion_matrix.png", "worst_errors.png", "saliency.png"} <= drawn
    loaded = nndist.load_run(whole.folder)
    images = loaded.data_at_hand().test.dataset
    answered = loaded.predict([str(images.folder / name) for name, _ in images.files])
    right = [answer == NAMES[label] for answer, label in zip(answered.columns["answer"], images.labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(whole.scores["test/accuracy"])


def test_rare_classes_weigh_as_torch_weighs_them(tmp_path, coloured):
    recipe = load_recipe(path_of("image_folder"))(images=coloured, class_weights=True, mixup=0.2)
    data = recipe.data(config(tmp_path))
    logits = torch.randn(28, 3, generator=torch.Generator().manual_seed(0))
    images, labels, others, share = next(data.train.in_epoch(0, 0).batches([torch.arange(28)]))
    weight = torch.tensor([28 / 12, 28 / 24, 28 / 48])
    torch.testing.assert_close(torch.tensor(recipe.class_weight), weight)
    given = recipe.loss({"model": lambda _: logits}, (images, labels, labels, torch.ones(28)))
    expected = F.cross_entropy(logits, labels, weight)
    torch.testing.assert_close((given.values * given.weights).sum() / given.weights.sum(), expected)
    given = recipe.loss({"model": lambda _: logits}, (images, labels, others, share))
    soft = share.unsqueeze(1) * F.one_hot(labels, 3) + (1 - share).unsqueeze(1) * F.one_hot(others, 3)
    weighted = soft * weight
    expected = -(weighted * logits.log_softmax(1)).sum() / weighted.sum()
    torch.testing.assert_close((given.values * given.weights).sum() / given.weights.sum(), expected)


def test_labels_are_smoothed_as_torch_smooths_them_and_scores_are_not(tmp_path, coloured):
    recipe = load_recipe(path_of("image_folder"))(images=coloured, label_smoothing=0.2)
    recipe.data(config(tmp_path))
    logits, labels = torch.randn(28, 3, generator=torch.Generator().manual_seed(0)), torch.arange(28) % 3
    batch = (torch.zeros(28, 3, 8, 8), labels, labels, torch.ones(28))
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(recipe.loss({"model": lambda _: logits}, batch), expected)
    scored = recipe.score({"model": lambda _: logits}, batch)["loss"]
    torch.testing.assert_close(scored, F.cross_entropy(logits, labels, reduction="none"))


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "vit_b_16", "efficientnet_b0", "mobilenet_v3_small"])
def test_any_of_torchvisions_networks_is_built_for_the_classes(name):
    network = folders.classifier(name, 3, 64).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_without_images_it_learns_textures_and_says_so(tmp_path):
    with pytest.raises(UserError, match=r"--labels x\.csv: name the folder of its images"):
        folders.load(config(tmp_path), None, Path("x.csv"), 0.2, "refuse", None)
    with pytest.raises(UserError, match=r"--data-source mnist: it learns your images"):
        folders.load(config(tmp_path, source="mnist"), None, None, 0.2, "refuse", None)
    found = folders.load(config(tmp_path, source="sample"), None, None, 0.2, "refuse", None)
    assert "--images FOLDER" in found.note and len(found.sets["train"]) == 128
