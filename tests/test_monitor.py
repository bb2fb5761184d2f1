"""The monitor: its model fed with scripted events, its lines at every size, its keys in a terminal that is not one."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import msgspec
import pytest
from textual.pilot import Pilot

from pipeline import messages
from pipeline.client import Client
from pipeline.config import Config
from pipeline.control import Hub
from pipeline.errors import ControlError
from pipeline.messages import (
    Accounting,
    CommandRecord,
    Effect,
    Event,
    LogRecord,
    OverloadRecord,
    RecordingRecord,
    Reply,
    RunRecord,
    Spread,
    StageRecord,
    StageSpread,
    StageState,
    StageStatus,
    StatusRecord,
    StatusReport,
    TextRecord,
    Timing,
    TimingRecord,
    XrunRecord,
    Xruns,
)
from pipeline.monitor import command, view
from pipeline.monitor.app import Lines, Monitor
from pipeline.monitor.feed import Feed
from pipeline.monitor.model import STAGES, Figures, Model
from pipeline.runtime import RunFolder
from pipeline.topology import FRAME, StageName
from tests.helpers import PATIENCE_S, folder, runtime_dir  # noqa: F401

SECOND: Final = 1_000_000_000
MS: Final = 1_000_000
Play = Callable[[Monitor, Pilot[None]], Awaitable[None]]
"""What a test does with a view that is open."""

START: Final = 1_000 * SECOND


def a_status(pid: int = 10, **other: Any) -> StatusReport:
    spread = Spread(frames=700, p50_ms=1.5, p95_ms=2.5, p99_ms=3.5, max_ms=4.5)
    given: dict[str, Any] = {
        "name": "t",
        "pid": pid,
        "muted": False,
        "state": "running",
        "engine": "moshi",
        "uptime_s": 61.0,
        "time_ns": START,
        "paused": False,
        "recording": None,
        "settings": Config(engine="moshi"),
        "stages": {
            stage: StageStatus(state="running", pid=100 + number, restarts=number, detail=f"a {stage}", memory_mb=50)
            for number, stage in enumerate(STAGES)
        },
        "accounting": Accounting(waiting_in=FRAME, waiting_out=2 * FRAME, concealed=2_400, dropped=FRAME, gaps=3),
        "timing": Timing(
            capture=spread,
            inference=StageSpread(frames=700, p50_ms=23.6, p95_ms=30.2, p99_ms=34.2, max_ms=99_999.0, late=12),
            playback=spread,
            mic_to_speaker_ms=spread,
        ),
        "xruns": Xruns(capture=1, playback=2),
        "drift_ppm": 12.4,
    }
    return StatusReport(**(given | other))


def timing(stage: StageName, frame: int, start_ms: float, took_ms: float, **other: Any) -> TimingRecord:
    start_ns = START + round(start_ms * MS)
    return TimingRecord(
        stage=stage, frame=frame, start_ns=start_ns, end_ns=start_ns + round(took_ms * MS), queued=1, **other
    )


def a_run(pid: int = 10, **other: Any) -> RunRecord:
    given: dict[str, Any] = {"state": "running", "muted": False, "paused": False}
    return RunRecord(name="t", pid=pid, engine="moshi", time_ns=START, **(given | other))


def fed(*events: Event) -> Model:
    model = Model("t")
    for event in events:
        model.take(event, START)
    return model


def one_frame() -> list[Event]:
    """A frame's way through all stages: 2 ms to the ring, 5 ms of waiting, 40 ms of work, 60 ms to the speaker."""
    return [
        timing("inference", 7, 87, 40, encode_ms=10, step_ms=20, decode_ms=9, context=30, context_size=3_000),
        timing("capture", 7, 0, 82, level_dbfs=-20.4, peak_dbfs=-6.2),  # tells of two frames at a time: later
        timing("playback", 7, 127, 60, mic_to_speaker_ms=187.0, level_dbfs=-30.0, peak_dbfs=-12.0),
    ]


# The model


def test_who_joins_late_knows_every_state_from_the_status_alone() -> None:
    figures = fed(StatusRecord(status=a_status())).figures(START)
    assert [figures.stages[stage].state for stage in STAGES] == ["running"] * 3
    assert [figures.stages[stage].pid for stage in STAGES] == [100, 101, 102]
    assert figures.stages["inference"].late == 12
    assert figures.since == "run"
    assert (figures.concealed_ms, figures.dropped_ms, figures.gaps) == (100, 80, 3)
    assert (figures.ring_in_ms, figures.ring_in_limit_ms) == (80, 640)
    assert (figures.ring_out_ms, figures.ring_out_limit_ms) == (160, 240)
    assert figures.journal == []


