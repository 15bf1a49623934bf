"""A trained run, loaded for use: its history, its networks rebuilt from its folder, predictions, evaluation.

Nothing here writes to a run's folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..config import RunConfig, default_data_dir
from ..data.sets import Data
from ..distributed.runtime import Runtime, forget_devices, seed_of
from ..errors import UserError, first_line, place_of
from ..files import check
from ..prediction.answers import Predictions
from ..prediction.inputs import Inputs, NothingToAnswer, expanded, parts
from ..recipe import kept
from ..recipe.classifier import Classifier
from ..recipe.contract import Recipe
from ..recipe.loading import make_importable
from ..runs import checkpoint, network_state
from ..runs.fetching import folder_of
from ..runs.python_state import PythonState
from ..runs.random_state import random_state, set_random_state
from ..runs.reading import mapping, number, read_about
from ..runs.records import FILE, Records
from ..runs.tracking import History, read_snapshots
from ..training.description import DESCRIPTION_KIND
from ..training.evaluation import evaluate_set, evaluating
from ..training.networks import is_channels_last
from ..training.run import Result, load_data
from ..training.snapshot import restore_python
from .budget import Budget
from .evaluated import ClassCounts, Evaluated, SetScores
from .rebuilt_recipe import contradictions, found_by_data, rebuilt_recipe

LOADED_KIND = {f"{name.removesuffix('?')}?": kind for name, kind in DESCRIPTION_KIND.items()}
WeightsName = Literal["auto", "best", "last", "average"]


def load_run(
    run: str | Path | Result | LoadedRun, *, recipe: str | Path | type[Recipe] | None = None, trust: bool = False
) -> LoadedRun:
    """The run in a folder or at a URL, such as "runs/mnist_cnn/first", or that of a training's Result.

    `recipe`: for a run whose recipe source was not recorded, its file or (in a notebook) its class. `trust`: execute
    the recipe in the folder even if you have not trained it on this machine; read it first. It is then recorded as
    trusted. Raises UserError if there is no run, or no trusted recipe with the source that it was trained with.
    """
    if isinstance(run, LoadedRun):
        return run
    if isinstance(run, Result):
        return LoadedRun(run.folder, recipe, trust=True)
    return LoadedRun(folder_of(run).expanduser(), recipe, trust=trust)


def predict(run: str | Path | Result | LoadedRun, *inputs: Any, trust: bool = False, **options: Any) -> Predictions:
    """The predictions of a run's networks for inputs; takes and raises what `LoadedRun.predict` does."""
    return load_run(run, trust=trust).predict(*inputs, **options)


def evaluate(run: str | Path | Result | LoadedRun, *, trust: bool = False, **options: Any) -> Evaluated:
    """The scores of a run on its test sets, or on other data; takes and raises what `LoadedRun.evaluate` does."""
    return load_run(run, trust=trust).evaluate(**options)


@dataclass
class Weights:
    """Networks with the weights of one checkpoint.

    networks: by name, in evaluation mode on the CPU. step: optimizer steps taken. text: a description of the weights.
    """

    networks: dict[str, nn.Module]
    step: int
    text: str


