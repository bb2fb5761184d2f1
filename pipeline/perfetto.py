"""A trace as ui.perfetto.dev opens it: tracks of slices, instants and counters, in Perfetto's own format.

Knows nothing of a run. Times are monotonic ns; the library takes a tenth of a second to load.
"""

import time
from collections.abc import Iterable, Mapping
from itertools import chain, count, pairwise
from typing import Final, NamedTuple

from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as schema

Value = bool | int | float | str

_SEQUENCE: Final = 1
"""All packets are of one writer."""

_ROOT: Final = 0
"""The track that all processes are children of."""


class Slice(NamedTuple):
    """Something that lasted. With zero length, it is still a slice, which a flow can begin or end at."""

    name: str
    start_ns: int
    end_ns: int
    values: Mapping[str, Value] = {}
    flow: int | None = None
    """Slices of one flow, 0 or more, are joined by arrows in the order of their starts."""


class Instant(NamedTuple):
    """Something that happened."""

    name: str
    time_ns: int
    values: Mapping[str, Value] = {}
    category: str = ""


class Sample(NamedTuple):
    """A counter's value, from a time on."""

    time_ns: int
    value: float


class Trace:
    """Collects tracks, which are shown in the order in which they were made."""

    def __init__(self, now_ns: int) -> None:
        """`now_ns` is what the clock of all times shows at this moment."""
        self._now_ns = now_ns
        self._uuids = count(1)
        self._ranks = count()
        self._descriptors: list[schema.TracePacket] = []
        self._events: list[schema.TracePacket] = []
        root = self._describe(_ROOT)
        root.process_ordering = schema.TrackDescriptor.PROCESS_ORDERING_EXPLICIT

    def process(self, name: str, pid: int | None) -> int:
        """A process, and what tracks in it name as their parent. Without `pid` it is a group of tracks."""
        uuid = next(self._uuids)
        descriptor = self._describe(uuid)
        descriptor.name = name
        descriptor.child_ordering = schema.TrackDescriptor.EXPLICIT
        if pid is not None:
            descriptor.process.pid = pid
            descriptor.process.process_name = name
        return uuid

    def slices(self, parent: int, name: str, slices: Iterable[Slice]) -> None:
        """A track of slices, in any order; where they overlap, as many tracks of that name as it takes."""
        for lane in lanes(slices):
            track = self._track(parent, name)
            self._events += chain.from_iterable(_begin_and_end(track, one) for one in lane)

    def instants(self, parent: int, name: str, instants: Iterable[Instant]) -> None:
        """A track of instants, in any order; none if there are none."""
        if ordered := sorted(instants, key=lambda instant: instant.time_ns):
            track = self._track(parent, name)
            self._events += [_at(track, instant) for instant in ordered]

    def counter(self, parent: int, name: str, unit: str, samples: Iterable[Sample]) -> None:
        """A track of a value that changes, in any order; none if there are no samples."""
        if ordered := sorted(samples):
            track = self._track(parent, name, unit)
            self._events += [_value(track, sample) for sample in ordered]

    def serialize(self) -> bytes:
        """The file's content."""
        trace = schema.Trace()
        trace.packet.append(_clocks(self._now_ns))
        trace.packet.extend(self._descriptors)
        # Stable, and each track is in order: at the same time one slice ends before the next begins.
        trace.packet.extend(sorted(self._events, key=lambda packet: packet.timestamp))
        for packet in trace.packet:
            packet.trusted_packet_sequence_id = _SEQUENCE
        trace.packet[0].sequence_flags = schema.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        data: bytes = trace.SerializeToString()
        return data

    def _describe(self, uuid: int) -> schema.TrackDescriptor:
        packet = schema.TracePacket()
        packet.track_descriptor.uuid = uuid
        packet.track_descriptor.sibling_order_rank = next(self._ranks)
        self._descriptors.append(packet)
        return packet.track_descriptor

    def _track(self, parent: int, name: str, unit: str | None = None) -> int:
        uuid = next(self._uuids)
        descriptor = self._describe(uuid)
        descriptor.parent_uuid = parent
        descriptor.name = name
        if unit is not None:
            descriptor.counter.unit_name = unit
        return uuid


def lanes(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Share slices out, so that none of a lane overlaps another: the slices of a track must nest."""
    found: list[list[Slice]] = []
    for one in sorted(slices, key=lambda one: (one.start_ns, one.end_ns)):
        free = (lane for lane in found if lane[-1].end_ns <= one.start_ns)
        lane = next(free, None)
        if lane is None:
            found.append(lane := [])
        lane.append(one)
    return found


def clipped(slices: Iterable[Slice]) -> list[Slice]:
    """Slices of which each ends where the next begins, if it does not end before."""
    ordered = sorted(slices, key=lambda one: one.start_ns)
    before = [one._replace(end_ns=min(one.end_ns, following.start_ns)) for one, following in pairwise(ordered)]
    return before + ordered[-1:]


def _begin_and_end(track: int, one: Slice) -> tuple[schema.TracePacket, schema.TracePacket]:
    begin = _event(track, one.start_ns, schema.TrackEvent.TYPE_SLICE_BEGIN)
    begin.track_event.name = one.name
    _annotate(begin.track_event, one.values)
    if one.flow is not None:
        begin.track_event.flow_ids.append(one.flow + 1)  # no flow is called 0
        begin.track_event.correlation_id = one.flow
    return begin, _event(track, one.end_ns, schema.TrackEvent.TYPE_SLICE_END)


def _at(track: int, instant: Instant) -> schema.TracePacket:
    packet = _event(track, instant.time_ns, schema.TrackEvent.TYPE_INSTANT)
    packet.track_event.name = instant.name
    if instant.category:
        packet.track_event.categories.append(instant.category)
    _annotate(packet.track_event, instant.values)
    return packet


def _value(track: int, sample: Sample) -> schema.TracePacket:
    packet = _event(track, sample.time_ns, schema.TrackEvent.TYPE_COUNTER)
    packet.track_event.double_counter_value = sample.value
    return packet


def _event(track: int, time_ns: int, kind: int) -> schema.TracePacket:
    packet = schema.TracePacket()
    packet.timestamp = time_ns
    packet.timestamp_clock_id = schema.BUILTIN_CLOCK_MONOTONIC
    packet.track_event.track_uuid = track
    packet.track_event.type = kind
    return packet


def _annotate(event: schema.TrackEvent, values: Mapping[str, Value]) -> None:
    for name, value in values.items():
        annotation = event.debug_annotations.add()
        annotation.name = name
        match value:
            case bool():
                annotation.bool_value = value
            case int():
                annotation.int_value = value
            case float():
                annotation.double_value = value
            case str():
                annotation.string_value = value


def _clocks(now_ns: int) -> schema.TracePacket:
    """What the run's monotonic clock, which shows `now_ns`, is in the world's time."""
    packet = schema.TracePacket()
    snapshot = packet.clock_snapshot
    snapshot.primary_trace_clock = schema.BUILTIN_CLOCK_MONOTONIC
    snapshot.clocks.add(clock_id=schema.BUILTIN_CLOCK_MONOTONIC, timestamp=now_ns)
    snapshot.clocks.add(clock_id=schema.BUILTIN_CLOCK_REALTIME, timestamp=time.time_ns())
    return packet
