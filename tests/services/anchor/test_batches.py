"""BatchChat against a scripted server with files and batches; a turn is made when the test says."""

from __future__ import annotations

import asyncio

import pytest

from asap.errors import UpstreamError, UpstreamUnavailable
from asap.estimate import Prices
from asap_anchor import batches
from asap_anchor.batches import BatchChat
from asap_anchor.cache import ReplyCache
from asap_anchor.failures import Transient
from asap_runtime.spending import Spending, charged_to
from openai_batches import BatchServer, NoReply
from openai_server import Reply, Status
from waiting import PATIENCE_S

KEY = "sk-secret-0123456789"


@pytest.fixture
async def chat_for(tmp_path):
    """Makes a client of a server on one folder, as each process that starts there does."""
    made = []

    async def make(server, **arguments):
        chat = BatchChat(
            base_url=server.base_url,
            api_key=KEY,
            model="tiny",
            cache=ReplyCache(tmp_path / "replies"),
            folder=tmp_path / "batches",
            timeout_s=PATIENCE_S,
            **{"period_s": 1000.0} | arguments,
        )
        await chat.start()
        made.append(chat)
        return chat

    yield make
    for chat in made:
        await chat.close()


async def ask(chat, sampling, *prompts):
    """The texts of the replies; None where the call is to come later."""
    texts = []
    for prompt in prompts:
        try:
            texts.append((await chat.complete(prompt, sampling)).text)
        except UpstreamUnavailable as error:
            if not (error.context["waits"] and error.context["retry_after_s"] > 0):
                raise
            texts.append(None)
    return texts


async def test_calls_are_collected_sent_as_one_batch_and_answered(chat_for, sampling):
    async with BatchServer(lambda prompt, body: Reply(f"reply to {prompt}")) as server:
        chat = await chat_for(server)
        assert await ask(chat, sampling, "a", "b", "a") == [None] * 3
        assert not server.asked
        await chat.turn()
        assert sorted(server.paid()) == ["a", "b"]
        assert await ask(chat, sampling, "a", "b") == [None] * 2
        await chat.turn()
        server.work()
        await chat.turn()
        assert await ask(chat, sampling, "a", "b") == ["reply to a", "reply to b"]
        asked = len(server.asked)
        await chat.turn()
        assert len(server.asked) == asked  # nothing is open any more
        assert len(server.batches) == 1


async def test_requests_say_what_single_ones_would(chat_for, sampling):
    async with BatchServer([Reply("x")]) as server:
        chat = await chat_for(server)
        await ask(chat, sampling, "a")
        await chat.turn()
        server.work()
        [body] = [request["body"] for request in server.lines(server.batches["batch-0"])]
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 2.0,
        "top_p": 1.0,
        "max_tokens": 64,
        "seed": 7,
    }


async def test_a_reply_costs_half_and_is_booked_once_on_whoever_takes_it(chat_for, sampling):
    async with BatchServer([Reply("x", usage=(1000, 100))]) as server:
        chat = await chat_for(server, prices=Prices(100.0, 1000.0))
        spent = [Spending(), Spending(), Spending()]
        with charged_to(spent[0]):
            await ask(chat, sampling, "a")
        await chat.turn()
        server.work()
        await chat.turn()
        for spending in spent[1:]:
            with charged_to(spending):
                assert await ask(chat, sampling, "a") == ["x"]
    assert [spending.take() for spending in spent] == [0, 100_000, 0]


@pytest.mark.parametrize("worked", [False, True], ids=["before it ends", "after it ends"])
async def test_a_process_that_starts_takes_up_the_open_batch(chat_for, sampling, worked):
    async with BatchServer([Reply("x")]) as server:
        first = await chat_for(server)
        await ask(first, sampling, "a")
        await first.turn()
        await first.close()
        if worked:
            server.work()
        second = await chat_for(server)
        assert await ask(second, sampling, "a") == [None]
        server.work()
        await second.turn()
        assert await ask(second, sampling, "a") == ["x"]
        assert server.paid() == ["a"]


async def test_what_was_only_collected_is_asked_again_by_the_next_process(chat_for, sampling):
    async with BatchServer([Reply("x")]) as server:
        first = await chat_for(server)
        await ask(first, sampling, "a")
        await first.close()
        second = await chat_for(server)
        await ask(second, sampling, "a")
        await second.turn()
        assert server.paid() == ["a"]


