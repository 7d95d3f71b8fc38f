"""Downloads: protection against hostile or broken servers, and redaction of secrets."""

import base64
import http.client
import socket
import subprocess
import sys
import threading
import urllib.error
from http.server import BaseHTTPRequestHandler

import pytest

from hf_speechllm.audio import downloads
from hf_speechllm.audio.downloads import DownloadError, UrlPolicy, download, redact


@pytest.fixture(autouse=True)
def policy(monkeypatch):
    """Returns a function that changes the policy, and restores the policy after the test."""
    for name in ("MAX_MEGABYTES", "TIMEOUT_SECONDS", "ALLOW_PRIVATE_REDIRECTS"):
        monkeypatch.setenv(f"SPEECHLLM_URL_{name}", "")
        monkeypatch.delenv(f"SPEECHLLM_URL_{name}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return UrlPolicy.change


@pytest.fixture
def server(serve):
    """A server that answers with a function of the request, and the received headers."""

    def start(answer):
        seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                seen.append(dict(self.headers) | {"path": self.path})
                answer(self)

            def log_message(self, *args):
                pass

        return serve(handler=Handler), seen

    return start


def send(request, data=b"data", status=200, length=True, **headers):
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    if length:
        request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def redirect_to(target):
    return lambda request: send(request, b"" if request.path == "/a" else b"data", 302, Location=target)


def test_address_in_the_list_may_be_private(server):
    address, _ = server(send)
    assert download(f"{address}/a.wav") == b"data"


def test_redirect_to_a_private_address_is_refused_before_anything_is_sent(server):
    inner, seen = server(send)
    port = inner.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"):
        outer, _ = server(redirect_to(f"http://{host}:{port}/secret"))
        with pytest.raises(DownloadError, match="not a public address; --allow_private_redirects"):
            download(f"{outer}/a")
    assert seen == []


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_further_redirect_is_checked(server, monkeypatch, number):
    inner, seen = server(send)
    outer, passed = server(lambda request: send(request, b"", 302, Location=places[request.path]))
    places = {f"/{step}": f"{outer}/{step + 1}" for step in range(1, number)} | {f"/{number}": f"{inner}/secret"}
    connected, check_address = [], downloads._Guard.check_address

    def check(guard, text):  # as if the servers on the way were public
        connected.append(text)
        check_address(guard, text if len(connected) > number else "93.184.216.34")

    monkeypatch.setattr(downloads._Guard, "check_address", check)
    with pytest.raises(DownloadError, match="redirected to 127.0.0.1"):
        download(f"{outer}/1")
    assert [request["path"] for request in passed] == [*places] and seen == []


@pytest.mark.parametrize(
    "address",
    ["100.64.0.1", "100.127.255.254", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "::1", "fc00::1",
     "fe80::1%eth0", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::"],
)  # fmt: skip
def test_no_redirect_leads_to_an_address_that_is_not_public(server, monkeypatch, address):
    inner, seen = server(send)
    outer, _ = server(redirect_to(f"{inner}/secret"))
    places = iter(["127.0.0.1", address])
    monkeypatch.setattr(socket.socket, "getpeername", lambda _: (next(places), 80))
    with pytest.raises(DownloadError, match="which is not a public address"):
        download(f"{outer}/a")
    assert seen == []


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "fe80::1%eth0",
     "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "::ffff:100.100.100.200"],
)  # fmt: skip
def test_addresses_of_cloud_metadata_are_refused_even_in_a_list(monkeypatch, server, policy, address):
    place, seen = server(send)
    monkeypatch.setattr(socket.socket, "getpeername", lambda _: (address, 80))
    with pytest.raises(DownloadError, match="link-local|cloud metadata"):
        download(f"{place}/latest/meta-data")
    assert seen == []
    policy(allow_private_redirects=True)
    assert download(f"{place}/latest/meta-data") == b"data"


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34"])
def test_redirect_to_a_public_address_is_followed(server, monkeypatch, address):
    inner, _ = server(send)
    outer, _ = server(redirect_to(f"{inner}/b"))
    monkeypatch.setattr(socket.socket, "getpeername", lambda _: (address, 80))
    assert download(f"{outer}/a") == b"data"


@pytest.fixture
def proxy(server, monkeypatch):
    """A proxy that answers with a function of the request; gives what it was asked for."""

    def start(answer):
        address, seen = server(answer)
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        return seen

    return start


def test_proxy_may_have_a_private_address_and_is_told_of_public_ones_alone(proxy):
    seen = proxy(send)
    assert download("http://93.184.216.34/a.wav") == b"data"
    assert download("http://name.that.only.the.proxy.knows.invalid/a.wav") == b"data"
    for host in ("169.254.169.254", "[::ffff:169.254.169.254]", "%31%36%39.254.169.254", "100.100.100.200"):
        with pytest.raises(DownloadError, match="link-local|cloud metadata"):
            download(f"http://{host}/latest/meta-data")
    assert len(seen) == 2


def test_redirect_behind_a_proxy_is_checked(proxy):
    seen = proxy(lambda request: send(request, b"", 302, Location="http://10.1.2.3/secret"))
    with pytest.raises(DownloadError, match="redirected to 10.1.2.3"):
        download("http://93.184.216.34/a.wav")
    assert [request["path"] for request in seen] == ["http://93.184.216.34/a.wav"]
    seen = proxy(lambda request: redirect_to("http://93.184.216.34/b.wav")(request) if not seen[1:] else send(request))
    assert download("http://93.184.216.34/a.wav") == b"data"


def test_redirect_to_a_private_address_can_be_allowed(server, policy):
    inner, _ = server(send)
    outer, _ = server(redirect_to(f"{inner}/b"))
    policy(allow_private_redirects=True)
    assert download(f"{outer}/a") == b"data"


def test_name_that_changes_its_address_is_caught(server, monkeypatch):
    """The address of the connection is checked, not an address from an earlier lookup."""
    inner, seen = server(send)
    port = int(inner.rpartition(":")[2])
    lookup = socket.getaddrinfo
    outer, _ = server(redirect_to("http://public.example/"))
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, wanted, *rest, **options: lookup(
            "127.0.0.1", port if host == "public.example" else wanted, type=socket.SOCK_STREAM
        ),
    )
    with pytest.raises(DownloadError, match="redirected to 127.0.0.1"):
        download(f"{outer}/a")
    assert seen == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://x/"])