def test_states_come_with_the_welcome_before_any_status() -> None:
    figures = fed(a_run(), *(StageRecord(stage=stage, state="ready") for stage in STAGES)).figures(START)
    assert [figures.stages[stage].state for stage in STAGES] == ["ready"] * 3
    assert figures.journal == []  # the welcome is no news


def test_waiting_and_work_are_told_apart() -> None:
    stages = fed(StatusRecord(status=a_status()), *one_frame()).figures(START + SECOND).stages
    assert (stages["capture"].wait_ms, stages["capture"].busy_ms) == (None, 2)
    assert (stages["inference"].wait_ms, stages["inference"].busy_ms, stages["inference"].load) == (5, 40, 0.5)
    assert (stages["playback"].wait_ms, stages["playback"].busy_ms) == (60, None)
    assert (stages["capture"].level_dbfs, stages["playback"].peak_dbfs) == (-20.4, -12.0)


def test_figures_of_now_end_after_two_seconds() -> None:
    model = fed(StatusRecord(status=a_status()), *one_frame())
    assert model.figures(START + SECOND).mic_to_speaker_ms == 187
    later = model.figures(START + 10 * SECOND)
    assert later.mic_to_speaker_ms is None
    assert later.stages["inference"].busy_ms is None
    assert later.context == 30  # as it was last


def test_counts_begin_anew_when_they_are_cleared() -> None:
    model = fed(StatusRecord(status=a_status()), *one_frame())
    model.clear(START + SECOND)
    cleared = model.figures(START + SECOND)
    assert cleared.since == "clear"
    assert (cleared.concealed_ms, cleared.dropped_ms, cleared.gaps) == (0, 0, 0)
    assert [cleared.stages[stage].xruns for stage in STAGES] == [0, None, 0]
    assert cleared.stages["inference"].spread.frames == cleared.stages["inference"].late == 0
    more = Accounting(concealed=4_800, dropped=FRAME, gaps=5)
    model.take(timing("inference", 30, 1_900, 90), START + 2 * SECOND)
    model.take(timing("inference", 29, 10, 90), START + 2 * SECOND)  # of before, and late to be told
    model.take(StatusRecord(status=a_status(accounting=more, xruns=Xruns(capture=4, playback=2))), START + 2 * SECOND)
    figures = model.figures(START + 2 * SECOND)
    assert (figures.concealed_ms, figures.dropped_ms, figures.gaps) == (100, 0, 2)
    assert [figures.stages[stage].xruns for stage in STAGES] == [3, None, 0]
    assert figures.stages["inference"].late == figures.stages["inference"].spread.frames == 1
    assert figures.stages["inference"].spread.max_ms == pytest.approx(90, rel=1e-3)


def test_another_run_of_the_name_begins_everything_anew() -> None:
    model = fed(StatusRecord(status=a_status()), *one_frame(), TextRecord(frame=7, text=" hello", time_ns=START))
    model.clear(START)
    model.take(a_run(pid=11), START + SECOND)
    figures = model.figures(START + SECOND)
    assert (figures.transcript, figures.since, figures.status, figures.context) == ("", "run", None, 0)
    assert not model.columns
    assert figures.stages["capture"].state is None


def test_the_end_of_a_run_is_known_and_so_is_its_return() -> None:
    events: list[Event] = [
        StatusRecord(status=a_status()),
        a_run(state="stopped"),
        LogRecord(stage="supervisor", level="info", message="what was under way", time_ns=START),
    ]
    model = fed(*events)
    assert model.figures(START).link == "ended"
    assert model.figures(START).status is not None  # its last
    model.take(a_run(pid=11, state="starting"), START)
    assert model.figures(START).link == "up"


def test_a_run_that_was_never_up_has_not_ended() -> None:
    model = Model("t")
    model.end()
    assert model.link == "waiting"


