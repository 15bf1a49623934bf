"""Stock prices: what a forecast may know, its baselines, and what it does and does not win."""

import datetime

import pytest
import torch
from making import data_of, figure, is_drawn, make
from torch import nn

import nndist
from nndist.datasets import stocks


def test_the_prices_are_of_trading_days_and_their_source_and_licence_lie_beside_them():
    prices = stocks.load_prices()
    assert prices.closes.shape == (3270, 3) and (prices.closes > 0).all()
    assert prices.dates[0] == datetime.date(2000, 3, 1) and prices.dates[-1] == datetime.date(2013, 3, 1)
    assert all(a < b and b.weekday() < 5 for a, b in zip(prices.dates, prices.dates[1:], strict=False))
    assert stocks.changes(prices.closes).abs().median() < 2  # percent
    text = stocks.PATH.with_name("stock_prices.md").read_text()
    assert "public domain" in text and "bokeh_sampledata 2026.1" in text


def test_each_example_is_the_changes_just_before_its_own():
    prices = stocks.load_prices()
    moved = stocks.changes(prices.closes)
    data = data_of("stock_rnn", days=7)
    years = {"train": set(range(2000, 2010)), "val": {2010}, "test": {2011, 2012, 2013}}
    for name, examples in (("train", data.train), ("val", data.val), ("test", data.test)):
        windows, change, _, _, symbol, day = data.inputs(examples)
        assert {prices.dates[d].year for d in day.tolist()} == years[name]
        assert symbol.unique().tolist() == [0, 1, 2] and len(torch.stack([symbol, day], 1).unique(dim=0)) == len(day)
        for number in (0, 50, len(examples) - 1):
            d, s = day[number], symbol[number]
            closes = prices.closes[:, s]
            assert change[number].item() == pytest.approx(100 * (closes[d] / closes[d - 1]).log().item(), abs=1e-4)
            torch.testing.assert_close(windows[number], moved[d - 8 : d - 1, s])


def test_no_baseline_knows_the_years_after_training(monkeypatch):
    prices = stocks.load_prices()
    before = stocks.examples(20)
    changed = prices.closes.clone()
    changed[prices.years >= 2010] *= 3.0
    monkeypatch.setattr(stocks, "load_prices", lambda: stocks.Prices(prices.dates, changed))
    after = stocks.examples(20)
    for a, b in zip(before["train"], after["train"], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(before["test"][2][:, 1], after["test"][2][:, 1])  # the drift


def test_the_baselines_are_what_they_are_called():
    windows, change, forecast, size, symbol, _ = stocks.examples(20)["train"]
    last, drift, linear = forecast.unbind(1)
    usual, recent = size.unbind(1)
    assert not last.any() and len(drift.unique()) == 3
    assert torch.equal(recent, windows.abs().median(1).values)
    for number in range(3):
        own = symbol == number
        assert usual[own].unique().item() == pytest.approx(change[own].abs().median().item(), rel=0.02)
    assert ((linear - change) @ windows).abs().max() / len(change) < 1e-3  # least squares


@pytest.mark.parametrize("kind, layer", [("rnn", nn.RNN), ("lstm", nn.LSTM), ("gru", nn.GRU), ("mlp", nn.Sequential)])
def test_the_network_is_the_one_asked_for_and_scales_with_percent(kind, layer):
    network = make("stock_rnn", kind=kind).networks()["model"]
    assert type(network.read) is layer and network(torch.randn(5, 20)).shape == (5, 2)


def test_fields_that_cannot_be_meant():
    with pytest.raises(nndist.UserError, match="--days 1: must lie between 2 and 250"):
        make("stock_rnn", days=1)
    with pytest.raises(nndist.UserError, match="--hidden 0"):
        make("stock_rnn", hidden=0)


def test_it_beats_the_recent_size_but_not_the_last_value(trained, tmp_path):
    """What the docstring says, by the network that trains fastest; and `predict` says the same as the network."""
    result = trained("stock_rnn", kind="mlp", epochs=3)
    scores = result.scores
    error, size = "test/error/", "test/size_error/"
    assert scores[size + "network"] < scores[size + "recent"] - 0.005 < scores[size + "usual"] - 0.03
    assert abs(scores[error + "network"] - scores[error + "last_value"]) < 0.03
    assert 0.45 < scores["test/direction/network"] < 0.55  # more would be a forecast that peeks
    assert is_drawn(figure(result, "forecast.png"))
    prices = stocks.load_prices()
    file = tmp_path / "prices.csv"
    lines = [f"{date},{close}" for date, close in zip(prices.dates[-25:], prices.closes[-25:, 2].tolist(), strict=True)]
    file.write_text("date,price\n" + "\n".join(lines))
    rows = nndist.predict(result, file).rows()
    assert [row["after"] for row in rows] == [str(date) for date in prices.dates[-5:]]
    windows = stocks.changes(prices.closes)[-20:, 2].unsqueeze(0)
    change = result.networks["model"](windows)[0, 0].item()
    assert rows[-1]["change percent"] == pytest.approx(change, abs=1e-3)
    assert rows[-1]["price"] == pytest.approx(prices.closes[-1, 2].item() * (1 + change / 100), rel=1e-3)
    for wrong, why in (("1/3/2013,2", "expected a line"), ("2013-03-01,-1", "above 0"), ("2013-03-01,2", "21")):
        file.write_text("date,price\n2013-02-28,3\n" + wrong)
        with pytest.raises(nndist.UserError, match=why):
            nndist.predict(result, file)
