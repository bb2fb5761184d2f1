"""Where every sample is, read off the rings: exact while the stages run, and after any of them was killed."""

from pipeline.messages import Accounting, Xruns
from pipeline.ring import Anchor, Ring
from pipeline.topology import FRAME, SAMPLE_RATE, StageName

_DRIFT_AFTER_S = 30
"""Before that the jitter of the anchors is more than any drift."""


def read(capture: Ring, playback: Ring, heard: Ring) -> tuple[Accounting, Xruns]:
    """One consistent reading of a run's three rings."""
    # Playback's counts are in two rings; it brackets each change of both by heard's version.
    mic = capture.ledger()
    out, sent = heard.steadily(lambda: (playback.ledger(), heard.ledger()))
    # Playback that was killed in the middle of a change had sent, and taken, what it had not yet counted.
    torn = heard.changing
    accounting = Accounting(
        captured=mic.written,
        stepped=mic.consumed,
        dropped=mic.dropped,
        waiting_in=mic.waiting,
        generated=out.written,
        played=out.consumed,
        skipped=out.dropped,
        waiting_out=out.written - out.consumed - out.dropped if torn else out.waiting,
        sent=sent.written,
        concealed=sent.written - out.consumed if torn else sent.concealed,
        gaps=sent.gaps,
        cleaned=mic.cleaned,
        cleaned_answers=out.cleaned,
    )
    return accounting, Xruns(capture=mic.xruns, playback=sent.xruns)


def next_frame(stage: StageName, capture: Ring, playback: Ring, heard: Ring) -> int:
    """The microphone frame that `stage` comes to next, as its timing records number them."""
    if stage == "capture":
        return capture.position // FRAME
    if stage == "inference":
        ledger = capture.ledger()
        return (ledger.consumed + ledger.dropped) // FRAME
    last = heard.mark(heard.mark_count - 1)
    return 0 if last is None else last.frame + 1


class Drift:
    """The microphone's clock against the speaker's, from how far each came since the first look."""

    def __init__(self) -> None:
        self._first: tuple[Anchor, Anchor, tuple[int, int]] | None = None

    def ppm(self, capture: Ring, heard: Ring) -> float | None:
        """Positive where the microphone is faster; None in the first 30 s after a device was opened."""
        mic, speaker = capture.anchor, heard.anchor
        if mic is None or speaker is None:
            return None
        generations = capture.generation, heard.generation
        if self._first is None or self._first[2] != generations:
            self._first = mic, speaker, generations
        first_mic, first_speaker, _ = self._first
        rates = [
            (now.position - first.position) * 1e9 / (now.time_ns - first.time_ns)
            for now, first in ((mic, first_mic), (speaker, first_speaker))
            if now.time_ns - first.time_ns >= _DRIFT_AFTER_S * 1e9
        ]
        return (rates[0] - rates[1]) / SAMPLE_RATE * 1e6 if len(rates) == 2 else None
