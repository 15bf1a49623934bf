"""The five pages: every command and every block of code is run, in order, in one clean folder; every flag and file that
they name is looked up. What is not run as it stands is in SHORTENED or NOT_RUN, with the reason."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import RECIPES, ROOT
from launching import command as forked
from written_commands import FLAG, LAUNCH, PROJECT_PATH, Wrong, check, check_flags

import nndist.recipe

# In the order in which they are read, and run: later pages use the runs of earlier ones.
PAGES = [ROOT / folder / "README.md" for folder in (".", "launch", "recipes", "nndist", "tests")]
IN_CI = ".ci/run runs it as it stands"
BUCKET = "there is no such bucket; tests/training/test_storage.py has a server"
DDP = "accelerate launch --config_file launch/accelerate/cpu_ddp.yaml"
# Commands that are cut short, by flags that are added: the flags, and why.
SHORTENED = {
    "python launch/sync.py runs/mnist_simple_cnn/first": (" --offline", "there is no API key"),
    "python launch/submit.py recipes/mnist_cnn.py --nodes 2 --gpus-per-node 8 --time 12:00:00 --epochs 20": (
        " --dry-run",
        "a Slurm with GPUs; tests/launchers/test_slurm.py submits to a real one without",
    ),
    "python launch/train.py recipes/char_gpt.py --checkpoint-activations": (
        " --check --num-layers 2 --width 16 --context 16",
        "minutes",
    ),
    "python launch/train.py languages.py --run first": (" --max-steps 3", "a minute"),
}
# Commands that are not run here, only held against the flags and files that there are, and why.
NOT_RUN = {
    "pip install -e . && accelerate launch launch/train.py recipes/mnist_cnn.py": IN_CI,
    "pip install -e '.[test]' && pytest -n 2 --dist loadfile": IN_CI,
    "ruff check . && ruff format --check . && mypy": IN_CI,
    "pytest -m long -n 3 --dist worksteal": IN_CI,
    "python launch/verify.py season.py": "minutes; tests/cli/test_commands.py runs it with another recipe",
    "python launch/train.py recipes/imagenet_resnet.py --shards https://server/OUT --cache-gigabytes 20": (
        "there is no such server; tests/data/test_shards.py has one"
    ),
    "python launch/train.py recipes/imagenet_resnet.py --shards OUT": "90 epochs; tests/data/test_shards.py has it",
    f"{DDP} --num_processes 3 launch/train.py recipes/mnist_simple_cnn.py --epochs 1 --run watched "
    "--recheck-every 100": "half a minute; tests/training/test_recheck.py has what it does",
    "python launch/train.py recipes/mnist_cnn.py": "minutes; .ci/run runs the same by accelerate",
    f"{DDP} --num_processes 3 launch/train.py recipes/mnist_cnn.py": "minutes; tests/cli/test_train.py has it",
    f"{DDP} launch/train.py recipes/char_gpt.py --shard fsdp": "minutes; tests/training/test_fsdp.py has it",
    "accelerate launch --config_file launch/accelerate/gpu_ddp.yaml --num_processes 8 launch/train.py "
    "recipes/mnist_cnn.py": "8 GPUs; tests/launchers/test_launchers.py has what accelerate makes of it",
    "accelerate launch --config_file launch/accelerate/fsdp.yaml --num_processes 8 launch/train.py "
    "recipes/char_gpt.py --shard fsdp": "8 GPUs; tests/launchers/test_launchers.py has what accelerate makes of it",
    "python launch/train.py recipes/mnist_cnn.py --run first --runs-dir s3://bucket/runs": BUCKET,
    "python launch/predict.py s3://bucket/runs/mnist_cnn/first digit.png": BUCKET,
    "python launch/report.py s3://bucket/runs": BUCKET,
    "python launch/push.py runs/mnist_simple_cnn/first s3://bucket/runs": BUCKET,
    "python launch/compare.py recipes/two_clusters.py --vary lr=0.002,0.02 --folds 5": (
        "a training for each fold; tests/experiments/test_search.py has some"
    ),
    "python launch/compare.py recipes/two_clusters.py --search optuna --trials 30 --vary lr=1e-4..1 "
    "--vary activation=relu,tanh --hold-out 0.2 --score val/loss --prune": (
        "thirty trainings; tests/experiments/test_search.py has some"
    ),
    "python launch/watch.py runs": "serves until Ctrl-C; tests/report/test_live.py has it",
    "python launch/sync.py runs/mnist_simple_cnn/first --track tensorboard": (
        "an optional package; tests/runs/test_trackers.py has it"
    ),
    "kubectl apply -f launch/kubernetes/job.yaml": "a cluster; tests/launchers/test_kubernetes.py runs the command",
}
# Commands that need packages which neither the project nor its tests do; .ci/run installs them for the long tests.
PACKAGES = {
    "python launch/train.py languages.py --check": ("datasets", "transformers"),
    "python launch/train.py languages.py --run first": ("datasets", "transformers"),
    "python launch/train.py languages_lora.py --init-from runs/languages/first --check": (
        *("datasets", "transformers", "peft"),
    ),
}
# What a command must have said or written.
EXPECTED = {
    "python launch/train.py recipes/mnist_simple_cnn.py --epochs 1 --lr 0.05 --run first": "MNIST sample",
    "python launch/train.py season.py --check": "check passed",
    "python launch/train.py languages.py --check": "check passed",
    "python launch/train.py languages_lora.py --init-from runs/languages/first --check": "43 of 51 tensors",
    "python launch/train.py season.py --run second": "test/accuracy",
    "python launch/predict.py runs/season/second '25, 14, 0, 2' '8, 5, 12, 4'": "summer",
    "python spirals_plain.py": "test/accuracy 0.99",
    "python launch/train.py spirals.py --run first": "test/accuracy 0.99",
}
FILES = [
    "runs/index.html",
    "runs/mnist_simple_cnn/first/report.html",
    "runs/season/first/report.html",
    "runs/two_clusters/compare-lr/curves.png",
    "answers.png",
    "confusion.png",
    "weights.safetensors",
    "OUT/train.json",
    "my_net.py",
]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its lines, its page, and the number of its first line there."""

    language: str
    text: str
    page: Path
    line: int

    @property
    def commands(self) -> list[str]:
        """The commands of a shell's block, continued lines in one, without comments."""
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines() if self.language == "sh" else []
        return [command for line in lines if (command := re.sub(r"(^|\s+)#.*", "", line))]

    @property
    def file(self) -> tuple[str, bool] | None:
        """The file that the reader is to write, and whether the block goes on with it."""
        match = re.match(r"# (\w+\.py)(, continued)?\n", self.text)
        return (match[1], bool(match[2])) if match and self.language == "python" else None


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    found, lines, start = [], page.read_text().splitlines(), None
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
        else:
            assert line == "```", f"{page}, line {number}: a block ends in {line!r}"
            found.append(Block(lines[start - 1][3:].strip(), "\n".join(lines[start : number - 1]), page, start + 1))
            start = None
    assert start is None, f"{page}: the block of line {start} does not end"
    return found


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = list(dict.fromkeys(command for block in BLOCKS for command in block.commands))
SPANS = list(dict.fromkeys(" ".join(span.split()) for page in PAGES for span in re.findall(r"`([^`]+)`", prose(page))))
SPIRALS = "spirals.py"
LAUNCHERS = ("nndist ", "python ", "accelerate launch", "torchrun ", "pytest ", "pip ", "kubectl ", "wandb ", ".ci/run")


