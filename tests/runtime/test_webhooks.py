"""Which webhooks are called, and what is sent there, against a real HTTPS server."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import re
import socket
import threading
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from asap.errors import InvalidInput, Misconfigured
from asap_runtime import webhooks
from asap_runtime.settings import RuntimeSettings, load_settings, redacted
from asap_runtime.webhooks import Answer, WebhookSettings, check_url, is_public, signature
from waiting import PATIENCE_S, free_port
from webhook_receiver import (
    HERE,
    NAME,
    SECRET,
    Receiver,
    authority,
    raw,
    receiving,
    status,
    trusting,
)

LISTED = WebhookSettings(hosts=(NAME, "ci.example:8443"), secret=SECRET)
BODY = b'{"type":"job.ended"}'
LIMIT_S = webhooks.TIMEOUT_S
DELIVERED, TIMEOUT = Answer("delivered", "200"), Answer("failed", "timeout")
INSIDE = {
    "private 10": "10.1.2.3",
    "private 172": "172.31.255.255",
    "private 192": "192.168.1.1",
    "loopback": "127.0.0.1",
    "all of loopback": "127.8.8.8",
    "link-local, metadata": "169.254.169.254",
    "shared": "100.64.0.1",
    "shared, metadata": "100.100.100.200",
    "unspecified": "0.0.0.0",
    "this network": "0.1.2.3",
    "multicast": "224.0.0.1",
    "global multicast": "232.1.1.1",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "protocol assignments, metadata": "192.0.0.192",
    "documentation": "203.0.113.7",
    "benchmarks": "198.18.0.1",
    "6to4 relay": "192.88.99.1",
    "platform server": "168.63.129.16",
    "loopback 6": "::1",
    "unspecified 6": "::",
    "link-local 6": "fe80::1",
    "link-local 6 with its interface": "fe80::1%eth0",
    "site-local": "fec0::1",
    "unique local": "fc00::1",
    "unique local, metadata": "fd00:ec2::254",
    "multicast 6": "ff02::1",
    "global multicast 6": "ff0e::1",
    "mapped private": "::ffff:10.0.0.1",
    "mapped public": "::ffff:8.8.8.8",
    "compatible": "::10.0.0.1",
    "6to4 of private": "2002:a00:1::1",
    "6to4 of public": "2002:808:808::1",
    "Teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "NAT64 of private": "64:ff9b::10.0.0.1",
    "NAT64 of loopback": "64:ff9b::127.0.0.1",
    "NAT64 of metadata": "64:ff9b::169.254.169.254",
    "local NAT64": "64:ff9b:1::808:808",
    "documentation 6": "2001:db8::1",
    "new documentation 6": "3fff::1",
    "discard": "100::1",
    "segment routing": "5f00::1",
    "reserved 6": "4000::1",
}
OUTSIDE = ["8.8.8.8", "100.63.255.255", "172.32.0.1", "2606:4700::1111", "64:ff9b::808:808"]


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """No call is given up because this machine is busy."""
    monkeypatch.setattr(webhooks, "TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr(webhooks, "CONNECT_S", PATIENCE_S)


def refusal(url: str, settings: WebhookSettings = LISTED) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        check_url(url, settings)
    assert caught.value.problem_code == "invalid-input"
    [error] = caught.value.context["errors"]
    assert error["pointer"] == "/webhook"
    assert error["detail"] in caught.value.detail
    return caught.value


@pytest.mark.parametrize(
    "url",
    [
        f"https://{NAME}",
        f"https://{NAME}/",
        f"https://{NAME}/a/%2e/b?token=x&y=@:8443/",
        f"https://{NAME}?a",
        f"https://{NAME}:443/a",
        "HTTPS://Hooks.EXAMPLE/a",
        "https://ci.example:8443/a",
        f"https://{NAME}/".ljust(2048, "a"),
    ],
)
def test_listed_places_are_accepted(url):
    check_url(url, LISTED)


@pytest.mark.parametrize(
    "url",
    [
        "",
        NAME,
        f"//{NAME}/",
        f"http://{NAME}/",
        f"ftp://{NAME}/",
        f" https://{NAME}/",
        f"https:/{NAME}/",
        f"https://user@{NAME}/",
        f"https://user:password@{NAME}/",
        f"https://@{NAME}/",
        f"https://{NAME}@evil.example/",
        f"https://{NAME}:x@evil.example/",
        f"https://evil.example\\@{NAME}/",
        f"https://{NAME}\\.evil.example/",
        f"https://{NAME}/a\\b",
        f"https://{NAME}/#",
        f"https://{NAME}#@evil.example/",
        f"https://{NAME}/a b",
        f"https://{NAME}/a\n",
        f"https://{NAME}\t/",
        f"https://{NAME}/a\x00",
        f"https://{NAME}/\u00e9",
        "https://hoo\u212as.example/",  # a Kelvin sign, whose small letter is a k
        "https://hooks\u3002example/",  # a full stop to some parsers
        "https://hooks%2eexample/",
        f"https://{NAME}:/",
        f"https://{NAME}:0443/",
        f"https://{NAME}/".ljust(2049, "a"),
    ],
)
def test_other_forms_are_refused_and_not_repeated(url):
    detail = refusal(url).detail
    assert "expected https://" in detail or "not on the operator's list" in detail
    assert "evil" not in detail
    assert "password" not in detail


@pytest.mark.parametrize(
    "place",
    [
        "evil.example",
        f"www.{NAME}",
        f"{NAME}.evil.example",
        f"{NAME}.",
        "hooks",
        f"{NAME}:8443",
        "ci.example",
        "ci.example:443",
        "127.0.0.1",
        "2130706433",
    ],
)
def test_other_places_are_refused(place):
    assert "list" in refusal(f"https://{place}/a").detail


def test_without_hosts_all_are_refused():
    assert "operator" in refusal(f"https://{NAME}/", WebhookSettings()).detail


@given(st.lists(st.sampled_from([*":@/?#\\.[]% x\t", "443", "evil.example", "%2f"])).map("".join))
def test_an_accepted_url_means_the_same_to_every_parser(tail):
    url = f"https://{NAME}{tail}"
    try:
        check_url(url, LISTED)
    except InvalidInput:
        return
    for read in (httpx.URL(url), urlsplit(url)):
        place = (read.scheme, getattr(read, "host", None) or read.hostname, read.port or 443)
        assert place == ("https", NAME, 443)
        assert not read.fragment
    assert not httpx.URL(url).userinfo


def test_places_are_normalised():
    settings = WebhookSettings(hosts=("Hooks.Example:443", "ci.example:8443"), secret=SECRET)
    assert settings.hosts == (NAME, "ci.example:8443")


class Settings(RuntimeSettings):
    webhooks: WebhookSettings = WebhookSettings()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"hosts": [NAME]}, "ASAP_WEBHOOKS: "),
        ({"hosts": [NAME], "secret": "short"}, "ASAP_WEBHOOKS__SECRET: "),
        ({"hosts": [f"https://{NAME}"], "secret": SECRET}, "ASAP_WEBHOOKS__HOSTS: "),
        ({"hosts": [f"{NAME}/a"], "secret": SECRET}, "ASAP_WEBHOOKS__HOSTS: "),
        ({"hosts": ["*.example"], "secret": SECRET}, "ASAP_WEBHOOKS__HOSTS: "),
        ({"hosts": [f"{NAME}:70000"], "secret": SECRET}, "ASAP_WEBHOOKS__HOSTS: "),
        ({"hosts": ["ex_ample." * 50], "secret": SECRET}, "ASAP_WEBHOOKS__HOSTS: "),
    ],
)
def test_settings_that_cannot_work_are_found_at_the_start(values, name):
    with pytest.raises(Misconfigured) as caught:
        load_settings(Settings, webhooks=values)
    assert name in caught.value.detail
    assert SECRET not in caught.value.detail


def test_the_secret_is_not_shown():
    settings = load_settings(Settings, webhooks={"hosts": [NAME], "secret": SECRET})
    assert SECRET not in f"{redacted(settings)}{settings!r}"


@pytest.mark.parametrize("address", INSIDE.values(), ids=INSIDE.keys())
def test_addresses_inside_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_addresses_outside_are_public(address):
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_an_address_in_nat64_is_judged_by_what_is_inside(address):
    wrapped = ipaddress.IPv6Address(int(ipaddress.IPv6Address("64:ff9b::")) | int(address))
    assert is_public(str(wrapped)) == is_public(str(address))


@given(st.ip_addresses())
def test_nothing_that_python_calls_special_is_public(address):
    special = (
        address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
    )
    assert not (special and is_public(str(address)))


def test_the_signature_is_that_of_another_program():
    # printf '1700000000.{"type":"job.ended"}' | openssl dgst -sha256 -hmac "$SECRET"
    assert signature(SECRET, 1_700_000_000, BODY) == (
        "t=1700000000,v1=25837c8240f8188f4b9d79164bafaf2f1d089c852b99b2faf7543ceb052ebcfc"
    )


@pytest.fixture(scope="module")
def verify():
    """The function of the documentation, as a receiver would copy it."""
    text = (Path(__file__).parents[2] / "docs/webhooks.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(code, names)
    return names["verify"]


async def test_one_signed_request_arrives(verify):
    async with receiving(status(200)) as receiver:
        answer = await receiver.caller().send(receiver.url("/a%2Fb?token=x"), "event", BODY)
    assert answer == DELIVERED
    [request] = receiver.requests
    assert request.line == "POST /a%2Fb?token=x HTTP/1.1"
    assert request.body == BODY
    assert request.headers["host"] == f"{NAME}:{receiver.port}"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["asap-event-id"] == "event"
    assert receiver.names == [NAME]
    verify(SECRET, request.headers["asap-signature"], request.body)


def test_the_documented_check_refuses_what_we_did_not_sign(verify):
    now = int(webhooks.time.time())
    good = signature(SECRET, now, BODY)
    verify(SECRET, good, BODY)
    for header, body in (
        (good, BODY + b" "),
        (good.replace(f"t={now}", f"t={now + 1}"), BODY),
        (good[:-1] + ("0" if good[-1] != "0" else "1"), BODY),
        (f"t={now}", BODY),
        ("v1=", BODY),
        ("", BODY),
        ("v1=\u00e9", BODY),
        (signature("x" * 32, now, BODY), BODY),
        (signature(SECRET, now - 301, BODY), BODY),
    ):
        with pytest.raises(ValueError, match="the signature"):
            verify(SECRET, header, body)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(204, "delivered"), (299, "delivered"), (300, "failed"), (400, "failed"), (404, "failed"),
     (410, "stopped"), (429, "failed"), (500, "failed"), (503, "failed")],
)  # fmt: skip
async def test_the_status_decides(code, kind):
    async with receiving(status(code)) as receiver:
        assert await receiver.caller().send(receiver.url(), "e", BODY) == Answer(kind, str(code))


async def test_the_list_is_read_again_at_the_call():
    async with receiving(status(200)) as receiver:
        url = receiver.url().replace(NAME, "evil.example")
        answer = await receiver.caller().send(url, "e", BODY)
    assert answer == Answer("refused", "host not allowed")
    assert receiver.connections == 0


@pytest.mark.parametrize("address", INSIDE.values(), ids=INSIDE.keys())
@pytest.mark.parametrize("public_first", [True, False])
async def test_a_name_with_one_address_inside_is_not_called(address, public_first):
    async with receiving(status(200)) as receiver:
        found = ["8.8.8.8", address] if public_first else [address, "8.8.8.8"]
        caller = receiver.caller(resolve=lambda host, port: found, may_call=is_public)
        answer = await caller.send(receiver.url(), "e", BODY)
    assert answer == Answer("refused", "private address")
    assert receiver.connections == 0


async def test_a_name_that_the_system_knows_as_inside_is_not_called():
    settings = WebhookSettings(hosts=("localhost",), secret=SECRET)
    answer = await webhooks.WebhookCaller(settings).send("https://localhost/", "e", BODY)
    assert answer == Answer("refused", "private address")


async def test_a_name_that_changes_its_address_is_looked_up_once():
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return [HERE] if len(asked) == 1 else ["127.0.0.2"]

    async with (
        receiving(status(200)) as checked,
        receiving(status(200), address="127.0.0.2", port=checked.port) as inside,
    ):
        caller = checked.caller(resolve=rebinding)
        assert await caller.send(checked.url(), "e", BODY) == DELIVERED
        assert asked == [(NAME, checked.port)]
        assert (checked.connections, inside.connections) == (1, 0)
        refused = await caller.send(checked.url(), "e", BODY)
    assert refused == Answer("refused", "private address")
    assert (checked.connections, inside.connections) == (1, 0)


async def test_the_next_address_gets_its_turn():
    async with receiving(status(200)) as receiver:
        caller = receiver.caller(
            resolve=lambda host, port: ["127.0.0.9", HERE], may_call=lambda address: True
        )
        assert await caller.send(receiver.url(), "e", BODY) == DELIVERED


@pytest.mark.parametrize(
    "certificate",
    [
        lambda: authority().issue_cert("evil.example"),
        lambda: authority().issue_cert(HERE),  # right for the address, wrong for the name
        lambda: trustme.CA().issue_cert(NAME),
        lambda: authority().issue_cert(
            NAME, not_after=datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        ),
    ],
    ids=["another name", "the address", "unknown authority", "outdated"],
)
async def test_the_certificate_must_be_that_of_the_name(certificate):
    async with receiving(status(200), certificate=certificate()) as receiver:
        answer = await receiver.caller().send(receiver.url(), "e", BODY)
    assert answer == Answer("failed", "TLS")
    assert receiver.requests == []


async def test_our_own_authority_is_not_trusted_by_default():
    async with receiving(status(200)) as receiver:
        answer = await receiver.caller(tls=None).send(receiver.url(), "e", BODY)
    assert answer == Answer("failed", "TLS")


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(code):
    async with receiving(status(200)) as other:
        async with receiving(status(code, f"Location: {other.url()}")) as receiver:
            answer = await receiver.caller().send(receiver.url(), "e", BODY)
        assert answer == Answer("failed", str(code))
        assert (receiver.connections, other.connections) == (1, 0)


async def test_proxies_of_the_environment_are_not_used(monkeypatch):
    async with receiving(status(200)) as proxy, receiving(status(200)) as receiver:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{HERE}:{proxy.port}")
        assert await receiver.caller().send(receiver.url(), "e", BODY) == DELIVERED
        assert proxy.connections == 0


def test_the_limit_is_five_seconds():
    assert LIMIT_S == 5


async def silence(writer):
    with suppress(OSError):
        await writer.wait_closed()


async def drip(writer):
    for _ in range(6000):
        writer.write(b"H")
        await writer.drain()
        await asyncio.sleep(0.01)


async def early_hints(writer):
    for _ in range(6000):
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("answering", [silence, drip, early_hints])
async def test_a_slow_answer_is_given_up(monkeypatch, answering):
    limit = asyncio.timeout(PATIENCE_S)
    monkeypatch.setattr(webhooks.asyncio, "timeout", lambda seconds: limit)

    async def slow(writer):
        limit.reschedule(asyncio.get_running_loop().time() + 0.2)  # while it answers
        await answering(writer)

    async with receiving(slow) as receiver:
        assert await receiver.caller().send(receiver.url(), "e", BODY) == TIMEOUT
    assert receiver.connections == 1


async def test_a_slow_name_server_is_given_up(monkeypatch):
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.2)
    answered = threading.Event()

    def slow(host: str, port: int) -> list[str]:
        answered.wait(60)
        return [HERE]

    async with receiving(status(200)) as receiver:
        assert await receiver.caller(resolve=slow).send(receiver.url(), "e", BODY) == TIMEOUT
        answered.set()
    assert receiver.connections == 0


async def test_nothing_is_read_of_an_endless_answer():
    written, most = 0, 64 * 2**20

    async def endless(writer):
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while written < most:
            writer.write(b"x" * 65536)
            await writer.drain()
            written += 65536

    async with receiving(endless) as receiver:
        assert await receiver.caller().send(receiver.url(), "e", BODY) == DELIVERED
        await asyncio.sleep(0.1)
    assert written < most / 4  # what the buffers of both ends took


async def test_a_slow_body_holds_up_nobody():
    async def begins(writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        await silence(writer)

    async with receiving(begins) as receiver:
        assert await receiver.caller().send(receiver.url(), "e", BODY) == DELIVERED


async def endless_head(writer):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(100_000):
        writer.write(b"X-%d: y\r\n" % number)
        await writer.drain()


@pytest.mark.parametrize(
    "answering", [endless_head, raw(b""), raw(b"SSH-2.0-x\r\n\r\n"), raw(b"HTTP/1.1 200")]
)
async def test_an_answer_that_is_none_is_a_failure(answering):
    async with receiving(answering) as receiver:
        answer = await receiver.caller().send(receiver.url(), "e", BODY)
    assert answer == Answer("failed", "broken answer")
    assert len(receiver.requests) == 1


async def test_a_receiver_that_is_not_there_is_a_failure():
    receiver = Receiver(port=free_port())
    answer = await receiver.caller().send(receiver.url(), "e", BODY)
    assert answer == Answer("failed", "no connection")


@pytest.mark.parametrize("found", [socket.gaierror("unknown"), []])
async def test_a_name_that_is_not_known_is_a_failure(found):
    def resolve(host: str, port: int) -> list[str]:
        if isinstance(found, OSError):
            raise found
        return found

    caller = webhooks.WebhookCaller(LISTED, resolve=resolve, tls=trusting())
    assert await caller.send(f"https://{NAME}/", "e", BODY) == Answer("failed", "unknown host")
