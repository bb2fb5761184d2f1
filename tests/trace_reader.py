"""Reads a trace by Perfetto's published schema, and by nothing of pipeline's; refuses what its processor would bend.

Slices of a track are a stack there: an end closes whatever is open, quietly, so that a slice that merely crosses
another comes out with a wrong length.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, Final, NamedTuple

from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as schema

Event: Final = schema.TrackEvent


class Slice(NamedTuple):
    """What the trace processor's tables slice, track and process tell of a slice; of an instant, with no length."""

    process: str
    track: str
    name: str
    start_ns: int
    end_ns: int
    values: dict[str, Any]
    flows: tuple[int, ...]
    category: str

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


class TraceFile:
    """A trace, checked and taken apart. Raises AssertionError where it breaks a rule."""

    def __init__(self, data: bytes) -> None:
        packets = schema.Trace.FromString(data).packet
        assert schema.Trace.FromString(data).SerializeToString() == data, "not in the schema's own encoding"
        _check_packets(packets)
        self._tracks = _tracks(packets)
        self.slices: list[Slice] = []
        self.instants: list[Slice] = []
        self.counters: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.units: dict[str, str] = {}
        self._take(packets)
        self.flows = self._flows()

    @classmethod
    def read(cls, path: Path) -> "TraceFile":
        return cls(path.read_bytes())

    @property
    def processes(self) -> dict[str, int]:
        """The pid of each process, in the order of their ranks."""
        found = [track for track in self._tracks.values() if track.HasField("process")]
        found.sort(key=lambda track: track.sibling_order_rank)
        return {track.process.process_name: track.process.pid for track in found}

    def on(self, track: str, process: str | None = None) -> list[Slice]:
        """Slices of the tracks of a name, by their starts."""
        found = [one for one in self.slices if one.track == track and process in (None, one.process)]
        return sorted(found, key=lambda one: one.start_ns)

    def named(self, name: str) -> list[Slice]:
        """Slices of a name, the longest first."""
        return sorted((one for one in self.slices if one.name == name), key=lambda one: -one.duration_ms)

    def at(self, track: str, process: str | None = None) -> list[Slice]:
        """Instants of the tracks of a name, in order."""
        return [one for one in self.instants if one.track == track and process in (None, one.process)]

    def _process(self, track: Any) -> str:
        while track.parent_uuid:
            track = self._tracks[track.parent_uuid]
        return str(track.name)

    def _take(self, packets: Any) -> None:
        open_slices: dict[int, list[Any]] = defaultdict(list)
        for packet in sorted((one for one in packets if one.HasField("track_event")), key=lambda one: one.timestamp):
            event = packet.track_event
            assert event.track_uuid in self._tracks, "an event on a track that is not described"
            track = self._tracks[event.track_uuid]
            assert track.HasField("counter") == (event.type == Event.TYPE_COUNTER), "a value on a track of slices"
            match event.type:
                case Event.TYPE_SLICE_BEGIN:
                    assert event.name, "a slice without a name"
                    open_slices[track.uuid].append(packet)
                case Event.TYPE_SLICE_END:
                    assert open_slices[track.uuid], "an end without a begin"
                    begin = open_slices[track.uuid].pop()
                    self.slices.append(self._slice(track, begin, packet.timestamp))
                case Event.TYPE_INSTANT:
                    assert event.name, "an instant without a name"
                    self.instants.append(self._slice(track, packet, packet.timestamp))
                case Event.TYPE_COUNTER:
                    assert event.HasField("double_counter_value")
                    name = f"{self._process(track)}: {track.name}"
                    self.units[name] = track.counter.unit_name
                    self.counters[name].append((packet.timestamp, event.double_counter_value))
                case _:
                    raise AssertionError(f"an event of type {event.type}")
        assert not any(open_slices.values()), "a begin without an end"

    def _slice(self, track: Any, packet: Any, end_ns: int) -> Slice:
        event = packet.track_event
        values = {one.name: getattr(one, one.WhichOneof("value")) for one in event.debug_annotations}
        assert len(values) == len(event.debug_annotations), "a value that is there twice"
        return Slice(
            self._process(track),
            track.name,
            event.name,
            packet.timestamp,
            end_ns,
            values,
            tuple(event.flow_ids),
            "".join(event.categories),
        )

    def _flows(self) -> dict[int, list[Slice]]:
        """The slices that each flow joins, as its arrows lead."""
        found: dict[int, list[Slice]] = defaultdict(list)
        for one in sorted(self.slices, key=lambda one: one.start_ns):
            for flow in one.flows:
                assert flow != 0, "no flow may be called 0"
                found[flow].append(one)
        return found


def _check_packets(packets: Any) -> None:
    assert {one.trusted_packet_sequence_id for one in packets} == {1}, "events need a sequence, and it is not 0"
    assert packets[0].sequence_flags & schema.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED, "the sequence has no start"
    snapshots = [one.clock_snapshot for one in packets if one.HasField("clock_snapshot")]
    assert packets[0].HasField("clock_snapshot"), "times come before it is said of which clock they are"
    assert all(one.primary_trace_clock == schema.BUILTIN_CLOCK_MONOTONIC for one in snapshots)
    for packet in packets:
        if packet.HasField("track_event"):
            assert packet.timestamp > 0
            assert packet.timestamp_clock_id == schema.BUILTIN_CLOCK_MONOTONIC


def _tracks(packets: Any) -> dict[int, Any]:
    tracks = [one.track_descriptor for one in packets if one.HasField("track_descriptor")]
    found = {track.uuid: track for track in tracks}
    assert len(found) == len(tracks), "two tracks of one uuid"
    assert found[0].process_ordering == schema.TrackDescriptor.PROCESS_ORDERING_EXPLICIT
    pids = [track.process.pid for track in tracks if track.HasField("process")]
    assert len(set(pids)) == len(pids), "two processes of one pid are shown as one"
    for track in tracks:
        assert track.parent_uuid in found, "a track in a process that is not described"
        if track.parent_uuid:
            assert found[track.parent_uuid].child_ordering == schema.TrackDescriptor.EXPLICIT
    return found
