"""A notebook that trains, looks, predicts and trains on two processes; executed as Jupyter does it."""

import pytest
from conftest import ROOT

pytestmark = pytest.mark.long

CELLS = [
    f"""
import torch
from nndist import train, evaluate, predict, load_run
torch.set_num_threads(2)
torch.rand(500, 500) @ torch.rand(500, 500)  # starts OpenMP's threads, which a forked process lacks
settings = dict(runs_dir="runs", wandb="off", threads=1, figures=False)
digits = train({str(ROOT / "recipes/mnist_mlp.py")!r}, epochs=1, run="digits", data_source="sample", **settings)
""",
    """
run = load_run(digits.folder)
steps, losses = run.history.series("train/loss")
assert type(steps) is list and len(losses) == len(steps) > 5
assert evaluate(run, threads=1).scores == run.scores == digits.scores
print("as recorded")
""",
    """
from dataclasses import dataclass
import torch
from torch import nn
from nndist import Data, Recipe, Resident

@dataclass(kw_only=True)
class Sums(Recipe):
    epochs: int = 20
    lr: float = 0.1
    def data(self, config):
        x = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
        return Data(train=Resident(x, x.sum(1, keepdim=True)), test=Resident(x[:50], x[:50].sum(1, keepdim=True)))
    def networks(self):
        return {"model": nn.Linear(4, 1)}
    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)
    def loss(self, networks, batch):
        return (networks["model"](batch[0]) - batch[1]).square().squeeze(1)

alone = train(Sums(), run="alone", **settings)
found = predict("runs/sums/alone", [0.1, 0.2, 0.3, 0.4])
print(found)
assert abs(found.columns["answer"][0] - 1.0) < 0.5
""",
    """
from accelerate import notebook_launcher

def together():
    train(Sums(), run="two", **(settings | dict(threads=None)))

notebook_launcher(together, num_processes=2)
two = load_run("runs/sums/two")
assert two.about["world_size"] == 2 and two.status == "finished"
difference = max(abs(a - b) for a, b in zip(two.scores.values(), alone.scores.values()))
assert difference < 1e-5, difference
print("two processes agree")
""",
]


def test_a_notebook_is_executed(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = ["".join(o.get("text", "") for o in cell.outputs if o.get("name") == "stdout") for cell in notebook.cells]
    told = "".join(o.get("text", "") for cell in notebook.cells for o in cell.outputs if o.get("name") == "stderr")
    assert "as recorded" in said[1] and "two processes agree" in said[3]
    assert "mnist_mlp" in told and "evaluating" in told, "a bar"
    assert "Warning" not in told, told  # no warning in a notebook without ipywidgets
