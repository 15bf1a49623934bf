"""Completion in bash: what is offered after some words is what the commands take."""

import shutil
import subprocess

import pytest
from launching import ROOT, python, succeeded

from nndist.cli.table import COMMANDS

COMPLETED = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={last} COMP_LINE="{words}" COMP_POINT=${{#COMP_LINE}}
_tyro_nndist
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """What bash offers for the last of some words."""
    script = tmp_path_factory.mktemp("completion") / "nndist.bash"
    script.write_text(succeeded(python("-m", "nndist", "completion", "bash")).stdout)

    def offer(words):
        text = COMPLETED.format(script=script, words=words, last=len(words.split()) - 1)
        done = subprocess.run([shutil.which("bash"), "-c", text], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return {line.strip() for line in done.stdout.splitlines()}

    return offer


def test_sub_commands(offered):
    assert offered("nndist tr") == {"train"}
    assert offered("nndist re") == {name for name in COMMANDS if name.startswith("re")}


def test_recipes_by_name(offered):
    names = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert offered("nndist train mnist_c") == {name for name in names if name.startswith("mnist_c")}


def test_flags_of_a_training_and_their_choices(offered):
    assert {"--compile", "--no-compile"} & offered("nndist train mnist_cnn --comp")
    assert "--epochs" in offered("nndist train mnist_cnn --epo")
    assert offered("nndist train mnist_cnn --precision b") == {"bf16"}


@pytest.mark.long
def test_zsh():
    assert "#compdef nndist" in succeeded(python("-m", "nndist", "completion", "zsh")).stdout
