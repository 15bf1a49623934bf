"""The recipes that make images of images, or find things in them: enlarging, segmentation, detection, embedding."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from making import data_of, figure, is_drawn, make, module_of
from torch import nn

import nndist
from nndist.figures import generated_images as quality


@pytest.mark.parametrize(
    "name, fields, flag",
    [
        ("superres_gan", {"width": 0}, "--width 0"),
        ("superres_gan", {"num_train": 0}, "--num-train 0"),
        ("superres_gan", {"adversarial": -0.5}, "--adversarial -0.5: must be at least 0"),
    ],
)
def test_fields_that_cannot_be_meant_are_refused(name, fields, flag):
    with pytest.raises(nndist.UserError, match=flag):
        make(name, **fields)


def reached(loss, networks, batch):
    """The names of the networks that a loss has gradients for, none of them held still."""
    for network in networks.values():
        network.zero_grad()
    losses = loss(networks, batch)
    assert losses.shape == (len(batch[0]),)
    losses.mean().backward()
    grads = {name: [p.grad for p in network.parameters()] for name, network in networks.items()}
    return {name for name, of in grads.items() if any(grad is not None and grad.any() for grad in of)}


# Enlarging.


def test_superres_a_small_digit_is_the_mean_of_4x4_pixels_in_bytes():
    data = data_of("superres_gan", num_train=50)
    images, _, small = data.inputs(data.train)
    assert len(data.train) == 50 and images.shape == (50, 1, 28, 28) and small.shape == (50, 1, 7, 7)
    blocks = images.reshape(50, 7, 4, 7, 4).mean((2, 4))
    assert (small[:, 0] - blocks).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal((255 * small).round() / 255, small)


def test_superres_psnr_is_ten_times_the_logarithm_of_the_mean_squared_error():
    recipe, images = make("superres_gan"), torch.rand(3, 1, 28, 28)
    made = (images + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)).clamp(0, 1)
    expected = -10 * (made - images).square().flatten(1).mean(1).log10()
    found = module_of("superres_gan").psnr(made, images)
    torch.testing.assert_close(found[:2], expected[:2])
    assert found[2] == pytest.approx(100)
    data = data_of("superres_gan")
    scores = recipe.score({"generator": module_of("superres_gan").bicubic}, data.inputs(data.test, 0, 20))
    assert torch.equal(scores["psnr/network"], scores["psnr/bicubic"]) and 10 < scores["psnr/bicubic"].mean() < 20


def test_superres_an_untrained_network_is_bicubic_interpolation():
    small = torch.rand(2, 1, 7, 7)
    made = make("superres_gan").networks()["generator"](small)
    torch.testing.assert_close(made, F.interpolate(small, (28, 28), mode="bicubic").clamp(0, 1))


def test_superres_the_discriminator_teaches_the_generator_and_is_not_taught_by_its_loss():
    recipe, data = make("superres_gan"), data_of("superres_gan")
    batch, networks = data.inputs(data.train, 0, 4), recipe.networks()
    assert reached(recipe.discriminator_loss, networks, batch) == {"discriminator"}
    assert "generator" in reached(recipe.generator_loss, networks, batch)
    alone = make("superres_gan", adversarial=0.0)
    images, _, small = batch
    expected = (networks["generator"](small) - images).square().flatten(1).mean(1)
    torch.testing.assert_close(alone.generator_loss(networks, batch), expected)
    nn.init.zeros_(networks["discriminator"].layers[-2].weight)
    nn.init.zeros_(networks["discriminator"].layers[-2].bias)
    guessing = torch.full((4,), 2.0).log()
    torch.testing.assert_close(recipe.discriminator_loss(networks, batch), 2 * guessing)
    torch.testing.assert_close(recipe.generator_loss(networks, batch), expected + recipe.adversarial * guessing)


def test_superres_a_run_leaves_its_pictures(trained, monkeypatch):
    monkeypatch.setattr(quality, "trained_reader", partial(quality.trained_reader, steps=5))
    result = trained("superres_gan", max_steps=3, batch_size=16, width=4)
    assert is_drawn(figure(result, "enlarged.png"))
    said = figure(result, "reading.txt").read_text()
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["bicubic", "network", "real"]
    assert "real" in said and "distance to the real ones 0.0" in said.splitlines()[-1]
