"""Images from http(s) URLs, with limits on size, time and redirects, and never from the local network.

A data set is untrusted: its URLs must not reach services that only this machine can reach. Every host is resolved once
per request, and the connection goes to the address that was checked, because a second lookup could return a different
one. Proxies of the environment are not used, since they look up hosts themselves.
"""

import asyncio
import ipaddress
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from typing import Any

import httpx

from tailora.data.messages import short_repr
from tailora.errors import DataError

MOST_REDIRECTS = 5
SECONDS = 30  # for a whole image, with its redirects
HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity"}  # the size limit applies to what is sent
EMBEDDING = ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")  # IPv4 in IPv6
NOT_PUBLIC = tuple(map(ipaddress.ip_network, (*EMBEDDING, "fec0::/10")))  # although Python counts some as global


def download_image(url: str, most_bytes: int) -> bytes:
    """Returns the content of a URL. Raises DataError if it cannot be downloaded within the limits."""
    with ThreadPoolExecutor(1) as thread:  # notebooks already run an event loop in theirs
        try:
            return thread.submit(asyncio.run, _download(url, most_bytes)).result()
        except TimeoutError:
            raise DataError(
                f"image {short_repr(url)} was not downloaded within {SECONDS:g} seconds; download it to a file"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            cause = str(error) or type(error).__name__
            raise DataError(f"image {short_repr(url)} cannot be downloaded: {cause}") from None


async def _download(first_url: str, most_bytes: int) -> bytes:
    url = httpx.URL(first_url)
    async with asyncio.timeout(SECONDS), httpx.AsyncClient(timeout=None, trust_env=False) as client:
        for _ in range(MOST_REDIRECTS + 1):
            request = client.build_request(
                "GET",
                url.copy_with(host=await _checked_address(url)),
                headers={**HEADERS, "Host": url.netloc.decode("ascii")},
                extensions={"sni_hostname": url.raw_host.decode("ascii")},
            )
            response = await client.send(request, stream=True)
            try:
                if response.has_redirect_location:
                    url = url.join(response.headers["location"])
                    continue
                if response.status_code != 200:
                    raise httpx.HTTPError(f"the server answers with {response.status_code} {response.reason_phrase}")
                content = bytearray()
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > most_bytes:
                        raise DataError(
                            f"image {short_repr(first_url)} has more than {most_bytes / 2**20:,.0f} MiB; save it with "
                            "a smaller size"
                        )
                return bytes(content)
            finally:
                await response.aclose()
    raise DataError(f"image {short_repr(first_url)} is redirected more than {MOST_REDIRECTS} times; use its final URL")


async def _checked_address(url: httpx.URL) -> str:
    """Returns the address of a URL's host to connect to. Raises DataError unless all its addresses are public."""
    if url.scheme not in ("http", "https") or not url.host:
        raise DataError(f"image {short_repr(str(url))} is not an http(s) URL; expected https://HOST/PATH")
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    host = url.raw_host.decode("ascii")
    addresses = [str(entry[4][0]) for entry in await _looked_up(host, port)]
    if local := [address for address in addresses if not _is_public(address)]:
        raise DataError(
            f"image {short_repr(str(url))} is on the local network ({local[0]}), which URLs in a data set must not "
            "reach; download it to a file"
        )
    return addresses[0]


async def _looked_up(host: str, port: int) -> list[Any]:
    """Looks a host up in a separate thread, which may run beyond the time limit, since lookups cannot be cancelled."""
    entries: Future[list[Any]] = Future()

    def look_up() -> None:
        entries.set_running_or_notify_cancel()
        try:
            entries.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            entries.set_exception(error)

    Thread(target=look_up, daemon=True).start()
    return await asyncio.wrap_future(entries)


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_global and not parsed.is_multicast and not any(parsed in network for network in NOT_PUBLIC)
