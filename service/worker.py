"""One worker of ``concord serve --workers``: ``python -m concord.service.worker DESCRIPTOR``, started by the supervisor.

The descriptor is one end of a socket pair. The first message on it holds the settings and the descriptors to serve on.
"""

import functools
import os
import signal
import socket
import sys
from typing import Any

import typer
from fastapi import FastAPI

from concord.service.cli import create_app, freeze_heap, set_up_process
from concord.service.http.acceptor import Acceptor, ConnectionCounts
from concord.service.http.server import Server
from concord.service.http.shared_quotas import SharedLevels
from concord.service.inference.registry import ModelRegistry
from concord.service.settings import Settings
from concord.service.workers.channel import receive
from concord.service.workers.link import SupervisorLink

FAILED = 1


class WorkerServer(Server):
    """Reports to the supervisor when it accepts requests. If a self-test has failed, which is logged, it accepts none and ends:
    the other workers share its socket."""

    failed = False

    def __init__(self, app: FastAPI, settings: Settings, link: SupervisorLink, counts: ConnectionCounts, number: int) -> None:
        super().__init__(app, settings)
        self._counts = counts
        self._place = number - 1
        self._link = link
        self._registry: ModelRegistry = app.state.registry

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        if not all(model.ready() for model in self._registry.models):
            self.failed = self.should_exit = True
            return
        make: Any = self.config.http_protocol_class
        protocol = functools.partial(make, self.config, self.server_state, app_state=self.lifespan.state)
        accept = functools.partial(Acceptor, protocol=protocol, backlog=self.config.backlog, defer=self._has_more)
        self.servers = [accept(listener) for listener in sockets or ()]  # type: ignore[misc]
        await self._link.report_ready()

    async def on_tick(self, counter: int) -> bool:
        leaving = self._leave_at is not None
        self._counts.set(self._place, None if leaving else len(self.server_state.connections))
        return await super().on_tick(counter)

    def _has_more(self) -> bool:
        """Whether another worker has fewer connections."""
        count = len(self.server_state.connections)
        self._counts.set(self._place, count)
        return count > self._counts.least()


def main(descriptor: int) -> int:
    """Serve until the supervisor says otherwise or ends. Returns the exit status."""
    end = socket.socket(fileno=descriptor)
    greeting = receive(end)
    settings = Settings(**greeting["settings"])
    set_up_process(settings, worker=greeting["number"])
    listener = socket.socket(fileno=greeting["listener"])
    operators = socket.socket(fileno=greeting["operators"]) if greeting["operators"] is not None else None
    link = SupervisorLink(end, on_lost=lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        app = create_app(settings, operators, link, SharedLevels(greeting["quotas"]))
    except typer.Exit as stop:  # its message is printed
        return stop.exit_code
    server = WorkerServer(app, settings, link, ConnectionCounts(greeting["connections"]), greeting["number"])
    freeze_heap()
    server.run(sockets=[listener])
    return FAILED if server.failed or not server.started else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
