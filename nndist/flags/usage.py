"""The one-screen --help of train.py: examples, the recipe's own fields, all other flags by subject."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import shlex
import textwrap
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..recipe.contract import Recipe
from ..recipe.fields import hints_of, options_of, to_json

COLUMNS = 80
INDENT = 11
# Flags that are missing here are shown under "other".
SUBJECTS = {
    "training": "epochs batch_size lr seed shuffle schedule warmup_steps decay_steps decay_factor clip_norm ema_decay "
    "drop_last hold_out fold",
    "fine-tune": "init_from freeze unfreeze_at lr_scale",
    "scores": "evaluate_every best best_is patience eval_batch_size compare_with",
    "data": "data_source data_dir num_workers cache_gigabytes",
    "the run": "run runs_dir local_runs_dir resume allow_change save_every keep max_steps time preempt_signal notify "
    "engine traceback",
    "device": "device cpu threads precision tf32 compile channels_last deterministic cudnn_benchmark accumulate "
    "gradient_sync shard gradient_compression weight_compression checkpoint_activations timeout_seconds",
    "proof": "recheck_every fingerprint_every",
    "shown": "log_every progress figures track report wandb wandb_project wandb_artifact wandb_alert profile "
    "profile_ranks",
    "instead": "check summary find_lr find_batch",
}


def overview(kind: type[Recipe], path: str) -> str:
    """The text of `nndist train PATH --help` in 80 columns; every flag with its default."""
    title = first_sentence(" ".join((inspect.getdoc(inspect.getmodule(kind)) or kind.__doc__ or "").split()))
    lines = [*textwrap.wrap(f"{title}.", COLUMNS), "", *examples(path), ""]
    hints = hints_of(kind) | hints_of(RunConfig)
    found = {f.name: f for f in (*dataclasses.fields(kind), *dataclasses.fields(RunConfig))}
    own = [f.name for f in dataclasses.fields(kind) if f.name not in {f.name for f in dataclasses.fields(Recipe)}]
    flags = {name: flag(name, hints[name], default_of(field)) for name, field in found.items()}
    for name, field in found.items():  # whose value may be of any length
        if os.environ.get(variable := field.metadata.get("variable", "")):
            flags[name] = f"--{name.replace('_', '-')} ${variable}"
    texts = texts_of_fields(kind)
    lines.append(f"usage: nndist train {path} [FLAGS]")
    lines += [f"{kind.__name__}'s own:"] * bool(own)
    for name in own:
        head = f"  {flags[name]}"
        about = texts.get(name, "")
        if len(head) > COLUMNS and "|" in head:  # many choices: the default beside the flag, the others in the text
            head, *others = head.split("|")
            about = f"{about} Or {', '.join(others)}."
        text = textwrap.wrap(about, COLUMNS - 4)
        if text and len(head) + 2 + len(text[0]) <= COLUMNS and len(text) == 1:
            lines.append(f"{head}  {text[0]}")
        else:
            lines += [head, *(f"    {line}" for line in text)]
    rest = [name for name in found if name not in own]
    subjects = {subject: names.split() for subject, names in SUBJECTS.items()}
    subjects["other"] = [name for name in rest if not any(name in names for names in subjects.values())]
    for subject, names in subjects.items():
        # a flag and its value stay on one line
        joined = "  ".join(flags[name].replace(" ", "\0") for name in names if name in rest)
        wrapper = textwrap.TextWrapper(COLUMNS, break_on_hyphens=False)
        wrapper.initial_indent, wrapper.subsequent_indent = f"{subject:<{INDENT}}", " " * INDENT
        if joined:
            lines += [line.replace("\0", " ") for line in wrapper.wrap(joined)]
    lines += ["", "Values are defaults; capitals mean there is none. --help-all explains each."]
    return "\n".join(lines)


def examples(path: str) -> list[str]:
    """Commands to copy."""
    shown = shlex.quote(path)
    return [
        f"nndist train {shown} --epochs 3 --run first",
        f"accelerate launch -m nndist train {shown}",
        f"nndist train {shown} --check",
    ]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default; None if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def flag(name: str, hint: Any, default: Any) -> str:
    """A flag with its default, its choices (the default first), or its type in capitals."""
    dashed = name.replace("_", "-")
    if isinstance(default, bool):
        return f"--no-{dashed}" if default else f"--{dashed}"
    options = options_of(hint)
    choices = [
        str(c) for option in options if typing.get_origin(option) is typing.Literal for c in typing.get_args(option)
    ]
    choices += [
        member
        for option in options
        if inspect.isclass(option) and issubclass(option, Enum)
        for member in option.__members__
    ]
    default = to_json(default) if isinstance(default, Enum) else default
    if choices:
        first = [str(default)] if default is not None else []
        return f"--{dashed} {'|'.join([*first, *(c for c in choices if c not in first)])}"
    if default is None or default == ():
        kind = next((option for option in options if option is not type(None)), str)
        names = {int: "INT", float: "FLOAT", Path: "PATH"}
        return f"--{dashed} {names.get(kind, 'NAME' if kind is str else 'NAME ...')}"
    if isinstance(default, tuple | list):
        return f"--{dashed} {' '.join(shlex.quote(str(to_json(item))) for item in default)}"
    if isinstance(default, Path):
        near = default.expanduser()
        home = Path.home()
        return f"--{dashed} {Path('~') / near.relative_to(home) if near.is_relative_to(home) else default}"
    return f"--{dashed} {shlex.quote(str(default))}"


def texts_of_fields(kind: type[Recipe]) -> dict[str, str]:
    """The docstring below each field of a recipe's class, by field."""
    texts: dict[str, str] = {}
    source = kind._source
    classes = [n for n in ast.parse(source or b"").body if isinstance(n, ast.ClassDef) and n.name == kind.__name__]
    for node in classes:
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                texts[field.target.id] = " ".join(text.value.value.split())
    return texts


def first_sentence(text: str) -> str:
    """The text before the first full stop at its end or before a space and a letter or backquote."""
    return re.split(r"\.(?= [A-Za-z`]|$)", text, maxsplit=1)[0]
