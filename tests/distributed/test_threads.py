"""How many threads a process takes: what the user says, whether or not a launcher has set the same variable."""

import os
import subprocess
import sys

import pytest

from nndist.distributed.runtime import threads_asked_for

ASKED = "from nndist.distributed.runtime import threads_asked_for; print(threads_asked_for())"
LAUNCHER = f"""
import os, subprocess, sys
os.environ["OMP_NUM_THREADS"] = "7"
os.environ["{{}}"] = "set by a launcher"
subprocess.run([sys.executable, "-c", {ASKED!r}], check=True)
"""


@pytest.mark.parametrize(
    "text, threads",
    [("3", 3), ("4,2", 4), (" 2 ", 2), ("", None), ("0", None), ("-1", None), ("many", None), (None, None)],
)
def test_the_variable_is_obeyed_where_it_is_a_number(monkeypatch, text, threads):
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if text is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads_asked_for() == threads


@pytest.mark.parametrize("sign, asked", [("ACCELERATE_MIXED_PRECISION", "5"), ("TORCHELASTIC_RUN_ID", None)])
def test_what_a_launcher_sets_is_not_what_the_user_asked_for(sign, asked):
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env |= {"OMP_NUM_THREADS": asked} if asked else {}
    done = subprocess.run([sys.executable, "-c", LAUNCHER.format(sign)], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(asked), done.stderr
