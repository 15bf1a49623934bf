"""Networks layer by layer: `--summary`, and what run.json and the report list."""

import json

import pytest
from making import path_of
from torch import nn

import nndist
from nndist.recipe.loading import load_recipe
from nndist.training.layers import layers_of


def test_a_summary_has_each_layers_shape_and_parameters_and_keeps_nothing(tmp_path, capsys):
    nndist.train(path_of("mnist_simple_cnn"), summary=True, data_source="sample", runs_dir=tmp_path, threads=1)
    said = capsys.readouterr().out
    lines = said[said.index("check passed") :].splitlines()[2:]
    assert max(map(len, lines)) <= 80
    network = load_recipe(path_of("mnist_simple_cnn"))().networks()["model"]
    named = {line.split()[0]: line for line in lines[1:] if line and not line.startswith(" ")}
    leaves = [name for name, module in network.named_modules() if not list(module.children())]
    assert list(named) == leaves
    first = named[leaves[0]]
    assert "Conv2d(1, 32" in first and "k x 32 x 26 x 26" in first and first.endswith(" 320")
    assert "k x 10" in named[leaves[-1]]
    assert lines[-1 - (not lines[-1])].strip() == f"{sum(p.numel() for p in network.parameters()):,}"
    assert not list((tmp_path / "mnist_simple_cnn").iterdir())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.answer = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.answer.weight = self.embed.weight
        self.scale = nn.Parameter(nn.init.ones_(nn.Parameter(self.embed.weight.new_empty(3))))


def test_parameters_add_up_where_weights_are_shared_or_no_layers():
    (rows,) = layers_of({"model": Tied()}).values()
    assert rows == [["(itself)", "Tied", 3], ["embed", "Embedding(7, 3)", 21], ["answer", rows[2][1], 0]]


@pytest.mark.parametrize("damaged", [None, [["a", "b"]], "text", [["a", "b", "c"]]])
def test_the_report_lists_the_layers(tmp_path, damaged):
    settings = {"max_steps": 1, "figures": False, "wandb": "off", "threads": 1, "progress": False}
    folder = nndist.train(path_of("sum_mlp"), run="it", runs_dir=tmp_path, **settings).folder
    said = json.loads((folder / "run.json").read_text())
    assert [count for *_, count in said["layers"]["model"]] == [1860, 3660, 61, 0]
    page = (folder / "report.html").read_text()
    assert "model, 4 layers" in page and "5,581" in page
    if damaged is not None:
        (folder / "run.json").write_text(json.dumps({**said, "layers": {"model": damaged}}))
        from nndist.report import run_page
        from nndist.runs.reading import read_run

        assert "Networks" in run_page.html_of(read_run(folder))
