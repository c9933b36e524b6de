"""An OpenAI-compatible server whose chats take so many seconds on average: the ideal to measure
against. `python benchmarks/llm_server.py SECONDS` prints its base URL.

Each answer takes half to one and a half of the time: with equal times all slots go in step, and a
burst of all of them waits for the processor, which no real server brings about.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

from aiohttp import web


@contextmanager
def llm_server(seconds: float) -> Iterator[str]:
    """The base URL of such a server in a process of its own, while the block runs."""
    command = [sys.executable, str(Path(__file__)), str(seconds)]
    with Popen(command, stdout=PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def completion(prompt: str) -> bytes:
    """The direct CoT, or the first step of the thinking, which any trace is proved to hold."""
    thinking = prompt.partition("Thinking:\n```\n")[2]
    text = thinking.split("\n\n", maxsplit=1)[0] or "Step-by-Step Solution: as in the answer."
    choice = {"index": 0, "finish_reason": "stop"}
    reply = {
        "object": "chat.completion",
        "choices": [choice | {"message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4},
    }
    return json.dumps(reply).encode()


async def serve(seconds: float) -> None:
    async def answer(request: web.Request) -> web.Response:
        prompt = (await request.json())["messages"][-1]["content"]
        await asyncio.sleep(seconds * random.uniform(0.5, 1.5))
        return web.Response(body=completion(prompt), content_type="application/json")

    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
