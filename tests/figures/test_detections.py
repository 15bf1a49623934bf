"""Average precision of detected boxes as COCO's own package computes it, and boxes drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from making import is_drawn

from nndist.figures.detections import average_precision, box_iou, boxed, coco_scores, judged, matches, named
from nndist.figures.plots import save

RECORDED = Path(__file__).with_name("coco_detections.json")


def test_average_precision_is_cocos():
    """On random boxes, against what pycocotools says of them: tests/make_coco_detections.py recorded it."""
    kept = json.loads(RECORDED.read_text())
    rows, true = [], torch.zeros(4)
    for image in range(1 + max(image for image, *_ in kept["said"])):
        said = sorted((row[1:] for row in kept["said"] if row[0] == image), key=lambda row: -row[2])
        truth = [row[1:] for row in kept["truth"] if row[0] == image] or [(-1, [0.0] * 4)]
        kinds, boxes, confidence = (torch.tensor(part) for part in zip(*said, strict=True))
        true_kinds, true_boxes = (torch.tensor(part) for part in zip(*truth, strict=True))
        rows.append(judged(boxes[None], kinds[None], confidence[None], true_boxes[None], true_kinds[None])[0])
        true += torch.bincount(true_kinds[true_kinds >= 0], minlength=4)
    found = average_precision(torch.cat(rows), true)
    expected = np.array(kept["precision"])
    assert np.isnan(found[:, 3]).all() and (expected[:, 3] == -1).all()  # no true box is of the last class
    np.testing.assert_allclose(found[:, :3], expected[:, :3], atol=1e-9)
    assert coco_scores(torch.cat(rows), true) == pytest.approx({"ap": kept["ap"], "ap50": kept["ap50"]})
    assert 0.2 < kept["ap"] < 0.8


def test_the_overlap_of_boxes():
    box = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
    others = torch.tensor([[0.0, 0.0, 4.0, 2.0], [2.0, 0.0, 6.0, 2.0], [5.0, 5.0, 6.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(box_iou(box, others), torch.tensor([[1.0, 4 / 12, 0.0, 0.0]]))


def test_a_true_box_is_found_once():
    box = torch.tensor([[[0.0, 0.0, 10.0, 10.0]]])
    twice, kinds = box.expand(1, 2, 4), torch.tensor([[3, 3]])
    assert matches(twice, kinds, box, torch.tensor([[3]]))[0].all(1).tolist() == [True, False]
    assert not matches(twice, kinds, box, torch.tensor([[4]])).any()
    assert not matches(twice, kinds, box, torch.tensor([[-1]])).any()


def test_boxes_are_named_with_their_scores():
    boxes, labels = torch.tensor([[[1.0, 2.0, 3.0, 4.0]] * 2]), torch.tensor([[1, 0]])
    assert named(boxes, labels, torch.tensor([[0.9, 0.1]]), "ab", 0.5) == [[([1.0, 2.0, 3.0, 4.0], "b 90%")]]


def test_boxes_are_drawn_where_they_are(tmp_path):
    truth = torch.tensor([[[2.0, 3.0, 8.0, 9.0], [0.0, 0.0, 0.0, 0.0]]])
    said = [[([10.0, 10.0, 18.0, 19.0], "7 90%")]]
    drawn = boxed(torch.zeros(1, 20, 20), truth, said, "title")
    (axes,) = drawn.axes
    places = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in axes.patches]
    assert places == [(2, 3, 6, 6), (10, 10, 8, 9)] and [text.get_text() for text in axes.texts] == ["7 90%"]
    assert is_drawn(save({"boxes": drawn}, tmp_path)[0])
