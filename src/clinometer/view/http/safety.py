"""Who may talk to the page: a middleware in front of everything.

- The Host header must name this server. A foreign name that was pointed at 127.0.0.1 (DNS rebinding) is
  refused before anything is read.
- Beyond 127.0.0.1 a token is required: once in the URL, then in a cookie that scripts cannot read.
- Other sites' pages cannot use the API: their requests carry Sec-Fetch-Site or Origin, and what changes
  anything needs a header that a form cannot send.
- Every answer carries the policy that lets no inline script, no foreign source and no frame in.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Collection, Iterable
from html import escape
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request, cookie_parser
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clinometer.messages import LANGUAGES, say
from clinometer.view.errors import ApiError

CUSTOM_HEADER = "x-clinometer"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
MAX_URL = 8_192

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def hosts_for(host: str, allowed: Iterable[str] = ()) -> frozenset[str]:
    """The names under which a server bound to `host` may be addressed; "*ip" stands for any address."""
    names = {*LOOPBACK, *(name.lower() for name in allowed)}
    if host in ("0.0.0.0", "::", ""):
        # An address typed as numbers cannot be rebound, and this machine's own names are known to it.
        own = socket.gethostname().lower()
        names |= {"*ip", own, f"{own}.local"}
    else:
        names.add(f"[{host.lower()}]" if ":" in host else host.lower())
    return frozenset(names)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """The middleware; `hosts` as from `hosts_for`, `token` None for a server only this machine reaches."""

    def __init__(
        self, app: ASGIApp, *, hosts: Collection[str], token: str | None = None, language: str = "en"
    ) -> None:
        self.app = app
        self.hosts = frozenset(hosts)
        self.token = token
        self.language = language

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        language = _language(scope, self.language)
        host = headers.get("host", "")
        port = (scope.get("server") or ("", None))[1]
        if not self._knows(host, port):
            text = say("view.host", language, host=host[:200], port=port or "")
            return PlainTextResponse(text, 421)
        if len(scope.get("query_string", b"")) + len(scope["path"]) > MAX_URL:
            return _error(ApiError(414, "view.url_too_long", limit=MAX_URL), language)
        if self.token is not None and (answer := self._ask_token(scope, headers, language, port)):
            return answer
        if scope["path"].startswith("/api/") and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return _error(ApiError(403, "view.cross_site"), language)
        if scope["method"] not in ("GET", "HEAD") and not self._is_own_page(headers, host, scope["scheme"]):
            return _error(ApiError(403, "view.cross_site"), language)
        return None

    def _knows(self, host: str, port: int | None) -> bool:
        host = host.lower()
        if host in self.hosts and ":" in host.rpartition("]")[2]:
            return True  # a name given with its port: a tunnel, another machine's proxy
        name, colon, given = host.rpartition(":") if not host.endswith("]") else (host, "", "")
        if not colon:
            name, given = host, "80"
        if port is not None and given != str(port):
            return False
        return name in self.hosts or ("*ip" in self.hosts and _is_address(name))

    def _ask_token(self, scope: Scope, headers: Headers, language: str, port: int | None) -> Response | None:
        assert self.token is not None
        # Cookies do not tell ports apart, and two servers of one machine have two tokens.
        cookie = f"clinometer_{port or 0}"
        query = parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
        if scope["path"] == "/" and any(name == "token" for name, _ in query):
            if not _same(dict(query)["token"], self.token):
                return _refuse_token(language)
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            # Not a redirect: after one, a browser that came from elsewhere withholds a strict cookie.
            address = escape(f"/?{rest}" if rest else "/")
            page = f'<!doctype html><meta http-equiv="refresh" content="0;url={address}">'
            answer = HTMLResponse(page, headers={"cache-control": "no-store"})
            answer.set_cookie(cookie, self.token, httponly=True, samesite="strict", path="/")
            return answer
        bearer = headers.get("authorization", "")
        given = (
            bearer.removeprefix("Bearer ")
            if bearer.startswith("Bearer ")
            else cookie_parser(headers.get("cookie", "")).get(cookie, "")
        )
        if _same(given, self.token):
            return None
        return (
            _error(ApiError(401, "view.token"), language)
            if scope["path"].startswith("/api/")
            else _refuse_token(language)
        )

    @staticmethod
    def _is_own_page(headers: Headers, host: str, scheme: str) -> bool:
        """Whether a request that changes something comes from our page: its own header, and its origin."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if headers.get(CUSTOM_HEADER) != "1" or (origin is None and site is None):
            return False
        own = {f"http://{host}".lower(), f"https://{host}".lower(), f"{scheme}://{host}".lower()}
        return (origin is None or origin.lower() in own) and site in (None, "same-origin")


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode("utf-8"))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _language(scope: Scope, default: str) -> str:
    given = Request(scope).query_params.get("lang", "")
    return given if given in LANGUAGES else default


def _error(error: ApiError, language: str) -> Response:
    return JSONResponse(error.body(language), error.status, headers={"cache-control": "no-store"})


def _refuse_token(language: str) -> Response:
    return PlainTextResponse(say("view.token", language), 401, headers={"cache-control": "no-store"})