def is_command(span: str) -> bool:
    return span.startswith(LAUNCHERS)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the files that the reader is to write."""
    folder = tmp_path_factory.mktemp("written")
    for block in BLOCKS:
        if block.file:
            write(block, folder)
    return folder


def write(block: Block, folder: Path) -> None:
    name, continued = block.file
    with (folder / name).open("a" if continued else "w") as file:
        file.write(block.text + "\n")


def test_every_block_is_run_or_said_why_not():
    assert len(BLOCKS) == sum(page.read_text().count("```") for page in PAGES) / 2 >= 20
    assert {block.language for block in BLOCKS} == {"sh", "python"}, "a block of another language would not be run"
    gone = (SHORTENED.keys() | NOT_RUN.keys() | EXPECTED.keys()) - set(COMMANDS)
    assert not gone, f"no page has {'; '.join(gone)}"
    as_they_stand = set(COMMANDS) - SHORTENED.keys() - NOT_RUN.keys()
    assert len(as_they_stand) >= 20 and not SHORTENED.keys() & NOT_RUN.keys()
    assert sum(len(block.commands) for block in BLOCKS) >= len(COMMANDS)


def test_what_ci_is_said_to_run_stands_there():
    script = (ROOT / ".ci/run").read_text()
    for command in (command for command, reason in NOT_RUN.items() if reason == IN_CI):
        for part in command.split(" && "):
            assert re.search(rf"^.*{re.escape(part)}", script, flags=re.MULTILINE), part


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_files_and_flags_that_there_are(command, written):
    check(command, written)


@pytest.mark.parametrize("span", [span for span in SPANS if is_command(span)])
def test_so_does_every_command_within_a_line(span, written):
    check(span, written)


def test_every_flag_and_file_within_a_line_is_there():
    flags = [span for span in SPANS if not is_command(span) and FLAG.search(span) and span.split()[0] not in OUTSIDE]
    assert len(flags) > 40
    for span in flags:
        check_flags(span)
    names = [path for span in SPANS for path in PROJECT_PATH.findall(span)]
    assert len(names) > 30
    for name in names:
        assert list(ROOT.glob(name)), f"there is no {name}"


# Programs of others whose flags are not looked up.
OUTSIDE = {"scancel", "sysctl", "scontrol"}


@pytest.mark.parametrize(
    "wrong",
    [
        "python launch/train.py recipes/mnist_cnn.py --epoch 3",
        "python launch/train.py recipes/mnist_cnn.py --gradient-sync dpp",
        "python launch/train.py recipes/mnist_cn.py",
        "python launch/trian.py recipes/mnist_cnn.py",
        "python launch/predict.py runs/mnist_cnn/first a.png --pictur b.png --nmu 3",
        "python launch/compare.py recipes/sum_mlp.py --vary lr=1 --seeds 3 --batchsize 3",
        "python launch/export.py runs/mnist_cnn/first --to onnx",
        "python tests/benchmarks/loop.py --rounds 3",
        "accelerate launch --config_fil launch/accelerate/gpu.yaml launch/train.py recipes/mnist_cnn.py",
        "accelerate launch --config_file launch/accelerate/gpus.yaml launch/train.py recipes/mnist_cnn.py",
        "torchrun --nproc-per-nod 4 launch/train.py recipes/mnist_cnn.py",
        "torchrun --nproc-per-node 4 launch/train.py recipes/mnist_cnn.py --run_ 3",
        "pytest tests/test_lop.py",
        "pytest tests/training/test_trainer.py -k nosuchtest",
        "kubectl apply -f launch/kubernetes/jobs.yaml",
        "python -m nndist.recipes",
        "pyhton launch/train.py recipes/mnist_cnn.py",
    ],
)
def test_a_mistake_in_a_command_is_noticed(wrong):
    with pytest.raises(Wrong):
        check(wrong)


@pytest.mark.parametrize(
    "wrong", ["--shrad fsdp", "--keeps 3", "--shard fsdpp", "--wandb online|offlin", "--no-figuers"]
)
def test_a_mistake_in_a_flag_is_noticed(wrong):
    with pytest.raises(Wrong):
        check_flags(wrong)


@pytest.mark.parametrize("path", [*LAUNCH.values(), *RECIPES], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_in_docstrings_are_as_true(path):
    text = re.sub(r"\s*\\\n\s*", " ", ast.get_docstring(ast.parse(path.read_text())))
    found = re.findall(r"^ *((?:python|accelerate) .*)", text, flags=re.MULTILINE)
    assert found
    for command in found:
        check(command)


def anchors(page: Path) -> set[str]:
    """What a link may name after its "#"."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not link.startswith("https://")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_can_be_read_and_its_links_lead_somewhere(page):
    lines = [line for line in page.read_text().splitlines() if not line.startswith("|")]
    assert max(map(len, lines)) <= 125, max(lines, key=len)
    for link in links(page):
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_the_first_page_is_short_and_leads_to_the_others():
    assert len(PAGES[0].read_text().splitlines()) <= 250
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(PAGES[0])}
    assert linked >= set(PAGES[1:])


