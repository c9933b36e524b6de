"""ASAP: compress chains of thought by anchor-guided pruning and first-token surprisal.

The pure library: types, configuration and algorithms. It opens nothing, calls nobody and imports
neither torch nor a web framework; a chat model and a scorer come in through the ports.
"""

from asap.coarse import coarse_prune
from asap.config import PruneConfig
from asap.errors import AsapError
from asap.fine import count_tokens, fine_prune, rebudget
from asap.methods import METHODS, get_method
from asap.ports import ChatModel, ChatResult, Sampling, Scorer, ScoreRequest, TokenCounter
from asap.proof import prove_reply
from asap.steps import join_steps, split_steps
from asap.thinking import parse_generation, render_target
from asap.types import Record, StepScores, Triple, Usage

__all__ = [
    "METHODS",
    "AsapError",
    "ChatModel",
    "ChatResult",
    "PruneConfig",
    "Record",
    "Sampling",
    "ScoreRequest",
    "Scorer",
    "StepScores",
    "TokenCounter",
    "Triple",
    "Usage",
    "coarse_prune",
    "count_tokens",
    "fine_prune",
    "get_method",
    "join_steps",
    "parse_generation",
    "prove_reply",
    "rebudget",
    "render_target",
    "split_steps",
]
