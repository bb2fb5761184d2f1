"""Words out of the pieces in which the model says them."""

import re
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from pipeline.topology import FRAME_MS

_PARTS: Final = re.compile(r"\s+|\S+")


class Word(Struct, frozen=True):
    """A word of the answer."""

    time_s: float
    """Where in the answer's audio the frame begins with which the word's first piece came, in seconds."""
    text: str

    def line(self) -> str:
        """As in `12.40  hello`."""
        return f"{self.time_s:.2f}  {self.text}"


class Words:
    """Joins the pieces that come with the frames: white space ends a word."""

    def __init__(self) -> None:
        self._time_s = 0.0
        self._text = ""

    def add(self, frame: int, text: str) -> Iterator[Word]:
        """The words that the text of `frame` completes, where frame 0 is the first of the audio."""
        return self.add_at(frame * FRAME_MS / 1_000, text)

    def add_at(self, time_s: float, text: str) -> Iterator[Word]:
        """The words that the text at `time_s`, in seconds into the audio, completes."""
        for part in _PARTS.findall(text):
            if part.isspace():
                yield from self.end()
                continue
            if not self._text:
                self._time_s = round(time_s, 2)
            self._text += part

    def end(self) -> Iterator[Word]:
        """The last word, if there is one."""
        if self._text:
            yield Word(self._time_s, self._text)
        self._text = ""