def test_what_the_first_page_says_of_results_stands_in_the_whole_table():
    """`launch/reproduce.py --write` writes the table of recipes/README.md only."""
    section = PAGES[0].read_text().partition("## What it reaches")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) >= 5 and set(rows) <= set((ROOT / "recipes/README.md").read_text().splitlines())


def test_the_map_of_the_library_names_every_wing_and_functions_that_there_are():
    text = (ROOT / "nndist/README.md").read_text()
    for path in (ROOT / "nndist").iterdir():
        is_wing = path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
        assert path.name.startswith("__") or not is_wing or f"`{path.stem}`" in text, path
    steps = re.findall(r"^\| `(nndist/\S+\.py)` \| `(\w+)` \|", text, flags=re.MULTILINE)
    assert len(steps) >= 10
    for file, name in steps:
        assert re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text(), flags=re.MULTILINE), (file, name)


def test_the_picture_is_legible_and_small():
    from PIL import Image

    (picture,) = re.findall(r"!\[[^\]]+\]\((\S+)\)", PAGES[0].read_text())
    assert (ROOT / picture).stat().st_size <= 150_000
    with Image.open(ROOT / picture) as image:
        assert image.width >= 1000 and image.height >= 600


def test_a_classifier_needs_the_first_three_methods_only(tmp_path, capsys):
    """What is said of the example: its loss, score, figures and predict are Classifier's."""
    text = next(block.text for block in BLOCKS if block.file == ("season.py", False))
    (tmp_path / "season.py").write_text(text.partition("    def loss(")[0].replace("Recipe", "Classifier"))
    nndist.train(tmp_path / "season.py", check=True, runs_dir=tmp_path, threads=1)
    assert "test/accuracy" in capsys.readouterr().out


