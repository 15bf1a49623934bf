"""Writes a starting recipe: a shipped one adapted to a new file, or a small one; with comments on each part."""

from __future__ import annotations

import ast
import keyword
import re
import textwrap
from pathlib import Path

from ..errors import UserError
from ..files import RECIPES

MAX_LINES = 150  # of a recipe, so that it can be read at once
# The comment above each part, the most useful first: a long recipe gets only the first ones
COMMENTS = {
    "loss": "One loss per example, shape [k], not their mean: so it is exact on any number of processes.",
    "data": "The sets, and how a raw batch becomes the networks' input; read or download files here.",
    "networks": "New networks by name: plain modules, without device, process or precision.",
    "fields": 'Hyper-parameters: each is a flag, and the text below it is its help. "--help" lists more.',
    "optimizer": "The optimizer of each network; a schedule (--schedule cosine) multiplies its learning rate.",
    "score": "Scores of an evaluation, one number per example; the loop takes exact means.",
    "objectives": "Network name -> its loss; a step runs them in this order.",
    "figures": "What to look at afterwards: matplotlib figures and texts by name.",
    "snapshot": "Tensors to keep at each evaluation, for figures of the training over time.",
    "validate": "Refuses invalid values, in one line with the flag, the value and the remedy.",
}
CLASSIFIER = "Loss, accuracy and the confusion matrix are Classifier's; define loss, score or figures to replace them."
TEMPLATE = '''
from dataclasses import dataclass

import torch
from torch import Tensor, nn, optim

from nndist.data import Data, Resident
from nndist.datasets import DataConfig
from nndist.recipe import Batch, Networks, Recipe


@dataclass(kw_only=True)
class NAME(Recipe):
    """Product of two numbers."""

    epochs: int = 20
    batch_size: int = 32
    lr: float = 0.01
    width: int = 32
    """Hidden units."""

    def data(self, config: DataConfig) -> Data:
        x = 2 * torch.rand(1200, 2, generator=torch.Generator().manual_seed(0)) - 1
        y = x.prod(1, keepdim=True)
        return Data(train=Resident(x[:1000], y[:1000]), test=Resident(x[1000:], y[1000:]), source="generated numbers")

    def networks(self) -> dict[str, nn.Module]:
        return {"model": nn.Sequential(nn.Linear(2, self.width), nn.ReLU(), nn.Linear(self.width, 1))}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        x, y = batch  # [k, 2] and [k, 1]
        return (networks["model"](x) - y).square().squeeze(1)

    def score(self, networks: Networks, batch: Batch) -> dict[str, Tensor]:
        x, y = batch
        error = (networks["model"](x) - y).squeeze(1)
        return {"loss": error.square(), "absolute_error": error.abs()}
'''


def write_recipe(path: Path, like: str | None) -> None:
    """Writes a commented recipe to `path`, adapted from the recipe `like` (a name or a path), or a small one.

    Raises UserError if the file exists, its name is not a module's or there is no such recipe, and OSError.
    """
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise UserError(f"{path}: give the name of a Python module, such as my_net.py")
    text = starting_text(path, like)
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; create it first")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path}: already exists; give a different name") from None


def starting_text(path: Path, like: str | None) -> str:
    """The text of the new recipe; raises UserError."""
    if like is None:
        return commented(
            docstring(path, "One line on what it is.", "") + TEMPLATE.replace("NAME", class_name(path, set()))
        )
    source = Path(like) if like.endswith(".py") else RECIPES / f"{like}.py"
    try:
        text = source.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.py")))
        raise UserError(f"--like {like}: no such recipe" + f"; choose from {known}" * bool(known)) from None
    except SyntaxError as error:
        raise UserError(f"--like {like}: line {error.lineno}: {error.msg}") from error
    recipe = recipe_class(tree)
    if recipe is None or ast.get_docstring(tree) is None:
        raise UserError(f"--like {like}: defines no subclass of Recipe or Classifier below a docstring")
    lines = text.splitlines()
    document = ""
    for node in reversed(recipe.body):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "document":
                document = ast.literal_eval(node.value)
            elif node.targets[0].id == "documented":  # the figure belongs to the original network
                del lines[node.lineno - 1 : node.end_lineno]
    title = (ast.get_docstring(tree) or "").split("\n\n")[0]
    title = " ".join(title.split()).rstrip(".")
    body = "\n".join(lines[tree.body[0].end_lineno :]) + "\n"
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    names |= {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    body = re.sub(rf"\b{recipe.name}\b", class_name(path, names - {recipe.name}), body)
    body = re.sub(rf'(["\']){source.stem} on ', rf"\g<1>{path.stem} on ", body)
    return commented(docstring(path, f"{title}; now say what yours is.", document) + body)


def recipe_class(tree: ast.Module) -> ast.ClassDef | None:
    """The last class of a module whose bases include Recipe or Classifier."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = [node for node in classes if {ast.unparse(base) for base in node.bases} & {"Recipe", "Classifier"}]
    return found[-1] if found else None


def docstring(path: Path, title: str, document: str) -> str:
    """The docstring of a new recipe, with placeholders for what is to be measured; in lines of 79."""
    about = textwrap.fill(title, 77)
    parts = [about[0].upper() + about[1:], f"    accelerate launch -m nndist train {shown(path)}"]
    parts.append("Measured: nothing yet. Say the figure, the seeds, the date, the device, the time.")
    differs = "Differences from the document: say what you change, and why."
    parts.append(differs if document else "No document describes it.")
    return '"""' + "\n\n".join(textwrap.fill(p, 79) if p[0] != " " else p for p in parts) + '\n"""\n'


def shown(path: Path) -> str:
    """A path as typed: relative to the working directory if it is below it."""
    whole = path.absolute()
    return str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else path)


def class_name(path: Path, taken: set[str]) -> str:
    """my_net.py -> MyNet, or MyNetRecipe if the module already has that name."""
    name = "".join(part[0].upper() + part[1:] for part in path.stem.split("_") if part) or "My"
    return name + "Recipe" if name in taken or not name.isidentifier() else name


def commented(text: str) -> str:
    """The recipe with a comment above each part of its class, within MAX_LINES."""
    lines = text.splitlines()
    recipe = recipe_class(ast.parse(text))
    assert recipe is not None
    places: dict[str, int] = {}
    for node in recipe.body:
        if isinstance(node, ast.AnnAssign):
            places.setdefault("fields", node.lineno)
        elif isinstance(node, ast.FunctionDef) and node.name in COMMENTS:
            places[node.name] = node.lineno
    chosen = [(places[name], comment) for name, comment in COMMENTS.items() if name in places]
    if "Classifier" in {ast.unparse(base) for base in recipe.bases} and "loss" not in places:
        chosen.insert(0, (recipe.body[-1].lineno, CLASSIFIER))
    for line, comment in sorted(chosen[: max(0, MAX_LINES - len(lines))], reverse=True):
        lines.insert(line - 1, f"    # {comment}")
    return "\n".join(lines) + "\n"
