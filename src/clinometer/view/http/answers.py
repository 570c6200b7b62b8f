"""JSON answers: made in a reading thread, revalidated by ETag, compressed if the client accepts it."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import secrets
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

COMPRESS_FROM = 4_096
_THIS_SERVER = secrets.token_hex(4)
"""Answers depend on the code as well as on the run: an ETag must not outlive the server."""


def plain(value: Any) -> Any:
    """`value` as JSON allows it: numbers that are not finite become None, arrays lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            value = value.astype(object)
            value[~np.isfinite(value.astype(float))] = None
        return value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def etag(*parts: Any) -> str:
    text = json.dumps([_THIS_SERVER, *parts], default=str)
    return f'W/"{hashlib.sha256(text.encode()).hexdigest()[:20]}"'


def json_answer(request: Request, data: Any, status: int = 200, tag: str | None = None) -> Response:
    """Strict JSON (never NaN). Call it in a reading thread: it compresses."""
    body = json.dumps(plain(data), allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    headers = {"cache-control": "no-cache" if tag else "no-store", "vary": "accept-encoding"}
    if tag:
        headers["etag"] = tag
    if len(body) >= COMPRESS_FROM and "gzip" in request.headers.get("accept-encoding", ""):
        body = gzip.compress(body, 1)
        headers["content-encoding"] = "gzip"
    return Response(body, status, headers, "application/json")


def not_modified(request: Request, tag: str) -> Response | None:
    """304 if the reader has this very answer."""
    if tag in [given.strip() for given in request.headers.get("if-none-match", "").split(",")]:
        return Response(None, 304, {"etag": tag, "cache-control": "no-cache"})
    return None
