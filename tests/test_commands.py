"""What a run does with each command: who is told, what is answered, what holds for stages that are started again."""

import json
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import messages, supervisor
from pipeline.config import Config
from pipeline.control import Subscription
from pipeline.messages import CommandRecord, Effect, Event, RecordingRecord, Reply, RunRecord, StatusRecord
from pipeline.timing import now_ns
from tests import helpers, test_supervisor
from tests.helpers import PATIENCE_S, wait_until
from tests.test_supervisor import HEALTHY, MakeRun, Run, done

pytestmark = pytest.mark.timeout(90)

folder = helpers.folder
runtime_dir = helpers.runtime_dir
make_run = test_supervisor.make_run
signals = test_supervisor.signals
quick = test_supervisor.quick


class Listener:
    """A subscriber, and all that it was told so far."""

    def __init__(self, run: Run, *topics: str) -> None:
        self._subscription = Subscription(run.folder.events, topics)
        run.to_close.append(self._subscription.close)
        self.events: list[tuple[str, Event]] = []

    def wait_for(self, kind: type[Any], **fields: Any) -> Any:
        """The next event of this kind with these fields."""
        found: list[Event] = []

        def come() -> bool:
            record = self._receive()
            if isinstance(record, kind) and all(getattr(record, name) == value for name, value in fields.items()):
                found.append(record)
            return bool(found)

        wait_until(come, f"{kind.__name__} with {fields}", pause_s=0)
        return found[0]

    def wait_until_known(self, *topics: str) -> None:
        """Until there was an event of each of them."""

        def known() -> bool:
            self._receive()
            return {topic for topic, _ in self.events} >= set(topics)

        wait_until(known, f"events of {topics}", pause_s=0)

    def _receive(self) -> Event | None:
        event = self._subscription.receive(0.05)
        if event is None:
            return None
        self.events.append((event[0], messages.decode_event(event[1])))
        return self.events[-1][1]


def in_force(run: Run) -> Config:
    """What a stage that is started now reads."""
    return msgspec.json.decode(run.folder.settings.read_bytes(), type=Config)


# set


def test_set_changes_what_is_in_force_and_what_the_next_start_reads(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        assert run.ask("set", volume=0.25, prebuffer_ms=5) == done("set", playback=101)
        assert run.ask("set", text_top_p=0.9, audio_temperature=0) == done("set", inference=102)
        for config in (run.status().settings, in_force(run)):
            assert (config.playback.volume, config.playback.prebuffer_ms) == (0.25, 5)
            assert config.sampler.text_cut == (None, 0.9, None)
            assert config.sampler.audio_temperature == 0
        # Another cut of the same kind takes its place.
        assert run.ask("set", text_top_k=7).ok
        assert run.status().settings.sampler.text_cut == (7, None, None)
        assert run.ask("set", text_top_k=None).ok
        assert run.status().settings.sampler.text_cut == Config().sampler.text_cut

    assert run.run(client) == 0
    assert run.commands("playback") == [{"verb": "set", "volume": 0.25, "prebuffer_ms": 5.0}]
    assert run.commands("capture") == []


def test_what_two_stages_carry_out_is_answered_once_when_both_have(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        reply = run.ask("set", volume=0.5, backlog_limit=20)
        assert reply.ok
        assert {effect.stage for effect in reply.effects} == {"inference", "playback"}
        assert (reply.stage, reply.frame) == (reply.effects[0].stage, reply.effects[0].frame)

    assert run.run(client) == 0


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({}, "set: expected at least one of text_temperature, "),
        ({"backlog_limit": 2}, "set: inference.backlog_limit = 2: expected at least inference.backlog_target, 3"),
        ({"backlog_target": 9, "volume": 0.5}, "set: inference.backlog_limit = 8: expected at least"),
        ({"text_top_k": 5, "text_top_p": 0.5}, "set: sampler.text_top_p = 0.5: expected to be unset, as"),
        ({"volume": 1.5}, "set: expected `float` <= 1.0 - at `$.volume`"),
        ({"volume": "loud"}, "set: expected `float`, got `str` - at `$.volume`"),
        ({"loudness": 1}, "set: object contains unknown field `loudness`"),
    ],
)
def test_a_wrong_value_leaves_everything_as_it_was(make_run: MakeRun, values: dict[str, Any], error: str) -> None:
    run = make_run()

    def client() -> None:
        before = run.wait_until_running().settings
        reply = run.ask("set", **values)
        assert not reply.ok
        assert reply.error.startswith(error)
        assert run.status().settings == in_force(run) == before

    assert run.run(client) == 0
    assert [run.commands(stage) for stage in ("inference", "playback")] == [[], []]


