"""The notebook of the basics: it runs, and what it prints is what it shows.

`python tests/recipes/test_basics.py` writes its outputs anew.
"""

import ast

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "recipes/basics.ipynb"


def executed():
    """The notebook, run in a fresh kernel."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, record_timing=False).execute()
    return notebook


def printed(notebook):
    """What each code cell has printed, by the first line of its source."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return {
        "".join(cell["source"]).splitlines()[0]: "".join("".join(output.get("text", "")) for output in cell["outputs"])
        for cell in cells
    }


def test_the_notebooks_outputs_are_those_of_a_run():
    import json

    shown, found = printed(json.loads(NOTEBOOK.read_text())), printed(executed())
    assert shown == found and all(found.values()) and len(found) == 10
    text = "\n".join(found.values())
    for sentence in (
        "[[100, 1, 2], [3, 4, 5]] [[0, 1, 2], [3, 4, 5]]",  # memory that is shared, and not
        "gradient [[0.5, 1.0], [1.5, 2.0]]",
        "(hidden): Linear(in_features=1, out_features=10, bias=True)",
        "the same outputs: True",
        "shuffle False epoch 1: [1, 2, 3, 4, 5] [6, 7, 8, 9, 10]",
        "two linear layers are one, up to rounding: True",
        "slope of the sigmoid at 50: 0.0000",
        "maximum [[8.0, 0.0], [0.0, 2.0]] average [[2.0, 0.0], [0.0, 2.0]]",
    ):
        assert sentence in text, sentence
    lines = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(("cross-entropy", "softmax,"))]
    assert lines[0] == lines[1] == lines[2] != lines[3]  # the last one is the mistake


def test_each_cell_is_python_that_a_person_can_read():
    import json

    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        text = "".join(cell["source"])
        assert max(map(len, text.splitlines())) <= 130
        if cell["cell_type"] == "code":
            ast.parse(text)


if __name__ == "__main__":
    import nbformat

    nbformat.write(executed(), NOTEBOOK)
