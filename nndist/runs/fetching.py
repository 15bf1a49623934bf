"""A run in a store, brought into a local folder: every byte of a checkpoint is verified before it appears there.

A run has the same files in a store as in its folder. Beside the files of a checkpoint lie `metrics.jsonl` and
`run.json` as they were when it was saved, since the run's own ones may have been overwritten, by another launch or in
part. A checkpoint's manifest is sent last, and removed first: without it there is no checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import move, open_regular, read_bytes, remove_folder, sync_folder, write, write_whole
from ..stores import BLOCK_BYTES, Store, StoreError, Told, is_url, redacted
from .manifest import MANIFEST, DamagedCheckpoint, folder_name, parse_manifest
from .reading import checkpoints_in
from .records import FILE, verified

CHECKPOINTS, ABOUT = "checkpoints", "run.json"
NOT_PAGES = (CHECKPOINTS, "snapshots", "wandb", "trackio", "lock", "lease.json")
"""What a run's folder or a store holds besides the run's pages: state of checkpoints and of this machine."""


def is_page(name: str) -> bool:
    """Whether this file of a run describes it, such as run.json, report.html and figures/."""
    parts = name.split("/")
    return parts[0] not in NOT_PAGES and not any(part.startswith(".") or part in ("", "..") for part in parts)


def steps_of(names: Iterable[str]) -> list[int]:
    """The steps of the checkpoints among the names of a run's files in a store, in order."""
    found = (re.fullmatch(rf"{CHECKPOINTS}/step-(\d+)/{MANIFEST}", name) for name in names)
    return sorted(int(match.group(1)) for match in found if match)


