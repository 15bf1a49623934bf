"""The manifest of a checkpoint, which says what belongs to it: read without torch, by whoever moves checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ..files import Each, parse_json

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_KIND = {
    "format": int,
    "step": int,
    "files": Each({"bytes": int, "sha256": str}),
    "state": dict,
    "sha256": str,
}


class DamagedCheckpoint(Exception):
    """The checkpoint must not be used; the message names the file and the damage."""


def folder_name(step: int) -> str:
    """The name of the folder for the checkpoint after optimizer step `step`."""
    return f"step-{step:08d}"


def own_hash(manifest: Mapping[str, Any]) -> str:
    """The hash that a manifest holds of itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def parse_manifest(data: bytes, folder: str) -> dict[str, Any]:
    """The manifest of the checkpoint in a folder of that name; raises DamagedCheckpoint."""
    try:
        manifest: dict[str, Any] = parse_json(data, MANIFEST_KIND)
    except ValueError as error:
        raise DamagedCheckpoint(f"{folder}/{MANIFEST}: not a manifest ({error})") from error
    if manifest["sha256"] != own_hash(manifest):
        raise DamagedCheckpoint(f"{folder}/{MANIFEST}: its content is not what was written (SHA-256 differs)")
    if manifest["format"] != FORMAT:
        raise DamagedCheckpoint(f"{folder}/{MANIFEST}: format {manifest['format']}; this version reads {FORMAT}")
    if folder_name(manifest["step"]) != folder:
        raise DamagedCheckpoint(f"{folder}/{MANIFEST}: belongs to step {manifest['step']}")
    return manifest
