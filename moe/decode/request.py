"""What is asked of generation."""

from dataclasses import dataclass, field

from moe.decode.sampling import Sampling
from moe.errors import UserError

MOST_STOPS = 8  # stop tokens of a request


@dataclass(frozen=True)
class Request:
    """A prompt to go on with."""

    prompt: tuple[int, ...]
    """Vocabulary ids, at least one."""

    max_new_tokens: int = 128
    """Most tokens to generate."""

    sampling: Sampling = field(default_factory=Sampling)
    """How they are drawn."""

    stop_tokens: tuple[int, ...] = ()
    """Tokens that end the sequence, themselves included in it."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if len(self.stop_tokens) > MOST_STOPS:
            raise UserError(f"{len(self.stop_tokens)} stop tokens are too many: at most {MOST_STOPS}")
