"""A checkpoint as a model of lm-evaluation-harness: likelihoods by evaluation passes, text by `moe.decode`.

Imports the extra `tasks`; `tasks.py` says what to do where it is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moe.data import Dataset
from moe.data.tokenizer import vocabulary_size
from moe.decode import CacheType, Decoder, Engine, Request, Sampling
from moe.decode.text import TextStream
from moe.evaluation.scoring import make_score_step, score
from moe.experiment import Experiment
from moe.nn import TransformerConfig, structure

NEW_TOKENS = 256  # where a task does not say how many, as in the harness
STEPS_AT_ONCE = 8


@dataclass(frozen=True)
class Checkpoint:
    """What a model of the harness is made of."""

    model: TransformerConfig
    params: nnx.State
    """As they are evaluated, quantised or not."""

    controllers: nnx.State
    tokenizer: tokenizers.Tokenizer
    end_of_text: int
    length: int
    """Tokens that the model sees of a text."""

    rows: int
    """Sequences at once, over all devices."""

    loss_chunks: int
    cache: CacheType


def checkpoint_of(
    experiment: Experiment, params: nnx.State, controllers: nnx.State, dataset: Dataset, rows: int
) -> Checkpoint:
    """What is asked of a run's weights.

    Args:
        experiment: the run's.
        params: quantised or not.
        controllers: state of its balance controllers and strategies.
        dataset: its data, for the tokenizer.
        rows: sequences at once, over all devices.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(dataset.tokenizer))
    tokenizer.encode_special_tokens = True  # as in training: a text that spells out <|endoftext|> goes on
    return Checkpoint(
        experiment.model,
        params,
        controllers,
        tokenizer,
        dataset.end_of_text,
        experiment.data.sequence_length,
        rows,
        experiment.train.loss_chunks,
        "bfloat16" if experiment.model.compute_dtype == "bfloat16" else "float32",
    )


class CheckpointLM(TemplateLM):
    """A checkpoint that answers the harness's three kinds of request."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__()
        self._checkpoint = checkpoint
        graph, _ = structure(checkpoint.model)
        self._step = make_score_step(graph, chunks=checkpoint.loss_chunks)
        self._engines: dict[int, Engine] = {}  # by the tokens that may be made; compiled when they are wanted

    @property
    def eot_token_id(self) -> int:
        """The token between texts, which also stands before one without context."""
        return self._checkpoint.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; none is added, as in training."""
        return self._checkpoint.tokenizer.encode(string, add_special_tokens=False).ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, following) for _, context, following in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that share no target."""
        windows = [
            list(
                map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        self.tok_encode(request.args[0]),
                        prefix_token=self.eot_token_id,
                        max_seq_len=self._checkpoint.length,
                        context_len=1,
                    ),
                )
            )
            for request in requests
        ]
        scores = iter(self._score([pair for text in windows for pair in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text behind each context, up to a stop string, the end of the text or the most tokens."""
        checkpoint = self._checkpoint
        wanted = [_Generation.of(*request.args) for request in requests]
        engine = self._engine(max(one.new_tokens for one in wanted))
        texts: dict[int, str] = {}
        streams: dict[int, TextStream] = {}
        for one in wanted:
            prompt = (self.tok_encode(one.context) or [self.eot_token_id])[-checkpoint.length :]
            stops = (self.eot_token_id,)
            number = engine.submit(Request(tuple(prompt), one.new_tokens, one.sampling, stops))
            texts[number], streams[number] = "", TextStream(checkpoint.tokenizer, prompt, one.until)
        for made in engine.run():
            stream = streams[made.request]
            for token in made.tokens[: -1 if made.stopped else None]:
                texts[made.request] += stream.push(token)
                if stream.stopped:
                    engine.cancel(made.request)
                    break
            if made.last and not stream.stopped:
                texts[made.request] += stream.rest()
        return list(texts.values())

    def _engine(self, new_tokens: int) -> Engine:
        checkpoint = self._checkpoint
        if new_tokens not in self._engines:
            self._engines[new_tokens] = Engine(
                Decoder.of(checkpoint.model, checkpoint.params, checkpoint.controllers),
                vocabulary=vocabulary_size(checkpoint.tokenizer),
                slots=checkpoint.rows,
                length=checkpoint.length + new_tokens,
                cache=checkpoint.cache,
                steps=STEPS_AT_ONCE,
            )
        return self._engines[new_tokens]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        checkpoint = self._checkpoint
        return score(
            self._step,
            checkpoint.params,
            checkpoint.controllers,
            pairs,
            rows=checkpoint.rows,
            length=checkpoint.length,
            padding=checkpoint.end_of_text,
        )


@dataclass(frozen=True)
class _Generation:
    """A request for text."""

    context: str
    until: tuple[str, ...]
    new_tokens: int
    sampling: Sampling

    @staticmethod
    def of(context: str, given: dict[str, Any]) -> "_Generation":
        """As a task writes it: `until`, `max_gen_toks`, `do_sample`, `temperature` and `top_p`."""
        until = given.get("until") or ()
        temperature = given.get("temperature", 1.0) if given.get("do_sample") else 0.0
        return _Generation(
            context,
            (until,) if isinstance(until, str) else tuple(filter(None, until)),
            int(given.get("max_gen_toks") or given.get("max_new_tokens") or NEW_TOKENS),
            Sampling(temperature=float(temperature), top_p=float(given.get("top_p", 1.0))),
        )