def test_where_one_stage_cannot_none_is_told(make_run: MakeRun, tmp_path: Path) -> None:
    back = tmp_path / "back"
    run = make_run(playback=[[["say", "ready"], ["serve", {"exit_on": "start"}]], [["wait_for", str(back)], *HEALTHY]])

    def client() -> None:
        run.wait_for(playback="starting", inference="running", capture="running")
        reply = run.ask("set", volume=0.5, backlog_limit=20)
        assert (reply.ok, reply.error) == (False, "playback is starting, not running")
        back.touch()
        run.wait_until_running()

    run.run(client)
    assert run.commands("inference") == []


def test_what_one_stage_cannot_do_is_undone_in_the_other(make_run: MakeRun) -> None:
    run = make_run(playback=[[["say", "ready"], ["serve", {"error": "it cannot"}]]])

    def client() -> None:
        before = run.wait_until_running().settings
        reply = run.ask("set", volume=0.5, backlog_limit=20, text_top_p=0.5)
        assert (reply.ok, reply.error) == (False, "it cannot")
        wait_until(lambda: len(run.commands("inference")) == 2, "it to be undone")
        assert run.status().settings == in_force(run) == before

    assert run.run(client) == 0
    undone = {
        "verb": "set",
        "volume": 1.0,
        "backlog_limit": 8,
        "text_top_k": None,
        "text_top_p": None,
        "text_min_p": None,
    }
    assert run.commands("inference")[1] == undone


