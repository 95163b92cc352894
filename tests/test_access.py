"""Who may use the admin API, and who may not."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from lmx.access import check
from lmx.errors import Forbidden, LMXError, Unauthorized


def allowed(key: str | None = None, peer: str = "127.0.0.1", **headers: str) -> bool:
    raw = {"host": "localhost:1234"} | {k.replace("_", "-"): v for k, v in headers.items()}
    pairs = [(k.encode(), v.encode("latin-1")) for k, v in raw.items()]
    try:
        check(key, peer, Headers(raw=pairs))
    except LMXError as error:
        assert isinstance(error, Forbidden if key is None else Unauthorized)
        return False
    return True


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("192.168.1.7", True),
        ("10.9.8.7", True),
        ("172.16.0.1", True),
        ("fd00::1", True),
        ("fe80::1", True),
        ("172.32.0.1", False),
        ("8.8.8.8", False),
        ("::ffff:8.8.8.8", False),
        ("2001:4860:4860::8888", False),
        ("100.64.0.1", False),
        ("", False),
        ("testclient", False),
    ],
)
def test_without_a_key_only_private_peers(peer: str, expected: bool) -> None:
    """Without a key the API answers this machine and private networks, nobody else."""
    assert allowed(peer=peer) is expected


def test_forwarded_for_is_not_believed() -> None:
    """Anybody can write that header: the socket's peer counts."""
    assert not allowed(peer="8.8.8.8", x_forwarded_for="127.0.0.1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sésame", False),
        ("s3cret", True),
        ("", False),
        ("s3cre", False),
        ("s3cret ", False),
        ("S3CRET", False),
        ("x" * 100_000, False),
    ],
    ids=lambda value: str(value)[:8],
)
def test_a_key(given: str, expected: bool) -> None:
    """With a key, it alone decides, wherever the peer is."""
    assert allowed("s3cret", "8.8.8.8", x_admin_key=given, host="evil.com") is expected
    assert not allowed("s3cret", "127.0.0.1")


def test_a_key_that_is_not_ascii() -> None:
    """A key of any characters can be sent as the bytes of its UTF-8."""
    assert allowed("sésame", x_admin_key="sésame".encode().decode("latin-1"))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST:1234", True),
        ("127.0.0.1:1234", True),
        ("192.168.1.7:1234", True),
        ("[::1]:1234", True),
        ("studio", True),
        ("Mac-Studio.local:1234", True),
        ("studio.local.", True),
        ("evil.com", False),
        ("evil.com:1234", False),
        ("127.0.0.1.evil.com", False),
        ("evil.com.", False),
        ("local", True),
        ("notlocal.com", False),
        ("", False),
        ("[::1", False),
        ("[evil.com]", False),
    ],
)
def test_the_host_name_is_ours(host: str, expected: bool) -> None:
    """A public name could have been pointed at this machine by its owner: DNS rebinding."""
    assert allowed(host=host) is expected


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:1234", True),
        ("http://LOCALHOST:1234", True),
        ("http://localhost", False),
        ("http://[", False),
        ("http://localhost:5173", False),
        ("https://evil.com", False),
        ("null", False),
        ("", False),
    ],
)
def test_no_foreign_pages(origin: str, expected: bool) -> None:
    """A page from elsewhere, open in a browser here, cannot load or delete models."""
    assert allowed(origin=origin) is expected