class LoadedRun:
    """A run, read from its folder; raises UserError if there is none.

    folder: the run's. about: contents of run.json. notes: what the user should know, such as that the recipe's file has
    changed since.
    """

    def __init__(self, folder: Path, recipe: str | Path | type[Recipe] | None = None, *, trust: bool = False):
        self.folder = folder
        self.about = read_about(folder)
        try:
            check(self.about, LOADED_KIND)
        except ValueError as error:
            raise UserError(f"{folder}/run.json: {error}; restore it from a copy") from error
        self.notes: list[str] = []
        self._trained: set[str] = set()  # attributes of the recipe that training has changed
        self._given = recipe
        self._trust = trust

    @property
    def name(self) -> str:
        """<recipe>/<run>."""
        return f"{self.about.get('recipe')}/{self.folder.absolute().name}"

    @property
    def status(self) -> str:
        """The run's status, such as "finished", "running" or "preempted"."""
        return str(self.about.get("status", "unknown"))

    @property
    def fields(self) -> dict[str, Any]:
        """The recipe's hyper-parameters."""
        return dict(mapping(self.about.get("fields")))

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the last evaluation by name, such as "test/accuracy" (0 to 1).

        A test set that was evaluated once, after training, was so with the weights that validation chose: see `best`.
        """
        return dict(mapping(self.about.get("scores")))

    @property
    def best(self) -> dict[str, Any] | None:
        """{"step", "scores"} of the best evaluation; None unless the recipe names a best score."""
        return self.about.get("best")

    @property
    def data(self) -> str:
        """The data that it was trained on, such as "MNIST"."""
        return str(mapping(self.about.get("data")).get("source", "unknown"))

    @property
    def classes(self) -> list[str]:
        """The names of the classes, if any."""
        return list(self.about.get("classes") or [])

    @property
    def figures(self) -> list[Path]:
        """The files of the run's figures."""
        return sorted(path for path in self.folder.glob("figures/*") if not path.name.startswith("."))

    @cached_property
    def history(self) -> History:
        """The run's records: `history.series("test/accuracy")` returns two plain lists, steps and values."""
        snapshots, problems = read_snapshots(self.folder)
        records = Records.of_file(self.folder / FILE)
        problem = records.compare(self.about)
        self.notes += [*problems, *([problem] if problem else [])]
        return History(records, snapshots)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with the run's fields and what `data` set on it.

        Raises UserError if the source that it was trained with is neither in the folder nor at its original path.
        """
        return rebuilt_recipe(self.folder, self.about, self._given, self.notes, trusted=self._trust)

    def config(self, **settings: Any) -> RunConfig:
        """The run's settings, as far as they matter here, overridden by those given."""
        saved = mapping(self.about.get("settings"))
        names = ["seed", "precision", "channels_last", "data_source"]
        names += ["eval_batch_size", "num_workers", "cache_gigabytes"]
        values = {name: saved[name] for name in names if name in saved}
        directory = Path(str(saved.get("data_dir", "")))
        values["data_dir"] = directory if directory.is_dir() and saved.get("data_dir") else default_data_dir()
        if values.get("precision") == "fp16" and not torch.cuda.is_available():
            values["precision"] = "fp32"
            self.notes.append("trained in fp16, which needs a GPU: evaluated in fp32")
        config = RunConfig(**values)
        try:
            config.validate()
        except UserError as error:
            raise UserError(f"{self.folder}/run.json: settings: {error}; restore it from a copy") from error
        given = {name: value for name, value in settings.items() if value is not None}
        return dataclasses.replace(config, **given)

    # The networks.

    @cached_property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by name, in evaluation mode on the CPU, with the weights that `weights()` chooses."""
        return self.weights().networks

    def weights(self, which: WeightsName = "auto") -> Weights:
        """The networks with the best weights, the last, or the EMA ("average") of the last.

        "auto": the best if the recipe names a score, else the last; of either the EMA if there is one, as in
        evaluations. Raises UserError for missing or damaged weights.
        """
        root = self.folder / "checkpoints"
        newest = checkpoint.newest_good(root, self.notes.append)
        if newest is None:
            raise UserError(f"{self.folder}: holds no checkpoint yet; it is saved every 10 minutes and at the end")
        self.notes += contradictions(self.folder, self.about, newest.state)
        chosen, best = None, newest.state["best"]
        if which == "best" and best is None:
            raise UserError(f"--weights best: {self.folder} names no best score (--best); choose last or average")
        if best is not None and which in ("auto", "best"):
            try:
                chosen = checkpoint.read(root / checkpoint.folder_name(best["step"]))
            except checkpoint.DamagedCheckpoint as damage:
                if which == "best":
                    raise UserError(f"--weights best: damaged checkpoint: {damage}; choose --weights last") from damage
                self.notes.append(f"the best weights can't be read: {damage}")
        if chosen is None:
            chosen = checkpoint.read(root / checkpoint.folder_name(newest.step))
        averaged = "ema.safetensors" in chosen.tensors
        if which == "average" and not averaged:
            raise UserError(f"--weights average: {self.folder} has no EMA weights; train with --ema-decay")
        averaged = averaged and which != "last"
        networks = self._fresh_networks(chosen)
        try:
            python_state = PythonState(self.recipe, networks)
            network_state.load(networks, chosen.tensors, averaged)
            restore_python(chosen, python_state, networks)
            changed = (entry[0] for entry in chosen.state["ranks"][0].get("python", []))
            names = {path[1] for path in changed if len(path) > 1 and path[0] == "recipe"}
            self._trained = names & vars(self.recipe).keys()
        except checkpoint.DamagedCheckpoint as damage:
            raise UserError(f"{self.folder}: its weights do not fit the recipe's networks: {damage}") from damage
        for network in networks.values():
            network.eval().requires_grad_(False)
        is_best = best is not None and chosen.step == best["step"] and which in ("auto", "best")
        text = f"{'best' if is_best else 'last'} weights, step {chosen.step:,}"
        score = self.fields.get("best")
        if is_best and score in best["scores"] and best["scores"][score] is not None:
            text += f" ({score} {best['scores'][score]:.5g})"
        return Weights(networks, chosen.step, text + (", EMA" if averaged else ""))

    def _fresh_networks(self, weights: checkpoint.Checkpoint) -> dict[str, nn.Module]:
        """The recipe's networks, freshly built, for these weights.

        Raises UserError if building them needs something missing, or far more memory than the weights take.
        """
        recipe, place = self.recipe, f"{self.folder}: networks() of its recipe"
        make_importable(type(recipe))
        try:
            with torch.random.fork_rng(devices=[]), Budget(self.folder, weights.tensors):
                return recipe.networks()
        except UserError:
            raise
        except OSError as error:
            what = f"{error.filename} ({error.strerror})" if error.filename else str(error).partition("\n")[0]
            raise UserError(
                f"{place} reads {what}, which existed in training; a run is used without it: read weights in "
                "initial_weights(); what data() sets on self is stored in the run"
            ) from error
        except AttributeError as error:
            if error.obj is not recipe:
                raise
            raise UserError(
                f"{place} needs self.{error.name}, which is not stored in the run: data() must set it, to numbers, "
                "strings, lists, dicts or tensors of at most a million numbers"
            ) from error
        except Exception as error:  # raised by the recipe, for fields or data that it was never meant to have
            raise UserError(
                f"{self.folder}: no networks can be built with the fields in run.json ({type(error).__name__}: "
                f"{first_line(error)}); restore run.json from a copy"
            ) from error

    # Predict and evaluate.

    def predict(
        self,
        *inputs: Any,
        num: int | None = None,
        seed: int = 0,
        weights: WeightsName = "auto",
        data_dir: Path | str | None = None,
        cpu: bool = False,
    ) -> Predictions:
        """The networks' predictions for inputs.

        inputs: images (files, folders, PIL images, arrays of 0 to 255, [h, w] or [h, w, 3]), numbers (CSV files, rows,
        "0.5"), or texts, as the recipe takes them; "-" is standard input. num: how many images or characters a
        generative network generates, seed: of its random numbers. Unreadable inputs become `failures` of the result;
        raises UserError if none can be used.
        """
        recipe, loaded = self.recipe, self.weights(weights)
        device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
        for network in loaded.networks.values():
            network.to(device)
        if num is not None and num < 1:
            raise UserError(f"--num {num}: must be at least 1")
        found = Predictions(f"{self.name}: {loaded.text}, trained on {self.data}")
        said: list[str] = []
        data: list[Data] = []

        def at_hand() -> Data:
            if not data:
                data.append(self.data_at_hand(data_dir).to(device))
            return data[0]

        columns = self.about.get("columns")
        make_importable(type(recipe))
        given = [item for one in inputs for item in (one if _is_list_of_items(one) else [one])]
        with evaluating(loaded.networks):
            for some in parts(expanded(given)):
                read = Inputs(
                    some,
                    data=at_hand,
                    classes=self.classes,
                    device=device,
                    num=num,
                    seed=seed,
                    columns=columns,
                    ranges=ranges_of(self.about),
                )
                try:
                    found.add(recipe.predict(loaded.networks, read), read)
                except NothingToAnswer:
                    pass
                except UserError as error:
                    raise UserError(f"{self.about.get('recipe')}: {error}") from error
                except AttributeError as error:
                    if error.obj is not recipe:
                        raise
                    raise UserError(
                        f"{self.about.get('recipe')}: predict() needs self.{error.name}, which is not stored in the "
                        f"run; {kept.REMEDY}"
                    ) from error
                found.failures += read.failures
                said += read.notes
        found.notes = list(dict.fromkeys([*self.notes, *said]))
        return found

    def data_at_hand(self, data_dir: Path | str | None = None) -> Data:
        """The recipe's data, which define how examples are read: the run's own or, if unavailable, the sample.

        Nothing is downloaded; raises UserError if neither is available.
        """
        return self.recipe_at_hand(data_dir)[1]

    def recipe_at_hand(self, data_dir: Path | str | None = None) -> tuple[Recipe, Data]:
        """A copy of the recipe, with the attributes of the trained one, and the data that its `data` returned.

        Takes and raises what `data_at_hand` does.
        """
        config = self.config(data_dir=Path(data_dir) if data_dir else None, progress=False)
        own = config.data_config(download=False)
        reason = ""
        for wanted in (own, dataclasses.replace(own, source="sample")):
            recipe = self._copied({})
            try:
                with _seeded_as_in_training(config.seed):
                    data = recipe.data(wanted)
            except UserError as error:
                reason = reason or str(error)
                continue
            except OSError as error:
                what = f"{error.filename}: {error.strerror}" if error.filename else first_line(error)
                reason = reason or f"{what}; its data() reads it, so restore it"
                continue
            except Exception as error:  # raised by the recipe or a library of it where the files are not found
                reason = reason or f"data() of its recipe: {type(error).__name__}: {first_line(error)}{place_of(error)}"
                continue
            vars(recipe).update(self._attributes())
            if data.source != self.data:
                self.notes.append(f"{self.data} is not available: inputs are prepared as for {data.source}")
            return recipe, data
        raise UserError(reason)

    def _attributes(self) -> dict[str, Any]:
        """What the recipe has besides its fields, and the fields that training changed.

        Set by `data` in training, by `networks` when they were built here, and by the hooks of training.
        """
        fields = {field.name for field in dataclasses.fields(self.recipe)} - self._trained
        return {name: value for name, value in vars(self.recipe).items() if name not in fields}

    def _copied(self, fields: Mapping[str, Any]) -> Recipe:
        """A copy of the recipe with other fields, for `data`, which may keep attributes that are there already."""
        recipe = dataclasses.replace(self.recipe, **fields)
        own = vars(recipe).keys() - (self._trained - fields.keys())  # of __post_init__, too: they depend on the fields
        # those of training anew: data() may change them in-place
        there = {**self._attributes(), **found_by_data(self.folder, self.about)}
        vars(recipe).update({name: value for name, value in there.items() if name not in own})
        return recipe

    def evaluate(
        self,
        *,
        data_source: str | None = None,
        data_dir: Path | str | None = None,
        weights: WeightsName = "auto",
        cpu: bool = False,
        threads: int | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> Evaluated:
        """The mean of each score, over every example once, and the confusion matrix; called on all processes.

        data_source: a different named set, such as "fashion-mnist". fields: recipe fields that select data, such as
        {"images": folder}. Raises UserError if the data are not available or do not fit.
        """
        config = self.config(
            data_source=data_source, data_dir=Path(data_dir) if data_dir else None, cpu=cpu, threads=threads
        )
        runtime = Runtime(
            precision=config.precision, cpu=cpu, timeout_seconds=config.timeout_seconds, threads=config.threads
        )
        loaded = self.weights(weights)
        recipe = self._copied(fields or {})
        recipe.validate()
        before = dict(vars(recipe))
        data = load_data(recipe, config, runtime).to(runtime.device)
        # data() has set attributes from these data, such as means; the network needs those that it was trained with
        said = self._other_values(
            {name: value for name, value in recipe.found().items() if value is not before.get(name)}
        )
        vars(recipe).update({**self._attributes(), **(fields or {})})
        said += self._other_classes(data)
        layout = is_channels_last(config.channels_last, self.recipe)
        networks = {name: runtime.place(network, channels_last=layout) for name, network in loaded.networks.items()}
        sets: dict[str, SetScores] = {}
        for name, examples in data.evaluation_sets().items():
            counts = ClassCounts(data.classes)
            if isinstance(recipe, Classifier):
                counts.labels_last, counts.ignored = recipe.labels_are_last(), recipe.ignore_index
            size = config.eval_batch_size
            evaluation = evaluate_set(
                recipe, networks, data, examples, runtime, size, counts.add, seed=config.seed, notes=said
            )
            matrix = counts.total(runtime, evaluation.scores)
            said += [counts.note] if counts.note else []
            if matrix is not None:
                num = int(matrix.sum()) + counts.left_out
                assert num == len(examples), f"{num} answers for {len(examples)} examples"
            sets[name] = SetScores(len(examples), evaluation.scores, matrix)
        runtime.done()
        forget_devices()
        classes = [str(c) for c in data.classes] or self.classes
        notes = list(dict.fromkeys([*self.notes, *said, *([data.note] if data.note else [])]))
        return Evaluated(self.name, loaded.text, self.data, data.source, classes, sets, runtime.describe(), notes)

    def _other_values(self, found: Mapping[str, Any]) -> list[str]:
        """A note if `data` has set attributes to other values than in training, where `Data.prepare` can't tell."""
        in_training = found_by_data(self.folder, self.about)
        other = [
            f"self.{name}"
            for name, value in found.items()
            if name in in_training and not isinstance(value, Path) and not kept.alike(value, in_training[name])
        ]
        if not other:
            return []
        some = ", ".join(other[:3]) + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        return [
            f"data() sets {some} to other values on these data than in training, whose values are used: examples that "
            "data() itself scaled or coded do not fit the network; let prepare or nndist.Scaled do it"
        ]

    def _other_classes(self, data: Data) -> list[str]:
        """A note if the data name other classes; raises UserError if not as many, or the same in another order."""
        ours, theirs = self.classes, [str(c) for c in data.classes]
        if not ours or ours == theirs:
            return []
        if len(theirs) != len(ours):
            raise UserError(
                f"{data.source}: has {len(theirs)} classes, but {self.data}, the training data, has {len(ours)}; name "
                "different data"
            )
        number = next(number for number, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        if sorted(ours) == sorted(theirs):
            raise UserError(
                f"{data.source}: class {number} is {theirs[number]!r}, in training {ours[number]!r}: the same "
                "classes in another order; let data() sort them, or keep their order in an attribute of self"
            )
        return [f"{data.source}: class {number} is {theirs[number]!r}, in training {ours[number]!r}"]


@contextlib.contextmanager
def _seeded_as_in_training(seed: int) -> Iterator[None]:
    """Context manager: Python's, NumPy's and torch's generators are seeded as for `data` in training, then restored."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    before = random_state(device)
    Runtime.seed_all(seed_of(seed))
    try:
        yield
    finally:
        set_random_state(*before, device)


def ranges_of(about: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The lowest and highest number of each column that the networks take; empty if run.json does not say."""
    for entries in mapping(about.get("inputs")).values():
        entry = mapping(entries[0]) if isinstance(entries, list) and entries else {}
        low, high = entry.get("low"), entry.get("high")
        if not isinstance(low, list) or not isinstance(high, list) or len(low) != len(high):
            continue
        if all(number(value) is not None for value in [*low, *high]):
            return list(zip(low, high, strict=True))
    return []


def _is_list_of_items(value: Any) -> bool:
    """Whether an argument is a list of inputs (paths, images or rows) rather than one input."""
    return isinstance(value, list | tuple) and any(not isinstance(item, int | float) for item in value)
