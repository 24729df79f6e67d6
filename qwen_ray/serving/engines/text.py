"""Text of a growing token sequence: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT_TAIL = 5  # prompt tokens decoded with the first new one: some tokenizers drop a leading space
_INCOMPLETE = "�"  # what a decoder shows for bytes that are not yet a character


class TextStream:
    """Decodes token by token. Text that could be the start of a stop string is held back."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_PROMPT_TAIL:])
        self._from, self._read = 0, len(self._ids)
        self._stop = [s for s in stop if s]
        self.text = ""
        self._shown = 0

    def push(self, token: int) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string was reached)."""
        self._ids.append(token)
        piece = self._pending()
        if piece.endswith(_INCOMPLETE):
            return "", False
        self._from, self._read = self._read, len(self._ids)
        return self._extend(piece)

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        piece = self._pending()
        self._from = self._read = len(self._ids)
        shown, stopped = self._extend(piece)
        if not stopped:
            shown += self.text[self._shown :]
            self._shown = len(self.text)
        return shown

    def _pending(self) -> str:
        before = self._decode(self._ids[self._from : self._read])
        return self._decode(self._ids[self._from :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _extend(self, piece: str) -> tuple[str, bool]:
        searched = max((len(s) for s in self._stop), default=1) - 1
        start = max(0, len(self.text) - searched)
        self.text += piece
        found = [at for at in (self.text.find(s, start) for s in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            shown = self.text[self._shown :]
            self._shown = len(self.text)
            return shown, True
        end = max(self._shown, len(self.text) - self._held())
        shown = self.text[self._shown : end]
        self._shown = end
        return shown, False

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(
            (
                n
                for s in self._stop
                for n in range(1, min(len(s), len(self.text) + 1))
                if self.text.endswith(s[:n])
            ),
            default=0,
        )
