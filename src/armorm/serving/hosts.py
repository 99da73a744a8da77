"""Which `Host` and `Origin` headers are answered: protection against web pages of other sites.

A page in the browser of somebody who can reach the server can send it requests. If the page's own name is made to
resolve to the server's address (DNS rebinding), it could read the responses too; its name is then the `Host`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers

from armorm.serving.errors import RequestError

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[a-zA-Z0-9._-]+)(?::(\d{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def is_local(name: str) -> bool:
    """Whether a host name or address, with or without brackets, is one of this machine's loopback interface."""
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


class HostRules:
    """The rules of one server.

    Args:
        hosts: names that are answered besides those of this machine (localhost, loopback addresses, the address that
            the client connected to); `*.example.org` stands for all names under example.org. None answers every name.
        origins: sites whose pages may send requests, as `https://example.org`, besides the server's own pages.
    """

    def __init__(self, hosts: Sequence[str] | None, origins: Sequence[str] = ()) -> None:
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origin.lower() for origin in origins)

    def rejection(self, headers: Headers, address: str | None) -> RequestError | None:
        """The error of a request that is not answered; `address` is the server's own of this connection."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if self._hosts is not None and not (len(hosts) == 1 and self._answers(hosts[0], address)):
            return RequestError(421, "this server does not answer for this Host (--allowed-hosts adds names)")
        own = _parts("", hosts[0]) if len(hosts) == 1 else None
        for origin in origins:
            scheme, _, place = origin.lower().partition("://")
            same = own is not None and own[0] and _parts(scheme, place) == _parts(scheme, hosts[0])
            if origin.lower() not in self._origins and not same:
                return RequestError(403, "pages of other sites may not send requests (--allowed-origins adds sites)")
        return None

    def _answers(self, host: str, address: str | None) -> bool:
        name = _parts("", host)[0]
        assert self._hosts is not None
        return bool(name) and (
            is_local(name)
            or name.strip("[]") == address
            or name in self._hosts
            or any(rule.startswith("*.") and name.endswith(rule[1:]) for rule in self._hosts)
        )


def _parts(scheme: str, host: str) -> tuple[str, str]:
    """Lowercase name and port of a `Host` value; the scheme's own port is left out; empty if it is malformed."""
    found = _HOST.fullmatch(host)
    if found is None:
        return "", ""
    port = found[2] or ""
    return found[1].lower().rstrip("."), "" if port == _DEFAULT_PORTS.get(scheme) else port
