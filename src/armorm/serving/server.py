"""Sockets, start and stop of the server.

The socket is bound before the model is loaded, so that a port in use is reported at once. On SIGTERM or Ctrl-C the
server accepts nothing more, answers what it has accepted, and exits.
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
from armorm.serving.engine import ScoringEngine
from armorm.serving.settings import SettingsError

_BACKLOG = 2048
_START_SECONDS = 60
_KEEP_ALIVE_SECONDS = 75  # longer than nginx's own, so that nginx closes connections first


class ServerError(ArmormError, OSError):
    """A server that cannot be started."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not yet listening; port 0 takes a free one."""
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
    """URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def key_from_environment(name: str | None) -> str | None:
    """The API key in an environment variable; None if no variable is named."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:  # The server shall not be open by accident.
        raise SettingsError(f"environment variable {name} is empty or absent, expected the API key")
    return key


def exposure_warning(host: str, api_key: str | None) -> str | None:
    """Warning about a server that other machines can reach without a key, else None."""
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if api_key is not None or loopback:
        return None
    return (
        f"{host} can be reached from other machines and no API key is set; anyone who reaches the server can use it "
        "(set a key with --api-key-env NAME)"
    )


def served_name(name: str) -> str:
    """Name of a model in responses: a folder's name without its parents, any other name unchanged."""
    return Path(name).resolve().name if Path(name).exists() else name


class _Server(uvicorn.Server):
    """Ends the streams of open pages before it waits for the last responses; they would never end by themselves."""

    def __init__(self, config: uvicorn.Config, before_stop: Sequence[Callable[[], None]]) -> None:
        super().__init__(config)
        self._before_stop = before_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for end in self._before_stop:
            end()
        await super().shutdown(sockets)


def make_server(engine: ScoringEngine) -> uvicorn.Server:
    """A server for an engine, without an access log."""
    app = make_app(engine)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(engine.settings.shutdown_seconds)),
    )
    return _Server(config, app.state.before_stop)


def serve(engine: ScoringEngine, sock: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; after SIGTERM and the last response, exit with code 0."""
    sock.listen(_BACKLOG)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        make_server(engine).run(sockets=[sock])  # (Raises the signal again when done.)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def running(engine: ScoringEngine, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Context manager that runs a server in a thread of this process and yields its URL."""
    sock = bound_socket(host, port)
    sock.listen(_BACKLOG)
    server = make_server(engine)
    thread = threading.Thread(target=server.run, args=([sock],), name="armorm-server", daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise ServerError("the server did not start; see its log")
            thread.join(0.01)
        yield address_of(sock)
    finally:
        server.should_exit = True
        thread.join(engine.settings.shutdown_seconds + _START_SECONDS)
