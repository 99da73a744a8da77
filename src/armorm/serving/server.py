"""Start and stop: sockets, uvicorn, and what a server says about itself.

In:  a scorer, a host and a port. Out: a running server.

The socket is bound before the model is loaded, so that a port in use is found out at once. On SIGTERM or Ctrl-C
the server takes nothing more, answers what it has accepted, and ends.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from armorm.errors import ArmormError
from armorm.serving.app import make_app
from armorm.serving.engine import Scorer
from armorm.serving.settings import SettingsError

_BACKLOG = 2048
_START_SECONDS = 60
_KEEP_ALIVE_SECONDS = 75  # longer than nginx keeps its own, so that it is nginx that closes


class ServerError(ArmormError, OSError):
    """A server that cannot be started."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not yet listening; port 0 takes a free one.

    Raises:
        ServerError: for an address that cannot be had.
    """
    if not 0 <= port <= 65535:
        raise ServerError(f"port {port}, expected 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServerError(f"host {host!r}: {error.strerror}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ServerError(f"{host}, port {port}: {error.strerror}") from None
    sock.set_inheritable(False)
    return sock


def address_of(sock: socket.socket) -> str:
    """The address of a bound socket as a URL."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def key_from_environment(name: str | None) -> str | None:
    """The API key in an environment variable; None where no variable is named.

    Raises:
        SettingsError: for a variable that is absent or empty: a server meant to be closed must not stand open.
    """
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise SettingsError(f"environment variable {name} is empty or absent, expected the API key")
    return key


def exposure_warning(host: str, api_key: str | None) -> str | None:
    """What to say about a server that others can reach without a key; None where that is not so."""
    if api_key is not None or is_loopback(host):
        return None
    return (
        f"{host} can be reached from other machines, and no API key is set: whoever reaches it may use it "
        "(--api-key-env NAME closes it)"
    )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def served_name(name: str) -> str:
    """How a model is called in answers: its name, without the folders it lies in."""
    return Path(name).resolve().name if Path(name).exists() else name


class _Server(uvicorn.Server):
    """Ends the streams of open pages before it waits for the last answers, which they would outlast."""

    def __init__(self, config: uvicorn.Config, before_stop: Sequence[Callable[[], None]]) -> None:
        super().__init__(config)
        self._before_stop = before_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for end in self._before_stop:
            end()
        await super().shutdown(sockets)


def make_server(scorer: Scorer) -> uvicorn.Server:
    """A server for a scorer; it writes no line for a request."""
    app = make_app(scorer)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(scorer.settings.shutdown_seconds)),
    )
    return _Server(config, app.state.before_stop)


def serve(scorer: Scorer, sock: socket.socket) -> None:
    """Serve until the process is told to stop; after SIGTERM and the last answer, leave with exit code 0."""
    sock.listen(_BACKLOG)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        make_server(scorer).run(sockets=[sock])  # (It hands the signal on when all is done.)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def running(scorer: Scorer, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """A server in a thread of this process, for as long as the block runs; yields its URL."""
    sock = bound_socket(host, port)
    sock.listen(_BACKLOG)
    server = make_server(scorer)
    thread = threading.Thread(target=server.run, args=([sock],), name="armorm-server", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise ServerError("the server did not start; its log says why")
            thread.join(0.01)
        yield address_of(sock)
    finally:
        server.should_exit = True
        thread.join(scorer.settings.shutdown_seconds + _START_SECONDS)