def test_the_example_of_the_contract_is_a_recipe(tmp_path, capsys):
    """`python -m pydoc nndist.recipe.contract` opens with it."""
    example = re.search(
        r"(?:^    .*\n|^\n)+", nndist.recipe.contract.__doc__.partition("The minimum:\n\n")[2], flags=re.MULTILINE
    )
    imports = "from dataclasses import dataclass\nimport torch\nfrom torch import nn\nfrom nndist import *\n"
    (tmp_path / "sums.py").write_text(imports + textwrap.dedent(example[0]))
    nndist.train(tmp_path / "sums.py", check=True, runs_dir=tmp_path, threads=1)
    assert "test/loss" in capsys.readouterr().out


def test_a_script_and_its_recipe_give_the_same(tmp_path, monkeypatch, capsys):
    """The script of recipes/README.md, given its seed and its examples as the recipe has them, ends in its weights."""
    import torch.utils.data

    from nndist.data.sets import permutation
    from nndist.distributed.runtime import Runtime

    class InTheRecipesOrder:
        def __init__(self, dataset, batch_size, shuffle=False):
            self.dataset, self.batch_size, self.shuffle, self.epoch = dataset, batch_size, shuffle, 0

        def __len__(self):
            return -(-len(self.dataset) // self.batch_size)

        def __iter__(self):
            numbers = permutation(len(self.dataset), 0, self.epoch, self.shuffle)
            self.epoch += 1
            return (self.dataset[part] for part in numbers.split(self.batch_size))

    best = {}
    monkeypatch.setattr(torch, "save", lambda state, path: best.update({k: v.clone() for k, v in state.items()}))
    monkeypatch.setattr(torch, "load", lambda path: best)
    monkeypatch.setattr(torch.utils.data, "DataLoader", InTheRecipesOrder)
    script, recipe = (next(b.text for b in BLOCKS if b.file == (name, False)) for name in ("spirals_plain.py", SPIRALS))
    assert "torch.manual_seed(0)" in script
    script = script.replace("torch.manual_seed(0)", "Runtime.seed(None, 0)")
    exec(compile(script, "spirals_plain.py", "exec"), {"Runtime": Runtime})
    said = capsys.readouterr().out.split()
    monkeypatch.undo()
    (tmp_path / SPIRALS).write_text(recipe)
    settings = {"figures": False, "report": False, "wandb": "off", "threads": 1, "device": "cpu"}
    result = nndist.train(tmp_path / SPIRALS, run="it", runs_dir=tmp_path, **settings)
    weights = nndist.load_run(result.folder).networks["model"].state_dict()
    assert weights.keys() == best.keys()
    assert all(torch.equal(weights[name], best[name]) for name in best)  # the same operations in the same order
    assert result.scores["test/accuracy"] == pytest.approx(float(said[-1]))
    assert result.scores["test/loss"] == pytest.approx(float(said[-3]), rel=1e-4)
    assert result.scores["test/accuracy"] > 0.97


# The whole of the pages, as a reader follows them.


@pytest.fixture
def clean(tmp_path):
    """A copy of what is tracked, with what the reader is said to have: two pictures, and a folder of photographs."""
    from PIL import Image

    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    folder = tmp_path / "nndist"
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    with Image.open(ROOT / "nndist/datasets/mnist_sample.png") as sheet:
        digits = [sheet.crop((28 * column, 0, 28 * column + 28, 28)) for column in range(4)]
    (folder / "photographs").mkdir()
    for digit, name in zip(digits, ("digit", "photographs/a", "photographs/b", "photographs/c"), strict=True):
        digit.save(folder / f"{name}.png")
    for number in range(12):
        place = folder / "IMAGES" / ("train" if number < 8 else "val") / ("ant", "bee")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (20 * number, 80, 90)).save(place / f"{number}.JPEG")
    return folder


