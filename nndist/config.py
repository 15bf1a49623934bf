"""The settings of a run: where and how to train, not what."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from .data.config import DataConfig
from .errors import UserError
from .recipe.fields import Count, check_fields
from .runs.fetching import local_copy_of
from .stores import is_url

UNITS = {"step": "steps", "epoch": "epochs", "minute": "minutes", "min": "minutes"}


@dataclass(frozen=True)
class Interval:
    """How often something happens: every so many optimizer steps, epochs, or minutes (which may be fractions)."""

    every: float
    unit: Literal["steps", "epochs", "minutes"]

    @classmethod
    def parse(cls, text: str, flag: str) -> "Interval":
        """Parses "500 steps", "2 epochs" or "10 minutes" (the space is optional).

        Raises UserError naming `flag` for anything else.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+?)s?", text.strip().lower())
        unit = UNITS.get(match.group(2)) if match else None
        if match and unit and float(match.group(1)) > 0 and (unit == "minutes" or float(match.group(1)).is_integer()):
            return cls(float(match.group(1)), unit)  # type: ignore[arg-type]
        raise UserError(f"{flag} {text!r}: give a number and a unit, such as '500 steps', '2 epochs' or '10 minutes'")

    def in_steps(self, steps_per_epoch: int) -> int | None:
        """The interval in optimizer steps; None if it is in minutes."""
        if self.unit == "minutes":
            return None
        return int(self.every) * (steps_per_epoch if self.unit == "epochs" else 1)


def default_data_dir() -> Path:
    """$NNDIST_DATA, else ~/.cache/nndist."""
    return Path(os.environ.get("NNDIST_DATA") or Path.home() / ".cache" / "nndist")


