"""The recipes in which generative adversarial networks redraw digits, or make more of them."""

import pytest
import torch
from making import data_of, figure, is_drawn, make
from torch import nn
from torch.nn import functional as F

import nndist
from nndist.config import RunConfig
from nndist.data.sets import ExampleRandom
from nndist.data.transforms import shifted
from nndist.datasets.mnist import load_sample
from nndist.datasets.styles import italic, judged, load_styles


@pytest.mark.parametrize(
    "name, fields, flag",
    [
        ("style_transfer", {"width": 0}, "--width 0: must be at least 1"),
        ("style_transfer", {"num_train": 0}, "--num-train 0: must be at least 1"),
        ("style_transfer", {"cycle": -0.5}, "--cycle -0.5: must be at least 0"),
        ("gan_augment", {"labelled": 0}, "--labelled 0: must be at least 1"),
        ("gan_augment", {"width": 0}, "--width 0: must be at least 1"),
    ],
)
def test_fields_that_cannot_be_meant_are_refused(name, fields, flag):
    with pytest.raises(nndist.UserError, match=flag):
        make(name, **fields)


def taught(loss, networks, batch):
    """The names of the networks that a loss has gradients for, none of them held still."""
    for network in networks.values():
        network.zero_grad()
    losses = loss(networks, batch)
    assert losses.shape == (len(batch[0]),)
    losses.mean().backward()
    return {name for name, network in networks.items() if any(p.grad is not None for p in network.parameters())}


# Style transfer.


def test_styles_no_digit_is_in_both_and_the_truth_is_the_digit_itself():
    data, sample = data_of("style_transfer", num_train=50), load_sample()
    plain, labels, slanted, others, as_italic, as_plain = data.inputs(data.train)
    images = sample.train_images[:100].unsqueeze(1) / 255
    assert len(data.train) == 50 and len(data.test) == 500 and len(data_of("style_transfer").train) == 2000
    assert torch.equal(plain, images[:50]) and torch.equal(as_plain, images[50:])
    assert torch.equal(slanted, italic(images[50:])) and torch.equal(as_italic, italic(images[:50]))
    assert torch.equal(torch.cat([labels, others]), sample.train_labels[:100])


def test_styles_italics_lean_to_the_right_and_are_two_pixels_thicker():
    upright = torch.zeros(1, 1, 28, 28)
    upright[..., 4:24, 13:15] = 1
    (rows,) = italic(upright)[0] > 0.5
    middle = (rows * torch.arange(28)).sum(1) / rows.sum(1)
    assert not rows[:3].any() and not rows[25:].any() and rows[3:25].any(1).all()  # a pixel more above and below
    assert middle[5] - middle[20] == pytest.approx(0.3 * 15, abs=1.1)
    assert set(rows[5:23].sum(1).tolist()) <= {4, 5}


class ReadsBrightness(nn.Module):
    """A judge that reads a picture of one brightness, b, as class 20 b."""

    def read(self, images):
        return images, F.one_hot((20 * images[:, 0, 0, 0]).round().long(), 20).float()


def test_styles_scores_are_shares_of_digits_of_styles_and_of_both():
    def pictures(*classes):
        return (torch.tensor(classes) / 20).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    truth = pictures(13, 17, 4, 0)  # two to be in italics, two to be plain
    made = {"all": truth, "none": pictures(4, 0, 13, 17), "some": pictures(13, 7, 4, 5), "truth": truth}
    scores = judged(ReadsBrightness(), made, torch.tensor([13, 17, 4, 0]))
    # the first of each direction, then the second
    assert scores["accuracy/all"].tolist() == [1, 1] and scores["accuracy/none"].tolist() == [0, 0]
    assert scores["digit/some"].tolist() == [1, 0.5] and scores["style/some"].tolist() == [1, 0.5]
    assert scores["accuracy/some"].tolist() == [1, 0]
    assert scores["error/some"].tolist() == pytest.approx([0, (10 + 5) / 20 / 2]) and not scores["error/truth"].any()