@pytest.mark.parametrize("broken", ["POST /batches", "lost POST /batches"])
async def test_a_batch_whose_making_went_wrong_is_made_exactly_once(chat_for, sampling, broken):
    async with BatchServer([Reply("x")]) as server:
        server.broken = broken
        first = await chat_for(server)
        await ask(first, sampling, "a")
        with pytest.raises(Transient):
            await first.turn()
        await first.close()  # killed here, in effect
        server.broken = None
        second = await chat_for(server)
        assert await ask(second, sampling, "a") == [None]
        await second.turn()
        server.work()
        await second.turn()
        assert await ask(second, sampling, "a") == ["x"]
        assert server.paid() == ["a"]


async def test_an_upload_that_fails_is_tried_again(chat_for, sampling):
    async with BatchServer([Reply("x")]) as server:
        server.broken = "POST /files"
        chat = await chat_for(server)
        await ask(chat, sampling, "a")
        with pytest.raises(Transient):
            await chat.turn()
        server.broken = None
        await chat.turn()
        assert server.paid() == ["a"]


async def test_a_download_that_fails_loses_no_reply_and_books_none_twice(chat_for, sampling):
    async with BatchServer([Reply("x", usage=(1000, 100)), Status(500)]) as server:
        chat = await chat_for(server, prices=Prices(100.0, 1000.0))
        await ask(chat, sampling, "a", "b")
        await chat.turn()
        server.work()
        server.broken = "GET /files/file-2/content"  # the errors, read behind the replies
        with pytest.raises(Transient):
            await chat.turn()
        spending = Spending()
        with charged_to(spending):
            await ask(chat, sampling, "a")
            server.broken = None
            await chat.turn()
            await ask(chat, sampling, "a")
    assert spending.take() == 100_000


async def test_what_expired_is_asked_again_and_what_came_is_kept(chat_for, sampling):
    async with BatchServer(lambda prompt, body: Reply(prompt)) as server:
        chat = await chat_for(server)
        await ask(chat, sampling, "a", "b", "c")
        await chat.turn()
        server.expire(answered=1)
        await chat.turn()
        assert await ask(chat, sampling, "a", "b", "c") == ["a", None, None]
        await chat.turn()
        server.work()
        await chat.turn()
        assert await ask(chat, sampling, "b", "c") == ["b", "c"]
        assert sorted(server.paid()[3:]) == ["b", "c"]


@pytest.mark.parametrize(("status", "final"), [(400, True), (429, False), (500, False)])
async def test_a_refused_line_fails_its_call_alone(chat_for, sampling, status, final):
    async with BatchServer(lambda p, b: Status(status) if p == "bad" else Reply(p)) as server:
        chat = await chat_for(server)
        await ask(chat, sampling, "bad", "good")
        await chat.turn()
        server.work()
        await chat.turn()
        assert await ask(chat, sampling, "good") == ["good"]
        if final:
            with pytest.raises(UpstreamError, match="400") as caught:
                await chat.complete("bad", sampling)
            assert not caught.value.retryable
        else:
            assert await ask(chat, sampling, "bad") == [None]


async def test_the_newer_name_of_the_reply_bound_is_found(chat_for, sampling):
    def newer(prompt, body):
        return Status(400, param="max_tokens") if "max_tokens" in body else Reply("x")

    async with BatchServer(newer) as server:
        chat = await chat_for(server)
        for _ in range(2):
            assert await ask(chat, sampling, "a") == [None]
            await chat.turn()
            server.work()
            await chat.turn()
        assert await ask(chat, sampling, "a") == ["x"]


@pytest.mark.parametrize(
    ("code", "final"), [("token_limit_exceeded", False), ("model_not_found", True)]
)
async def test_a_refused_batch_is_sent_again_only_when_that_can_help(
    chat_for, sampling, code, final
):
    async with BatchServer([Reply("x")]) as server:
        server.refuse_with = code
        chat = await chat_for(server)
        await ask(chat, sampling, "a")
        await chat.turn()
        server.work()
        await chat.turn()
        if final:
            with pytest.raises(UpstreamError, match="whole batch"):
                await chat.complete("a", sampling)
        else:
            assert await ask(chat, sampling, "a") == [None]


async def test_a_batch_that_the_provider_forgot_is_asked_again(chat_for, sampling):
    async with BatchServer([Reply("x")]) as server:
        chat = await chat_for(server)
        await ask(chat, sampling, "a")
        await chat.turn()
        server.batches.clear()
        await chat.turn()
        await ask(chat, sampling, "a")
        await chat.turn()
        assert server.paid() == ["a"]