class Fetching:
    """Brings a run from a store into a folder.

    say: shows a line to the user. told: see stores. Methods raise StoreError, and OSError of the local disk.
    """

    def __init__(self, store: Store, folder: Path, say: Callable[[str], None], told: Told):
        self.store, self.folder, self.say, self.told = store, folder, say, told
        self.root = folder / CHECKPOINTS

    def resumable(self, names: list[str]) -> int | None:
        """Brings what a run is resumed from, unless the folder has at least as much; returns the step that it brought.

        That is run.json, the newest whole checkpoint, the best one, the records that they were saved with, and the
        snapshots up to it.
        """
        own = next((step for step, path in reversed(checkpoints_in(self.root)) if self._is_whole(path)), -1)
        if not steps_of(names) and ABOUT in names and not (self.folder / ABOUT).exists():
            self._page(ABOUT)
        for step in reversed(steps_of(names)):
            if step <= own:
                return None
            try:
                manifest = self._prepare(step)
                records = self._records(manifest)
            except DamagedCheckpoint as damage:
                self.say(f"{self.store.url}: damaged checkpoint: {damage}")
                continue
            kept = [step]
            best = _best_of(manifest)
            if best is not None and best != step:
                with contextlib.suppress(DamagedCheckpoint):  # the resume notes that it is gone
                    self._prepare(best)
                    kept.append(best)
            self._drop_others(kept, names)
            self._snapshots(names, step)
            with contextlib.suppress(FileNotFoundError):  # the resume says what that means
                write_whole(self.folder / ABOUT, self.store.read(f"{CHECKPOINTS}/{folder_name(step)}/{ABOUT}"))
            write_whole(self.folder / FILE, records)
            for number in reversed(kept):  # the one to resume from last: before, the folder is as it was
                self._publish(number)
            return step
        return None

    def usable(self) -> None:
        """Brings what showing and using a run needs: its pages, its newest checkpoint and its best."""
        names = self.store.names()
        self.pages(names)
        steps = steps_of(names)
        kept: list[int] = []
        for step in reversed(steps):
            try:
                manifest = self._prepare(step)
            except DamagedCheckpoint as damage:
                self.say(f"{self.store.url}: damaged checkpoint: {damage}")
                continue
            best = _best_of(manifest)
            kept = [step]
            if best in steps and best != step:
                with contextlib.suppress(DamagedCheckpoint):  # whoever wants the best weights is told
                    self._prepare(best)
                    kept.append(best)
            break
        for step, path in checkpoints_in(self.root):
            if step not in kept:
                remove_folder(path)
        for step in kept:
            self._publish(step)
        if steps and not kept:
            raise UserError(f"{self.store.url}: every checkpoint is damaged")

    def pages(self, names: list[str]) -> None:
        """Brings the pages and the snapshots of the run."""
        for name in names:
            if is_page(name):
                self._page(name)
        self._snapshots(names, None)

    def _page(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            write_whole(path, self.store.read(name))

    def _snapshots(self, names: list[str], last: int | None) -> None:
        for name in names:
            match = re.fullmatch(r"snapshots/step-(\d+)\.safetensors", name)
            if match and (last is None or int(match.group(1)) <= last):
                self._page(name)

    def _prepare(self, step: int) -> dict[str, Any]:
        """Brings a checkpoint into a hidden folder, whole; returns its manifest. Raises DamagedCheckpoint."""
        name, there = folder_name(step), f"{CHECKPOINTS}/{folder_name(step)}"
        part = self._hidden(step)
        try:
            data = self.store.read(f"{there}/{MANIFEST}")
            manifest = parse_manifest(data, name)
            if _same(self.root / name / MANIFEST, data) and self._is_whole(self.root / name):
                return manifest
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            self.say(f"{self.store.url}: fetching step {step:,}, {size / 2**20:,.1f} MiB")
            for file in manifest["files"]:
                if Path(file).name != file:
                    raise DamagedCheckpoint(f"{name}/{MANIFEST}: names {file!r:.60}, which is not a file beside it")
                self.store.fetch(f"{there}/{file}", part / file, self.told)
            check_files(part, manifest, self.told)
            write(part / MANIFEST, data)
            sync_folder(part)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{name}: a file of it is missing") from error
        return manifest

    def _publish(self, step: int) -> None:
        """Makes a prepared checkpoint appear in one rename."""
        part, place = self._hidden(step), self.root / folder_name(step)
        if part.exists():  # else the folder had it
            remove_folder(place)
            move(part, place)
            sync_folder(self.root)

    def _hidden(self, step: int) -> Path:
        return self.root / f".{folder_name(step)}.part"

    def _is_whole(self, path: Path) -> bool:
        try:
            check_files(path, parse_manifest(read_bytes(path / MANIFEST), path.name), self.told)
        except (OSError, DamagedCheckpoint):
            return False
        return True

    def _records(self, manifest: dict[str, Any]) -> bytes:
        """The records that a checkpoint was saved with; raises DamagedCheckpoint if they are not those."""
        name, state = folder_name(manifest["step"]), manifest["state"]
        try:
            data = self.store.read(f"{CHECKPOINTS}/{name}/{FILE}")
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{name}/{FILE}: is missing") from error
        part = self.folder / f".{FILE}.part"
        write(part, data)
        try:
            seals = verified(part, len(data))
        except ValueError as error:
            raise DamagedCheckpoint(f"{name}/{FILE}: {error}") from error
        finally:
            part.unlink()
        if len(data) != state.get("metrics_bytes") or state.get("metrics_chain") not in (None, seals.chain):
            raise DamagedCheckpoint(f"{name}/{FILE}: not the records that it was saved with")
        return data

    def _drop_others(self, kept: list[int], names: list[str]) -> None:
        """Removes local checkpoints that the store does not have: those of a launch that a different one replaced."""
        for step, path in checkpoints_in(self.root):
            name = f"{CHECKPOINTS}/{folder_name(step)}/{MANIFEST}"
            if step not in kept and not (name in names and _same(path / MANIFEST, self.store.read(name))):
                remove_folder(path)


def check_files(folder: Path, manifest: dict[str, Any], told: Told) -> None:
    """Raises DamagedCheckpoint for the first file that is not as the manifest says, and OSError."""
    for name, expected in manifest["files"].items():
        found = hashlib.sha256()
        with open_regular(folder / name, follow=False) as file:
            size = os.fstat(file.fileno()).st_size
            while size == expected["bytes"] and (data := file.read(BLOCK_BYTES)):
                found.update(data)
                told(0)
        if found.hexdigest() != expected["sha256"] or size != expected["bytes"]:
            step = folder_name(manifest["step"])
            raise DamagedCheckpoint(f"{step}/{name}: its content is not what was written (SHA-256 differs)")


def _best_of(manifest: dict[str, Any]) -> int | None:
    best = manifest["state"].get("best")
    return best["step"] if isinstance(best, dict) and isinstance(best.get("step"), int) else None


def _same(path: Path, data: bytes) -> bool:
    try:
        return read_bytes(path, len(data)) == data
    except OSError:
        return False


def local_copy_of(url: str, kind: str, within: Path | None = None) -> Path:
    """The local folder for what is at a URL; `kind` keeps what is trained apart from what is only looked at."""
    text = redacted(url).rstrip("/")
    plain = re.sub(r"\W+", "-", text.partition("://")[2]).strip("-")[-40:]
    name = f"{text.partition(':')[0]}-{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return (within or Path.home() / ".cache" / "nndist") / kind / name


def folder_of(place: str | Path, *, weights: bool = True) -> Path:
    """The folder of a run, or of all runs: a path as it is, and for a URL the local copy, which is fetched now.

    For one run: its pages and, with `weights`, the newest and the best checkpoint; for all runs: their pages. What is
    fetched is reported on stderr. Raises UserError.
    """
    if not is_url(place):
        return Path(place)
    url = str(place).rstrip("/")
    try:
        store = Store(url)
        names = store.names(depth=3)
        if is_url(base := url.rpartition("/")[0].rpartition("/")[0]) and _is_run(names):
            folder = local_copy_of(base, "fetched").joinpath(*url.split("/")[-2:])
            _fetch(store, folder, weights=weights)
            return folder
        runs = sorted(
            {"/".join(parts[:2]) for name in names if len(parts := name.split("/")) == 3 and _is_run(parts[2:])}
        )
        if not runs:
            raise UserError(
                f"{store.url}: holds no run; name a run, such as s3://bucket/runs/mnist_cnn/first, or all runs"
            )
        folder = local_copy_of(url, "fetched")
        for path in folder.glob("*/*"):
            if path.relative_to(folder).as_posix() not in runs:
                shutil.rmtree(path, ignore_errors=True)  # removed from the store
        for run in runs:
            _fetch(Store(f"{url}/{run}"), folder / run, weights=False)
        return folder
    except StoreError as error:
        raise UserError(f"{redacted(url)}: can't be read ({error})") from error


def _is_run(names: Iterable[str]) -> bool:
    return any(name == ABOUT or name.startswith(f"{CHECKPOINTS}/") for name in names)


def _fetch(store: Store, folder: Path, *, weights: bool) -> None:
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    fetching = Fetching(store, folder, lambda line: print(line, file=sys.stderr, flush=True), lambda count: None)
    with FileLock(folder / ".fetching"):  # the processes of an evaluation fetch once
        if weights:
            fetching.usable()
        else:
            fetching.pages(store.names())
