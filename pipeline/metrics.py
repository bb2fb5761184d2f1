"""A run's figures for Prometheus: a program of its own, which listens to the run's events.

A scrape asks the run nothing. Counters and gauges are what the run last told of itself; histograms and commands are
counted here, from when this program began. A counter that begins anew is a run, or a stage, that did; Prometheus knows
that of counters. docs/metrics.md is checked against this module.
"""

import contextlib
import math
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from socketserver import ThreadingMixIn
from typing import Any, Final, NamedTuple, get_args
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, make_wsgi_app
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline import messages
from pipeline.control import Subscription
from pipeline.errors import ConfigError, ControlError
from pipeline.messages import (
    CommandRecord,
    RunRecord,
    RunState,
    StageState,
    StageStatus,
    StatusRecord,
    StatusReport,
    TimingRecord,
)
from pipeline.runtime import RunFolder
from pipeline.timing import NS_PER_S, now_ns
from pipeline.topology import PROCESSES, SAMPLE_RATE, StageName

TOPICS: Final = ("timing.", "state.run", "status", "command")
"""What is listened to."""

FRESH_S: Final = 5.0
"""A run is up if it told its status so recently; it does every second."""

RECENT_FRAMES: Final = 125
"""Over how many frames the levels are taken: 10 s."""

STEP_BUCKETS_S: Final = (
    *(0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.075, 0.08, 0.085, 0.09),
    *(0.1, 0.12, 0.16, 0.24, 0.5, 1.0, 2.0, 5.0),
)
"""Closest around a frame's 80 ms."""

LATENCY_BUCKETS_S: Final = (
    *(0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.24, 0.28, 0.32, 0.4, 0.5),
    *(0.64, 0.8, 1.0, 1.5, 2.0, 5.0, 10.0),
)

_PREFIX: Final = "pipeline_"
_WAIT_S: Final = 1.0
_REQUEST_S: Final = 10.0
"""How long who has connected may take to ask."""

_MEBI: Final = 1 << 20


class Reading(NamedTuple):
    """What a run has told of itself."""

    status: StatusReport
    recent: Mapping[StageName, deque[TimingRecord]]
    """Each stage's last frames."""


Values = Mapping[tuple[str, ...], float]
"""By the values of the labels."""


class Figure(NamedTuple):
    """A counter or a gauge, without prefix, `_total` and the label `run`."""

    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[Reading], Values]


def _one(value: Callable[[StatusReport], float]) -> Callable[[Reading], Values]:
    return lambda reading: {(): value(reading.status)}


def _each(value: Callable[[StageStatus], float]) -> Callable[[Reading], Values]:
    return lambda reading: {(name,): value(stage) for name, stage in reading.status.stages.items()}


def _last(stage: StageName, value: Callable[[TimingRecord], float]) -> Callable[[Reading], Values]:
    """Of the stage's last frame, if it had any."""

    def read(reading: Reading) -> Values:
        frames = reading.recent[stage]
        return {(): value(frames[-1])} if frames else {}

    return read


def _heard(value: Callable[[Iterable[TimingRecord]], float]) -> Callable[[Reading], Values]:
    """Of the recent frames of both stages that have a device."""
    return lambda reading: {
        (stage,): value(frames) for stage, frames in reading.recent.items() if frames and stage != "inference"
    }


def _level_dbfs(frames: Iterable[TimingRecord]) -> float:
    squares = [10 ** (frame.level_dbfs / 10) for frame in frames]
    return messages.dbfs(math.sqrt(sum(squares) / len(squares)))


def _frames(reading: Reading) -> Values:
    timing = reading.status.timing
    spreads = {"capture": timing.capture, "inference": timing.inference, "playback": timing.playback}
    return {(stage,): spread.frames for stage, spread in spreads.items()}


def _xruns(reading: Reading) -> Values:
    xruns = reading.status.xruns
    return {("capture",): xruns.capture, ("playback",): xruns.playback}


