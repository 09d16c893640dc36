"""Images from http(s) URLs, with limits on size, time and redirects. Never from addresses of the local network."""

import ipaddress
import socket
import time

import httpx

from tailora.data.messages import short_repr
from tailora.errors import DataError

MOST_REDIRECTS = 5
SECONDS = 30  # for a whole image


def download_image(url: str, most_bytes: int) -> bytes:
    """Returns the content of a URL. Raises DataError if it cannot be downloaded within the limits."""
    deadline = time.monotonic() + SECONDS
    try:
        with httpx.Client(timeout=SECONDS, trust_env=True) as client:
            for _ in range(MOST_REDIRECTS + 1):
                _check_address(url)
                with client.stream("GET", url) as response:
                    if response.next_request is not None:
                        url = str(response.next_request.url)
                        continue
                    response.raise_for_status()
                    return _content(response, most_bytes, deadline)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise DataError(f"image {short_repr(url)} cannot be downloaded: {error or type(error).__name__}") from None
    raise DataError(f"image {short_repr(url)} is redirected more than {MOST_REDIRECTS} times; use its final URL")


def _check_address(url: str) -> None:
    """Raises DataError unless all addresses of the host are public: a data set must not reach this network."""
    parts = httpx.URL(url)
    if parts.scheme not in ("http", "https") or not parts.host:
        raise DataError(f"image {short_repr(url)} is not an http(s) URL")
    addresses = socket.getaddrinfo(parts.host, parts.port or parts.scheme, type=socket.SOCK_STREAM)
    local = [entry[4][0] for entry in addresses if not ipaddress.ip_address(entry[4][0]).is_global]
    if local:
        raise DataError(
            f"image {short_repr(url)} is on the local network ({local[0]}), where data sets may not reach; download it"
        )


def _content(response: httpx.Response, most_bytes: int, deadline: float) -> bytes:
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > most_bytes:
            raise DataError(f"image {short_repr(str(response.url))} has more than {most_bytes >> 20} MiB")
        if time.monotonic() > deadline:
            raise DataError(f"image {short_repr(str(response.url))} takes more than {SECONDS} seconds to download")
    return bytes(content)