def test_redirect_to_another_scheme_is_refused(server, target):
    address, _ = server(redirect_to(target))
    # The parent takes ftp addresses, and refuses the others itself.
    with pytest.raises(DownloadError if target.startswith("ftp") else urllib.error.HTTPError):
        download(f"{address}/a")


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_other_schemes_are_refused(address):
    with pytest.raises(DownloadError, match="neither http nor https"):
        download(address)


def test_link_local_address_is_refused_even_in_a_list(monkeypatch, server):
    address, seen = server(send)
    monkeypatch.setattr(socket.socket, "getpeername", lambda _: ("169.254.169.254", 80))
    with pytest.raises(DownloadError, match="169.254.169.254 is a link-local address"):
        download(f"{address}/latest/meta-data")
    assert seen == []


def test_endless_redirects_end(server, policy):
    policy(allow_private_redirects=True)
    address, seen = server(lambda request: send(request, b"", 302, Location=f"/{len(request.path) * 'x'}"))
    with pytest.raises(urllib.error.HTTPError, match="infinite loop"):
        download(f"{address}/a")
    assert len(seen) < 20


@pytest.mark.parametrize("length", [True, False])
def test_download_has_a_limit_of_size(server, policy, length):
    policy(max_megabytes=1)
    address, _ = server(lambda request: send(request, bytes(1_000_000), length=length))
    assert len(download(f"{address}/a")) == 1_000_000
    address, _ = server(lambda request: send(request, bytes(1_000_001), length=length))
    with pytest.raises(DownloadError, match="larger than 1 MB"):
        download(f"{address}/a")


def test_address_that_is_not_well_formed_is_refused_without_its_secrets():
    with pytest.raises(DownloadError) as info:
        download("http://user:secret@host:8o8o/a.wav")
    assert "secret" not in str(info.value)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("headers", [True, False])
def test_slow_server_runs_into_the_timeout(server, policy, headers):
    stop, closed = threading.Event(), threading.Event()

    def drip(request):
        request.wfile.write(b"HTTP/1.0 200 OK\r\n")
        if not headers:
            request.wfile.write(b"\r\n")
        try:
            while not stop.wait(0.05):
                request.wfile.write(b"x")
        except OSError:
            closed.set()

    address, _ = server(drip)
    policy(timeout_seconds=0.5)
    try:
        with pytest.raises(DownloadError, match="longer than 0.5 s"):
            download(f"{address}/a")
        assert closed.wait(30)  # the connection is not left open
    finally:
        stop.set()


def test_incomplete_download_is_refused(server):
    def cut(request):
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b"abcd")

    address, _ = server(cut)
    with pytest.raises(http.client.IncompleteRead) as info:
        download(f"{address}/a")
    assert info.value.partial == b"abcd"


def test_password_is_sent_only_to_the_host_of_the_url(server, policy):
    policy(allow_private_redirects=True)
    inner, inner_seen = server(send)
    outer, outer_seen = server(redirect_to(f"{inner}/b"))
    assert download(outer.replace("http://", "http://me:p%40ss@") + "/a") == b"data"
    assert outer_seen[0]["Authorization"] == "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert "Authorization" not in inner_seen[0]


def test_policy_is_inherited_by_child_processes(policy):
    assert UrlPolicy() == UrlPolicy.current() == UrlPolicy(1000.0, 600.0, False)
    policy(12.5, None, True)
    assert UrlPolicy.current() == UrlPolicy(12.5, 600.0, True)
    code = "import os; print(sorted((k, v) for k, v in os.environ.items() if k.startswith('SPEECHLLM_URL')))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "('SPEECHLLM_URL_MAX_MEGABYTES', '12.5')" in output and "REDIRECTS', '1')" in output
    with pytest.raises(ValueError, match="above 0"):
        policy(0)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("https://u:p@h/a.wav: gone", "https://***@h/a.wav: gone"),
        ("https://h/a.wav?token=x: gone", "https://h/a.wav?***: gone"),
        ("http://h/a b 'https://h/?x=1' s3://k:s@b/c", "http://h/a b 'https://h/?***' s3://***@b/c"),
        ("HTTPS://a:b@c@h/x#t=1, y", "HTTPS://***@h/x#***, y"),
        ("wget -O - https://t@h/x?k=v |", "wget -O - https://***@h/x?*** |"),
        ("/data/a?b.wav and a@b.c", "/data/a?b.wav and a@b.c"),
    ],
)
def test_redaction(text, expected):
    assert redact(text) == expected


def test_socket_timeout_is_at_most_the_download_timeout(monkeypatch, server, policy):
    policy(timeout_seconds=7)
    address, _ = server(send)
    used = []
    original = downloads._Connection.__init__
    monkeypatch.setattr(
        downloads._Connection,
        "__init__",
        lambda self, host, **o: used.append(o["timeout"]) or original(self, host, **o),
    )
    download(f"{address}/a")
    assert used == [7]