async def test_large_collections_become_several_files(chat_for, sampling, monkeypatch):
    monkeypatch.setattr(batches, "MAX_REQUESTS", 2)
    async with BatchServer(lambda prompt, body: Reply(prompt)) as server:
        chat = await chat_for(server)
        prompts = ["a", "b", "c", "d", "e"]
        await ask(chat, sampling, *prompts)
        await chat.turn()
        assert len(server.batches) == 3
        assert sorted(server.paid()) == prompts


async def test_it_goes_on_by_itself_and_over_failures(chat_for, sampling):
    async with BatchServer([Reply("x")]) as server:
        server.broken = "POST /files"
        chat = await chat_for(server, period_s=0.02)
        while await ask(chat, sampling, "a") == [None]:
            await asyncio.sleep(0.02)
            if len(server.asked) > 2:
                server.broken = None
            server.work()
        assert server.paid() == ["a"]


async def test_items_that_wait_do_not_come_all_the_time(chat_for, sampling):
    async with BatchServer([Reply("x")]) as server:
        chat = await chat_for(server, period_s=60.0)
        waits = []
        for i in range(4000):
            chat._collected[f"{i}"] = b""
        for _ in range(2):
            with pytest.raises(UpstreamUnavailable) as caught:
                await chat.complete("a", sampling)
            waits.append(caught.value.context["retry_after_s"])
            chat._collected.clear()
    assert waits[0] > waits[1] >= 2 * 60.0
    assert waits[0] < 1800


async def test_a_paid_line_that_is_no_reply_is_not_paid_for_again_and_again(chat_for, sampling):
    async with BatchServer(lambda p, b: NoReply() if p == "bad" else Reply(p)) as server:
        chat = await chat_for(server)
        await ask(chat, sampling, "bad", "good")
        await chat.turn()
        server.work()
        await chat.turn()
        assert await ask(chat, sampling, "good") == ["good"]
        with pytest.raises(UpstreamError, match="not a chat completion") as caught:
            await chat.complete("bad", sampling)
        assert not caught.value.retryable
        assert len(server.paid()) == 2


async def test_batches_shrink_until_the_provider_has_room_for_one(chat_for, sampling):
    """Its limit of waiting tokens may be far below what we would send at once."""
    prompts = [str(i) for i in range(10)]
    async with BatchServer(lambda prompt, body: Reply(prompt)) as server:
        server.room = 3
        chat = await chat_for(server)
        for _ in range(12):
            if None not in await ask(chat, sampling, *prompts):
                break
            await chat.turn()
            server.work()
            await chat.turn()
        assert await ask(chat, sampling, *prompts) == prompts
        sizes = [len(server.lines(batch)) for batch in server.batches.values()]
    assert sizes[:3] == [10, 5, 5]
    assert set(sizes[3:]) == {2}  # what was taken once is not made smaller


async def test_a_disk_that_is_full_for_a_while_does_not_end_the_turns(
    chat_for, sampling, monkeypatch
):
    async with BatchServer([Reply("x")]) as server:
        chat = await chat_for(server, period_s=0.02)
        put, failures = chat._ledger.put, []

        def full(batch):
            if len(failures) < 2:
                failures.append(batch)
                raise OSError(28, "No space left on device")
            put(batch)

        monkeypatch.setattr(chat._ledger, "put", full)
        async with asyncio.timeout(PATIENCE_S):
            while await ask(chat, sampling, "a") == [None]:
                await asyncio.sleep(0.02)
                server.work()
        assert len(failures) == 2


async def test_replies_are_fetched_while_nothing_new_is_taken(chat_for, sampling):
    async with BatchServer(lambda prompt, body: Reply(prompt)) as server:
        chat = await chat_for(server)
        await ask(chat, sampling, "a")
        await chat.turn()
        server.work()
        await ask(chat, sampling, "b")
        server.broken = "POST /files"
        with pytest.raises(Transient):
            await chat.turn()
        assert await ask(chat, sampling, "a", "b") == ["a", None]


@pytest.mark.parametrize("call", ["POST /files", "POST /batches"])
async def test_a_server_without_batches_fails_its_calls_instead_of_letting_them_wait(
    chat_for, sampling, call
):
    async with BatchServer([Reply("x")]) as server:
        server.broken, server.broken_status = call, 404
        chat = await chat_for(server)
        await ask(chat, sampling, "a", "b")
        with pytest.raises(UpstreamError):
            await chat.turn()
        for prompt in ("a", "b"):
            with pytest.raises(UpstreamError, match="404") as caught:
                await chat.complete(prompt, sampling)
            assert not caught.value.retryable
        await chat.turn()  # and nothing of it is left
