"""Azurite, Microsoft's emulator of Azure Blob Storage, on loopback; `npm install --prefix build/azurite azurite`.

`server.token(...)` signs a query as Azure documents it (an account SAS, or one of a container).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

ACCOUNT = "pumpstation"
_VERSION = "2021-12-02"
_BUILT = Path(__file__).parents[1] / "build" / "azurite" / "node_modules" / ".bin"


def find_azurite() -> str | None:
    """The program, on PATH or where `.ci/run` installs it."""
    return shutil.which("azurite-blob", path=os.pathsep.join([os.environ.get("PATH", ""), str(_BUILT)]))


class Azurite:
    """The server, with one account and a key of its own. Use as a context manager."""

    def __init__(self, program: str, folder: Path) -> None:
        self.key = base64.b64encode(secrets.token_bytes(64)).decode()
        command = [program, "--blobPort", "0", "--location", str(folder), "--silent", "--disableTelemetry",
                   "--skipApiVersionCheck"]  # fmt: skip
        self._process = subprocess.Popen(
            command, env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{self.key}"}, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Azurite:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"listens on (http://\S+)", line):
                self.url = f"{found[1]}/{ACCOUNT}"
                return self
        raise AssertionError("azurite ended before it listened")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def upload(self, container: str, objects: dict[str, bytes], *, public: bool = False) -> None:
        access = {"x-ms-blob-public-access": "container"} if public else {}
        self._put(f"{container}?restype=container&{self.token()}", b"", access)
        for name, data in objects.items():
            self._put(f"{container}/{name}?{self.token()}", data, {"x-ms-blob-type": "BlockBlob"})

    def _put(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        kind = {"x-ms-version": _VERSION, "Content-Type": "application/octet-stream", **headers}
        urlopen(Request(f"{self.url}/{path}", data, kind, method="PUT"), timeout=20).close()

    def token(self, container: str = "", *, until: str = "2099-01-01T00:00:00Z") -> str:
        """A query: of one container for reading, or of the whole account for everything."""
        if container:
            fields = {"sp": "rl", "st": "", "se": until, "cr": f"/blob/{ACCOUNT}/{container}", "si": "", "sip": "",
                      "spr": "https,http", "sv": _VERSION, "sr": "c", "snapshot": "", "ses": "", "rscc": "",
                      "rscd": "", "rsce": "", "rscl": "", "rsct": ""}  # fmt: skip
            signed = "\n".join(fields.values())
        else:
            fields = {"sp": "rwlac", "ss": "b", "srt": "sco", "st": "", "se": until, "sip": "", "spr": "https,http",
                      "sv": _VERSION, "ses": ""}  # fmt: skip
            signed = "\n".join([ACCOUNT, *fields.values(), ""])
        signature = hmac.new(base64.b64decode(self.key), signed.encode(), hashlib.sha256).digest()
        shown = {name: value for name, value in fields.items() if value and name != "cr"}
        return urlencode({**shown, "sig": base64.b64encode(signature).decode()})
