"""Run by test_faults: trainings under torchrun's agent, in processes that are forked with everything imported.

usage: elastic.py PLAN

PLAN is a JSON list of trainings, each {"arguments": [...], "env": {...}}; the exit code is 0 where all succeeded.
"""

import json
import os
import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path.insert(0, str(Path(__file__).parent.parent))
import launching  # noqa: F401  (what it has preloaded is there in these processes too)


def train(arguments: list[str], env: dict[str, str]) -> None:
    """What torchrun's command does in a process; it returns where the training succeeded, as the agent expects."""
    os.environ.update(env)
    from nndist.cli import train as cli

    def leave(code: int = 0) -> None:
        raise SystemExit(code)

    cli.leave = leave
    try:
        cli.train_command(arguments)
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        if stop.code:
            os._exit(int(stop.code))


def main(plan: Path) -> None:
    for number, training in enumerate(json.loads(plan.read_text())):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=4,
            run_id=f"it{number}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=2,
            monitor_interval=0.1,
            start_method="forkserver",
        )
        elastic_launch(config, train)(training["arguments"], training["env"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
