"""`nndist new`: what it writes is a recipe like the shipped ones, whichever it is made from."""

import ast
import contextlib

import pytest
from conftest import RECIPES, ROOT
from launching import command, python, succeeded
from test_layout import test_all_recipes_read_alike as check_sections

import nndist
from nndist.cli.new_recipe import COMMENTS, write_recipe
from nndist.recipe.loading import load_recipe


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A recipe made from each of the shipped ones."""
    folder = tmp_path_factory.mktemp("made") / "recipes"
    folder.mkdir()
    paths = {path.stem: folder / f"my_{path.stem}.py" for path in RECIPES}
    with contextlib.chdir(folder.parent):  # the command in its docstring has the path as one types it
        for like, path in paths.items():
            write_recipe(path, like)
    return paths


@pytest.mark.parametrize("like", [path.stem for path in RECIPES])
def test_it_reads_like_the_shipped_ones_and_says_what_each_part_is_for(written, like):
    text = written[like].read_text()
    check_sections(written[like])
    kind = load_recipe(written[like])
    assert kind.__name__.startswith("My") and not kind.documented
    assert kind().fields() == load_recipe(ROOT / f"recipes/{like}.py")().fields()
    assert "Measured: nothing yet" in text and f'"{like} on' not in text
    assert sum(f"    # {comment}\n" in text for comment in COMMENTS.values()) >= 3


def test_ruff_finds_nothing_in_them(written):
    folder = written["mnist_cnn"].parent
    for check in (["check"], ["format", "--check"]):
        done = python("-m", "ruff", *check, "--config", ROOT / "pyproject.toml", folder)
        assert done.returncode == 0, done.stdout


def test_check_passes_on_one_made_from_a_recipe(written, tmp_path, capsys):
    nndist.train(written["mnist_cnn"], check=True, data_source="sample", runs_dir=tmp_path, threads=1)
    assert "check passed" in capsys.readouterr().out


@pytest.mark.parametrize("like", [path.stem for path in RECIPES])
def test_it_has_the_code_of_the_shipped_one(written, like):
    """So what tests/recipes shows of that holds for it too."""
    assert code_of(written[like]).replace(f"my_{like}", like) == code_of(ROOT / f"recipes/{like}.py")


def code_of(path):
    """The module without its docstrings, comments, the class's name and the document that it is from."""
    tree = ast.parse(path.read_text())
    recipe = next(node for node in reversed(tree.body) if isinstance(node, ast.ClassDef))
    recipe.name = "Recipe"
    recipe.body = [node for node in recipe.body if "documented" not in ast.unparse(node).partition("=")[0]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


@pytest.mark.nightly
@pytest.mark.parametrize("like", [path.stem for path in RECIPES])
def test_check_passes_on_all(written, like, tmp_path, capsys):
    nndist.train(written[like], check=True, data_source="sample", runs_dir=tmp_path, threads=1)
    assert "check passed" in capsys.readouterr().out


def test_the_small_one_is_written_says_what_is_next_and_learns(tmp_path):
    done = succeeded(command(ROOT / "launch/new.py", "net.py", cwd=tmp_path))
    assert done.stdout.splitlines()[-1] == "next     nndist train net.py --check"
    result = nndist.train(tmp_path / "net.py", runs_dir=tmp_path, threads=1, progress=False, figures=False)
    assert result.scores["test/absolute_error"] < 0.1  # the mean of |product| is 0.25
    again = command(ROOT / "launch/new.py", "net.py", "--like", "mnist_cnn", cwd=tmp_path)
    assert again.returncode == 2 and "net.py: already exists" in again.stderr and len(again.stderr.splitlines()) == 1
    assert "class Net(Recipe)" in (tmp_path / "net.py").read_text()


def test_a_name_that_the_module_has_is_not_taken(tmp_path):
    write_recipe(tmp_path / "net.py", "mnist_cnn")
    assert load_recipe(tmp_path / "net.py").__name__ == "NetRecipe"


@pytest.mark.parametrize(
    "path, like, expected",
    [
        ("net.txt", None, "give the name of a Python module"),
        ("my-net.py", None, "give the name of a Python module"),
        ("no/net.py", None, "there is no folder"),
        ("net.py", "mnist_cn", "no such recipe; choose from char_bert"),
        ("net.py", "conftest.py", "conftest.py"),
    ],
)
def test_bad_input_writes_nothing(tmp_path, path, like, expected):
    with pytest.raises(nndist.UserError, match=expected):
        write_recipe(tmp_path / path, like and str(ROOT / "tests" / like) if like == "conftest.py" else like)
    assert not any(tmp_path.iterdir())
