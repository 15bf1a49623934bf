"""A run trained again by the Python of its own environment: with the release of torch, say, that it was trained with.

    python -m nndist.experiments.elsewhere TASK ANSWER

is what this starts there. TASK and ANSWER are JSON files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .again import observed, trained_again


def answer_of(python: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """What that Python's nndist answers; raises UserError, with what it said last, if it can't."""
    with tempfile.TemporaryDirectory(prefix="nndist-elsewhere-") as scratch:
        question, answer = Path(scratch, "task.json"), Path(scratch, "answer.json")
        question.write_text(json.dumps(dict(task)))
        words = [python, "-m", "nndist.experiments.elsewhere", str(question), str(answer)]
        try:
            done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"--python {python}: {error.strerror}; give the python of an environment") from error
        if done.returncode or not answer.exists():
            said = (done.stderr.strip().splitlines() or ["no answer"])[-1].removeprefix("error: ")
            raise UserError(f"--python {python}: {said}; it needs nndist and the recipe's packages")
        found: dict[str, Any] = json.loads(answer.read_text())
    return found


def main(question: str, answer: str) -> None:
    """Answers in the environment that the run was trained in."""
    task = json.loads(Path(question).read_text())
    folder, trust = Path(task["folder"]), bool(task["trust"])
    if "step" in task:
        found = observed(folder, task["step"], trust)
    else:
        found = trained_again(folder, task["start"], task["last"], trust)
    Path(answer).write_text(json.dumps(found.as_json()))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        os._exit(2)
    os._exit(0)  # threads of a training may still run
