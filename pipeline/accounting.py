"""Where every sample is, read off the rings: exact while the stages run, and after any of them was killed."""

from pipeline.messages import Accounting, Xruns
from pipeline.ring import Ring
from pipeline.topology import FRAME, StageName


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
