"""uvicorn as this service runs it."""

import math
import socket
import uuid

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import Problem
from service.settings import Settings


class Protocol(HttpToolsProtocol):
    """Answers bytes that are no HTTP request, which no application gets to see, with a problem object too."""

    def send_400_response(self, msg: str) -> None:
        answer = Problem("bad_request", msg).answer(uuid.uuid4().hex)
        head = b"".join(b"%s: %s\r\n" % header for header in answer.raw_headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n%sconnection: close\r\n\r\n%s" % (head, answer.body))
        self.transport.close()


def configure(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """When asked to end, the server waits as long as a request may take, no longer."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.request_timeout_ms / 1000),
    )


def bind(host: str, port: int) -> socket.socket:
    """Bound, not yet listening: what connects before the bundle is loaded is refused, and may try again.

    Raises:
        OSError: no such address, or it is taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
