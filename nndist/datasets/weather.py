"""Four years of daily weather in Seattle, embedded; seattle_weather.md names the source."""

import csv
import datetime
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nndist.errors import UserError
from nndist.prediction.inputs import Inputs

PATH = Path(__file__).with_name("seattle_weather.csv")
QUANTITIES = ("temp_max", "temp_min", "precipitation", "wind")
UNITS = ("degrees Celsius", "degrees Celsius", "mm", "m/s")
RAIN = QUANTITIES.index("precipitation")
BASELINES = ("persistence", "climatology", "linear")


@dataclass(frozen=True)
class Weather:
    """Consecutive days. values: float32 [days, 4], the QUANTITIES in their UNITS."""

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
    """1, and sines and cosines of the first `count` multiples of the season's angle: [days, 1 + 2 * count]."""
    angles = season.unsqueeze(1) * torch.arange(1, count + 1)
    return torch.cat([torch.ones(len(season), 1), angles.sin(), angles.cos()], dim=1)


def climatology(weather: Weather, past: Tensor) -> Tensor:
    """The usual highest temperature of each day, [all days], fitted to the days in `past` (bool) only.

    A mean and two harmonics of the year by least squares: three years are too few for means of single dates.
    """
    terms = harmonics(weather.season, 2)
    return terms @ torch.linalg.lstsq(terms[past], weather.values[past, :1]).solution[:, 0]


def evenings(weather: Weather, past: Tensor) -> Tensor:
    """What is known on the evening of each day but the last, [days - 1, 7]: its weather, and tomorrow's season.

    Precipitation as log(1 + mm); the four quantities are standardised by the days in `past` (bool).
    """
    values = scaled(weather.values, weather.values[past])
    return torch.cat([values[:-1], harmonics(weather.season[1:], 1)], dim=1)


def scaled(values: Tensor, past: Tensor) -> Tensor:
    """Quantities of days, [days, 4]: precipitation as log(1 + mm), all standardised by the days of `past`, [n, 4]."""
    values, past = values.clone(), past.clone()
    for table in (values, past):
        table[:, RAIN] = table[:, RAIN].log1p()
    return (values - past.mean(0)) / past.std(0)


def given_days(inputs: Inputs, days: int, test_year: int) -> tuple[list[str], Tensor, Tensor]:
    """A person's daily weather: dates to forecast, [k], the `days` days before each, [k, days, 7], and the highest
    temperature of the day before, [k]; tensors on the inputs' device.

    CSV with a date and the QUANTITIES in each line, as in the embedded table (other columns are optional). Raises
    UserError for any other line, a gap between days, or fewer than `days` days.
    """
    dates: list[datetime.date] = []
    rows = []
    for place, cells in inputs.records(("date", *QUANTITIES)):
        try:
            date = datetime.date(*map(int, cells[0].replace("/", "-").split("-")))
            rows.append([float(cell) for cell in cells[1:]])
        except (ValueError, TypeError) as error:
            raise UserError(f"{place}: {error}; expected a line such as 2015/12/31,5.6,-2.1,0.0,3.5") from None
        if dates and date - dates[-1] != datetime.timedelta(days=1):
            raise UserError(f"{place}: {date} does not follow {dates[-1]}; the days must be consecutive")
        dates.append(date)
    if len(rows) < days:
        raise UserError(f"{len(rows)} days of weather: the network needs at least {days}")
    known = load_weather()
    values = torch.tensor(rows)
    tomorrow = [date + datetime.timedelta(days=1) for date in dates]
    season = Weather(tuple(tomorrow), values).season
    each = torch.cat([scaled(values, known.values[known.years < test_year]), harmonics(season, 1)], dim=1)  # [n, 7]
    windows = each.unfold(0, days, 1).transpose(1, 2)  # [k, days, 7]
    texts = [str(date) for date in tomorrow[days - 1 :]]
    inputs.names += [f"{days} days to {date}" for date in dates[days - 1 :]]
    return texts, windows.to(inputs.device), values[days - 1 :, 0].to(inputs.device)


def baselines(weather: Weather, past: Tensor) -> Tensor:
    """The BASELINES' highest temperature of each day but the first, [days - 1, 3]; fitted to `past` (bool) only.

    Today's temperature; the usual one for the date; a linear regression on what is known today.
    """
    known, highest = evenings(weather, past), weather.values[:, 0]
    learned = past[1:]
    linear = known @ torch.linalg.lstsq(known[learned], highest[1:][learned].unsqueeze(1)).solution[:, 0]
    return torch.stack([highest[:-1], climatology(weather, past)[1:], linear], dim=1)