def on_one_core():
    """Two threads of a training on cores that other tests use too would wait for each other most of the time."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@pytest.mark.long
def test_every_block_runs_in_order_in_a_clean_folder(clean, tmp_path):
    (tmp_path / "home").mkdir()
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NNDIST", "WANDB", "PYTEST", "PYTHON"))
    }
    env |= {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(clean)}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "WANDB_MODE": "disabled"}
    # no network is needed: what would be fetched is refused at once, and MNIST's place is taken by the sample
    env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    seconds: dict[str, float] = {}
    done: set[str] = set()  # a command that several pages have is run once

    def run(arguments, title):
        began = time.perf_counter()
        words = shlex.split(title, comments=True)
        if words[0] == "python" and words[1].startswith("launch/") and not set("&|;<>{*") & set(title):
            # the pages have dozens of these; that the scripts start by themselves is tested elsewhere
            ended = forked(words[1], *words[2:], cwd=clean, env=env, alone=True)
        else:
            settings = {"capture_output": True, "text": True, "timeout": 300, "preexec_fn": on_one_core}
            ended = subprocess.run(arguments, cwd=clean, env=env, **settings)
        seconds[title] = time.perf_counter() - began
        assert ended.returncode == 0, (
            f"{title}: exit code {ended.returncode}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
        )
        return ended.stdout

    for block in BLOCKS:
        if block.file:
            write(block, clean)
        elif block.language == "python":
            (tmp_path / "block.py").write_text(block.text)
            run([sys.executable, str(tmp_path / "block.py")], f"{block.page.relative_to(ROOT)}, line {block.line}")
        for command in dict.fromkeys(block.commands):
            there = all(map(importlib.util.find_spec, PACKAGES.get(command, ())))
            if command not in NOT_RUN and command not in done and there:
                done.add(command)
                actual = command + SHORTENED.get(command, ("",))[0]
                assert EXPECTED.get(command, "") in run(["bash", "-c", actual], actual)
    for name in FILES:
        assert (clean / name).stat().st_size > 100, name
    print("\n".join(f"{taken:6.1f} s  {title}" for title, taken in seconds.items()))
