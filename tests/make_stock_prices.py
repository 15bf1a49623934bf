"""Make nndist/datasets/stock_prices.csv.gz from the PyPI package bokeh_sampledata 2026.1, as stock_prices.md says.

pip download --no-deps bokeh_sampledata==2026.1 && unzip bokeh_sampledata-2026.1-py3-none-any.whl
python tests/make_stock_prices.py bokeh_sampledata/_data/stocks.csv.gz
"""

import csv
import gzip
import sys
from pathlib import Path

from nndist.datasets.stocks import PATH, SYMBOLS


def main(path: Path) -> None:
    """Write the file into the package: a line per day, its date and the adjusted close of each of the SYMBOLS."""
    with gzip.open(path, "rt", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["Ticker"] in SYMBOLS]
    dates = sorted({row["Date"] for row in rows})
    close = {(row["Date"], row["Ticker"]): f"{float(row['Adj Close']):.4f}" for row in rows}
    lines = [",".join(["date", *SYMBOLS])]
    lines += [",".join([date, *(close[date, symbol] for symbol in SYMBOLS)]) for date in dates]
    PATH.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
