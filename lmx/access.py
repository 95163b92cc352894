"""Who may use the admin API. Plain ASGI, before any handler.

With a key, whoever knows it. Without one, peers of this machine and of private networks; and since
a browser on such a machine runs other people's pages, no page but LMX's own: a foreign `Origin` is
refused, and so is a `Host` that an attacker's DNS could have pointed here (DNS rebinding,
CVE-2024-28224).
"""

from __future__ import annotations

import hmac
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import Forbidden, Unauthorized


class AdminOnly:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = scope["client"][0] if scope["client"] else ""
        check(scope["state"]["registry"].config.admin_key, peer, Headers(scope=scope))
        await self._app(scope, receive, send)


def check(key: str | None, peer: str, headers: Headers) -> None:
    """
    Raises:
        Unauthorized: there is a key, and the request does not have it.
        Forbidden: there is none, and the peer or the page is not one of ours.
    """
    if key is not None:
        # Headers are latin-1; as bytes, since compare_digest takes no other text than ASCII.
        bearer = headers.get("authorization", "").removeprefix("Bearer ")  # Prometheus has no other
        given = headers.get("x-admin-key", bearer).encode("latin-1")
        if not hmac.compare_digest(given, key.encode()):
            raise Unauthorized("The admin API wants its key in the header X-Admin-Key.")
        return
    if not _is_private(peer):
        raise Forbidden(
            f"The admin API has no key, so it answers this machine and private networks only, not "
            f"{peer or 'an unknown peer'}. Set admin_key in the configuration."
        )
    host = headers.get("host", "").lower()
    if not _is_ours(host):
        raise Forbidden(
            f"The admin API does not answer to the name {host[:100]!r}: use the address, a .local "
            "name, or set admin_key in the configuration."
        )
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        raise Forbidden(f"The admin API is not for pages of {origin[:100]!r}.")


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_private(peer: str) -> bool:
    address = _address(peer)
    return address is not None and (address.is_private or address.is_link_local)


def _is_ours(host: str) -> bool:
    """No public name server can answer for it: an address, a name without dots, or `.local`."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return False
    if _address(name) is not None:
        return True
    return bool(name) and ("." not in name or name.endswith((".local", ".localhost")))
