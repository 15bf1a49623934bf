"""The commands that train parts of a run again, bit for bit; in the form of `commands`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..runs.fetching import folder_of
from .commands import Parser, mistakes_in_one_line

if TYPE_CHECKING:
    from ..experiments.replay import Replay


def replay_command(arguments: list[str]) -> None:
    """`nndist replay`: takes a step of a run again and shows what happened in it; exits with 0, 1 (it differs) or 2."""
    parser = Parser("replay").with_traceback()
    parser.add_argument("run", metavar="RUN", type=folder_of, help="the folder or URL of a run")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the optimizer step, counted from 1")
    help = "continue with another value"
    parser.add_argument("--vary", action="append", default=[], metavar="FIELD=VALUE", help=help)
    parser.add_argument(
        "--for", type=int, default=100, metavar="N", dest="steps", help="steps to continue for (default: 100)"
    )
    parser.add_argument("--trust", action="store_true", help="execute the recipe in the folder; read it first")
    parser.add_argument("--json", action="store_true", help="print JSON")
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        if options.step < 1:
            raise UserError(f"--step {options.step}: steps count from 1")
        if options.steps < 1:
            raise UserError(f"--for {options.steps}: must be at least 1")
        changes = dict(pair_of(text) for text in options.vary)
        code = vary(options, changes) if changes else examine_step(options)
    from .train import leave

    leave(code)


def pair_of(text: str) -> tuple[str, str]:
    """The field and the value of "lr=0.05"; raises UserError."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise UserError(f"--vary {text}: give a field of the recipe and its value, such as lr=0.05")
    return name, value


def examine_step(options: Any) -> int:
    """Replays the step, prints what happened in it and writes its page; returns the exit code."""
    from ..experiments.examine import Examination
    from ..experiments.replay import Replay, summary
    from ..experiments.replay_page import lines_of, write

    replay = Replay(options.run, options.step, trust=options.trust)
    examination = Examination()
    say_how_far(replay, options)
    replay.advance(options.step, examination)
    shown = summary(replay)
    found = examination.found
    if replay.trainer.runtime.is_main:
        path = write(replay, found, shown)
        if options.json:
            first = None if found.first is None else vars(found.first)
            rest = {"examples": found.examples, "losses": found.losses, "layers": [vars(one) for one in found.layers]}
            print(json.dumps({**shown, **rest, "first": first, "page": str(path)}))
        else:
            print("\n".join([*lines_of(replay, found, shown), f"\npage     {path}"]), flush=True)
    differs = bool(shown["record_differs"]) or shown["checkpoint"] not in ("none", "identical")
    return int(replay.trainer.runtime.from_main(differs))


def say_how_far(replay: Replay, options: Any) -> None:
    """Says what is about to be trained again, which may take a while."""
    if replay.trainer.runtime.is_main and not options.json and options.step - replay.began > 1:
        print(f"training steps {replay.began + 1:,} to {options.step:,} again", file=sys.stderr, flush=True)


def vary(options: Any, changes: dict[str, str]) -> int:
    """Continues from the step with other values of the recipe's fields, beside the run; returns the exit code."""
    import shutil
    import tempfile

    from ..experiments.replay import Replay
    from ..experiments.replay_page import write_variation

    original = Replay(options.run, options.step + 1, trust=options.trust)
    runtime = original.trainer.runtime
    say_how_far(original, options)
    if original.began < options.step:
        original.advance(options.step)
    scratch = Path(runtime.from_main(tempfile.mkdtemp(prefix="nndist-replay-") if runtime.is_main else ""))
    try:
        root = original.published(scratch)
        other = Replay(options.run, options.step + 1, trust=options.trust, changes=changes, root=root)
        last = min(options.step + options.steps, other.trainer.total_steps, original.trainer.total_steps)
        other.advance(last)
        original.advance(last)
    finally:
        if runtime.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
    if runtime.is_main:
        said = " ".join(f"{name}={value}" for name, value in changes.items())
        curves = curves_of({"as it was": original, said: other}, options.step)
        path = write_variation(original, changes, options.step, curves)
        for metric, lines in curves.items():
            for name, (steps, values) in lines.items():
                print(f"{metric:<20} {values[-1]:<12.5g} at step {steps[-1]:,}, {name}")
        print(f"page     {path}", flush=True)
    return 0


