"""The engines a command needs: the chat client and the scorer, built from its options."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from asap.errors import Misconfigured
from asap.methods import get_method
from asap.ports import Scorer, TokenCounter
from asap_cli.options import PruneOptions

if TYPE_CHECKING:
    from asap_anchor.chat import OpenAIChat


def open_chat(options: PruneOptions) -> OpenAIChat | None:
    """The LLM client when the method and the anchor need one."""
    config = options.config
    if "anchor" not in get_method(config.method).stages or config.anchor == "extractive":
        return None
    if not options.llm_model:
        raise Misconfigured(
            "the LLM anchor needs --llm-model (and --llm-base-url unless it is OpenAI's own); "
            "--anchor extractive needs none"
        )
    from asap_anchor.cache import ReplyCache
    from asap_anchor.chat import OpenAIChat

    price_in, price_out = options.llm_price or (None, None)
    return OpenAIChat(
        base_url=options.llm_base_url,
        # servers on one's own machine take any key
        api_key=os.environ.get("ASAP_LLM__API_KEY") or os.environ.get("OPENAI_API_KEY") or "none",
        model=options.llm_model,
        timeout_s=options.llm_timeout_s,
        concurrency=options.llm_concurrency,
        price_in=price_in,
        price_out=price_out,
        cache=ReplyCache(options.reply_cache),
    )


def open_scorer(options: PruneOptions) -> Scorer | None:
    """The scorer when the method ranks steps; loading takes seconds to minutes."""
    if "surprisal" not in get_method(options.config.method).stages:
        return None
    from asap_surprisal.scorer import TorchScorer

    return TorchScorer.load(resolve_scorer(options), device=options.device)


def open_counter(options: PruneOptions) -> TokenCounter:
    """The scorer's tokenizer alone, for methods that only count."""
    from asap_surprisal.tokenization import HFTokenCounter

    return HFTokenCounter.load(resolve_scorer(options))


def resolve_scorer(options: PruneOptions) -> str:
    """`auto`: the paper's 7B where a GPU can run it, else the shipped demo scorer."""
    if options.scorer != "auto":
        return options.scorer
    from asap_runtime.demo_model import DEMO
    from asap_runtime.model_files import DEFAULT_MODEL

    if options.device == "cpu":
        return DEMO
    from asap_surprisal.loading import gpu_available

    return DEFAULT_MODEL if gpu_available() else DEMO