def _cleaned(reading: Reading) -> Values:
    counts = reading.status.accounting
    return {("capture",): counts.cleaned, ("playback",): counts.cleaned_answers}


def _waiting(reading: Reading) -> Values:
    counts = reading.status.accounting
    return {("capture",): counts.waiting_in, ("playback",): counts.waiting_out}


def _stage_states(reading: Reading) -> Values:
    stages = reading.status.stages
    return {
        (name, state): float(stage.state == state) for name, stage in stages.items() for state in get_args(StageState)
    }


def _run_states(reading: Reading) -> Values:
    return {(state,): float(reading.status.state == state) for state in get_args(RunState)}


def _info(reading: Reading) -> Values:
    settings = reading.status.settings
    return {(reading.status.engine, settings.quality if settings.engine == "moshi" else ""): 1.0}


def _drift(reading: Reading) -> Values:
    drift_ppm = reading.status.drift_ppm
    return {} if drift_ppm is None else {(): drift_ppm}


COUNTERS: Final = (
    Figure("frames", "Frames of 80 ms that the stage has dealt with.", ("stage",), _frames),
    Figure("late_frames", "Frames whose answer took more than 80 ms.", (), _one(lambda s: s.timing.inference.late)),
    Figure("gaps", "Times that the speaker was without a frame to play.", (), _one(lambda s: s.accounting.gaps)),
    Figure("xruns", "Over- and underruns of the audio device, reported or seen by its dates.", ("stage",), _xruns),
    Figure(
        "captured_samples", "Samples that the microphone gave, at 24 kHz.", (), _one(lambda s: s.accounting.captured)
    ),
    Figure("stepped_samples", "Samples that the model heard.", (), _one(lambda s: s.accounting.stepped)),
    Figure(
        "dropped_samples",
        "Samples of the microphone that the model never heard: it was too far behind, or paused.",
        (),
        _one(lambda s: s.accounting.dropped),
    ),
    Figure("generated_samples", "Samples that the model said.", (), _one(lambda s: s.accounting.generated)),
    Figure("played_samples", "Samples of the model that went to the speaker.", (), _one(lambda s: s.accounting.played)),
    Figure(
        "skipped_samples",
        "Samples of the model that were left out, to bring the latency back.",
        (),
        _one(lambda s: s.accounting.skipped),
    ),
    Figure("sent_samples", "Samples that the speaker took.", (), _one(lambda s: s.accounting.sent)),
    Figure(
        "concealed_samples",
        "Samples that the speaker took while there was none of the model: silence, fades included.",
        (),
        _one(lambda s: s.accounting.concealed),
    ),
    Figure(
        "cleaned_samples",
        "Samples that were not finite or beyond full scale: of the microphone (capture), of the model (playback).",
        ("stage",),
        _cleaned,
    ),
    Figure("stage_restarts", "Times that the stage was started again.", ("stage",), _each(lambda s: s.restarts)),
    Figure(
        "lost_reports",
        "Reports of the stage that never reached the supervisor; the audio is not concerned.",
        ("stage",),
        _each(lambda s: s.lost_reports),
    ),
    Figure("stage_cpu_seconds", "Processor time of the stage's process.", ("stage",), _each(lambda s: s.cpu_s)),
)
"""They stay after the run's end, until the next begins."""

