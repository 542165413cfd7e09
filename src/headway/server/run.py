"""Runs the server in this process: its socket, its signals, its end.

uvicorn with uvloop and httptools, one worker: the engine's step thread shares the process. The
first SIGTERM or SIGINT stops admission and lets running requests end; the second ends at once.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headway.core.errors import ConfigError, EngineStopped
from headway.engine.client import EngineClient
from headway.server.app import create_app
from headway.server.config import ServerConfig
from headway.server.edge.limits import limited_protocol

__all__ = ["SWITCH_INTERVAL", "Server", "base_url", "bind", "run"]

#: Seconds after which a thread that holds the interpreter lets another have it. Between two steps
#: the step thread waits for it that long when the event loop is busy, and the other way round;
#: CPython's own 5 ms are a sixth of a step.
SWITCH_INTERVAL: Final = 0.001

#: Seconds that idle connections are kept: longer than clients keep them, so that no request meets
#: a connection that is being closed.
_KEEP_ALIVE: Final = 75

#: Seconds in which clients must have read the last of what the engine made for them.
_LINGER: Final = 2

_log = logging.getLogger("headway.server")


def bind(config: ServerConfig) -> socket.socket:
    """Take the address, so that it is known to be free before a model is loaded.

    Raises:
        ConfigError: it is taken or does not exist, or strangers could use the server.
    """
    try:
        # An empty name would be all addresses, for which there are names: 0.0.0.0 and ::.
        found = socket.getaddrinfo(config.host or "?", config.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ConfigError(f"host is {config.host!r}, must be a name or an address") from None
    family, kind, protocol, _, address = found[0]
    if not config.is_protected and not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"host is {config.host}: without API keys it must be a loopback address, "
            "or --allow-unauthenticated be given"
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(config, error) from None
    return listener


def base_url(config: ServerConfig, listener: socket.socket) -> str:
    """Where clients on this machine find the server."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}"


def run(
    engine: EngineClient,
    config: ServerConfig,
    listener: socket.socket,
    on_ready: Callable[[], None],
) -> None:
    """Serve until told to stop; the engine is shut down then.

    Args:
        engine: not started; it must have no other client.
        config: how to serve.
        listener: from ``bind``.
        on_ready: called when requests are answered.

    Raises:
        ConfigError: the address has been taken meanwhile.
        EngineStopped: the engine's step loop died.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        listener.listen()  # uvloop does it too, and does not notice if it fails
    except OSError as error:
        asyncio.run(engine.shutdown())
        raise _cannot_listen(config, error) from None
    Server(engine, config, on_ready).run(sockets=[listener])
    if engine.failure is not None:
        raise EngineStopped("the step loop died, so the server has stopped; the log says why")


class Server(uvicorn.Server):
    """uvicorn's server; draining comes before closing.

    Args:
        engine: not started.
        config: how to serve.
        on_ready: called when requests are answered.
    """

    def __init__(
        self, engine: EngineClient, config: ServerConfig, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(engine, config),
                http=limited_protocol(config),
                ws="none",
                lifespan="on",
                log_config=_log_config(config),
                access_log=config.access_log,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
            )
        )
        self._engine = engine
        self._shutdown_timeout = config.shutdown_timeout
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # What is there now stays: the collector, which stops every thread, need not look at it.
        gc.collect()
        gc.freeze()
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would end the process by the signal after the shutdown; this one exits 0.
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._engine.failure is not None:
            _log.error("the step loop died", exc_info=self._engine.failure)
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        _log.info(
            "stopping; running requests get %g s, or until the next signal", self._shutdown_timeout
        )
        await self._engine.drain(self._shutdown_timeout)
        asyncio.get_running_loop().call_later(_LINGER, self._hang_up)
        await super().shutdown(sockets)

    def _hang_up(self) -> None:
        for connection in list(self.server_state.connections):
            assert isinstance(connection, HttpToolsProtocol)
            connection.transport.abort()


def _cannot_listen(config: ServerConfig, error: OSError) -> ConfigError:
    reason = os.strerror(error.errno or 0).lower()
    return ConfigError(f"cannot listen on {config.host} port {config.port}: {reason}")


def _log_config(config: ServerConfig) -> dict[str, Any]:
    level = config.log_level.upper()
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "loggers": {
            "headway": {"handlers": ["stderr"], "level": "INFO"},
            "uvicorn": {"handlers": ["stderr"], "level": level, "propagate": False},
            "uvicorn.access": {"level": "INFO"},
        },
    }
