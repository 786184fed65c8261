"""Generation: a static cache, prompts read in one pass, tokens one by one, requests batched continuously."""

from moe.decode.cache import CacheType
from moe.decode.engine import Engine, Made
from moe.decode.model import Decoder, dropped_in_training, for_decoding
from moe.decode.request import Request
from moe.decode.sampling import Sampling

__all__ = [
    "CacheType",
    "Decoder",
    "Engine",
    "Made",
    "Request",
    "Sampling",
    "dropped_in_training",
    "for_decoding",
]
