"""A store that fails: fsspec's local file system under faulty://, found by fsspec as any installed client is.

`FAULTS` in the environment names a JSON file: a list of {"on": a pattern of "<request> <path>", "do": what, "skip": how
many first, "times": how often}. What: "fail", "deny", "stall", "cut" (half of it is written, then it fails) or "kill"
(half of it is written, then the training and the sending process are killed, as if the machine lost its power). Each
request is a line of the file beside it, FAULTS.log.
"""

import json
import os
import re
import signal
import time
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

import nndist.runs.lease
import nndist.runs.sending
import nndist.stores

# what takes a minute in life takes a moment here; files in several parts
nndist.stores.BLOCK_BYTES = 1000
nndist.runs.lease.EXPIRY_SECONDS, nndist.runs.lease.POLL_SECONDS = 3.0, 0.1
nndist.runs.lease.SETTLE_SECONDS, nndist.runs.sending.RENEW_SECONDS = 0.02, 0.2
nndist.runs.sending.POLL_SECONDS, nndist.runs.sending.FIRST_PAUSE_SECONDS = 0.02, 0.05
nndist.runs.sending.PAGES_SECONDS, nndist.runs.sending.STALL_SECONDS = 0.5, 9.0  # far beyond what expires
nndist.runs.sending.MAX_PAUSE_SECONDS = 0.5


class Faulty(LocalFileSystem):
    protocol = "faulty"

    @classmethod
    def _strip_protocol(cls, path):
        """Also of a URL with a user and a password, as ftp:// has them."""
        return re.sub(r"^faulty://([^/@]*@)?", "", str(path)).rstrip("/") or "/"

    def request(self, kind, path):
        """Writes down a request and does what befalls it; returns "cut" or "kill" if that is to happen halfway."""
        place = os.environ.get("FAULTS")
        if not place:
            return ""
        with Path(f"{place}.log").open("a") as file:
            file.write(f"{kind} {path}\n")
        counts = Path(f"{place}.counts")
        seen = json.loads(counts.read_text()) if counts.exists() else {}
        for number, fault in enumerate(json.loads(Path(place).read_text()) if Path(place).exists() else []):
            if not re.search(fault["on"], f"{kind} {path}"):
                continue
            seen[str(number)] = count = seen.get(str(number), 0) + 1
            counts.write_text(json.dumps(seen))
            if not fault.get("skip", 0) < count <= fault.get("skip", 0) + fault.get("times", 10**9):
                continue
            match fault["do"]:
                case "fail":
                    raise TimeoutError(f"no answer from https://store/?signature={os.environ.get('A_SECRET_KEY')}")
                case "deny":
                    raise PermissionError("Access Denied")
                case "stall":
                    time.sleep(1000)
                case "slow":
                    time.sleep(0.3)
            return fault["do"]
        return ""

    def halfway(self, what):
        if what == "kill":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "cut":
            raise ConnectionResetError("connection lost")

    def pipe_file(self, path, value, **options):
        what = self.request("put", path)
        path = Path(self._strip_protocol(path))
        with path.open("wb") as file:
            file.write(value[: len(value) // 2])
            file.flush()
            self.halfway(what)
            file.write(value[len(value) // 2 :])

    def cat_file(self, path, *arguments, **options):
        self.request("get", path)
        return super().cat_file(path, *arguments, **options)

    def ls(self, path, *arguments, **options):
        self.request("list", path)
        return super().ls(path, *arguments, **options)

    def rm_file(self, path):
        self.halfway(self.request("remove", path))
        super().rm_file(path)

    def rm(self, path, **options):
        self.halfway(self.request("remove", path))
        super().rm(path, **options)

    def open(self, path, mode="rb", **options):
        self.request("open" if mode == "rb" else "parts", path)
        file = super().open(path, mode, **options)
        if mode == "wb":
            write = file.f.write if hasattr(file, "f") else file.write

            class Parts:
                closed = False

                def write(_, data):
                    self.halfway(self.request("part", path))
                    return write(data)

                def discard(_):
                    pass

                def close(_):
                    file.close()

            return Parts()
        return file
