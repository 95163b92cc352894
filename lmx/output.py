"""What a model writes, on its way to the client: text in, text out. Knows no engine, does no I/O.

The runner keeps one parser per sequence. Text goes out as soon as no stop string can begin in it,
so how the text was cut into pieces never shows in the result.
"""

from __future__ import annotations


class OutputParser:
    """Ends the text before a stop string: of several, before the one that begins first."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(s for s in stop if s)  # an empty one would be found everywhere
        self._held = ""
        self.stopped = False
        """A stop string was found: no text follows and generation may end."""

    def feed(self, text: str) -> str:
        """The text that may go out now."""
        if self.stopped or not self._stop:
            return "" if self.stopped else text
        self._held += text
        found, begun = self._found(), self._begun()
        if found <= begun and found < len(self._held):
            return self._end(found)
        # Up to here. A stop string found later than one that has only begun must wait for it.
        safe, self._held = self._held[:begun], self._held[begun:]
        return safe

    def finish(self) -> str:
        """The text still held back, at the end of generation: what had only begun stays text."""
        return self._end(self._found())

    def _end(self, at: int) -> str:
        self.stopped = self.stopped or at < len(self._held)
        text, self._held = self._held[:at], ""
        return text

    def _found(self) -> int:
        """Where the first stop string begins in the held text; its length if there is none."""
        places = [self._held.find(s) for s in self._stop]
        return min((at for at in places if at >= 0), default=len(self._held))

    def _begun(self) -> int:
        """Where the longest unfinished stop string begins; the held text's length if none has."""
        first = len(self._held)
        for s in self._stop:
            at = self._held.find(s[0], max(0, len(self._held) - len(s) + 1))
            while 0 <= at < first and not s.startswith(self._held[at:]):
                at = self._held.find(s[0], at + 1)
            if at >= 0:
                first = min(first, at)
        return first