@dataclass(kw_only=True)
class RunConfig:
    """Where and how to train. Nothing here changes what is learned, up to rounding and the random seed."""

    seed: Annotated[int, Ge(0)] = 0
    """Seed of the initial weights, the order of the data and dropout."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward pass; weights and optimizer stay in fp32. fp16 needs a GPU."""
    accumulate: Count = 1
    """Micro-batches that each process splits its share of the global batch into; more where it lacks memory."""
    data_dir: Path = field(default_factory=default_data_dir, metadata={"variable": "NNDIST_DATA"})
    """Folder of the data files (default: $NNDIST_DATA, else ~/.cache/nndist)."""
    data_source: Literal["auto", "mnist", "fashion-mnist", "kmnist", "sample"] = "auto"
    """Which digits: a name is strict; auto is MNIST, or the embedded sample if MNIST is not available."""
    runs_dir: str = "runs"
    """Folder of all runs; this one is written to RUNS_DIR/<recipe>/<run>. A URL (s3://bucket/runs) is a store, which a
    local copy of the run is sent to in the background."""
    local_runs_dir: Path | None = None
    """Folder of the local copies if RUNS_DIR is a URL (default: one in ~/.cache/nndist)."""
    run: str | None = None
    """Name of the run (default: the time); one that exists is resumed. Under plain torchrun write --run-name."""
    resume: Literal["auto", "must", "never", "rebuild"] = "auto"
    """auto: resume the run if it exists. must: it is an error if there is none. never: it is an error if there is one.
    rebuild: resume from intact weights even if other files are missing or damaged; what is lost is reported."""
    allow_change: tuple[str, ...] = ()
    """Fields of the recipe that may differ from those the run began with ('source': the recipe's source)."""
    save_every: str = "10 minutes"
    """How often a checkpoint is saved: '10 minutes', '500 steps' or '2 epochs'; always also at the end."""
    compare_with: Path | None = None
    """Folder of a run whose scores the plan, the report and the last lines show beside this one's."""
    keep: Count = 2
    """Checkpoints to keep besides the best one."""
    deterministic: bool = False
    """Use only operations that give the same bits each time, also on a GPU; slower."""
    recheck_every: Count | None = None
    """Every so many steps compute each share of the batch twice, on another process, and compare every bit."""
    fingerprint_every: Count | None = None
    """Every so many steps record a hash of the weights, so that `nndist bisect` finds where two runs part."""
    engine: Literal["auto", "eager"] = "auto"
    """Has no effect; accepted for commands written for earlier versions."""
    gradient_sync: Literal["step", "ddp"] = "step"
    """How gradients are summed over processes: once per step, for any network; ddp: during the backward pass, which is
    faster if sending them takes long, and needs every parameter in every step."""
    shard: Literal["none", "fsdp"] = "none"
    """fsdp: shard weights, gradients and optimizer over the processes, for networks that outgrow one device."""
    checkpoint_activations: bool = False
    """Recompute the inside of repeated blocks in the backward pass instead of keeping it: less memory, slower."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """Number format in which processes send gradients: bf16 halves the bytes, and rounds."""
    weight_compression: Literal["none", "bf16"] = "none"
    """Number format in which --shard fsdp gathers weights, for --precision bf16; they are kept in fp32."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps; the learning-rate schedule stays the same."""
    log_every: Count | None = None
    """Optimizer steps between two records of the training loss (default: 50, fewer in short runs)."""
    eval_batch_size: Count = 1000
    """Examples per process and forward pass of an evaluation."""
    timeout_seconds: Annotated[float, Gt(0)] = 600.0
    """How long processes wait for each other before the run fails."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train: auto is a CUDA GPU if there is one, then Apple's (mps: fp32, one process), else the CPU."""
    tf32: bool = False
    """Round the inputs of matrix products and convolutions to TF32 on GPUs that have it: faster, less exact."""
    cudnn_benchmark: bool = True
    """Let cuDNN time its convolutions for each new shape and take the fastest, on CUDA GPUs, unless --deterministic."""
    channels_last: Literal["recipe", "on", "off"] = "recipe"
    """Layout of convolutions: as the recipe says, or on: usually faster; view() of an image tensor may then fail."""
    compile: bool = False
    """torch.compile of each network in training passes: other bits, faster steps after a slow first one."""
    cpu: bool = False
    """The same as --device cpu."""
    threads: Count | None = None
    """CPU threads per process (default: $OMP_NUM_THREADS, else the machine's cores divided among its processes)."""
    num_workers: Annotated[int, Ge(0)] = 2
    """Worker processes that load data that does not fit in memory."""
    cache_gigabytes: Annotated[float, Gt(0)] = 50.0
    """Disk space in the data folder for shards fetched by URL; the oldest make room."""
    check: bool = False
    """Do one step, evaluation, save and load, then exit; nothing is kept."""
    summary: bool = False
    """Print each layer of the networks with its output's shape and its parameters, after a --check; nothing is kept."""
    find_lr: bool = False
    """Instead of training: raise the learning rate over 200 steps, and report where the loss falls fastest."""
    find_batch: bool = False
    """Instead of training: measure examples per second and memory against the batch size, up to what fits."""
    progress: bool = True
    """Show the progress bar."""
    figures: bool = True
    """Draw the figures at the end."""
    report: bool = True
    """Write report.html, the page of the run, at each evaluation and at the end."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases: auto is $WANDB_MODE, else online if an API key is configured, else offline."""
    wandb_project: str = field(default_factory=lambda: os.environ.get("WANDB_PROJECT") or "nndist")
    """Project of the W&B run (default: $WANDB_PROJECT, else nndist)."""
    wandb_artifact: bool = False
    """Also send the final checkpoint to W&B, as an artifact."""
    track: tuple[str, ...] = ()
    """Also write the run for tensorboard, trackio, or both: in RUN/tensorboard, in Trackio's database."""
    wandb_alert: bool = False
    """Send W&B's alert when the run ends, fails or is preempted."""
    time: str = "auto"
    """How long this launch may take, such as 8h: it saves and stops in time (auto: until the end of a Slurm job)."""
    preempt_signal: str = "USR1"
    """The signal, besides TERM and INT, that asks the run to save and stop; none for no other."""
    notify: str = ""
    """A shell command run at the end, at a failure and at a preemption; it gets $NNDIST_STATUS, $NNDIST_RUN, ..."""
    profile: str = ""
    """Steps of which torch's trace is written, such as 10:20 (from step 10 to before step 20)."""
    profile_ranks: str = "0"
    """The processes that write it: numbers such as 0,3, or all."""
    traceback: bool = False
    """Show Python's traceback with an error."""

    def validate(self) -> None:
        """Raises UserError for the first invalid setting."""
        check_fields(self)
        Interval.parse(self.save_every, "--save-every")
        if self.track:
            from .runs.trackers import check_installed

            check_installed(self.track)
        if self.local_runs_dir is not None and not is_url(self.runs_dir):
            raise UserError(f"--local-runs-dir {self.local_runs_dir}: --runs-dir {self.runs_dir} is local; give one")
        if self.weight_compression != "none" and (self.shard, self.precision) != ("fsdp", "bf16"):
            raise UserError(
                f"--weight-compression {self.weight_compression}: give it with --shard fsdp and --precision bf16"
            )
        if self.find_batch:
            others = ("find_lr", "check", "summary", "run", "max_steps", "wandb_artifact")
            given = [name for name in others if getattr(self, name) not in (None, False)]
            given += ["resume"] if self.resume != "auto" else []
            if given:
                raise UserError(
                    f"--find-batch and --{given[0].replace('_', '-')}: it only measures and leaves no run; give one"
                )
        if self.run is not None and not re.fullmatch(r"[^./\\:]([^/\\:]*[^./\\: ])?", self.run):
            raise UserError(
                f"--run {self.run!r}: give a plain name without '/', '\\' or ':', not starting or ending with '.'"
            )

    @property
    def runs_folder(self) -> Path:
        """The local folder of all runs."""
        if not is_url(self.runs_dir):
            return Path(self.runs_dir).expanduser()
        if self.local_runs_dir is not None:
            return Path(self.local_runs_dir).expanduser()
        return local_copy_of(str(self.runs_dir), "runs")

    def url_of(self, *parts: str) -> str:
        """The URL of what is in RUNS_DIR; "" if that is a local folder."""
        return "/".join([str(self.runs_dir).rstrip("/"), *parts]) if is_url(self.runs_dir) else ""

    def data_config(self, *, download: bool) -> DataConfig:
        """The argument of `Recipe.data`; `download` is for the one process per machine that may fetch files."""
        return DataConfig(
            directory=Path(self.data_dir).expanduser(),
            source=self.data_source,
            download=download,
            progress=self.progress,
            num_workers=self.num_workers,
            cache_bytes=round(1e9 * self.cache_gigabytes),
        )
