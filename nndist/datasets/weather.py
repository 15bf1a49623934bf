"""Four years of daily weather in Seattle, embedded; seattle_weather.md says where they come from."""

import csv
import datetime
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).with_name("seattle_weather.csv")
QUANTITIES = ("temp_max", "temp_min", "precipitation", "wind")
UNITS = ("degrees Celsius", "degrees Celsius", "mm", "m/s")
RAIN = QUANTITIES.index("precipitation")
BASELINES = ("persistence", "climatology", "linear")


@dataclass(frozen=True)
class Weather:
    """Days without a gap. values: float32 [days, 4], the QUANTITIES in their UNITS."""

    dates: tuple[datetime.date, ...]
    values: Tensor

    @property
    def years(self) -> Tensor:
        """The year of each day, int64 [days]."""
        return torch.tensor([date.year for date in self.dates])

    @property
    def season(self) -> Tensor:
        """The time of the year of each day as an angle from 0 to 2 pi, float32 [days]."""
        return torch.tensor([2 * math.pi * (date.timetuple().tm_yday - 1) / 365.25 for date in self.dates])


def load_weather() -> Weather:
    """The embedded table, 2012-01-01 to 2015-12-31."""
    with PATH.open(newline="") as file:
        rows = list(csv.DictReader(file))
    dates = tuple(datetime.date(*map(int, row["date"].split("/"))) for row in rows)
    return Weather(dates, torch.tensor([[float(row[name]) for name in QUANTITIES] for row in rows]))


def harmonics(season: Tensor, count: int) -> Tensor:
    """1, and sine and cosine of the first `count` multiples of the season's angle: [days, 1 + 2 * count]."""
    angles = season.unsqueeze(1) * torch.arange(1, count + 1)
    return torch.cat([torch.ones(len(season), 1), angles.sin(), angles.cos()], dim=1)


def climatology(weather: Weather, past: Tensor) -> Tensor:
    """The highest temperature usual on each day of the year, [all days], learned from the days of `past` (bool) alone.

    A mean and two harmonics of the year by least squares: three years are too few for means of single dates.
    """
    terms = harmonics(weather.season, 2)
    return terms @ torch.linalg.lstsq(terms[past], weather.values[past, :1]).solution[:, 0]


def evenings(weather: Weather, past: Tensor) -> Tensor:
    """What is known when each day but the last is over, [days - 1, 7]: its weather, and tomorrow's season.

    Precipitation as log(1 + mm); the four quantities standardised by the days of `past` (bool).
    """
    values = weather.values.clone()
    values[:, RAIN] = values[:, RAIN].log1p()
    values = (values - values[past].mean(0)) / values[past].std(0)
    return torch.cat([values[:-1], harmonics(weather.season[1:], 1)], dim=1)


def baselines(weather: Weather, past: Tensor) -> Tensor:
    """The BASELINES' highest temperature of each day but the first, [days - 1, 3]; learned from `past` (bool) alone.

    Today's again; what is usual on the date; a linear regression on what is known today.
    """
    known, highest = evenings(weather, past), weather.values[:, 0]
    learned = past[1:]
    linear = known @ torch.linalg.lstsq(known[learned], highest[1:][learned].unsqueeze(1)).solution[:, 0]
    return torch.stack([highest[:-1], climatology(weather, past)[1:], linear], dim=1)
