"""The live page at `/`: one static file. Anybody may have it; what it shows comes from /admin."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from .endpoint import State

_HTML: Final = Path(__file__).with_name("page.html").read_bytes()


def _hash_of(tag: str) -> str:
    """The CSP source that allows the page's one `tag`, and nothing that got into it."""
    [text] = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), _HTML, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(text).digest()).decode()}'"


_HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "ETag": f'"{hashlib.sha256(_HTML).hexdigest()[:32]}"',
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash_of('script')}",
            f"style-src {_hash_of('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


async def page(request: Request[State]) -> Response:
    """The live page."""
    if request.headers.get("if-none-match") == _HEADERS["ETag"]:
        return Response(status_code=304, headers=_HEADERS)
    return Response(_HTML, headers=_HEADERS)
