"""Downloads of recordings: http(s) only, with limits of size and time, and no way into a private network."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import ipaddress
import os
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

URL_TIMEOUT = 30  # seconds without an answer before a download is given up
BLOCK_SIZE = 1 << 16  # bytes read at once
WHOLE = (200, 203)  # answers that hold the whole file: OK, and the same from a proxy that changed it
# Where cloud machines keep their secrets, besides link-local addresses: Alibaba, Oracle, AWS by IPv6.
METADATA = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "192.0.0.192", "fd00:ec2::254")))
NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SECRETS = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<user>[^\s/?#]*@)?(?P<rest>[^\s?#'\"]*)(?P<query>[?#][^\s'\"]*?(?=[:;,.]?(?:[\s'\"]|$)))?",
    re.IGNORECASE,
)
# A query behind a space or a quote in a URL, where `_SECRETS` has to take the URL for ended.
_LOST_QUERY = re.compile(r"\?[\w.%\[\]-]+=[^\s'\"]*?(?=[:;,.]?(?:[\s'\"]|$))")


class DownloadError(ValueError):
    """A download that is not allowed or broke a limit; the message says which, without the address."""


@dataclass(frozen=True)
class UrlPolicy:
    """What a download may do. Kept in environment variables, so that processes of a loader or of `map` share it.

    Args:
        max_megabytes: the largest recording, in 10^6 bytes.
        timeout_seconds: the longest download, from the first connection to the last byte.
        allow_private_redirects: whether a redirect may lead to a private, loopback or link-local address. An address
            that a list itself names may be private, save link-local ones, where cloud machines keep their secrets.
    """

    max_megabytes: float = 1000.0
    timeout_seconds: float = 600.0
    allow_private_redirects: bool = False

    def __post_init__(self):
        if not self.max_megabytes > 0 or not self.timeout_seconds > 0:
            raise ValueError("the limits of a download, in megabytes and in seconds, must be above 0")

    @classmethod
    def change(
        cls,
        max_megabytes: float | None = None,
        timeout_seconds: float | None = None,
        allow_private_redirects: bool | None = None,
    ) -> None:
        """Changes the policy of this process, and of those that it starts, where an argument is not `None`.

        Raises:
            ValueError: if a limit is not above 0.
        """
        given = {
            "max_megabytes": max_megabytes,
            "timeout_seconds": timeout_seconds,
            "allow_private_redirects": allow_private_redirects,
        }
        changes: dict = {name: value for name, value in given.items() if value is not None}
        policy = dataclasses.replace(cls.current(), **changes)
        os.environ["SPEECHLLM_URL_MAX_MEGABYTES"] = repr(float(policy.max_megabytes))
        os.environ["SPEECHLLM_URL_TIMEOUT_SECONDS"] = repr(float(policy.timeout_seconds))
        os.environ["SPEECHLLM_URL_ALLOW_PRIVATE_REDIRECTS"] = str(int(policy.allow_private_redirects))

    @classmethod
    def current(cls) -> UrlPolicy:
        """The policy in force.

        Raises:
            ValueError: if an environment variable is not a number.
        """
        return cls(
            float(os.environ.get("SPEECHLLM_URL_MAX_MEGABYTES", cls.max_megabytes)),
            float(os.environ.get("SPEECHLLM_URL_TIMEOUT_SECONDS", cls.timeout_seconds)),
            os.environ.get("SPEECHLLM_URL_ALLOW_PRIVATE_REDIRECTS", "0") == "1",
        )


def redact(text: str) -> str:
    """Text without the secrets that URLs in it may hold: user, password and query become `***`."""

    def clean(match: re.Match) -> str:
        user = "***@" if match["user"] else ""
        return f"{match['scheme']}{user}{match['rest']}" + (f"{match['query'][0]}***" if match["query"] else "")

    text = _SECRETS.sub(clean, text)
    return _LOST_QUERY.sub("?***", text) if "://" in text else text


def redact_url(url: str) -> str:
    """A URL without user, password, query and fragment.

    In a longer text, `redact` has to guess where a URL ends: a space or a quote may be part of it.
    """
    start = url.find("://") + 3
    path = min(place for sign in "/?#" for place in (url.find(sign, start), len(url)) if place >= 0)
    host = url[start:path]
    rest = re.search("[?#]", url[path:])
    shown = url[path:] if rest is None else f"{url[path : path + rest.start() + 1]}***"
    return f"{url[:start]}{'***@' if '@' in host else ''}{host.rpartition('@')[2]}{shown}"


def is_url(source: object) -> bool:
    """Whether a source is an http(s) URL."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def download(url: str) -> bytes:
    """The content of an http(s) URL, under the policy in force.

    User and password in the URL are sent to its host alone, not to where it redirects.

    Raises:
        DownloadError: if the policy forbids it.
        OSError: if the server can't be reached, answers with an error, or breaks off.
        http.client.HTTPException, ValueError: if the answer or the address is not well formed.
    """
    if not is_url(url):
        raise DownloadError("neither http nor https")
    policy = UrlPolicy.current()
    # Non-ASCII paths must be quoted, what is quoted already must stay.
    parts = urllib.parse.urlsplit(urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"))
    credentials, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)))  # noqa: S310
    if credentials:
        token = base64.b64encode(urllib.parse.unquote_to_bytes(credentials)).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {token}")
    guard = _Guard(policy)
    # Put together by hand: the default opener also takes file:, ftp: and data: addresses.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(guard),
        _Handler(guard),
    ):
        opener.add_handler(handler)

    def fetch() -> bytes:
        try:
            with opener.open(request, timeout=min(URL_TIMEOUT, policy.timeout_seconds)) as answer:
                return _read(answer, policy)
        except http.client.InvalidURL as error:  # its message has parts of the URL
            raise DownloadError("not a valid URL") from error

    return guard.within_time(fetch)