def test_a_silent_stage_is_named_and_the_first_on_the_way_is() -> None:
    model = fed(StatusRecord(status=a_status()), *one_frame())
    assert model.silent(START + 300 * MS) is None
    model.take(timing("capture", 30, 1_900, 80), START)
    assert model.silent(START + 2 * SECOND) == "inference"  # and playback, which waits for it
    model.take(a_run(paused=True), START)
    assert model.silent(START + 2 * SECOND) is None


def test_the_timeline_keeps_the_longest_of_each_column_and_where_there_was_none() -> None:
    model = fed(*(timing("inference", frame, 80 * frame, took_ms) for frame, took_ms in enumerate((5, 70, 20))))
    assert list(model.columns) == [(500, 70)]
    model.take(timing("inference", 3, 5_000, 10), START)
    assert list(model.columns) == [(500, 70), (502, 10)]
    assert list(model.silences) == [500, 501, 502]


@pytest.mark.parametrize(
    ("event", "kind", "text"),
    [
        (XrunRecord(stage="playback", kind="gap", count=3, time_ns=START), "xrun", "playback: gap"),
        (LogRecord(stage="capture", level="error", message="lost", time_ns=START), "error", "capture: lost"),
        (
            CommandRecord(verb="set", values={"volume": 0.5}, ok=False, error="no", start_ns=0, end_ns=START),
            "refused",
            "set volume=0.5: refused, no",
        ),
        (
            CommandRecord(verb="mute", ok=True, effects=[Effect(stage="capture", frame=9)], start_ns=0, end_ns=START),
            "command",
            "mute: done by capture from frame 9",
        ),
        (
            RecordingRecord(
                path="a.wav", transcript="a.txt", on=False, frame=0, seconds=2, error="full", time_ns=START
            ),
            "error",
            "recorded 2.0 s to a.wav: full",
        ),
        (
            RecordingRecord(path="a.wav", transcript="a.txt", on=False, frame=0, error="no such folder", time_ns=START),
            "error",
            "not recorded: no such folder",
        ),
    ],
)
def test_what_happened_is_written_down(event: Event, kind: str, text: str) -> None:
    entry = fed(event).figures(START).journal[-1]
    assert (entry.kind, entry.text, entry.time_ns) == (kind, text, START)


def test_what_happens_again_is_counted_in_its_line() -> None:
    gaps: list[Event] = [XrunRecord(stage="playback", kind="gap", count=n, time_ns=START + n) for n in (1, 3)]
    model = fed(StatusRecord(status=a_status()), *gaps)
    assert [(entry.count, entry.time_ns) for entry in model.journal] == [(4, START + 3)]
    assert "playback: gap x4" in "\n".join(line.plain for line in view.lines(model, START, 80, 23))
    model.take(LogRecord(stage="capture", level="info", message="a word", time_ns=START), START)
    model.take(gaps[0], START)
    assert [entry.count for entry in model.journal] == [4, 1, 1]


def test_a_change_of_state_is_news_once() -> None:
    model = fed(StatusRecord(status=a_status()))
    for _ in range(2):
        model.take(StageRecord(stage="inference", state="backoff", time_ns=START), START)
    assert [entry.text for entry in model.journal] == ["inference: backoff"]


def test_cpu_is_what_was_used_between_two_statuses_of_one_process() -> None:
    model = fed(StatusRecord(status=a_status()))
    later = a_status(time_ns=START + 2 * SECOND)
    later.stages["inference"].cpu_s = 0.5
    later.stages["capture"] = StageStatus(state="running", pid=555, restarts=1, cpu_s=0.1)
    model.take(StatusRecord(status=later), START)
    stages = model.figures(START).stages
    assert [stages[stage].cpu_percent for stage in STAGES] == [None, 25, 0]


def test_a_long_conversation_is_bounded() -> None:
    model = fed(*(TextRecord(frame=frame, text=" word", time_ns=START) for frame in range(5_000)))
    assert len(model.transcript) < 10_000


# The lines


def full_model() -> Model:
    """With everything that can be shown, and figures of many digits."""
    status = a_status(
        muted=True, paused=True, recording="talk.wav", uptime_s=400_000.0, xruns=Xruns(capture=12_345, playback=2)
    )
    status.stages["inference"].pid = 4_194_303
    status.stages["inference"].restarts = 108
    talk = [TextRecord(frame=frame, text=f" word{frame}", time_ns=START) for frame in range(2_000)]
    news = [
        LogRecord(stage="capture", level="warning", message=f"line {number} {'long ' * 40}", time_ns=START)
        for number in range(40)
    ]
    return fed(StatusRecord(status=status), *one_frame(), *talk, *news)


