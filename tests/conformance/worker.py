"""Called in 1 or 3 processes: trains many habits one after the other, and writes down what came out of each."""

import ast
import contextlib
import copy
import io
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from conformance.habit import ACCUMULATED
from conformance.reference import Generators, Loop, train_replicas
from safetensors.torch import save_file

import nndist
from nndist.distributed.runtime import Runtime
from nndist.errors import TrainingError, UserError
from nndist.recipe.loading import load_recipe
from nndist.training.trainer import Trainer

NEEDED = {
    "alone": ["plain"],
    "accumulated": ["plain_accumulated"],
    "resumed": ["alone"],
    "three": ["plain", "plain_three"],
    "three_resumed": ["three"],
}
"""What each mode is compared with, and resumes from."""
HABITS = Path(__file__).parent / "habits"
SAVED_AT = 5


def write_alone(name, folder):
    """Writes a module that holds one habit of its theme and what it uses, as a recipe's file would."""
    theme, _, habit = name.partition(".")
    text = (HABITS / f"{theme}.py").read_text()
    lines, nodes = text.splitlines(), ast.parse(text).body
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    used, more = set(), {habit}
    while more:
        kept = [node for node in nodes if node in imports or defined_by(node) & (used := used | more)]
        named = {part.id for node in kept for part in ast.walk(node) if isinstance(part, ast.Name)}
        more = named - used
    pieces = ["\n".join(lines[first_line(node) - 1 : node.end_lineno]) for node in kept]
    file = alone(name, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n\n".join(pieces) + "\n")


def alone(name, folder):
    return folder / f"habits/{name}/{name.partition('.')[0]}.py"


def defined_by(node):
    """The names that a statement at the top of a module gives a value."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def first_line(node):
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def load(name, folder):
    """The habit's class, from a freshly loaded module."""
    return load_recipe(f"{alone(name, folder)}:{name.partition('.')[2]}")


def named_tensors(networks):
    """Every parameter and buffer by name, and nothing that a state_dict may make of them."""
    found = {}
    for name, network in networks.items():
        for key, tensor in (*network.named_parameters(remove_duplicate=False), *network.named_buffers()):
            tensor = tensor.detach()
            tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            found[f"{name}.{key}"] = tensor.contiguous().clone()
    return found


def kill_after_save(whole, place, recipe, name):
    """Leaves the folder of a run as a process leaves it that is killed after a save and before the next."""
    if not (whole / recipe / name).exists():  # it was refused
        return
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.copytree(whole / recipe / name, place / recipe / name)
        for path in (place / recipe / name / "checkpoints").iterdir():
            if int(path.name.rpartition("-")[2]) > SAVED_AT:
                shutil.rmtree(path)
        page = place / recipe / name / "run.json"
        page.write_text(json.dumps({**json.loads(page.read_text()), "status": "running", "step": SAVED_AT}))
    if "RANK" in os.environ:
        Runtime(cpu=True, timeout_seconds=30, threads=1).barrier()


def outcome(recipe, networks, losses, scores, **more):
    tensors = named_tensors(networks)
    for name, value in recipe.witness(networks).items():
        tensors[f"witness.{name}"] = torch.as_tensor(value).detach().clone().contiguous()
    return {"losses": losses, "scores": scores, **more}, tensors


def begin(name, folder, accumulate=1):
    """What the loop by hand starts from, with the random numbers of a run of seed 0."""
    recipe = load(name, folder)()
    Runtime.seed(None, 0)
    data = recipe.data(None)
    Runtime.seed(None, 0)
    networks = recipe.networks()
    recipe.initialise(networks, data)
    for network in networks.values():
        network.train()
    return recipe, networks, Loop(recipe, data, accumulate)


def by_hand(name, mode, folder):
    recipe, networks, loop = begin(name, folder, accumulate=2 if mode == "plain_accumulated" else 1)
    Runtime.seed(None, 0, rank=0)
    recipe.train(networks, loop)
    return outcome(recipe, networks, loop.losses, loop.scores)


def by_hand_three_times(name, mode, folder):
    begun = [begin(name, folder) for _ in range(3)]
    recipes, networks, loops = map(list, zip(*begun, strict=True))
    generators = []
    for rank in range(3):
        Runtime.seed(None, 0, rank=rank)
        generators.append(Generators())
    optimizers = [recipe.optimizer("model", nets["model"]) for recipe, nets in zip(recipes, networks, strict=True)]
    train_replicas(recipes, networks, loops, generators, optimizers)
    return outcome(recipes[0], networks[0], loops[0].losses, loops[0].scores)


def by_library(name, mode, folder):
    recipe = load(name, folder)()
    taken, trained = [], [recipe]
    take_step = Trainer.take_step

    def counted(trainer, batch):
        done = take_step(trainer, batch)
        taken.append(trainer.step)
        trained[:] = [trainer.recipe]
        return done

    settings = {"accumulate": 2} if mode == ACCUMULATED else {}
    place = folder / "runs" / mode
    if "resumed" in mode:
        kill_after_save(folder / "runs" / NEEDED[mode][0], place, recipe.name, name)
    Trainer.take_step = counted
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            result = nndist.train(
                recipe,
                run=name,
                runs_dir=place,
                progress=False,
                figures=False,
                report=False,
                wandb="off",
                threads=1,
                log_every=1,
                save_every=f"{SAVED_AT} steps",
                keep=100,
                timeout_seconds=30,
                **settings,
            )
    except (UserError, TrainingError) as error:
        return {"error": f"{type(error).__name__}: {error}", "steps": len(taken), "said": output.getvalue()}, {}
    finally:
        Trainer.take_step = take_step
    records = result.history.records
    names = {key for record in records for key in record if key.startswith("train/loss")}
    losses = {
        name.removeprefix("train/loss").lstrip("/") or "model": [r[name] for r in records if name in r]
        for name in names
    }
    scores = [record["test/loss"] for record in records if "test/loss" in record]
    more = {"steps": len(taken), "said": output.getvalue()}
    return outcome(trained[0], result.networks, losses, scores, **more)


WAYS = {"plain": by_hand, "plain_accumulated": by_hand, "plain_three": by_hand_three_times}


def main(mode, folder, *names):
    folder = Path(folder)
    rank = int(os.environ.get("RANK", 0))
    torch.set_num_threads(1)
    os.fsync = lambda file: None  # no machine loses its power here, and it takes a third of the time
    for name in names:
        failed = ""
        run = WAYS.get(mode, by_library)
        try:
            described, tensors = run(name, mode, folder)
            failed = "in mid-training" if "error" in described and described["steps"] else ""
        except Exception:
            failed = traceback.format_exc()
            described, tensors = {"error": failed}, {}
        in_step = failed == "in mid-training"  # so did the others, and the first of them tells of it
        if rank == 0 or (failed and not in_step):
            written = folder / mode / name
            written.parent.mkdir(parents=True, exist_ok=True)
            save_file(copy.deepcopy(tensors), f"{written}.safetensors")
            Path(f"{written}.part{rank}").write_text(json.dumps(described))
            Path(f"{written}.part{rank}").rename(f"{written}.json")
        if failed and dist.is_initialized():
            print(failed, flush=True)
            time.sleep(1.0 if in_step and rank else 0.0)  # who ends with an error has the others killed
            sys.exit(1)  # the processes would wait for each other: the next launch continues after this habit
