"""The process around the application: its socket, its connections, how it starts and how it stops."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable

import uvicorn

from ..errors import ConfigError
from .addresses import is_loopback
from .connections import timed_protocol
from .service import AnswerService
from .settings import ServeSettings

POLL = 0.02  # seconds between two looks at whether the running answers are done
LEAVE = 5.0  # seconds for connections to close after the last answer


def bind(host: str, port: int) -> socket.socket:
    """A socket, taken before a model is loaded. It listens once the server runs; until then clients are refused.

    Raises:
        ConfigError: no such address on this machine, or a port that is in use or not allowed.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host: expected an address of this machine, got {host!r} ({error})") from None
    listener = socket.socket(family, kind, number)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port: {host}:{port} is in use; choose another with --port, or 0 for any") from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(f"port: {port} is not allowed to this user; choose one above 1023 with --port") from None
        raise ConfigError(f"host: expected an address of this machine, got {host!r} ({error.strerror})") from None
    return listener


class Server(uvicorn.Server):
    """uvicorn's server with limits on connections, and an end that lets running answers finish.

    Args:
        started: called with the port once the server listens.
    """

    def __init__(self, app, service: AnswerService, settings: ServeSettings, started: Callable[[int], None]):
        super().__init__(
            uvicorn.Config(
                app, host=settings.host, port=settings.port, log_level="error", access_log=False, server_header=False,
                http=timed_protocol(settings), ws="none", timeout_keep_alive=settings.idle_seconds,  # pyright: ignore
                timeout_graceful_shutdown=LEAVE,  # pyright: ignore[reportArgumentType]
            )
        )  # fmt: skip
        self.service, self.settings, self.announce = service, settings, started

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            self.announce(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets=None) -> None:
        """Take nothing new, let running answers finish for `drain_seconds`, end the rest with an error of their own."""
        for server in self.servers:
            server.close()
        self.service.stopping = True
        deadline = time.monotonic() + self.settings.drain_seconds
        while self.service.in_work and time.monotonic() < deadline and not self.force_exit:
            await asyncio.sleep(POLL)
        await asyncio.get_running_loop().run_in_executor(None, self.service.worker.stop)
        await super().shutdown(sockets)


def exposure(settings: ServeSettings) -> str | None:
    """What to say about a server that others can reach without a key, or None."""
    if settings.api_key is not None or is_loopback(settings.host) or settings.host.lower() == "localhost":
        return None
    return (
        f"warning: {settings.host} can be reached from other machines, and no key is asked for; set "
        "VREFLECTION_API_KEY or --api-key-file"
    )