@pytest.mark.parametrize("size", [(80, 23), (80, 40), (99, 24), (100, 24), (140, 39), (300, 80), (20, 5)])
def test_lines_fill_the_view_and_no_more(size: tuple[int, int]) -> None:
    width, height = max(size[0], view.WIDTH_MIN), max(size[1], view.HEIGHT_MIN)
    for model in (full_model(), Model("t"), fed(StatusRecord(status=a_status()))):
        shown = view.lines(model, START + SECOND, *size, notice="mute: done")
        assert len(shown) == height
        assert max(line.cell_len for line in shown) <= width


@pytest.mark.parametrize("width", [80, 140])
def test_nothing_that_matters_is_cut_off(width: int) -> None:
    shown = [line.plain for line in view.lines(full_model(), START + SECOND, width, 23)]
    text = "\n".join(shown)
    head, columns, *rows = shown
    assert "[MUTED] [PAUSED] [REC]" in head
    assert "whole run" in head
    assert len({row.index("running") for row in rows[:3]}) == 1
    assert rows[1].split()[:12] == [
        "2", "inference", "running", "4194303", "5.0", "40.0", "50%", "23.6", "30.2", "34.2", "100s", "12",
    ]  # fmt: skip
    for title in ("pid", "WAIT", "late", "xrun"):
        assert len(rows[1]) > columns.index(title)
    for figure in ("12k", "encode 10.0", "step 20.0", "decode 9.0", "-20 dBFS, peak   -6", "80 of 640 ms",
                   "160 of 240 ms", "187 ms now", "+12 ppm", "gaps 3, concealed 100 ms", "30/3000 (1%)",
                   "talk.wav", "word1999", "line 39"):  # fmt: skip
        assert figure in text, figure


def test_a_name_of_any_length_leaves_room_for_what_is_wrong() -> None:
    model = full_model()
    model.name = "n" * 32
    head = view.lines(model, START, 80, 23)[0].plain
    assert "running [MUTED] [PAUSED] [REC]" in head


@pytest.mark.parametrize("state", ["backoff", "fatal"])
def test_a_stage_that_is_down_is_said_in_words(state: StageState) -> None:
    model = fed(StatusRecord(status=a_status()), StageRecord(stage="inference", state=state, time_ns=START))
    assert f"! inference is {state}" in "\n".join(line.plain for line in view.lines(model, START, 80, 23))


def test_a_stalled_model_is_said_in_words_and_marked_in_the_timeline() -> None:
    model = fed(StatusRecord(status=a_status()), *one_frame(), timing("capture", 40, 3_000, 80))
    shown = [line.plain for line in view.lines(model, START + 3_127 * MS, 80, 23)]
    assert "! no frame of inference for 3.0 s" in shown
    assert next(line for line in shown if line.startswith("   0")).endswith("xx")


def test_work_over_the_budget_reaches_over_the_line() -> None:
    model = fed(timing("inference", 1, 1_500, 100), timing("inference", 2, 1_700, 350))
    shown = [line.plain for line in view.lines(model, START + 2_300 * MS, 80, 23)]
    at = next(number for number, line in enumerate(shown) if line.startswith("  80"))
    assert shown[at - 1].rstrip().endswith("^")
    assert shown[at][-2] in "▁▂▃▄▅▆▇█"
    assert shown[at + 1][-2] == shown[at + 2][-2] == "█"


@pytest.mark.parametrize(
    ("ms", "text"),
    [(None, "-"), (0.04, "0.0"), (99.94, "99.9"), (99.96, "100"), (9_999.4, "9999"), (600_000.0, "600s")],
)
def test_a_duration_has_four_characters_at_most(ms: float | None, text: str) -> None:
    assert view.number(ms) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0 s"), (61, "1:01"), (3_661, "1:01:01")])
def test_spans(seconds: float, text: str) -> None:
    assert view.span(seconds) == text


def test_the_plain_view_has_no_control_codes() -> None:
    text = view.plain(full_model(), START, 80)
    assert all(letter == "\n" or letter.isprintable() for letter in text)


# Feed, against a supervisor's sockets


