"""Daily prices of three stocks, embedded; stock_prices.md names the source."""

import csv
import datetime
import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nndist.errors import UserError
from nndist.prediction.inputs import Inputs

PATH = Path(__file__).with_name("stock_prices.csv.gz")
SYMBOLS = ("AAPL", "IBM", "MSFT")
CHANGE_BASELINES = ("last_value", "drift", "linear")
SIZE_BASELINES = ("usual", "recent")
VALIDATED, TESTED = 2010, 2011  # years; earlier ones are for training, the tested ones go to March 2013


@dataclass(frozen=True)
class Prices:
    """Consecutive trading days. closes: adjusted for dividends and splits, float64 [days, symbols], in dollars."""

    dates: tuple[datetime.date, ...]
    closes: Tensor

    @property
    def years(self) -> Tensor:
        """The year of each day, int64 [days]."""
        return torch.tensor([date.year for date in self.dates])


@cache
def load_prices() -> Prices:
    """The embedded table, 2000-03-01 to 2013-03-01."""
    with gzip.open(PATH, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    closes = [[float(row[symbol]) for symbol in SYMBOLS] for row in rows]
    return Prices(
        tuple(datetime.date.fromisoformat(row["date"]) for row in rows), torch.tensor(closes, dtype=torch.float64)
    )


def changes(closes: Tensor) -> Tensor:
    """Each day's change from the day before in percent (of logarithms), float32 [days - 1, symbols]."""
    return (100 * closes.log().diff(dim=0)).float()


def examples(days: int) -> dict[str, tuple[Tensor, ...]]:
    """An example per stock and day, by part "train", "val" and "test", as these tensors:

    the changes of the `days` days before, [n, days]; the day's own, [n]; those that the CHANGE_BASELINES forecast,
    [n, 3], and the sizes, without the sign, that the SIZE_BASELINES forecast, [n, 2]; symbol and day, [n] each.
    """
    prices = load_prices()
    moved, years = changes(prices.closes), prices.years[1:]
    past = years < VALIDATED
    day = torch.arange(days, len(moved))
    place = day.repeat(len(SYMBOLS))  # symbol by symbol
    symbol = torch.arange(len(SYMBOLS)).repeat_interleave(len(day))
    windows = moved.unfold(0, days, 1)[:-1].transpose(0, 1).flatten(0, 1)  # [n, days]
    target = moved[place, symbol]
    learned = past[place]
    terms = torch.cat([torch.ones(len(windows), 1), windows], 1)
    linear = terms @ torch.linalg.lstsq(terms[learned], target[learned].unsqueeze(1)).solution
    drift, usual = moved[past].mean(0)[symbol], moved[past].abs().median(0).values[symbol]
    change = torch.stack([torch.zeros_like(drift), drift, linear.squeeze(1)], 1)
    size = torch.stack([usual, windows.abs().median(1).values], 1)
    parts = {"train": learned, "val": years[place] == VALIDATED, "test": years[place] >= TESTED}
    return {
        name: tuple(tensor[part] for tensor in (windows, target, change, size, symbol, place + 1))
        for name, part in parts.items()
    }


def given_prices(inputs: Inputs, days: int) -> tuple[list[str], Tensor, Tensor]:
    """A person's daily prices: the last known date of each forecast, [k], the changes of the `days` days up to it, in
    percent, [k, days], and its price, [k]; tensors on the inputs' device.

    CSV with a date and a price in each line, oldest first. Raises UserError for any other line, or for fewer than
    `days` + 1 days.
    """
    dates: list[datetime.date] = []
    closes = []
    for place, (date, price) in inputs.records(("date", "price")):
        try:
            dates.append(datetime.date.fromisoformat(date.replace("/", "-")))
            closes.append(float(price))
        except ValueError as error:
            raise UserError(f"{place}: {error}; expected a line such as 2013-03-01,24.68") from None
        if not closes[-1] > 0:
            raise UserError(f"{place}: {price}: a price must be above 0")
        if len(dates) > 1 and dates[-1] <= dates[-2]:
            raise UserError(f"{place}: {date} is not after {dates[-2]}; the days must be in order")
    if len(closes) <= days:
        raise UserError(f"{len(closes)} prices: the network needs at least {days + 1}")
    known = torch.tensor(closes, dtype=torch.float64)
    windows = changes(known.unsqueeze(1)).squeeze(1).unfold(0, days, 1)
    texts = [str(date) for date in dates[days:]]
    inputs.names += [f"{days} days to {date}" for date in texts]
    return texts, windows.to(inputs.device), known[days:].float().to(inputs.device)
