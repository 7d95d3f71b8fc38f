"""Downloads of recordings: http(s) only, with limits of size and time, and protection of private networks."""

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

URL_TIMEOUT = 30  # seconds without an answer before a download fails
BLOCK_SIZE = 1 << 16  # bytes per read
COMPLETE = (200, 203)  # status codes of complete answers: OK, and OK from a proxy that changed the file
# Metadata services of clouds, which contain secrets, besides link-local addresses: Alibaba, Oracle, AWS by IPv6.
METADATA = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "192.0.0.192", "fd00:ec2::254")))
NAT64 = ipaddress.ip_network("64:ff9b::/96")
_SECRETS = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<user>[^\s/?#]*@)?(?P<rest>[^\s?#'\"]*)(?P<query>[?#][^\s'\"]*?(?=[:;,.]?(?:[\s'\"]|$)))?",
    re.IGNORECASE,
)
# A query after a space or a quote in a URL. For `_SECRETS`, the URL ends before the space or quote.
_LOST_QUERY = re.compile(r"\?[\w.%\[\]-]+=[^\s'\"]*?(?=[:;,.]?(?:[\s'\"]|$))")


class DownloadError(ValueError):
    """A download that is not allowed or exceeds a limit; the message contains the reason, but not the URL."""


@dataclass(frozen=True)
class UrlPolicy:
    """Limits of downloads. Stored in environment variables, so worker processes share the policy.

    Args:
        max_megabytes: maximum size of a recording, in 10^6 bytes.
        timeout_seconds: maximum duration of a download, from the first connection to the last byte.
        allow_private_redirects: whether a redirect may lead to a private, loopback or link-local address. URLs in a
            list may always have private addresses, but not link-local ones, where clouds serve secrets.
    """

    max_megabytes: float = 1000.0
    timeout_seconds: float = 600.0
    allow_private_redirects: bool = False

    def __post_init__(self):
        if not self.max_megabytes > 0 or not self.timeout_seconds > 0:
            raise ValueError(
                "--url_max_megabytes and --url_timeout_seconds must be above 0; "
                f"got {self.max_megabytes:g} MB and {self.timeout_seconds:g} s"
            )

    @classmethod
    def change(
        cls,
        max_megabytes: float | None = None,
        timeout_seconds: float | None = None,
        allow_private_redirects: bool | None = None,
    ) -> None:
        """Changes the policy of this process and of its later child processes; `None` leaves a value unchanged.

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
        """Returns the current policy.

        Raises:
            ValueError: if an environment variable is not a number.
        """
        return cls(
            float(os.environ.get("SPEECHLLM_URL_MAX_MEGABYTES", cls.max_megabytes)),
            float(os.environ.get("SPEECHLLM_URL_TIMEOUT_SECONDS", cls.timeout_seconds)),
            os.environ.get("SPEECHLLM_URL_ALLOW_PRIVATE_REDIRECTS", "0") == "1",
        )


def redact(text: str) -> str:
    """Replaces user, password and query of all URLs in a text by `***`."""

    def clean(match: re.Match) -> str:
        user = "***@" if match["user"] else ""
        return f"{match['scheme']}{user}{match['rest']}" + (f"{match['query'][0]}***" if match["query"] else "")

    text = _SECRETS.sub(clean, text)
    return _LOST_QUERY.sub("?***", text) if "://" in text else text


def printable(text: str) -> str:
    """Replaces non-printable characters by U+FFFD: the result is one line without control sequences of a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)


def redact_url(url: str) -> str:
    """Replaces user, password, query and fragment of a URL by `***`.

    Safer than `redact`, which must guess where a URL ends in a text: a URL may contain spaces and quotes.
    """
    start = url.find("://") + 3
    path = min(place for sign in "/?#" for place in (url.find(sign, start), len(url)) if place >= 0)
    host = url[start:path]
    rest = re.search("[?#]", url[path:])
    shown = url[path:] if rest is None else f"{url[path : path + rest.start() + 1]}***"
    return f"{url[:start]}{'***@' if '@' in host else ''}{host.rpartition('@')[2]}{shown}"