class Supervised:
    """The supervisor's end of a run's sockets: it publishes what the test says, and answers commands."""

    def __init__(self, run: RunFolder, pid: int = 10) -> None:
        self.hub = Hub(run.control, run.events, run.stages)
        self.status = a_status(pid=pid)
        self.asked: list[dict[str, Any]] = []
        self.publish(StatusRecord(status=self.status))

    def publish(self, event: Event) -> None:
        topic = messages.topic(event)
        assert topic is not None
        self.hub.publish(topic, messages.encode(event))

    def turn(self, error: str = "") -> None:
        self.hub.wait(0.01)
        for address, data in self.hub.commands():
            self.asked.append(json.loads(data))
            verb = self.asked[-1]["verb"]
            told = self.status if verb == "status" else None
            self.hub.reply(address, Reply(ok=not error, verb=verb, stage="capture", frame=5, error=error, status=told))

    def close(self) -> None:
        self.hub.close()


@pytest.fixture
def supervised(folder: RunFolder) -> Iterator[Supervised]:  # noqa: F811
    folder.lock()
    supervised = Supervised(folder)
    yield supervised
    supervised.close()
    folder.release()


def follow(feed: Feed, supervised: Supervised, true: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, what
        supervised.turn()
        feed.update(0.01)


def test_the_feed_learns_states_at_once_and_events_as_they_come(supervised: Supervised) -> None:
    with contextlib.closing(Feed(Client("t"))) as feed:
        follow(feed, supervised, lambda: feed.model.status is not None, "the status")
        assert feed.model.figures(START).stages["inference"].state == "running"
        supervised.publish(TextRecord(frame=0, text="hello", time_ns=START))
        follow(feed, supervised, lambda: feed.model.transcript == "hello", "the text")


def test_events_of_another_version_are_counted(supervised: Supervised) -> None:
    with contextlib.closing(Feed(Client("t"))) as feed:
        follow(feed, supervised, lambda: feed.model.status is not None, "the status")
        supervised.hub.publish("xrun", b'{"type":"novel"}')
        follow(feed, supervised, lambda: feed.model.misunderstood == 1, "the event")
        shown = "\n".join(line.plain for line in view.lines(feed.model, START, 80, 23))
        assert "! events of another version of the program: 1" in shown


def test_a_run_that_went_without_a_word_has_ended_and_may_come_back(folder: RunFolder) -> None:  # noqa: F811
    folder.lock()
    first = Supervised(folder)
    with contextlib.closing(Feed(Client("t"))) as feed:
        follow(feed, first, lambda: feed.model.link == "up", "the run")
        first.close()
        folder.release()
        until = time.monotonic() + PATIENCE_S
        while feed.model.link == "up" and time.monotonic() < until:
            feed.update(0.05)
        assert feed.model.link == "ended"
        assert view.absence(feed.model, START) == "t: run ended, waiting for it"
        folder.make()
        folder.lock()
        second = Supervised(folder, pid=11)
        try:
            follow(feed, second, lambda: feed.model.link == "up", "the run's return")
            assert feed.model.status is not None
            assert feed.model.status.pid == 11
        finally:
            second.close()
            folder.release()


# The command, without a terminal


def test_a_number_of_views_asks_for_a_run_that_is_up(runtime_dir: object) -> None:  # noqa: F811
    with pytest.raises(ControlError, match="no run is up under 't'"):
        command.run(Client("t"), views=1, interval_s=1.0, as_json=False)


# The keys


def driven(
    supervised: Supervised, size: tuple[int, int], play: Callable[[Monitor, Pilot[None]], Awaitable[None]]
) -> None:
    """A live view of that size while the run's other end answers."""

    async def main(feed: Feed) -> None:
        app = Monitor(feed, Client("t"), interval_s=0.1)
        async with app.run_test(size=size) as pilot:
            await settled(pilot, supervised, lambda: "running" in screen(app), "the first states")
            await play(app, pilot)

    with contextlib.closing(Feed(Client("t"))) as feed:
        asyncio.run(main(feed))


async def settled(
    pilot: Pilot[None], supervised: Supervised, true: Callable[[], bool], what: str, error: str = ""
) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, what
        supervised.turn(error)
        await pilot.pause(0.01)


def screen(app: Monitor) -> str:
    """What the view shows."""
    lines = app.query_one(Lines)
    return "\n".join(lines.render_line(y).text for y in range(lines.size.height))


def footer(app: Monitor) -> str:
    """The last line of the whole screen."""
    strips = app.screen._compositor.render_strips()
    return strips[-1].text


@pytest.mark.parametrize("size", [(80, 24), (140, 40)])
def test_the_footer_shows_every_key(supervised: Supervised, size: tuple[int, int]) -> None:
    async def play(app: Monitor, pilot: Pilot[None]) -> None:
        await pilot.pause()
        assert " ".join(footer(app).split()) == "m Mute p Pause r Reset 1 2 3 Restart stage c Clear counts q Quit"

    driven(supervised, size, play)


def test_keys_become_commands_and_answers_are_shown(supervised: Supervised) -> None:
    pressed = {
        "m": {"verb": "mute"},
        "p": {"verb": "pause"},
        "r": {"verb": "reset"},
        "1": {"verb": "restart", "stage": "capture"},
        "2": {"verb": "restart", "stage": "inference"},
        "3": {"verb": "restart", "stage": "playback"},
    }

    async def play(app: Monitor, pilot: Pilot[None]) -> None:
        for number, (key, asked) in enumerate(pressed.items(), 1):
            await pilot.press(key)
            answer = f"{' '.join(asked.values())}: done by capture, from frame 5 on"
            await settled(pilot, supervised, lambda answer=answer: answer in screen(app), f"the answer to {key}")  # type: ignore[misc]
            assert supervised.asked[number - 1 :] == [asked]

    driven(supervised, (80, 24), play)


def test_what_is_in_force_is_taken_back_by_the_same_key(supervised: Supervised) -> None:
    async def play(app: Monitor, pilot: Pilot[None]) -> None:
        supervised.publish(a_run(muted=True, paused=True))
        await settled(pilot, supervised, lambda: "[MUTED] [PAUSED]" in screen(app), "the flags")
        for key in "mp":
            await pilot.press(key)
        await settled(pilot, supervised, lambda: len(supervised.asked) == 2, "the commands")
        assert sorted(one["verb"] for one in supervised.asked) == ["resume", "unmute"]

    driven(supervised, (80, 24), play)


def test_a_refusal_is_shown(supervised: Supervised) -> None:
    async def play(app: Monitor, pilot: Pilot[None]) -> None:
        await pilot.press("m")
        shown = "mute: refused, capture is backoff, not running"
        await settled(pilot, supervised, lambda: shown in screen(app), "the refusal", "capture is backoff, not running")

    driven(supervised, (80, 24), play)


def test_clearing_is_of_this_view_only(supervised: Supervised) -> None:
    async def play(app: Monitor, pilot: Pilot[None]) -> None:
        assert "gaps 3" in screen(app)
        await pilot.press("c")
        await settled(pilot, supervised, lambda: "gaps 0" in screen(app), "the counts")
        assert "figures since 0 s ago" in screen(app)
        assert supervised.asked == []

    driven(supervised, (80, 24), play)


def test_q_ends_the_view_also_while_a_command_is_not_answered(supervised: Supervised) -> None:
    async def play(app: Monitor, pilot: Pilot[None]) -> None:
        await pilot.press("2", "q")
        await pilot.pause()
        assert not app.is_running

    driven(supervised, (80, 24), play)
    until = time.monotonic() + PATIENCE_S
    while not supervised.asked:  # let the command's thread end
        assert time.monotonic() < until
        supervised.turn()


def test_figures_are_json_that_reads_back() -> None:
    figures = full_model().figures(START)
    assert msgspec.json.decode(messages.encode(figures), type=Figures) == figures


def test_the_terminals_library_is_not_loaded_for_plain_views() -> None:
    program = "import sys; from pipeline.monitor import command; print('textual' in sys.modules, 'hdrh' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_model_that_is_too_slow_is_said_with_what_helps() -> None:
    slow = OverloadRecord(on=True, p95_ms=112.4, advice="q4 is faster: `pipeline up --quality q4`", time_ns=START)
    model = fed(StatusRecord(status=a_status()), *one_frame(), slow)
    said = "too slow: 95 % of the frames took up to 112 ms of 80; q4 is faster: `pipeline up --quality q4`"
    assert model.figures(START).overload == said
    assert f"! {said}" in view.plain(model, START, 120)
    model.take(OverloadRecord(on=False, p95_ms=60.0, time_ns=START), START)
    assert model.figures(START).overload == ""