def test_styles_the_judge_knows_both_and_a_recipe_that_does_nothing_scores_as_it_should():
    recipe, config = make("style_transfer"), RunConfig(data_source="sample").data_config(download=False)
    data = recipe.data(config)
    scores = recipe.score({"to_italic": nn.Identity(), "to_plain": nn.Identity()}, data.inputs(data.test))
    for score in ("digit", "style", "accuracy", "error"):
        assert torch.equal(scores[f"{score}/network"], scores[f"{score}/as_is"])
    assert scores["accuracy/truth"].mean() > 0.85 and scores["digit/as_is"].mean() > 0.85
    assert scores["accuracy/as_is"].mean() < 0.05 < 0.1 < scores["error/as_is"].mean()
    _, again = load_styles(config, 10)
    assert again is recipe.judge  # seconds that a process spends once


@pytest.mark.parametrize("style, other", [("plain", "italic"), ("italic", "plain")])
def test_styles_each_network_learns_from_its_own_loss(style, other):
    recipe, data = make("style_transfer", width=4, cycle=2.0), data_of("style_transfer")
    batch, networks = data.inputs(data.train, 0, 4), recipe.networks()
    objectives = recipe.objectives()
    assert list(objectives) == list(networks)
    assert taught(objectives[f"{style}_discriminator"], networks, batch) == {f"{style}_discriminator"}
    reached = taught(objectives[f"to_{style}"], networks, batch)
    assert f"to_{style}" in reached and f"{other}_discriminator" not in reached
    # fooling by guesses of 1/2, and both ways around by networks that only darken
    networks[f"{style}_discriminator"] = lambda images: torch.full((len(images), 49), 0.5)
    networks[f"to_{style}"], networks[f"to_{other}"] = (lambda x: x + 0.25), (lambda x: x + 0.5)
    assert objectives[f"to_{style}"](networks, batch).tolist() == pytest.approx([0.25 + 2 * (0.75 + 0.75)] * 4)
    seen = {}
    networks[f"{style}_discriminator"] = lambda images: seen.setdefault(len(seen), images)[:, 0, :1, :1].flatten(1)
    objectives[f"{style}_discriminator"](networks, batch)
    digits = {"plain": batch[0], "italic": batch[2]}
    assert torch.equal(seen[0], digits[style]) and torch.equal(seen[1], digits[other] + 0.25)


def test_styles_a_run_leaves_its_picture_and_redraws_what_it_is_given(trained):
    result = trained("style_transfer", max_steps=2, width=4, num_train=200)
    assert is_drawn(figure(result, "styles.png"))


@pytest.mark.nightly
def test_styles_are_learned(trained):
    result = trained("style_transfer", max_steps=100, figures=False)
    assert result.scores["test/accuracy/network"] > 0.3 > 0.05 > result.scores["test/accuracy/as_is"]


# Augmentation.


def training_batch(data, numbers, epoch=0):
    raw = next(iter(data.train.batches([numbers])))
    return data.augment(data.prepare(raw), ExampleRandom(0, epoch, numbers))


def test_augment_every_class_has_as_many_digits_and_each_choice_is_another():
    data, sample = data_of("gan_augment", labelled=7), load_sample()
    images, labels = data.train.tensors
    assert torch.equal(torch.bincount(labels), torch.full((10,), 7)) and len(data.test) == 1000
    known = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(sample.train_images, sample.train_labels, strict=True)
    }
    chosen = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    assert len(chosen) == 70 and chosen.items() <= known.items()
    assert torch.equal(data_of("gan_augment", labelled=7).train.tensors[0], images)
    others = data_of("gan_augment", labelled=7, data_seed=1).train.tensors[0]
    assert len({image.numpy().tobytes() for image in others} - chosen.keys()) > 35


