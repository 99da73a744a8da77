"""Sockets, start and stop of the server.

The socket is bound before the model is loaded, so that a port in use is reported at once. On SIGTERM or Ctrl-C the
server accepts nothing more, answers what it has accepted within a time limit, the rest with 503, and exits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from armorm.errors import ArmormError
from armorm.serving.app import make_app
from armorm.serving.connections import connection_class
from armorm.serving.engine import ScoringEngine
from armorm.serving.hosts import is_local
from armorm.serving.settings import ServingSettings, SettingsError

_LOG = logging.getLogger("armorm.serving")
_BACKLOG = 2048
_HEADER_BYTES = 1 << 16  # most bytes of the headers of a request
_OTHER_FILES = 256  # open files besides connections
_START_SECONDS = 60
_ANSWER_SECONDS = 5  # in which the requests that a stopping server gives up get their responses


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


def exposure_warnings(host: str, settings: ServingSettings) -> list[str]:
    """Warnings about a server that other machines can reach, and what it lacks."""
    if is_local(host):
        return []
    found = []
    if settings.api_key is None:
        found.append(
            f"{host} can be reached from other machines and no API key is set; anyone who reaches the server can use "
            "it (set a key with --api-key-env NAME)"
        )
    if settings.allowed_hosts is None:
        found.append(
            f"{host} is not a loopback address and no host names are set, so that any Host is answered, also that of "
            "a web page which resolves to this server (set --allowed-hosts NAME,NAME)"
        )
    return found


def served_name(name: str) -> str:
    """Name of a model in responses: a folder's name without its parents, any other name unchanged."""
    return Path(name).resolve().name if Path(name).exists() else name


class _Server(uvicorn.Server):
    """Ends what would not end by itself when it stops: streams of open pages, requests after `seconds`."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, seconds: float) -> None:
        super().__init__(config)
        self._app, self._seconds = app, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for end in self._app.state.before_stop:
            end()
        deadline = asyncio.get_running_loop().call_later(self._seconds, self._give_up)
        await super().shutdown(sockets)
        deadline.cancel()

    def _give_up(self) -> None:
        in_flight = self._app.state.in_flight
        text = "not answered within %g s after the server was stopped: %d requests, which get 503"
        _LOG.warning(text, self._seconds, len(in_flight.tasks))
        in_flight.end()


def make_server(engine: ScoringEngine, sock: socket.socket) -> uvicorn.Server:
    """A server for an engine on a bound socket, without an access log."""
    settings = engine.settings
    hosts = settings.allowed_hosts
    app = make_app(engine, () if hosts is None and is_local(sock.getsockname()[0]) else hosts)
    config = uvicorn.Config(
        app,
        http=connection_class(settings),
        ws="none",
        h11_max_incomplete_event_size=_HEADER_BYTES,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=math.ceil(settings.keep_alive_seconds),
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds) + _ANSWER_SECONDS,
    )
    return _Server(config, app, settings.shutdown_seconds)


def serve(engine: ScoringEngine, sock: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; after SIGTERM and the last response, exit with code 0."""
    _allow_files(engine.settings.max_connections + _OTHER_FILES)
    sock.listen(_BACKLOG)
    before = signal.signal(signal.SIGTERM, lambda number, frame: _leave(engine))
    try:
        make_server(engine, sock).run(sockets=[sock])  # (Raises the signal again when done.)
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(engine: ScoringEngine) -> NoReturn:
    """Exit with code 0, at once if a forward pass is not over: libraries abort if Python ends below their calls."""
    if engine.batcher.running:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(0)
    sys.exit(0)


def _allow_files(count: int) -> None:
    """Raise this process's limit of open files, which connections count as, as far as it may."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def running(engine: ScoringEngine, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Context manager that runs a server in a thread of this process and yields its URL."""
    sock = bound_socket(host, port)
    sock.listen(_BACKLOG)
    server = make_server(engine, sock)
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
