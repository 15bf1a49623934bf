"""Tomorrow's highest temperature in Seattle, forecast from two weeks of weather by
a recurrent network (document 002, section 4).

    accelerate launch launch/train.py recipes/weather_rnn.py

Measured: mean absolute error over 2015 of 2.10 degrees Celsius (2.07 to 2.12)
by an LSTM, 2.25 by persistence (as today), 0.4 s (median and range of 3 seeds,
2026-11-30, two threads of a 2-core AMD EPYC). Medians of 10 seeds, 2026-11-21:
LSTM 2.08 (2.06 to 2.12), GRU 2.09, plain RNN 2.13; climatology (as usual on the
date) 3.02. A linear regression on today's weather gets 2.12: earlier days add
little. On 2014, which (with 2013) the fields were chosen on, it is ahead: 2.16,
the LSTM 2.20 (persistence 2.31, climatology 2.90). Clipping changes nothing.

Differences from the document: it only names weather. Everything else is chosen
here.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn, optim

from nndist import CELLS, Answers, Batch, Cell, Count, History, Inputs, Networks, Recipe, ScheduleName, figures
from nndist.data import Data, DataConfig, Resident
from nndist.datasets.weather import BASELINES, baselines, evenings, given_days, load_weather

CLOSER = slice(150, 210)  # test days shown in detail


class Forecaster(nn.Module):
    """From the days up to today, by how many degrees Celsius tomorrow will be warmer."""

    def __init__(self, cell: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.recurrent = CELLS[cell](inputs, hidden, batch_first=True)
        self.change = nn.Linear(hidden + inputs, 1)

    def forward(self, x: Tensor) -> Tensor:  # [k, days, inputs]
        outputs, _ = self.recurrent(x)  # [k, days, hidden]
        return self.change(torch.cat([outputs[:, -1], x[:, -1]], dim=1))  # [k, 1]


@dataclass(kw_only=True)
class WeatherRNN(Recipe):
    """Weather forecast from the days before."""

    document = "002, section 4"
    headline = ("test/error_celsius/network", "test/error_celsius/persistence")

    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-2
    schedule: ScheduleName = "cosine"
    clip_norm: float | None = 1.0
    cell: Cell = "lstm"
    """Recurrent cell: plain (tanh or ReLU), LSTM or GRU."""
    hidden: Count = 16
    """Width of the hidden state."""
    days: Annotated[int, Interval(ge=1, le=180)] = 14
    """Days that a forecast is based on."""
    test_year: Literal[2013, 2014, 2015] = 2015
    """Year to test on; earlier years are for training."""

    def data(self, config: DataConfig) -> Data:
        weather = load_weather()
        past = weather.years < self.test_year
        known, simple = evenings(weather, past), baselines(weather, past)

        def examples(days: Tensor) -> Resident:
            """An example per given day but the first few, which only serve as inputs."""
            target = torch.nonzero(days).flatten()[self.days :]
            window = known[target.unsqueeze(1) + torch.arange(-self.days, 0)]  # [n, days, 7]
            return Resident(window, weather.values[target, 0], simple[target - 1], target)

        source = f"Seattle's weather (NOAA) of {self.test_year}, trained on 2012 to {self.test_year - 1}"
        test = examples(weather.years == self.test_year)
        return Data(train=examples(past), test=test, source=source, sequential=True)  # its windows overlap

    def networks(self) -> dict[str, nn.Module]:
        return {"model": Forecaster(self.cell, 7, self.hidden)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, fused=True)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        return (forecasts(networks, batch)["network"] - batch[1]).abs()

    def score(self, networks: Networks, batch: Batch) -> dict[str, Tensor]:
        errors = {name: (values - batch[1]).abs() for name, values in forecasts(networks, batch).items()}
        return {"loss": errors["network"]} | {f"error_celsius/{name}": values for name, values in errors.items()}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        batch = data.inputs(data.test)
        dates = [load_weather().dates[day] for day in batch[3].tolist()]
        series = {"observed": batch[1].cpu()}
        series |= {name: values.cpu() for name, values in forecasts(networks, batch).items()}
        columns = [[round(value, 2) for value in values.tolist()] for values in series.values()]
        return {
            "forecast": forecast_figure(dates, series, f"weather_rnn ({self.cell}): {data.source}"),
            "forecasts": figures.Table(["date", *series], list(zip(map(str, dates), *columns, strict=True))),
        }

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        days, windows, today = given_days(inputs, self.days, self.test_year)
        return Answers({"tomorrow": days, "degrees Celsius": today + networks["model"](windows).squeeze(1)})


def forecasts(networks: Networks, batch: Batch) -> dict[str, Tensor]:
    """Tomorrow's highest temperature by the network and by each baseline, degrees Celsius [k]."""
    inputs, _, simple, _ = batch
    named = dict(zip(BASELINES, simple.unbind(1), strict=True))
    return {"network": named["persistence"] + networks["model"](inputs).squeeze(1), **named}


def forecast_figure(dates: list[Any], series: dict[str, Tensor], title: str) -> Any:
    """Forecasts of the day before and actual values: all days, some in detail, and each method's error."""
    from matplotlib.dates import ConciseDateFormatter

    figure = figures.new_figure(11.5, 7.5)
    panels = figure.subplot_mosaic([["year", "year", "year"], ["closer", "closer", "errors"]])
    colors = dict(zip(series, ("black", "tab:red", "tab:blue", "tab:gray", "tab:green"), strict=True))
    for panel, days, left_out in (("year", slice(None), ("persistence", "linear")), ("closer", CLOSER, ("linear",))):
        axes = panels[panel]
        for name in [name for name in series if name not in left_out]:
            dashes = "--" if name in BASELINES else "-"
            axes.plot(dates[days], series[name][days], dashes, color=colors[name], label=name)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator(), show_offset=False))
        axes.set(ylabel="highest temperature (degrees Celsius)", ymargin=0.15)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower center", ncols=4, fontsize="small")
    errors = {name: (series[name] - series["observed"]).abs().mean().item() for name in ("network", *BASELINES)}
    bars = panels["errors"].bar(list(errors), list(errors.values()), color=[colors[name] for name in errors])
    panels["errors"].bar_label(bars, fmt="%.2f")
    panels["errors"].set(ylabel="mean absolute error (degrees Celsius)", ymargin=0.1)
    panels["errors"].tick_params("x", labelsize=8)
    figure.suptitle(f"{title}\ntomorrow's highest temperature, forecast on {len(dates)} days", fontsize=11)
    return figure
