"""The recipes that make images of images, or find things in them: enlarging, segmentation, detection, embedding."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from launching import Processes
from making import data_of, figure, is_drawn, make, module_of, path_of, train_readers_in
from torch import nn

import nndist
from nndist.config import RunConfig
from nndist.figures import generated_images as quality
from nndist.figures.detections import coco_scores, judged
from nndist.figures.objects import painted
from nndist.metrics import equal_error_rate, overlaps, verification_curve


@pytest.mark.parametrize(
    "name, fields, flag",
    [
        ("superres_gan", {"width": 0}, "--width 0"),
        ("superres_gan", {"num_train": 0}, "--num-train 0"),
        ("superres_gan", {"adversarial": -0.5}, "--adversarial -0.5: must be at least 0"),
        ("digits_detector", {"num_train": 0}, "--num-train 0"),
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


# Detection.

FEW = {"num_train": 40, "num_test": 30}


def test_detector_the_map_to_learn_is_read_as_the_boxes_that_it_was_made_of():
    module, data = module_of("digits_detector"), data_of("digits_detector", **FEW)
    images, boxes, labels, numbers = data.inputs(data.test)
    assert images.shape == (30, 1, 48, 48) and images.max() <= 1 and numbers.tolist() == list(range(30))
    heat, cells, centres = module.targets(boxes, labels, 12)
    assert heat.shape == (30, 10, 12, 12) and heat.min() >= 0 and heat.max() == 1
    assert ((heat == 1).sum((1, 2, 3)) == (labels >= 0).sum(1)).all()
    logits = torch.cat([torch.logit(heat.clamp(1e-6, 1 - 1e-6)), torch.zeros(30, 4, 12, 12)], 1)
    reach = (boxes - centres.repeat(1, 1, 2)) / module.STRIDE
    for number, place in (labels >= 0).nonzero().tolist():
        logits[number, 10:].view(4, -1)[:, cells[number, place]] = reach[number, place]
    said, kinds, sure = module.found(logits)
    scores = coco_scores(
        judged(said, kinds, sure, boxes, labels).flatten(0, 1), torch.bincount(labels[labels >= 0], minlength=10)
    )
    assert scores == {"ap": 1.0, "ap50": 1.0}


def test_detector_the_loss_is_least_where_the_map_is_right():
    recipe, data = make("digits_detector", **FEW), data_of("digits_detector", **FEW)
    images, boxes, labels, numbers = data.inputs(data.test)
    heat, cells, centres = module_of("digits_detector").targets(boxes, labels, 12)
    right = torch.cat([torch.where(heat == 1, 9.0, -9.0), torch.zeros(30, 4, 12, 12)], 1)
    for number, place in (labels >= 0).nonzero().tolist():
        reach = (boxes - centres.repeat(1, 1, 2))[number, place] / 4
        right[number, 10:].view(4, -1)[:, cells[number, place]] = reach

    def loss(logits):
        return recipe.loss({"model": lambda _: logits}, (images, boxes, labels, numbers))

    assert loss(right).shape == (30,) and loss(right).max() < 1e-3
    wider = torch.cat([right[:, :10], right[:, 10:] + 0.25], 1)  # each side by a pixel, of 4
    torch.testing.assert_close(loss(wider) - loss(right), torch.full((30,), 0.4), atol=1e-3, rtol=0)
    assert (loss(torch.cat([-right[:, :10], right[:, 10:]], 1)) > 5).all()


def test_detector_a_run_leaves_boxes_and_the_baseline(trained):
    result = trained("digits_detector", max_steps=2, batch_size=8, width=4, **FEW)
    assert is_drawn(figure(result, "boxes.png"))
    assert {"test/loss", "test/ap", "test/ap50"} <= result.scores.keys()
    assert 0.1 < float(figure(result, "baseline.txt").read_text().split()[3].rstrip(",")) < 0.9


# Segmentation.


def test_unet_overlaps_are_intersections_and_unions():
    said, true = torch.randint(5, (2, 4, 9, 9)), torch.randint(4, (2, 4, 9, 9))
    common, either = overlaps(said, true, 5)
    for kind in range(5):
        assert common[kind] == ((said == kind) & (true == kind)).sum()
        assert either[kind] == ((said == kind) | (true == kind)).sum()
    recipe = make("digits_unet")
    counts = torch.tensor([[5.0, 1.0, 0.0], [10.0, 4.0, 0.0]])  # the last class does not occur
    assert recipe.set_scores({}, {"network": counts}) == {"miou/network": pytest.approx((0.5 + 0.25) / 2)}


def test_unet_thresholds_know_the_commonest_class_of_each_brightness():
    recipe = make("digits_unet", **FEW)
    data = recipe.data(RunConfig(data_source="sample").data_config(download=False))
    images, masks = data.train.tensors
    for level in (0, 100, 255):
        classes = masks[images == level]
        assert (classes == recipe.by_brightness[level]).sum() == torch.bincount(classes.flatten()).max()
    x, _ = data.inputs(data.train)
    said = recipe.answers({"model": lambda given: torch.zeros(len(given), 11, 48, 48)}, x)["thresholds"]
    assert torch.equal(said, torch.tensor(recipe.by_brightness)[images.long()])


def test_unet_a_pixel_of_paper_counts_a_fifth():
    recipe, logits = make("digits_unet"), torch.randn(2, 11, 48, 48)
    for kind, weight in ((0, 0.2), (4, 1.0)):
        masks = torch.full((2, 48, 48), kind, dtype=torch.uint8)
        expected = weight * F.cross_entropy(logits, masks.long(), reduction="none").mean((1, 2))
        torch.testing.assert_close(recipe.loss({"model": lambda _: logits}, (logits, masks)), expected)


def test_unet_pixels_are_painted_by_class():
    made = painted(torch.full((1, 2, 2), 0.9), torch.tensor([[[0, 1], [2, 10]]]))
    torch.testing.assert_close(made[0, 0, 0], torch.full((3,), 0.3))
    assert len(made.reshape(4, 3).unique(dim=0)) == 4 and made.shape == (1, 2, 2, 3)


def test_unet_a_run_leaves_its_overlay_and_the_classes_iou(trained):
    result = trained("digits_unet", max_steps=2, batch_size=8, width=4, **FEW)
    assert is_drawn(figure(result, "overlay.png"))
    header, *rows = figure(result, "iou_by_class.csv").read_text().splitlines()
    assert header == 'class,"network, %","thresholds, %"' and len(rows) == 11
    mean = sum(float(row.split(",")[1]) for row in rows) / 11
    assert mean == pytest.approx(100 * result.scores["test/miou/network"], abs=0.1)


# Embedding.


def test_embedding_the_equal_error_is_where_both_kinds_of_error_are_as_frequent():
    same = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    similarity = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    false, true = verification_curve(similarity, same)
    assert false.tolist() == pytest.approx([0, 0, 0, 1 / 3, 1 / 3, 2 / 3, 1])
    assert true.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1])
    assert equal_error_rate(similarity, same) == pytest.approx(1 / 3)
    assert equal_error_rate(same, same) == 0 and equal_error_rate(-same, same) == 1
    assert equal_error_rate(torch.zeros(6), same) == pytest.approx(0.5)  # all are accepted together


def test_embedding_pairs_are_of_classes_that_were_not_trained_on():
    data = data_of("digits_embedding")
    assert set(data.train.tensors[1].tolist()) == set(range(7)) and len(data.test) == 300
    images, labels, others, same, numbers = data.test.tensors
    assert set(labels.tolist()) == {7, 8, 9} and torch.equal(numbers, torch.arange(300))
    assert 0.4 < same.mean() < 0.6
    place = {image.numpy().tobytes(): number for number, image in enumerate(images)}
    found = torch.tensor([place[image.numpy().tobytes()] for image in others])
    assert torch.equal(labels[found] == labels, same.bool()) and not (found == numbers).any()
    x, _, y, *_ = data.inputs(data.test)
    assert x.shape == y.shape == (300, 1, 28, 28) and x.min() == -1 and x.max() <= 1


def test_embedding_the_margin_is_taken_off_the_right_class_only():
    recipe = make("digits_embedding", scale=10.0, margin=0.5)
    networks = recipe.networks()
    images, labels = torch.randn(4, 1, 28, 28), torch.tensor([0, 3, 6, 3])
    cosines = F.cosine_similarity(networks["model"](images)[:, None], networks["model"].classes[None], dim=2)
    cosines[torch.arange(4), labels] -= 0.5
    expected = F.cross_entropy(10 * cosines, labels, reduction="none")
    torch.testing.assert_close(recipe.loss(networks, (images, labels)), expected)


def test_embedding_a_run_leaves_its_curve_and_the_neighbours(trained):
    result = trained("digits_embedding", max_steps=3)
    assert is_drawn(figure(result, "verification.png")) and is_drawn(figure(result, "neighbours.png"))
    assert {"test/equal_error/network", "test/equal_error/pixels", "test/cosine/same"} <= result.scores.keys()


# On several processes.


def _in_few_steps(rank):
    train_readers_in(20)


@pytest.mark.long
@pytest.mark.parametrize("name", ["superres_gan", "style_transfer", "digits_detector", "digits_unet"])
def test_three_processes_score_what_one_does(name, tmp_path):
    common = ["--num-train", 200, "--data-source", "sample", "--threads", 1, "--no-figures", "--no-progress"]
    common += ["--max-steps", 4]
    found = []
    for world_size in (1, 3):
        run = ["--runs-dir", tmp_path, "--run", f"on{world_size}", "--timeout-seconds", 60]
        processes = Processes(world_size, [path_of(name), *common, *run], folder=tmp_path, patch=_in_few_steps)
        assert processes.wait() == [0] * world_size, processes.said()
        last = json.loads((tmp_path / name / f"on{world_size}/metrics.jsonl").read_text().splitlines()[-1])
        found.append({key: value for key, value in last.items() if key.startswith("test/")})
    assert found[1] == pytest.approx(found[0], rel=2e-3) and len(found[0]) >= 2
