"""Canvases of digits: what is on them, each a function of its number, and the baseline that needs no network."""

from dataclasses import astuple

import pytest
import torch

from nndist.datasets import canvases
from nndist.datasets.canvas_baselines import components, found_components, mean_digits
from nndist.datasets.mnist import load_sample


@pytest.fixture(scope="module")
def digits():
    return load_sample()


@pytest.fixture(scope="module")
def drawn(digits):
    return canvases.draw(digits.test_images, digits.test_labels, 60, 0, "test")


def test_a_canvas_is_a_function_of_seed_split_and_its_number_alone(digits, drawn, monkeypatch):
    monkeypatch.setattr(canvases, "AT_ONCE", 7)
    torch.manual_seed(5)
    first = canvases.draw(digits.test_images, digits.test_labels, 20, 0, "test")
    assert all(torch.equal(a, b[:20]) for a, b in zip(astuple(first), astuple(drawn), strict=True))
    for seed, split in ((1, "test"), (0, "train")):
        other = canvases.draw(digits.test_images, digits.test_labels, 20, seed, split)
        assert not any(torch.equal(a, b) for a, b in zip(other.images, first.images, strict=True))


def test_digits_lie_in_their_boxes_and_none_over_another(drawn):
    assert (drawn.labels[:, 0] >= 0).all() and (drawn.labels < 0).any()
    sides = set()
    for mask, boxes, labels in zip(drawn.masks, drawn.boxes, drawn.labels, strict=True):
        assert set(mask.unique().tolist()) - {0} <= {label + 1 for label in labels.tolist()}
        covered = torch.zeros(canvases.SIDE, canvases.SIDE, dtype=torch.int64)
        for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            assert 0 <= left <= right <= canvases.SIDE and 0 <= top <= bottom <= canvases.SIDE
            if label < 0:
                assert (left, top, right, bottom) == (0, 0, 0, 0)
                continue
            covered[int(top) : int(bottom) + 1, int(left) : int(right) + 1] += 1
            inside = mask[int(top) : int(bottom) + 1, int(left) : int(right) + 1] == label + 1
            rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
            assert len(rows) >= bottom - top - 4 and len(columns) >= right - left - 4  # its ink reaches to the edges
            sides.add(round(bottom - top))
        assert covered.max() == 1 and not (mask[covered == 0] > 0).any()
    assert max(sides) > 1.5 * min(sides)


def test_ink_boxes():
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    images[0, 3:9, 5:7] = 200
    assert canvases.ink_boxes(images).tolist() == [[5, 3, 7, 9], [0, 0, 28, 28]]


def test_connected_pixels_have_one_number():
    ink = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]]).bool()[None]
    (marked,) = components(ink)
    assert marked[0, 0] == marked[1, 1] != 0 and len(marked[:3, 3].unique()) == 1 and (marked[~ink[0]] == 0).all()
    assert len(marked.unique()) == 4


def test_the_baseline_finds_a_digit_that_lies_alone(digits):
    means = mean_digits(digits)
    images = torch.zeros(100, 48, 48)
    images[:, 10:38, 15:43] = digits.test_images[:100] / 255
    boxes, labels, scores = found_components(images, means)
    expected = canvases.ink_boxes(digits.test_images[:100]) + torch.tensor([15, 10, 15, 10])
    assert ((boxes[:, 0] - expected).abs().amax(1) <= 1).float().mean() > 0.9
    assert (labels[:, 0] == digits.test_labels[:100]).float().mean() > 0.7 and (scores[:, 0] > 0.4).all()
    assert (scores[:, 1:] <= scores[:, :1]).all()
    nothing, _, none = found_components(torch.zeros(1, 48, 48), means)
    assert not nothing.any() and not none.any()