GAUGES: Final = (
    Figure("run_info", "1, with the engine and, of moshi, the checkpoint's quality.", ("engine", "quality"), _info),
    Figure("run_state", "1 for the state that the run is in, 0 for the others.", ("state",), _run_states),
    Figure("stage_state", "1 for the state that the stage is in, 0 for the others.", ("stage", "state"), _stage_states),
    Figure("uptime_seconds", "Since the run's start.", (), _one(lambda s: s.uptime_s)),
    Figure("muted", "1 while silence stands in for the microphone.", (), _one(lambda s: s.muted)),
    Figure("paused", "1 while the model takes no frames.", (), _one(lambda s: s.paused)),
    Figure("recording", "1 while both sides are recorded.", (), _one(lambda s: s.recording is not None)),
    Figure("waiting_samples", "Samples in the ring that its consumer has yet to take.", ("ring",), _waiting),
    Figure(
        "ring_size_samples",
        "Samples that each ring holds: more waiting than these are lost.",
        (),
        _one(lambda s: s.settings.ring_seconds * SAMPLE_RATE),
    ),
    Figure(
        "stage_memory_bytes",
        "Resident memory of the stage's process.",
        ("stage",),
        _each(lambda s: s.memory_mb * _MEBI),
    ),
    Figure(
        "device_latency_seconds",
        "What the audio device reports as its own latency, from or to its converter.",
        ("stage",),
        lambda reading: {
            (stage,): reading.status.stages[stage].device_latency_ms / 1_000
            for stage in reading.status.stages
            if stage != "inference"
        },
    ),
    Figure(
        "prebuffer_seconds",
        "How long a frame waits after silence, so that the next may be as late.",
        (),
        _last("playback", lambda frame: frame.prebuffer_ms / 1_000),
    ),
    Figure(
        "drift_ppm",
        "The microphone's clock against the speaker's, in parts per million; none in the first 30 s.",
        (),
        _drift,
    ),
    Figure(
        "level_dbfs",
        "Root mean square of the last 10 s, in decibels of full scale, -120 or more: of the microphone (capture), of "
        "the speaker (playback).",
        ("stage",),
        _heard(_level_dbfs),
    ),
    Figure(
        "peak_dbfs",
        "The largest sample of the last 10 s, in decibels of full scale, -120 or more.",
        ("stage",),
        _heard(lambda frames: max(frame.peak_dbfs for frame in frames)),
    ),
    Figure(
        "context_frames",
        "Positions that the model's attention sees, one a frame; 0 for echo.",
        (),
        _last("inference", lambda frame: frame.context),
    ),
    Figure(
        "context_size_frames",
        "The most positions that the model's attention can see; then the oldest is forgotten. 0 for echo.",
        (),
        _last("inference", lambda frame: frame.context_size),
    ),
)
"""They are there while the run is up."""


