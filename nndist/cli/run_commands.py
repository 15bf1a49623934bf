"""The commands that use a trained run, predict, evaluate and export; in the form of `commands`."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from ..errors import UserError
from .commands import Parser, mistakes_in_one_line


def of_a_run(command: str, epilog: str | None = None) -> Parser:
    """A parser with the flags of every command that uses a run's networks."""
    parser = Parser(command, epilog).with_traceback()
    parser.add_argument("run", metavar="RUN", help="the run's folder or URL, such as runs/mnist_cnn/first")
    choices = ["best", "last", "average"]
    help = "default: the best if the recipe names a score, else the last; of either the EMA if there is one"
    parser.add_argument("--weights", choices=choices, default="auto", help=help)
    help = "a recipe's file to use instead of the run's own copy"
    parser.add_argument("--recipe", metavar="FILE", help=help)
    help = "execute the recipe in the run's folder although you have not trained it here; read it first"
    parser.add_argument("--trust", action="store_true", help=help)
    parser.add_argument("--data-dir", type=Path, help="folder of the data files (default: as in the training)")
    return parser


def predict_command(arguments: list[str]) -> None:
    """`nndist predict`: prints a table or JSON; exits with 0, or 2 (bad input, or an input that can't be read)."""
    parser = of_a_run("predict")
    help = "image files or folders of them; CSV files or numbers; texts or files of lines; - is standard input"
    parser.add_argument("inputs", metavar="INPUT", nargs="*", help=help)
    parser.add_argument("--json", action="store_true", help="print JSON, with all probabilities")
    parser.add_argument("--picture", metavar="FILE.png", type=Path, help="draw the images with their answers")
    parser.add_argument("--num", type=int, help="how many images to make (16), or characters to write (200)")
    parser.add_argument("--seed", type=int, default=0, help="of generated outputs (default: 0)")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    with mistakes_in_one_line(arguments):
        options = parser.parse_intermixed_args(arguments)
        check_suffix("--picture", options.picture, ".png")
        from ..trained.loaded_run import load_run

        found = load_run(options.run, recipe=options.recipe, trust=options.trust).predict(
            *options.inputs,
            num=options.num,
            seed=options.seed,
            weights=options.weights,
            data_dir=options.data_dir,
            cpu=options.cpu,
        )
        if options.json:
            import json

            about = {"run": found.title, "notes": found.notes, "failures": found.failures}
            print(json.dumps({**about, "predictions": found.rows()}, indent=1, ensure_ascii=False))
        else:
            lines = [f"run      {found.title}", *(f"note     {note}" for note in found.notes)]
            if len(found):
                lines += ["", *found.table(min(80, shutil.get_terminal_size().columns))]
            print("\n".join(lines), flush=True)
        if options.picture and len(found):
            write_figure(options.picture, found.figure(), say=not options.json)
    for failure in found.failures:
        print(f"error: {failure}", file=sys.stderr, flush=True)
    sys.exit(2 if found.failures else 0)


def evaluate_command(arguments: list[str]) -> None:
    """`nndist evaluate`: prints scores and what each class was taken for; exits with 0 or 2 (bad input)."""
    epilog = "Fields of the recipe that name data are flags too, such as --images FOLDER."
    parser = of_a_run("evaluate", epilog)
    parser.add_argument("--data-source", help="a different set, such as fashion-mnist (default: as in the training)")
    parser.add_argument("--json", action="store_true", help="print JSON, with the full confusion matrix")
    parser.add_argument("--figure", metavar="FILE.png", type=Path, help="draw the confusion matrix")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads per process")
    rank = int(os.environ.get("RANK", 0))
    from .train import die_with_launcher, fail, leave, where_from

    die_with_launcher()
    try:
        options, rest = parser.parse_known_args(arguments)
        check_suffix("--figure", options.figure, ".png")
        from ..trained.loaded_run import load_run

        run = load_run(options.run, recipe=options.recipe, trust=options.trust)
        found = run.evaluate(
            data_source=options.data_source,
            data_dir=options.data_dir,
            weights=options.weights,
            cpu=options.cpu,
            threads=options.threads,
            fields=fields_given(run.recipe, rest),
        )
        if rank == 0:
            import json

            text = json.dumps(found.json_value(), indent=1, ensure_ascii=False) if options.json else str(found)
            print(text, flush=True)
            if options.figure:
                write_figure(options.figure, found.figure(), say=not options.json)
    except UserError as error:
        fail(str(error), rank, 2)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), rank, 2)
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        fail(where_from(error, rank), rank, 1)
    leave()


def fields_given(recipe: Any, flags: list[str]) -> dict[str, Any]:
    """Parses flags such as --images FOLDER as fields of the recipe; raises UserError for other flags."""
    import dataclasses

    from ..recipe.fields import from_text, hints_of, to_json

    given: dict[str, Any] = {}
    hints = hints_of(type(recipe))
    names = {field.name for field in dataclasses.fields(recipe)}
    while flags:
        flag, _, value = flags.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in names:
            raise UserError(f"{flag}: neither a flag nor a field of the recipe (nndist evaluate --help shows examples)")
        if not value:
            if not flags:
                raise UserError(f"{flag}: needs a value")
            value = flags.pop(0)
        now = getattr(recipe, name)
        try:
            given[name] = from_text(value, hints.get(name), now)
        except ValueError:
            what = "a number, such as" if isinstance(now, int | float) and not isinstance(now, bool) else "such as"
            raise UserError(f"{flag} {value}: must be {what} {to_json(now)}") from None
    return given


def export_command(arguments: list[str]) -> None:
    """`nndist export`: prints how the answers compare; exits with 0, 1 (they differ, no file) or 2 (bad input)."""
    parser = of_a_run("export")
    parser.add_argument("--to", choices=["onnx", "torch-export", "safetensors"], required=True)
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="the file to write")
    parser.add_argument("--network", help="which network, if the recipe has several")
    help = "largest allowed difference from the network's answers, relative to their maximum (default: 1e-4)"
    parser.add_argument("--tolerance", type=float, default=1e-4, help=help)
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        from ..errors import TrainingError
        from ..trained.export import export
        from ..trained.loaded_run import load_run

        try:
            lines = export(
                load_run(options.run, recipe=options.recipe, trust=options.trust),
                options.to,
                options.output,
                network=options.network,
                weights=options.weights,
                data_dir=options.data_dir,
                tolerance=options.tolerance,
            )
        except TrainingError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
    print("\n".join(lines))


def check_suffix(flag: str, path: Path | None, suffix: str) -> None:
    """Raises UserError if a file's name has a different suffix or its folder does not exist."""
    if path is not None and path.suffix.lower() != suffix:
        raise UserError(f"{flag} {path}: the file's name must end in {suffix}")
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}")


def write_figure(path: Path, figure: Any, *, say: bool) -> None:
    """Writes a figure as PNG and prints its path."""
    from .. import figures

    written = figures.save({path.stem: figure}, path.parent, say=lambda line: print(line, file=sys.stderr))
    if say:
        print("\n".join(f"picture  {file}" for file in written), flush=True)
