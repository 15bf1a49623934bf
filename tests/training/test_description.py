"""What run.json says of the recipe's repository."""

import subprocess

import pytest

from nndist.training.description import commit_of


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit of one recipe."""

    def git(*words):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "recipe.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    commit_of.cache_clear()
    yield tmp_path / "recipe.py", git("rev-parse", "HEAD")
    commit_of.cache_clear()


def test_the_commit_and_whether_files_differ_from_it(repository):
    recipe, commit = repository
    assert commit_of(recipe) == {"commit": commit, "dirty": False}
    commit_of.cache_clear()
    (recipe.parent / "notes.txt").write_text("not in the repository")
    assert commit_of(recipe) == {"commit": commit, "dirty": False}
    commit_of.cache_clear()
    recipe.write_text("x = 2\n")
    assert commit_of(recipe) == {"commit": commit, "dirty": True}


def test_without_a_repository_there_is_nothing_to_say(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert commit_of(tmp_path / "recipe.py") == {} == commit_of(None)
    monkeypatch.setenv("PATH", "")
    commit_of.cache_clear()
    assert commit_of(tmp_path / "recipe.py") == {}, "there is no git"