def is_url(source: object) -> bool:
    """Returns whether a source is an http(s) URL."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def download(url: str) -> bytes:
    """Downloads an http(s) URL under the current policy.

    User and password in the URL are sent only to the host of the URL, not to the targets of redirects.

    Raises:
        DownloadError: if the policy forbids the download.
        OSError: if the server cannot be reached, answers with an error, or closes the connection early.
        http.client.HTTPException, ValueError: if the answer or the URL is invalid.
    """
    if not is_url(url):
        raise DownloadError("neither http nor https")
    policy = UrlPolicy.current()
    # Non-ASCII characters must be quoted; quoted characters must not be quoted twice.
    parts = urllib.parse.urlsplit(urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"))
    credentials, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)))  # noqa: S310
    if credentials:
        token = base64.b64encode(urllib.parse.unquote_to_bytes(credentials)).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {token}")
    guard = _Guard(policy)
    # The default opener also accepts file:, ftp: and data: URLs.
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
        except http.client.InvalidURL as error:  # the message contains parts of the URL
            raise DownloadError("not a valid URL") from error

    return guard.run_with_timeout(fetch)


def _read(answer: http.client.HTTPResponse, policy: UrlPolicy) -> bytes:
    if answer.status not in COMPLETE:
        raise DownloadError(f"the server answers {answer.status}, which is not a complete file")
    limit = int(policy.max_megabytes * 1e6)
    too_large = DownloadError(f"larger than {policy.max_megabytes:g} MB (--url_max_megabytes)")
    if (answer.length or 0) > limit:
        raise too_large
    data = bytearray()
    while block := answer.read(BLOCK_SIZE):
        data += block
        if len(data) > limit:
            raise too_large
    if answer.length:  # bytes announced but not sent; `read` with a size does not raise
        raise http.client.IncompleteRead(bytes(data), answer.length)
    return bytes(data)


class _Guard:
    """Checks the addresses and the total duration of one download.

    The timeout of a socket does not suffice: a slow server may send single bytes, and a host name may have many
    addresses that do not answer. Therefore the download runs in a separate thread, which is abandoned on timeout.
    """

    def __init__(self, policy: UrlPolicy):
        self.policy = policy
        self.redirected = False
        self.expired = False
        self.by_proxy = False
        self.socket: socket.socket | None = None

    def run_with_timeout(self, fetch: Callable[[], bytes]) -> bytes:
        """Returns or raises the result of `fetch`; raises `DownloadError` on timeout."""
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
        raise DownloadError(f"takes longer than {self.policy.timeout_seconds:g} s (--url_timeout_seconds)")

    def check_host(self, host: str) -> None:
        """Raises `DownloadError` if the policy forbids an address of a host name.

        Used for requests through a proxy. A name that cannot be resolved here is left to the proxy.
        """
        try:
            addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        for *_, address in addresses:
            self.check_address(str(address[0]))

    def check_address(self, text: str) -> None:
        """Raises `DownloadError` if the policy forbids an IP address (for example "127.0.0.1" or "::1")."""
        if self.policy.allow_private_redirects:
            return
        address = _embedded_ipv4(ipaddress.ip_address(text.partition("%")[0]))
        if self.redirected and not address.is_global:
            raise DownloadError(
                f"redirected to {address}, which is not a public address; --allow_private_redirects allows it"
            )
        if address.is_link_local:
            raise DownloadError(f"{address} is a link-local address; --allow_private_redirects allows it")
        if address in METADATA:
            raise DownloadError(
                f"{address} is the address of a cloud metadata service; --allow_private_redirects allows it"
            )


def _embedded_ipv4(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Returns the IPv4 address embedded in an IPv6 address (mapped, NAT64, 6to4); other addresses unchanged."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


class _Connection(http.client.HTTPConnection):
    guard: _Guard

    def connect(self) -> None:
        """Connects; raises `DownloadError` if the address is forbidden."""
        super().connect()
        self.guard.socket = self.sock
        if self.guard.expired:
            raise TimeoutError
        # Checks the address of the connection, because a second lookup of the name may return another address.
        # With a proxy, the connection leads to the proxy, which the user has chosen.
        if not self.guard.by_proxy:
            self.guard.check_address(self.sock.getpeername()[0])


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """An HTTPS connection that connects through `_Connection`, which checks the address before data is sent."""

    def connect(self) -> None:
        """Connects; raises `DownloadError` if the address is forbidden."""
        super().connect()
        self.guard.socket = self.sock  # the encrypted socket


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
        self.guard.by_proxy = request.host != urllib.parse.unquote(
            target.netloc
        )  # unquoted in the same way as `request.host`
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
        """Returns the request that follows a redirect; raises `DownloadError` if the policy forbids it."""
        if not is_url(address):
            raise DownloadError("redirected to a URL that is neither http nor https")
        self.guard.redirected = True
        file.read = bytes  # the parent class would read the body of the redirect, whatever its size
        return super().redirect_request(request, file, code, message, headers, address)
