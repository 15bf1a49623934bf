"""What a bug report needs to know of a machine, on one screen: versions, devices, room, and what would be chosen.

No line has a key or a password in it, nor the name of the home folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from ..errors import first_line
from ..files import CHECKOUT, PACKAGE
from .commands import Parser, mistakes_in_one_line

COLUMNS = 80
INDENT = 10
PACKAGES = ("torch", "torchvision", "accelerate", "safetensors", "numpy", "wandb", "tyro", "matplotlib", "tqdm")


def doctor_command(arguments: list[str]) -> None:
    """`nndist doctor`: prints the screen; exits with 0, whatever is missing, or 2 (bad input)."""
    from ..config import RunConfig

    parser = Parser("doctor").with_traceback()
    parser.add_argument("--runs-dir", default=RunConfig.runs_dir, help="default: %(default)s")
    parser.add_argument("--data-dir", type=Path, default=RunConfig().data_dir, help="default: %(default)s")
    with mistakes_in_one_line(arguments):
        print("\n".join(lines(parser.parse_args(arguments))))


def lines(options: argparse.Namespace) -> list[str]:
    """The screen: a title and what there is to say of it; where that can't be found out, why not."""
    found: dict[str, Callable[[], str]] = {
        "nndist": nndist,
        "python": lambda: f"{platform.python_version()}, {at(Path(sys.executable))}",
        "packages": packages,
        "system": system,
        "CPU": cpu,
        "GPU": gpu,
        "precision": precision,
        "backends": backends,
        "memory": memory,
        "shared": lambda: room(Path("/dev/shm")) if Path("/dev/shm").is_dir() else "no /dev/shm",
        "runs": lambda: runs(options.runs_dir),
        "data": lambda: f"{at(options.data_dir)}: {room(options.data_dir)}; {mnist(options.data_dir)}",
        "W&B": wandb,
        "settings": settings,
        "chosen": chosen,
    }
    shown: list[str] = []
    for title, ask in found.items():
        try:
            said = ask()
        except Exception as error:  # what is broken here is what the report is about
            said = f"{type(error).__name__}: {first_line(error)}"
        wrapper = textwrap.TextWrapper(COLUMNS, initial_indent=f"{title:<{INDENT}}", subsequent_indent=" " * INDENT)
        shown += wrapper.wrap(said)
    return shown


def nndist() -> str:
    from .. import __version__

    return f"{__version__}, {'a checkout' if CHECKOUT else 'installed'}, {at(PACKAGE)}"


def packages() -> str:
    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "MISSING"

    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


def system() -> str:
    return f"{platform.platform()}, {platform.machine()}"


def cpu() -> str:
    import torch

    from .. import machine

    count = f"{machine.cores()} of {os.cpu_count()} cores usable"
    return f"{count}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} torch threads"


def gpu() -> str:
    import torch

    if torch.cuda.is_available():
        names = []
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            names.append(f"{device.name} {gibibytes(device.total_memory)} ({device.major}.{device.minor})")
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        cudnn = f", cuDNN {torch.backends.cudnn.version()}" if torch.backends.cudnn.is_available() else ""
        return f"{kind}{cudnn}: {', '.join(names)}"
    if torch.backends.mps.is_available():
        return "MPS"
    built = torch.version.cuda or torch.version.hip
    return f"none{f' found; torch is built for CUDA {built}' if built else '; torch is built for CPUs'}"


def precision() -> str:
    import torch

    if torch.cuda.is_available():
        return f"fp32, fp16, bf16{'' if torch.cuda.is_bf16_supported(including_emulation=False) else ' (emulated)'}"
    native = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return f"fp32, bf16 ({'in hardware' if native else 'no instructions for it seen: perhaps slower than fp32'})"


def backends() -> str:
    import torch.distributed as dist

    if not dist.is_available():
        return "none: torch is built without torch.distributed"
    known = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    return ", ".join(name for name, there in known.items() if there()) or "none"


def memory() -> str:
    from .. import machine

    return f"{gibibytes(machine.free_memory())} free of {gibibytes(machine.memory())}"


def mnist(folder: Path) -> str:
    from ..datasets.mnist import missing_files

    missing = missing_files(folder / "MNIST/raw")
    return "MNIST is there" if not missing else "no MNIST, which is downloaded when it is first used"


def wandb() -> str:
    from ..runs.wandb import choose_mode, has_api_key

    mode = choose_mode("auto", Path("RUN"))[0] or "off"
    set_to = f", $WANDB_MODE={os.environ['WANDB_MODE']}" if os.environ.get("WANDB_MODE") else ""
    return f"{'an API key is configured' if has_api_key() else 'no API key'}{set_to}: runs would be {mode}"


def settings() -> str:
    from accelerate.commands.config.config_args import default_config_file

    config = Path(default_config_file)
    said = [f"accelerate's default config {'is there' if config.is_file() else 'is not there'}"]
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return ", ".join([*said, *(f"${name}={os.environ[name]}" for name in names if name in os.environ)])


def chosen() -> str:
    from ..config import RunConfig
    from ..distributed.runtime import Runtime

    default = RunConfig.precision
    return f"{Runtime(precision=default).describe()}, {default}"


def runs(place: str) -> str:
    """Where runs are kept; of a store, whether its client and credentials will do."""
    from ..config import RunConfig
    from ..stores import Store

    config = RunConfig(runs_dir=place)
    folder = config.runs_folder
    local = f"{at(folder)}: {room(folder)}"
    if not (url := config.url_of()):
        return local
    store = Store(url)
    count = len(store.names(depth=1))
    return f"{store.url}: can be read ({count:,} files at the top); local copies in {local}"


def room(path: Path) -> str:
    """Free disk where a folder lies or would lie."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    usage = shutil.disk_usage(there)
    return f"{gibibytes(usage.free)} free of {gibibytes(usage.total)}"


def at(path: Path) -> str:
    """A path without the name of the home folder."""
    path, home = path.absolute(), Path.home()
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) else str(path)


def gibibytes(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