class Figures(Collector):
    """What was heard of the run `name`, for `registry`, which holds nothing else. Any thread may collect."""

    def __init__(self, name: str, clock: Callable[[], int] = now_ns) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # no series that tell when others began
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._status: StatusReport | None = None
        self._stopped = False
        self._recent: dict[StageName, deque[TimingRecord]] = {
            process.name: deque(maxlen=RECENT_FRAMES) for process in PROCESSES
        }
        self.registry = CollectorRegistry(auto_describe=True)
        self._step = self._histogram("step_seconds", "The model's work on a frame.", STEP_BUCKETS_S)
        self._parts = self._histogram(
            "step_part_seconds",
            "Of the work on a frame: the codec's on what is heard (encode), the language model's (model), the codec's "
            "on what is said (decode). They overlap with other frames' parts.",
            STEP_BUCKETS_S,
            ("part",),
        )
        self._latency = self._histogram(
            "mic_to_speaker_seconds",
            "From a frame's first sample at the microphone's converter to its answer's at the speaker's.",
            LATENCY_BUCKETS_S,
        )
        self._commands = Counter(
            f"{_PREFIX}commands",
            "Commands that were answered, by outcome ok or error; status and trace are not counted.",
            ("run", "verb", "outcome"),
            registry=self.registry,
        )
        self.registry.register(self)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(f"{_PREFIX}{name}", what, ("run", *labels), buckets=buckets, registry=self.registry)

    def take(self, data: bytes) -> None:
        """Count one event. Raises ControlError if it is none that this version knows."""
        try:
            event = messages.decode_event(data)
        except msgspec.DecodeError as error:
            raise ControlError(
                f"an event of the run {self._name!r} is not understood ({error}): is the run of another version?"
            ) from None
        match event:
            case StatusRecord(status=status):
                self._take_status(status)
            case TimingRecord():
                self._take_frame(event)
            case RunRecord(state="stopped"):
                self._stopped = True
            case CommandRecord(verb=verb, ok=ok):
                known = verb if verb in messages.VERBS else "unknown"
                self._commands.labels(self._name, known, "ok" if ok else "error").inc()

    def _take_status(self, status: StatusReport) -> None:
        with self._lock:
            if self._status is not None and status.pid != self._status.pid:
                for frames in self._recent.values():
                    frames.clear()
            self._status = status
            self._stopped = status.state == "stopped"

    def _take_frame(self, record: TimingRecord) -> None:
        with self._lock:
            self._recent[record.stage].append(record)
        if record.stage == "inference":
            self._step.labels(self._name).observe((record.end_ns - record.start_ns) / NS_PER_S)
            parts = {"encode": record.encode_ms, "model": record.step_ms, "decode": record.decode_ms}
            for part, duration_ms in parts.items():
                self._parts.labels(self._name, part).observe(duration_ms / 1_000)
        if record.stage == "playback":
            self._latency.labels(self._name).observe(record.mic_to_speaker_ms / 1_000)

    def collect(self) -> list[Metric]:
        """The counters and gauges as they are now."""
        with self._lock:
            told = Reading(self._status, self._recent) if self._status is not None else None
            now = told if told is not None and self._is_up(told.status) else None
            up = GaugeMetricFamily(f"{_PREFIX}up", "1 while the run is up.", labels=("run",))
            up.add_metric((self._name,), float(now is not None))
            counters = [self._fill(CounterMetricFamily, figure, told) for figure in COUNTERS]
            gauges = [self._fill(GaugeMetricFamily, figure, now) for figure in GAUGES]
            return [up, *counters, *gauges]

    def _is_up(self, status: StatusReport) -> bool:
        return not self._stopped and self._clock() - status.time_ns < FRESH_S * NS_PER_S

    def _fill(
        self, kind: type[CounterMetricFamily | GaugeMetricFamily], figure: Figure, reading: Reading | None
    ) -> Metric:
        family = kind(f"{_PREFIX}{figure.name}", figure.help, labels=("run", *figure.labels))
        for labels, value in (figure.read(reading) if reading is not None else {}).items():
            family.add_metric((self._name, *labels), value)
        return family


class _Handler(WSGIRequestHandler):
    """One connection. Nothing is printed of it."""

    timeout = _REQUEST_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the library's name)
        pass


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a connection, so that one who does not ask keeps nobody waiting."""

    daemon_threads = True

    def __init__(self, address: str, port: int) -> None:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, place = found[0]
        super().__init__((str(place[0]), port), _Handler)

    @property
    def url(self) -> str:
        host = str(self.server_address[0])
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self.server_port}/metrics"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection broke, which is the other side's business; what fails in answering is told by wsgiref."""


@contextlib.contextmanager
def serving(figures: Figures, address: str, port: int) -> Iterator[str]:
    """Answer scrapes, in threads; gives the URL. Raises ConfigError where nothing can listen there."""
    try:
        server = _Server(address, port)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--address {address} --port {port}: cannot be listened on: {why}; choose another --address or --port"
        ) from None
    server.set_app(make_wsgi_app(figures.registry))
    thread = threading.Thread(target=server.serve_forever, name="scrapes")
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def command(name: str, *, address: str, port: int) -> int:
    """Serve the figures of the run `name` until Ctrl-C or SIGTERM, whether it is up or not. Returns the exit code.

    Raises ConfigError if the name, address or port will not do, ControlError if the run is of another version.
    """
    folder = RunFolder(name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    figures = Figures(name)
    with contextlib.suppress(KeyboardInterrupt), serving(figures, address, port) as url:
        print(f"figures of the run {name!r}: {url}", flush=True)
        with contextlib.closing(Subscription(folder.events, TOPICS)) as events:
            _follow(events, figures)
    return 0


def _follow(events: Subscription, figures: Figures) -> None:
    while True:
        event = events.receive(_WAIT_S)
        if event is not None:
            figures.take(event[1])
