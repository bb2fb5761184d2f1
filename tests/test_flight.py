"""pipeline.flight: what the recorder keeps, in which order, and what it forgets."""

import json

from pipeline.flight import FlightRecorder

S = 1_000_000_000


def kept(recorder: FlightRecorder, since_ns: int = 0) -> list[tuple[str, dict[str, int]]]:
    return [tuple(json.loads(bytes(raw))) for raw in recorder.since(since_ns)]


def filled(recorder: FlightRecorder, seconds: int) -> FlightRecorder:
    for at_s in range(seconds):
        recorder.add("text", json.dumps({"n": at_s}).encode(), at_s * S)
    return recorder


def numbers(recorder: FlightRecorder, since_ns: int = 0) -> list[int]:
    return [record["n"] for _, record in kept(recorder, since_ns)]


def test_events_come_back_as_they_were_published_oldest_first() -> None:
    recorder = FlightRecorder()
    recorder.add("timing.capture", b'{"n":1,"text":"\xc3\xa9\\n"}', 5 * S)
    recorder.add("xrun", b'{"n":2}', 6 * S)
    assert kept(recorder) == [("timing.capture", {"n": 1, "text": "é\n"}), ("xrun", {"n": 2})]


def test_only_those_from_a_time_on() -> None:
    recorder = filled(FlightRecorder(), 10)
    assert numbers(recorder, 7 * S) == [7, 8, 9]
    assert numbers(recorder, 7 * S + 1) == [8, 9]
    assert numbers(recorder, 10 * S) == []


def test_what_is_older_than_is_kept_is_forgotten() -> None:
    assert numbers(filled(FlightRecorder(kept_s=3), 10)) == [6, 7, 8, 9]


def test_a_silence_is_no_reason_to_keep_what_is_old() -> None:
    recorder = filled(FlightRecorder(kept_s=3), 10)
    recorder.add("text", b'{"n":100}', 100 * S)
    assert numbers(recorder) == [100]


def test_what_is_more_than_is_kept_is_forgotten_oldest_first() -> None:
    recorder = filled(FlightRecorder(kept_bytes=4 * len('{"n": 1}')), 10)
    assert numbers(recorder) == [6, 7, 8, 9]


def test_one_event_that_is_too_large_leaves_a_recorder_that_works() -> None:
    recorder = FlightRecorder(kept_bytes=20)
    recorder.add("log.capture", b'{"n":"' + b"x" * 100 + b'"}', S)
    assert kept(recorder) == []
    recorder.add("text", b'{"n":1}', 2 * S)
    assert numbers(recorder) == [1]