def _read(answer: http.client.HTTPResponse, policy: UrlPolicy) -> bytes:
    if answer.status not in WHOLE:
        raise DownloadError(f"the server answers {answer.status}, which is not the whole file")
    limit = int(policy.max_megabytes * 1e6)
    too_large = DownloadError(f"larger than {policy.max_megabytes:g} MB (--url_max_megabytes)")
    if (answer.length or 0) > limit:
        raise too_large
    data = bytearray()
    while block := answer.read(BLOCK_SIZE):
        data += block
        if len(data) > limit:
            raise too_large
    if answer.length:  # announced and not sent; a `read` with a size does not mind
        raise http.client.IncompleteRead(bytes(data), answer.length)
    return bytes(data)


class _Guard:
    """Watches the connections of one download: where they lead, and how long they take in all.

    A server that sends a byte now and then never meets the timeout of a socket, and a name may stand for many
    addresses that don't answer. The download therefore has a thread of its own, which is left to itself when the time
    is over.
    """

    def __init__(self, policy: UrlPolicy):
        self.policy = policy
        self.redirected = False
        self.expired = False
        self.by_proxy = False
        self.socket: socket.socket | None = None

    def within_time(self, fetch: Callable[[], bytes]) -> bytes:
        """What `fetch` gives or raises; raises `DownloadError` if the time is over before."""
        result: Future[bytes] = Future()

        def run() -> None:
            try:
                result.set_result(fetch())
            except BaseException as error:  # raised again by `result`
                result.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        wait([result], self.policy.timeout_seconds)
        if result.done():
            return result.result()
        self.expired = True
        if self.socket is not None:
            with contextlib.suppress(OSError):  # closed in the meantime
                self.socket.shutdown(socket.SHUT_RDWR)
        raise DownloadError(f"took longer than {self.policy.timeout_seconds:g} s (--url_timeout_seconds)")

    def check_host(self, host: str) -> None:
        """Raises `DownloadError` if the policy forbids an address that a host's name stands for.

        For requests by a proxy, which connects itself: a name that is not known here is left to it.
        """
        try:
            addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        for *_, address in addresses:
            self.check_address(str(address[0]))

    def check_address(self, text: str) -> None:
        """Raises `DownloadError` if the policy forbids an address, "127.0.0.1" or "::1"."""
        if self.policy.allow_private_redirects:
            return
        address = _embedded(ipaddress.ip_address(text.partition("%")[0]))
        if self.redirected and not address.is_global:
            raise DownloadError(
                f"redirected to {address}, which is not a public address; --allow_private_redirects allows it"
            )
        if address.is_link_local:
            raise DownloadError(f"{address} is a link-local address; --allow_private_redirects allows it")
        if address in METADATA:
            raise DownloadError(f"{address} is an address of cloud metadata; --allow_private_redirects allows it")


def _embedded(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that an IPv6 address leads to (mapped, NAT64, 6to4); any other address unchanged."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


class _Connection(http.client.HTTPConnection):
    guard: _Guard

    def connect(self) -> None:
        """As the parent's; raises `DownloadError` if the address is forbidden."""
        super().connect()
        self.guard.socket = self.sock
        if self.guard.expired:
            raise TimeoutError
        # The address that is connected to: a name may stand for another one the next time it is looked up. Behind a
        # proxy this is the proxy, which the user has chosen.
        if not self.guard.by_proxy:
            self.guard.check_address(self.sock.getpeername()[0])


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """Its parent connects by `_Connection`, so that the address is checked before anything is sent."""

    def connect(self) -> None:
        """As the parent's."""
        super().connect()
        self.guard.socket = self.sock  # the encrypted one


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens both schemes with guarded connections."""

    def __init__(self, guard: _Guard):
        super().__init__()
        self.guard = guard

    def http_open(self, request):
        """Opens an http URL."""
        return self._open(_Connection, request)

    def https_open(self, request):
        """Opens an https URL."""
        return self._open(_SecureConnection, request)

    def _open(self, kind: type[_Connection], request: urllib.request.Request):
        target = urllib.parse.urlsplit(request.full_url)
        self.guard.by_proxy = request.host != urllib.parse.unquote(target.netloc)  # as the request has read it
        if self.guard.by_proxy:
            self.guard.check_host(urllib.parse.unquote(target.hostname or ""))

        def connection(host, **options):
            made = kind(host, **options)
            made.guard = self.guard
            return made

        return self.do_open(connection, request)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, guard: _Guard):
        self.guard = guard

    def redirect_request(self, request, file, code, message, headers, address):
        """The request to follow; raises `DownloadError` where the policy forbids it."""
        if not is_url(address):
            raise DownloadError("redirected to something that is neither http nor https")
        self.guard.redirected = True
        file.read = bytes  # the parent reads the whole body of the redirect, whatever its size: let there be none
        return super().redirect_request(request, file, code, message, headers, address)
