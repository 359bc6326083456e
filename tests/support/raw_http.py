"""HTTP over a socket, for requests that no HTTP client would send."""

import socket
from typing import BinaryIO

import httpx

SECONDS = 60.0
"""Longest wait for bytes of the server."""


def head(path: str, size: int, *headers: str) -> bytes:
    """Return the head of a POST request with a JSON body of ``size`` bytes."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {size}", *headers, "", ""]
    return "\r\n".join(lines).encode()


def connect(client: httpx.Client, seconds: float = SECONDS) -> socket.socket:
    """Return a new connection to the client's server."""
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=seconds)


def send_raw(client: httpx.Client, content: bytes, seconds: float = SECONDS) -> bytes:
    """Send ``content`` and return what the server sends until it closes the connection."""
    with connect(client, seconds) as connection:
        connection.sendall(content)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Return what arrives until the server closes the connection.

    Raises:
        ConnectionError: the server resets it.
        TimeoutError: nothing arrives within the socket's timeout.
    """
    return b"".join(iter(lambda: connection.recv(65536), b""))


def read_response(file: BinaryIO) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers (names in lower case) and body of the next response."""
    status = int(file.readline().split()[1])
    lines = iter(file.readline, b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.decode().partition(":") for line in lines)}
    return status, headers, file.read(int(headers["content-length"]))
