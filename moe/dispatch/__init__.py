"""Dispatch: from a `Routing` to rows grouped by expert, and back. It does not know which strategy ran."""

from moe.dispatch.all_to_all import AllToAll
from moe.dispatch.auto import Auto
from moe.dispatch.capacity import Capacity
from moe.dispatch.dispatch import Dispatch, Dispatched
from moe.dispatch.dropless import Dropless
from moe.dispatch.exchange import Exchange, ExpertFunction, ExpertWeights
from moe.dispatch.gather import Gather
from moe.dispatch.one_hot import OneHot
from moe.dispatch.ragged_all_to_all import RaggedAllToAll

__all__ = [
    "AllToAll",
    "Auto",
    "Capacity",
    "Dispatch",
    "Dispatched",
    "Dropless",
    "Exchange",
    "ExpertFunction",
    "ExpertWeights",
    "Gather",
    "OneHot",
    "RaggedAllToAll",
]
