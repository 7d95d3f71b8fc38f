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
from dataclasses import dataclass

URL_TIMEOUT = 30  # seconds without an answer before a download is given up
BLOCK_SIZE = 1 << 16  # bytes read at once
_SECRETS = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<user>[^\s/?#]*@)?(?P<rest>[^\s?#'\"]*)(?P<query>[?#][^\s'\"]*?(?=[:;,.]?(?:[\s'\"]|$)))?",
    re.IGNORECASE,
)


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

    return _SECRETS.sub(clean, text)


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
    with guard:
        try:
            with opener.open(request, timeout=min(URL_TIMEOUT, policy.timeout_seconds)) as answer:
                data = _read(answer, policy)
        except (OSError, http.client.HTTPException, ValueError):
            guard.check_time()  # what is said of a connection that was cut means nothing
            raise
        guard.check_time()
    return data


def _read(answer: http.client.HTTPResponse, policy: UrlPolicy) -> bytes:
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

    A server that sends a byte now and then never meets the timeout of a socket, so a timer cuts the connection.
    """

    def __init__(self, policy: UrlPolicy):
        self.policy = policy
        self.redirected = False
        self.expired = False
        self.by_proxy = False
        self.socket: socket.socket | None = None
        self._timer = threading.Timer(policy.timeout_seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        self.expired = True
        if self.socket is not None:
            with contextlib.suppress(OSError):  # closed in the meantime
                self.socket.shutdown(socket.SHUT_RDWR)

    def check_time(self) -> None:
        """Raises `DownloadError` if the time is over."""
        if self.expired:
            raise DownloadError(f"took longer than {self.policy.timeout_seconds:g} s (--url_timeout_seconds)")

    def check_address(self, text: str) -> None:
        """Raises `DownloadError` if the policy forbids an address, "127.0.0.1" or "::1"."""
        address = ipaddress.ip_address(text.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        if self.policy.allow_private_redirects:
            return
        if self.redirected and not address.is_global:
            raise DownloadError(
                f"redirected to {address}, which is not a public address; --allow_private_redirects allows it"
            )
        if address.is_link_local:
            raise DownloadError(f"{address} is a link-local address; --allow_private_redirects allows it")


class _Connection(http.client.HTTPConnection):
    guard: _Guard

    def connect(self) -> None:
        """As the parent's; raises `DownloadError` if the address is forbidden."""
        super().connect()
        self.guard.socket = self.sock
        self.guard.check_time()
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
        self.guard.by_proxy = request.host != urllib.parse.urlsplit(request.full_url).netloc

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
        host = urllib.parse.urlsplit(address).hostname or ""
        if _is_address(host):  # also behind a proxy; what a name stands for is checked once it is connected to
            self.guard.check_address(host)
        file.read = bytes  # the parent reads the whole body of the redirect, whatever its size: let there be none
        return super().redirect_request(request, file, code, message, headers, address)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
