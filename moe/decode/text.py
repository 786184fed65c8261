"""Text out of tokens as they come."""

from collections.abc import Iterable

import tokenizers
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one sequence.

    Bytes of a character that is not whole, and text that may become a stop string, are held back.

    Args:
        tokenizer: whose tokens they are.
        prompt: the tokens before, after which some tokenizers write another text than at the beginning.
        stop: strings at which the text ends, themselves left out.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt: Iterable[int], stop: tuple[str, ...] = ()):
        self.stopped = False
        """Whether a stop string has come."""
        self._tokenizer, self._stop, self._held = tokenizer, stop, ""
        self._decode = DecodeStream(ids=list(prompt), skip_special_tokens=False)
        self._unfinished: list[int] = []  # tokens of which no text has come yet

    def push(self, token: int) -> str:
        """The text that is certain now."""
        text = self._decode.step(self._tokenizer, token)
        if text is None:
            self._unfinished.append(token)
            return ""
        self._unfinished.clear()
        self._held += text
        found = [at for string in self._stop if (at := self._held.find(string)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.rest()
        keep = max((_overlap(self._held, string) for string in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def rest(self) -> str:
        """What was held back when no more comes; a character cut short becomes U+FFFD."""
        text = self._held + self._tokenizer.decode(self._unfinished, skip_special_tokens=False)
        self._held = ""
        self._unfinished.clear()
        return text


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` with which `string` begins."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