def test_augment_a_shifted_image_is_moved_by_whole_pixels_and_paper_follows():
    images = torch.rand(3, 1, 28, 28, requires_grad=True)
    moved = shifted(images, torch.tensor([[0.0, 0.0], [2.0, -1.0], [-28.0, 0.0]]), paper=-1.0)
    torch.testing.assert_close(moved[0], images[0])
    torch.testing.assert_close(moved[1, 0, :-1, 2:], images[1, 0, 1:, :-2])
    assert (moved[1, 0, -1] == -1).all() and (moved[1, 0, :, :2] == -1).all() and (moved[2] == -1).all()
    (gradient,) = torch.autograd.grad(moved[1].sum(), images)
    assert gradient[1].sum() == 27 * 26 and not gradient[0].any()


def test_augment_noise_and_shifts_are_a_function_of_seed_epoch_and_example():
    data, numbers = data_of("gan_augment"), torch.arange(200)
    images, labels, noise, *shifts = training_batch(data, numbers)
    alone = training_batch(data, numbers[150:151])
    for whole, part in zip((images, labels, noise, *shifts), alone, strict=True):
        assert torch.equal(whole[150:151], part)
    assert torch.equal(noise[:, 32:].argmax(1), labels) and (noise[:, 32:].sum(1) == 1).all()
    assert all(set(shift.unique().tolist()) == {-2, -1, 0, 1, 2} for shift in shifts)
    assert not torch.equal(*shifts) and not torch.equal(training_batch(data, numbers, epoch=1)[2], noise)


def test_augment_each_network_learns_from_its_own_loss_and_the_classifiers_start_alike():
    recipe, data = make("gan_augment", width=4), data_of("gan_augment")
    batch, networks = training_batch(data, torch.arange(0, 200, 50)), recipe.networks()
    objectives = recipe.objectives()
    assert list(objectives) == list(networks)
    for name, objective in objectives.items():
        expected = {"generator", "discriminator"} if name == "generator" else {name}
        assert taught(objective, networks, batch) == expected
    logits = [networks[name](batch[0]) for name in ("plain", "generated", "shifted", "both")]
    assert all(torch.equal(logits[0], other) for other in logits[1:])


def test_augment_the_losses_are_those_of_labelled_generated_and_shifted_digits():
    recipe, data = make("gan_augment"), data_of("gan_augment")
    images, labels, _, shift, its_shift = batch = training_batch(data, torch.arange(0, 200, 50))
    made = torch.rand(4, 1, 28, 28)

    def classifier(x):  # any that shifting changes
        return x[:, 0, 8:18, 14] * 3

    networks = dict.fromkeys(recipe.networks(), classifier) | {"generator": lambda _: made}

    def loss(x, by=None):
        x = x if by is None else shifted(x, by, paper=-1.0)
        return F.cross_entropy(classifier(x), labels, reduction="none")

    def told(x, by):
        return classifier(shifted(x, by, paper=-1.0))[torch.arange(4), labels]

    objectives = recipe.objectives()
    expected = {
        "plain": loss(images),
        "generated": (loss(images) + loss(made)) / 2,
        "shifted": loss(images, shift),
        "both": (loss(images, shift) + loss(made, its_shift)) / 2,
        "discriminator": F.softplus(-told(images, shift)) + F.softplus(told(made, its_shift)),
        "generator": F.softplus(-told(made, its_shift)),
    }
    for name, values in expected.items():
        torch.testing.assert_close(objectives[name](networks, batch), values)


def test_augment_a_run_leaves_its_picture_and_the_classifiers_accuracies(trained):
    result = trained("gan_augment", max_steps=2, width=4)
    assert is_drawn(figure(result, "generated.png"))
    named = {f"test/accuracy/{name}" for name in ("plain", "generated", "shifted", "both")}
    assert named <= result.scores.keys() and all(0 <= result.scores[name] <= 1 for name in named)


@pytest.mark.nightly
def test_augment_shifts_help(trained, mnist_dir):
    mnist = {"data_source": "mnist", "data_dir": mnist_dir}
    scores = trained("gan_augment", epochs=100, evaluate_every="100 epochs", figures=False, **mnist).scores
    assert scores["test/accuracy/shifted"] > scores["test/accuracy/plain"] > 0.78