def curves_of(replays: dict[str, Any], first: int) -> dict[str, dict[str, Any]]:
    """Losses and scores after step `first`: metric -> name -> (steps, values)."""
    found: dict[str, dict[str, Any]] = {}
    for name, replay in replays.items():
        for record in replay.recorded.records:
            for metric, value in record.items():
                if "/" in metric and isinstance(value, float) and record["step"] > first and metric[:7] != "seconds":
                    steps, values = found.setdefault(metric, {}).setdefault(name, ([], []))
                    steps.append(record["step"])
                    values.append(value)
    return found


def bisect_command(arguments: list[str]) -> None:
    """`nndist bisect`: says why two runs differ; exits with 0 (they do not), 1 or 2."""
    parser = Parser("bisect").with_traceback()
    parser.add_argument("first", metavar="RUN_A", type=folder_of, help="the folder or URL of a run")
    parser.add_argument("second", metavar="RUN_B", type=folder_of, help="and of another of the same networks")
    parser.add_argument("--python", metavar="PATH", help="of the environment in which RUN_B is trained again")
    parser.add_argument("--trust", action="store_true", help="execute the recipes in the folders; read them first")
    parser.add_argument("--json", action="store_true", help="print JSON")
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        from ..experiments.bisect import bisect

        def say(line: str) -> None:
            if is_main() and not options.json:
                print(line, file=sys.stderr, flush=True)

        found = bisect(options.first, options.second, trust=options.trust, say=say, python=options.python)
    if not is_main():
        pass
    elif options.json:
        print(json.dumps({**vars(found), "differ": found.differs_at is not None}))
    else:
        for what, ours, theirs in found.described:
            print(f"described {what}: {ours} and {theirs}")
        shows = "no record differs" if found.differs_at is None else f"a difference shows at step {found.differs_at:,}"
        print(f"recorded  the same up to step {found.same_until:,}; {shows}")
        if found.step is not None:
            print(f"weights   of step {found.step:,} are the first that differ when both are trained again")
        for note in found.notes:
            print(f"note      {note}")
        print(f"cause     {found.cause}", flush=True)
    from .train import leave

    leave(int(found.differs_at is not None))


def is_main() -> bool:
    """Whether this is the process that prints."""
    return int(os.environ.get("RANK", 0)) == 0


def audit_command(arguments: list[str]) -> None:
    """`nndist audit`: checks a run's hashes and trains stretches of it again; exits with 0, 1 (one fails) or 2."""
    parser = Parser("audit").with_traceback()
    parser.add_argument("run", metavar="RUN", type=folder_of, help="the folder or URL of a run")
    parser.add_argument("--stretches", type=int, default=2, metavar="N", help="between checkpoints (default: 2)")
    parser.add_argument("--seed", type=int, help="of the choice of the stretches (default: drawn)")
    parser.add_argument("--trust", action="store_true", help="execute the recipe in the folder; read it first")
    parser.add_argument("--json", action="store_true", help="print JSON")
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        if options.stretches < 1:
            raise UserError(f"--stretches {options.stretches}: must be at least 1")
        code = examine_run(options)
    from .train import leave

    leave(code)


def examine_run(options: Any) -> int:
    """Audits the run, prints the table; returns the exit code."""
    import random

    from ..experiments.audit import audit
    from ..experiments.audit_page import write

    if options.seed is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--seed: give one, the same to all processes")
    seed = random.SystemRandom().randrange(1 << 31) if options.seed is None else options.seed

    def say(line: str) -> None:
        if is_main() and not options.json:
            print(line, file=sys.stderr, flush=True)

    found = audit(options.run, stretches=options.stretches, seed=seed, trust=options.trust, say=say)
    page = write(options.run, found, seed) if is_main() else None
    if is_main() and options.json:
        print(json.dumps({**found.as_json(), "seed": seed, "page": str(page)}))
    elif is_main():
        for what, outcome, held in found.findings:
            print(f"{'holds' if held else 'FAILS'}    {what:<22} {outcome}")
        for note in found.notes:
            print(f"note     {note}")
        if found.chosen:
            print(
                f"{len(found.chosen)} of {len(found.stretches)} stretches were trained again (seed {seed}): a single "
                f"forged one\nwould have been missed with probability {found.missed:.2f}"
            )
        print(f"page     {page}", flush=True)
    return 0 if found.holds else 1
