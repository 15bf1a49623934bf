"""Makes tests/figures/coco_detections.json: random boxes, and the average precision that pycocotools gives them.

python tests/make_coco_detections.py, with the package pycocotools, which no test needs.
"""

import json
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IMAGES, CLASSES = 40, 4


def random_boxes(random: np.random.Generator) -> tuple[list, list]:
    """True boxes (image, class, box) and detections (image, class, box, score): left, top, right, bottom."""
    truth, said = [], []
    for image in range(IMAGES):
        for _ in range(random.integers(0, 5)):
            corner, sides = random.uniform(0, 30, 2), random.uniform(5, 20, 2)
            box, kind = np.concatenate([corner, corner + sides]), int(random.integers(CLASSES - 1))
            truth.append((image, kind, box.round(2).tolist()))
            for _ in range(random.integers(0, 3)):  # near it, sometimes of another class
                near = (box + random.normal(0, 1.2, 4)).round(2).tolist()
                other = int(random.integers(CLASSES - 1)) if random.random() < 0.2 else kind
                said.append((image, other, near, round(random.uniform(0.2, 1), 4)))
        corner = random.uniform(0, 30, 2)
        said.append(
            (image, int(random.integers(CLASSES)), [*corner.round(2), *(corner + 8).round(2)], 0.1 + image / 1e4)
        )
    return truth, said


def evaluated(truth: list, said: list) -> COCOeval:
    coco = COCO()
    sides = [[a, b, c - a, d - b] for _, _, (a, b, c, d) in truth]
    coco.dataset = {
        "info": {},
        "images": [{"id": image} for image in range(IMAGES)],
        "categories": [{"id": kind} for kind in range(CLASSES)],
        "annotations": [
            {"id": n + 1, "image_id": i, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for n, ((i, k, _), box) in enumerate(zip(truth, sides, strict=True))
        ],
    }
    coco.createIndex()
    rows = [
        {"image_id": i, "category_id": k, "bbox": [a, b, c - a, d - b], "score": s} for i, k, (a, b, c, d), s in said
    ]
    found = COCOeval(coco, coco.loadRes(rows), "bbox")
    found.evaluate()
    found.accumulate()
    found.summarize()
    return found


if __name__ == "__main__":
    truth, said = random_boxes(np.random.default_rng(0))
    found = evaluated(truth, said)
    # [thresholds, recalls, classes, areas, most detections]: of all areas and at most 100; -1 for an absent class
    by_class = found.eval["precision"][:, :, :, 0, 2].mean(1)
    kept = {"truth": truth, "said": said, "precision": by_class.tolist(), "ap": found.stats[0], "ap50": found.stats[1]}
    Path(__file__).with_name("figures").joinpath("coco_detections.json").write_text(json.dumps(kept) + "\n")
