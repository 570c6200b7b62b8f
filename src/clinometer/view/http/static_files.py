"""The page itself and its files: a fixed table, read once, served under the hash of all of it."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import plotly
from starlette.requests import Request
from starlette.responses import Response

from clinometer.messages import LANGUAGES
from clinometer.view.figures.colours import stylesheet

TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".webmanifest": "application/manifest+json",
}
FOREVER = "public, max-age=31536000, immutable"


def plotly_script() -> bytes:
    """plotly.min.js from plotly's own wheel."""
    return (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes()


def _files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """The static files of a folder and the folders in it: ("pages/run.js", its bytes)."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, f"{prefix}{entry.name}/")
        elif Path(entry.name).suffix in TYPES:
            yield prefix + entry.name, entry.read_bytes()


class Pages:
    """index.html and the static files by name; names that are not in the table do not exist."""

    def __init__(self, language: str) -> None:
        self.files = dict(_files(files("clinometer.view").joinpath("static")))
        self.files["tokens.css"] = stylesheet().encode()
        # Plotly writes its rules into the sheet with this id; an inline one the policy forbids.
        self.files["plotly.css"] = b"/* plotly.js writes its rules here */\n"
        self.files["plotly.min.js"] = script = plotly_script()
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(name.encode() + b"\0" + self.files[name] + b"\0")
        self.hash = digest.hexdigest()[:16]
        self._compressed: dict[str, bytes] = {}
        prefix = f"/static/{self.hash}"
        head = f'<link id="plotly.js-style-global" rel="stylesheet" href="{prefix}/plotly.css">'
        # Plotly's map library adds an inline style sheet unless an element with its id is there.
        for name in sorted(set(re.findall(rb'getElementById\("([0-9a-f]{64})"\)', script))):
            head += f'\n<meta id="{name.decode()}">'
        index = self.files.get("index.html", b"").decode()
        codes = " ".join(LANGUAGES)
        places = {"static": prefix, "lang": language, "languages": codes, "plotly": head}
        for place, value in places.items():
            index = index.replace("{{" + place + "}}", value)
        self.index = index.encode()

    async def page(self, request: Request) -> Response:
        tag = f'"{self.hash}"'
        headers = {"cache-control": "no-cache", "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(None, 304, headers)
        return Response(self.index, 200, headers, TYPES[".html"])

    def file(self, request: Request) -> Response:
        """Runs in a thread: the first reader of a file waits for its compression."""
        name = request.path_params["name"]
        content = self.files.get(name)
        if content is None or request.path_params["hash"] != self.hash:
            return Response(None, 404, {"cache-control": "no-store"})
        headers = {"cache-control": FOREVER, "vary": "accept-encoding"}
        suffix = Path(name).suffix
        client = request.client.host if request.client else ""
        # On this machine copying five megabytes is quicker than unpacking them.
        far = client not in ("127.0.0.1", "::1")
        if far and suffix in (".js", ".css", ".svg") and "gzip" in request.headers.get("accept-encoding", ""):
            if name not in self._compressed:
                self._compressed[name] = gzip.compress(content, 6)
            content = self._compressed[name]
            headers["content-encoding"] = "gzip"
        return Response(content, 200, headers, TYPES[suffix])
