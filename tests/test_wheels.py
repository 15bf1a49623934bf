"""Every dependency has a wheel for each platform and Python that is built for; names are resolved, nothing is fetched.

    pip install uv && pytest -m nightly tests/test_wheels.py

uv answers a platform's own markers; pip's --platform would answer those of the machine that it runs on.
"""

import os
import re
import shutil
import subprocess
import tomllib

import pytest
from launching import ROOT

PLATFORMS = {
    "win_amd64": "x86_64-pc-windows-msvc",
    "macosx_arm64": "aarch64-apple-darwin",
    "manylinux_x86_64": "x86_64-manylinux_2_28",
}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
UV = shutil.which("uv")
NO_NETWORK = ("dns error", "tcp connect error", "Failed to fetch", "Connection refused", "timed out")


@pytest.mark.nightly
@pytest.mark.skipif(UV is None, reason="pip install uv")
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_dependency_has_a_wheel(platform, python):
    flags = ["--only-binary", ":all:", "--python-platform", PLATFORMS[platform], "--python-version", python]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    done = subprocess.run(
        [UV, "pip", "compile", "--no-config", "--no-header", "--no-annotate", *flags, ROOT / "pyproject.toml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode and any(words in done.stderr for words in NO_NETWORK):
        pytest.skip(f"no package index answers: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    found = dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.split(r"[><=]", dependency)[0] for dependency in project["dependencies"]}
    assert asked <= found.keys()
    print(platform, python, {name: found[name] for name in sorted(asked)})