def test_what_is_acknowledged_late_holds_and_is_told(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was begun in time: to say that the microphone is open would be wrong."""
    monkeypatch.setattr(supervisor, "ANSWER_S", 0.1)
    run = make_run(capture=[[["say", "ready"], ["serve", {"pairs": True}]]])

    def client() -> None:
        run.wait_until_running()
        listener = Listener(run, "command", "state.run")
        listener.wait_for(RunRecord)  # it is subscribed
        reply = run.ask("mute")
        assert (reply.ok, reply.error) == (False, "capture did not acknowledge mute within 0.1 s")
        assert not run.status().muted
        assert not listener.wait_for(CommandRecord).ok
        run.ask("unmute")  # at which both are acknowledged, the second one first
        late = listener.wait_for(CommandRecord, verb="mute")
        assert (late.ok, late.effects[0].stage) == (True, "capture")
        assert run.status().muted

    assert run.run(client) == 0


def test_an_order_says_until_when_it_may_be_begun(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        assert run.ask("mute").ok

    assert run.run(client) == 0
    (order,) = [order for order in run.orders("capture") if order["type"] == "apply"]
    assert abs(order["until_ns"] - now_ns()) < PATIENCE_S * 1e9


def test_what_a_stage_took_with_it_is_refused_at_once(make_run: MakeRun) -> None:
    run = make_run(capture=[[["say", "ready"], ["serve", {"exit_on": "apply"}]], HEALTHY])

    def client() -> None:
        run.wait_until_running()
        assert run.ask("mute").error == "capture ended before it acknowledged mute"

    run.run(client)


# input and output


def test_another_device_is_what_the_next_start_takes(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        assert run.ask("input", spec="tone:440") == done("input", capture=101)
        assert run.ask("output", spec="device:Kitchen") == done("output", playback=102)
        for config in (run.status().settings, in_force(run)):
            assert (config.capture.input, config.playback.output) == ("tone:440", "device:Kitchen")

    assert run.run(client) == 0


def test_a_device_that_a_stage_refuses_is_not_taken(make_run: MakeRun) -> None:
    run = make_run(capture=[[["say", "ready"], ["serve", {"error": "input device:X: not found"}]]])

    def client() -> None:
        before = run.wait_until_running().settings
        reply = run.ask("input", spec="device:X")
        assert reply == Reply(ok=False, verb="input", stage="capture", error="input device:X: not found")
        assert run.status().settings == in_force(run) == before

    assert run.run(client) == 0


@pytest.mark.parametrize(
    ("verb", "file", "error"),
    [
        ("output", "in.wav", "expected another file than the run's other side has"),
        ("input", "out.wav", "expected another file than the run's other side has"),
        ("output", "out.wav", "it exists already; expected a new file"),
        ("output", "other.wav", "it exists already; expected a new file"),
    ],
)
def test_no_file_is_destroyed(make_run: MakeRun, tmp_path: Path, verb: str, file: str, error: str) -> None:
    for name in ("in.wav", "out.wav", "other.wav"):
        (tmp_path / name).touch()
    run = make_run()
    run.config.capture.input, run.config.playback.output = f"file:{tmp_path}/in.wav", f"file:{tmp_path}/out.wav"

    def client() -> None:
        run.wait_until_running()
        reply = run.ask(verb, spec=f"file:{tmp_path}/{file}")
        assert (reply.ok, reply.error) == (False, f"spec = 'file:{tmp_path}/{file}': {error}")

    assert run.run(client) == 0
    assert [run.commands(stage) for stage in ("capture", "playback")] == [[], []]


@pytest.mark.parametrize(
    ("verb", "values"),
    [
        ("input", {"spec": "silence"}),
        ("output", {"spec": "null"}),
        ("restart", {"stage": "capture"}),
        ("record", {"on": True, "path": "x.wav"}),
    ],
)
def test_from_file_to_file_nothing_is_switched(make_run: MakeRun, verb: str, values: dict[str, Any]) -> None:
    run = make_run({"offline": True})

    def client() -> None:
        run.wait_until_running()
        reply = run.ask(verb, **values)
        assert (reply.ok, reply.error) == (
            False,
            f"{verb}: expected a run in real time, and this one goes from file to file",
        )

    run.run(client)
    assert all("apply" not in run.order_types(stage) for stage in ("capture", "inference", "playback"))


# pause


def test_a_paused_model_that_is_started_again_is_paused_before_it_starts(make_run: MakeRun) -> None:
    run = make_run(inference=[HEALTHY, HEALTHY])

    def client() -> None:
        run.wait_until_running()
        assert run.ask("pause").ok
        assert run.status().paused
        assert run.ask("restart", stage="inference").ok
        assert run.status().paused
        assert run.ask("resume").ok
        assert not run.status().paused

    assert run.run(client) == 0
    assert run.order_types("inference") == ["start", "apply", "stop", "apply", "start", "apply", "stop"]
    assert [command["verb"] for command in run.commands("inference")] == ["pause", "pause", "resume"]


# restart


@pytest.mark.parametrize("stage", ["capture", "inference", "playback"])
def test_a_stage_is_ended_in_good_order_and_started_again(make_run: MakeRun, stage: str) -> None:
    run = make_run()

    def client() -> None:
        before = run.wait_until_running().stages[stage]  # type: ignore[index]
        reply = run.ask("restart", stage=stage)
        assert reply.ok
        assert reply.stage == stage
        after = run.wait_until_running().stages[stage]  # type: ignore[index]
        assert after.pid != before.pid
        assert after.restarts == before.restarts + 1

    assert run.run(client) == 0  # it was asked for: the run is clean
    assert run.order_types(stage) == ["start", "stop", "start", "stop"]
    assert run.warnings() == run.errors() == []


def test_a_stage_that_does_not_stop_is_killed_and_started_again(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STOP_S", 0.2)
    deaf = [["say", "ready"], ["ignore_sigterm"], ["serve", {"deaf": True}]]
    run = make_run(inference=[deaf, HEALTHY])

    def client() -> None:
        run.wait_until_running()
        assert run.ask("restart", stage="inference").ok
        monkeypatch.setattr(supervisor, "STOP_S", PATIENCE_S)

    run.run(client)
    assert run.warnings() == ["inference did not stop within 0.2 s and was killed"]


def test_a_stage_that_waits_to_be_started_again_is_started_at_once(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_FIRST_S", 1_000.0)
    monkeypatch.setattr(supervisor, "BACKOFF_LAST_S", 1_000.0)
    run = make_run(capture=[[["say", "ready"], ["serve", {"exit_on": "start"}]], HEALTHY])

    def client() -> None:
        run.wait_for(capture="backoff", inference="running", playback="running")
        assert run.ask("restart", stage="capture").ok
        run.wait_until_running()

    run.run(client)
    assert run.starts["capture"] == 2


def test_a_stage_that_does_not_come_back_is_said_so(make_run: MakeRun) -> None:
    run = make_run(capture=[HEALTHY, [["leave", 5]], HEALTHY])

    def client() -> None:
        run.wait_until_running()
        reply = run.ask("restart", stage="capture")
        assert (reply.ok, reply.stage) == (False, "capture")
        assert reply.error.startswith("capture stopped with exit code 5")
        run.wait_until_running()

    run.run(client)
    assert run.starts["capture"] == 3


def test_nothing_is_restarted_before_the_run_runs(make_run: MakeRun, tmp_path: Path) -> None:
    go = tmp_path / "go"
    run = make_run(inference=[[["wait_for", str(go)], *HEALTHY]])

    def client() -> None:
        run.wait_for(inference="starting", capture="ready", playback="ready")
        reply = run.ask("restart", stage="inference")
        assert (reply.ok, reply.error) == (False, "inference is starting, not running")
        go.touch()
        run.wait_until_running()

    assert run.run(client) == 0
    assert run.starts["inference"] == 1


def test_a_stage_that_hangs_at_its_start_can_be_restarted(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(capture=[HEALTHY, [["wait_for", str(tmp_path / "never")]], HEALTHY])

    def client() -> None:
        run.wait_until_running()
        first = threading.Thread(target=lambda: run.ask("restart", stage="capture"))
        first.start()
        run.wait_for(capture="starting")
        error = run.ask("restart", stage="capture").error
        assert error == "capture is being restarted already"
        run.processes[-1].kill()  # what hangs is gone; the supervisor starts another
        run.wait_until_running()
        first.join()

    run.run(client)
    assert run.starts["capture"] == 3


def test_the_end_of_a_stage_is_not_its_restart(make_run: MakeRun) -> None:
    """It may say once more that it runs, because its device is another."""
    says_more = [["say", "ready"], ["serve", {"until": "stop"}], ["say", "running", "another"], ["leave", 0]]
    run = make_run(playback=[says_more, HEALTHY])

    def client() -> None:
        pid = run.wait_until_running().stages["playback"].pid
        assert run.ask("restart", stage="playback").ok
        status = run.status()
        assert status.stages["playback"].pid not in (None, pid)
        assert status.stages["playback"].state == "running"

    assert run.run(client) == 0
    assert run.starts["playback"] == 2


# record

RECORDS: list[list[Any]] = [["record", True], ["serve"]]


def test_a_recording_begins_and_ends(make_run: MakeRun) -> None:
    run = make_run(recorder=[[["record", True], ["serve", {"until": "stop"}], ["record", False, 7], ["leave", 0]]])

    def client() -> None:
        run.wait_until_running()
        listener = Listener(run, "state.recording")
        begun = run.ask("record", on=True, path="/r.wav")
        assert begun.recording is not None
        assert begun.recording.on
        assert msgspec.structs.replace(begun, recording=None) == done("record", recorder=7)
        assert run.arguments["recorder"][:2] == ("--path", "/r.wav")
        assert run.status().recording == "/r.wav"
        again = run.ask("record", on=True, path="/other.wav")
        assert (again.ok, again.error) == (False, "record on = true: /r.wav is being recorded; end that first")
        ended = run.ask("record", on=False)
        assert ended.recording is not None
        assert not ended.recording.on
        assert msgspec.structs.replace(ended, recording=None) == done("record", recorder=7)
        assert run.status().recording is None
        listener.wait_for(RecordingRecord, on=True)
        listener.wait_for(RecordingRecord, on=False)
        assert run.ask("record", on=False).error.endswith("nothing is being recorded")
        # At once, though the first recorder may not have left yet.
        assert run.ask("record", on=True, path="/r.wav").ok

    assert run.run(client) == 0
    assert run.starts["recorder"] == 2


def test_a_relative_path_is_looked_up_where_the_run_is(make_run: MakeRun) -> None:
    run = make_run(recorder=[RECORDS])

    def client() -> None:
        run.wait_until_running()
        assert run.ask("record", on=True, path="talk.wav").ok
        assert run.arguments["recorder"][1] == str(Path.cwd() / "talk.wav")

    assert run.run(client) == 0
    run.assert_nothing_left()


@pytest.mark.parametrize("path", [None, ""])
def test_a_recording_needs_a_path(make_run: MakeRun, path: str | None) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        reply = run.ask("record", on=True, path=path)
        assert reply.error == "record: path is not given: expected the name of a sound file to write"

    assert run.run(client) == 0
    assert run.starts["recorder"] == 0


def test_a_recording_that_cannot_begin_is_refused_by_the_recorder(make_run: MakeRun) -> None:
    run = make_run(recorder=[[["record", False, -1, "it exists already"], ["leave", 2]]])

    def client() -> None:
        run.wait_until_running()
        reply = run.ask("record", on=True, path="/r.wav")
        assert (reply.ok, reply.stage, reply.error) == (False, "recorder", "it exists already")
        assert run.status().recording is None

    assert run.run(client) == 0


@pytest.mark.parametrize("said", [True, False])
def test_a_recorder_that_dies_is_told_of_and_harms_nothing(make_run: MakeRun, said: bool) -> None:
    begins: list[list[Any]] = [["record", True]] if said else []
    run = make_run(recorder=[[*begins, ["die", 9]]])

    def client() -> None:
        run.wait_until_running()
        listener = Listener(run, "state.recording")
        reply = run.ask("record", on=True, path="/r.wav")
        assert reply.ok == said
        ended = listener.wait_for(RecordingRecord, on=False)
        assert ended.error == "recorder was ended by SIGKILL"
        assert (said, reply.error) in ((True, ""), (False, ended.error))
        assert run.status().recording is None

    assert run.run(client) == 0


def test_a_recording_ends_with_the_run(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "CLOSE_S", PATIENCE_S)
    run = make_run(recorder=[[["record", True], ["serve"]]])

    def client() -> None:
        run.wait_until_running()
        assert run.ask("record", on=True, path="/r.wav").ok

    assert run.run(client) == 0
    assert run.order_types("recorder") == ["stop"]
    run.assert_nothing_left()


# trace


def test_trace_gives_what_was_published(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        run.ask("mute")
        run.status()  # what is published of a command may be so after its answer
        run.ahead_ns += 10 * 10**9
        run.ask("unmute")
        everything = [json.loads(bytes(record)) for record in run.ask("trace").records]
        recent = [json.loads(bytes(record)) for record in run.ask("trace", seconds=5.0).records]
        topics = [topic for topic, _ in everything]
        assert topics[0] == "state.run"
        assert {"state.capture", "state.inference", "state.playback", "command"} <= set(topics)
        assert [record["verb"] for topic, record in everything if topic == "command"] == ["mute", "unmute"]
        assert [record["verb"] for topic, record in recent if topic == "command"] == ["unmute"]
        assert recent == everything[len(everything) - len(recent) :]

    assert run.run(client) == 0


# Events


def test_a_newcomer_knows_every_state_at_once(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        run.ask("mute")
        listener = Listener(run, "state.", "status")
        assert listener.wait_for(StatusRecord).status.muted  # a status that was due anyway may come first

        listener.wait_until_known("state.run", "state.capture", "state.inference", "state.playback")
        assert {type(event) for topic, event in listener.events if topic == "state.run"} == {RunRecord}

    assert run.run(client) == 0


def test_the_status_is_told_again_and_again(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        listener = Listener(run, "status")
        first = listener.wait_for(StatusRecord).status
        second = listener.wait_for(StatusRecord).status
        while second.time_ns == first.time_ns:  # the welcome may come twice
            second = listener.wait_for(StatusRecord).status
        assert second.time_ns > first.time_ns
        assert second.state == "running"

    assert run.run(client) == 0


def test_every_command_is_told_with_what_came_of_it(make_run: MakeRun) -> None:
    run = make_run()

    def client() -> None:
        run.wait_until_running()
        listener = Listener(run, "command", "state.run")
        listener.wait_for(RunRecord)  # it is subscribed
        assert run.ask("status").ok  # which is not told of
        run.ask("set", volume=0.5)
        told = listener.wait_for(CommandRecord)
        assert (told.verb, told.values, told.ok) == ("set", {"volume": 0.5}, True)
        assert told.effects == [Effect(stage="playback", frame=101)]
        assert told.start_ns <= told.end_ns
        run.ask("set", backlog_limit=1)
        refused = listener.wait_for(CommandRecord)
        assert (refused.ok, refused.effects) == (False, [])
        assert "backlog_limit = 1" in refused.error

    assert run.run(client) == 0


def test_the_end_of_a_run_is_told(make_run: MakeRun) -> None:
    run = make_run()
    states: list[str] = []

    def client() -> None:
        run.wait_until_running()
        listener = Listener(run, "state.run")
        assert listener.wait_for(RunRecord).state == "running"
        ending = threading.Thread(target=lambda: run.ask("shutdown"))
        ending.start()
        listener.wait_for(RunRecord, state="stopping")
        listener.wait_for(RunRecord, state="stopped")
        ending.join()
        states.extend(event.state for _, event in listener.events if isinstance(event, RunRecord))
        run.over.wait(PATIENCE_S)

    assert run.run(client) == 0
    assert states == ["running", "stopping", "stopped"]
