"""The playback stage: the playback ring to the speaker, gaps concealed, and a record of all that was sent."""

import heapq
import math
import threading
import time
from collections import deque

import numpy as np

from pipeline import accounting, messages, worker
from pipeline import config as settings
from pipeline.audio import FADE, Samples, falling, level, rising
from pipeline.control import HasFileno
from pipeline.drift import Drift
from pipeline.errors import DeviceError, DeviceLostError
from pipeline.messages import AnyCommand, Finished, Output, Set, TimingRecord, XrunRecord, dbfs
from pipeline.ring import Consumer, Mark, Ring, RingReader, RingWriter
from pipeline.stretch import ALIKE, LEAST, OVERLAP, find_joint, warm_up
from pipeline.timing import NS_PER_MS, NS_PER_S, now_ns
from pipeline.topology import FRAME, FRAME_NS, SAMPLE_RATE
from pipeline.worker import Context
from procs import devices
from procs.recovery import Held

_FADE_OUT_S = 0.2
"""How long the fade out, and then the device's own latency, may hold up the end."""

_JITTER_FRAMES = 300
"""Frames, 24 s, whose jitter the prebuffer follows."""

_ACCIDENTS = 1
"""Of them that may come later than the prebuffer allows for: one alone is no jitter."""

_STEADY = 3
"""Frames that must all have waited too long before it counts: one callback that was late does not."""

_CALM = 12
"""Frames, about a second, without surplus, after which the latency is what it was."""

_BURSTS = 32
"""How many times a device has asked, of late, that tell how much it asks for at a time."""

_LATE_NS = 10 * NS_PER_MS
"""A first frame that is later by so much, as a model's first step may be, is made up for."""

_DRY = 2
_DRY_WITHIN_NS = 60 * NS_PER_S
"""So many underruns within so long, and the device is asked for twice the latency: one alone is an accident."""

_ONE_NS = NS_PER_S
_ONE_AT_MOST_NS = 5 * NS_PER_S
"""Underruns that follow one another sooner are of one cause, for so long at most; those of a new device are its own."""

_LEAST_LATENCY_MS = 20.0
_MOST_LATENCY_MS = 80.0
"""Less, and more, is never asked for of itself. The most is a frame."""

_CONCESSION = 0.1
"""How much less alike two stretches need be after each frame in which there were none to shorten it by."""


class Jitter:
    """How much later than the earliest other frames come, over the last 24 s: what a prebuffer is there for.

    A frame that is less late than the one before it was held up behind that, and one that is over a frame late was
    stalled, which no prebuffer makes up for: neither counts.
    """

    def __init__(self) -> None:
        self._delays_ns: deque[int] = deque(maxlen=_JITTER_FRAMES)
        self._late_ns: deque[int] = deque(maxlen=_JITTER_FRAMES)
        self._before_ns = 0
        self._first_ns = 0

    def late_ns(self, mark: Mark) -> int:
        """How much longer than the earliest this frame took from the microphone until it was complete."""
        delay_ns = mark.end_ns - mark.captured_ns
        return max(0, delay_ns - min(self._delays_ns, default=delay_ns))

    def add(self, mark: Mark) -> None:
        """Take in the frame that is played next."""
        late_ns = self.late_ns(mark)
        if not self._delays_ns:
            self._first_ns = mark.end_ns - mark.captured_ns
        self._delays_ns.append(mark.end_ns - mark.captured_ns)
        self._late_ns.append(late_ns if self._before_ns <= late_ns <= FRAME_NS else 0)
        self._before_ns = late_ns

    @property
    def began_late_ns(self) -> int:
        """How much later than the earliest the very first frame came: all that followed it wait for so long."""
        return self._first_ns - min(self._delays_ns, default=self._first_ns)

    @property
    def spread_ns(self) -> int:
        """What all frames but _ACCIDENTS of them were late by at most."""
        return heapq.nlargest(_ACCIDENTS + 1, self._late_ns)[-1]


def _reconcile(playback: Ring, heard: Ring) -> None:
    """A predecessor that was killed between two counts had sent what it had not yet counted as played."""
    sent, played = heard.ledger(), playback.ledger().consumed
    heard.count("concealed", sent.written - played - sent.concealed)


class Player:
    """Turns frames that come when they come into blocks that are due when they are due.

    While frames are in time it copies. When none is there it fades out, on the last samples played backwards, and
    goes on with silence; the next frame fades in. `heard` gets every block as it is sent, concealment included.
    What a gap added to the latency is taken back by playing faster, at the same pitch, until it is as before.
    `fill` allocates nothing that lasts, takes no lock and never waits.
    """

    def __init__(self, playback: Ring, heard: Ring, prebuffer_ns: int, queue_frames: int) -> None:
        self._ring = playback
        self._source = Consumer(playback)
        _reconcile(playback, heard)
        self._heard = RingWriter(heard)
        self.prebuffer_ns = prebuffer_ns
        """How long a frame that came early waits, after silence, before its first sample is sent.

        At least what it began with and at most a frame; between them it follows the jitter.
        """
        self.queue_frames = queue_frames
        """More frames than these waiting are skipped."""
        self.volume = 1.0
        """What all samples are multiplied by; a change is spread over the next block."""
        self._gain = 1.0
        self._playing = False
        self._sounding = False
        self._disturbed = self._source.position > 0
        self._leaving = False
        self._rise = rising()
        self._fall = falling()
        self._recent = devices.silence(FADE + 1)
        self._fading = devices.silence(FADE)
        self._faded = FADE
        self._risen = FADE
        self._initial_prebuffer_ns = prebuffer_ns
        self._asked_ns = 0
        self._burst = 0
        self._bursts: deque[int] = deque(maxlen=_BURSTS)
        self._jitter = Jitter()
        self._starting = _CALM
        self._waits_ns: deque[int] = deque(maxlen=_STEADY)
        self._calm = 0
        self._ahead = RingReader(playback)
        self._frame = devices.silence(FRAME)
        self._joint = -OVERLAP
        self._lag = 0
        self._misses = 0
        self._out_of = falling(OVERLAP)
        self._into = rising(OVERLAP)
        self._entering = devices.silence(OVERLAP)
        warm_up()  # in the device's callback it would be late
        self.last_sound_ns = 0
        """When the last sample of the model's that was sent so far reaches the speaker."""

    @property
    def ended(self) -> bool:
        """Whether the stream has ended and all of it was sent."""
        return self._source.ended

    @property
    def silent(self) -> bool:
        """Whether nothing but zeros is being sent."""
        return not self._playing and self._faded == FADE

    def leave(self) -> None:
        """Fade out and take no more frames."""
        self._leaving = True

    def stay(self) -> None:
        """Take frames again, after `leave`; the first fades in."""
        self._disturb()
        self._leaving = False

    def begin_with(self, prebuffer_ns: int) -> None:
        """Let frames wait for so long after silence, or longer where the jitter asks for it."""
        self.prebuffer_ns = self._initial_prebuffer_ns = prebuffer_ns

    def fill(self, out: Samples, dac_ns: int, xrun: bool) -> None:
        """Fill one block, shape (n,), whose first sample the device converts at `dac_ns`."""
        heard = self._heard
        heard.begin()
        heard.anchor(heard.position, dac_ns)
        self._count_burst(len(out))
        if xrun:
            heard.count("xruns")
            self._disturb()
        played = self._play(out, dac_ns)
        self._remember(out[:played])
        if played < len(out):
            if self._playing:
                self._begin_gap()
            self._conceal(out[played:])
            self._remember(out[played:])
        self._amplify(out)
        heard.write(out)
        self._source.consume(played)
        heard.count("concealed", len(out) - played)
        heard.commit()

    def _amplify(self, out: Samples) -> None:
        gain, self._gain = self._gain, self.volume
        if gain != self._gain:
            out *= np.linspace(gain, self._gain, len(out), dtype=np.float32)
        elif gain != 1.0:
            out *= np.float32(gain)

    def _play(self, out: Samples, dac_ns: int) -> int:
        """Copy what there is to play into the start of `out`; returns how much that was."""
        if self._leaving or not (self._playing or self._may_begin(len(out))):
            return 0
        source, filled, count = self._source, 0, len(out)
        while filled < count:
            if source.position % FRAME == 0 and source.available >= FRAME:
                self._begin_frame(filled, count, dac_ns)
            got = self._read(out[filled : filled + self._uniform()])
            if got == 0:
                break
            self._blend(out[filled : filled + got])
            self._sounding = True
            filled += got
        if filled:
            self.last_sound_ns = dac_ns + filled * NS_PER_S // SAMPLE_RATE
        return filled

    def _may_begin(self, count: int) -> bool:
        """After silence: whether a frame is there that is as late as any of the next ones may be.

        `count` samples are asked for.
        """
        source = self._source
        if source.available < FRAME - source.position % FRAME:
            return False
        oldest = self._ring.mark(source.position // FRAME)
        if oldest is not None and source.available < 2 * FRAME:
            into = self._burst - count
            late_ns = now_ns() - oldest.end_ns + self._jitter.late_ns(oldest)
            if late_ns + into * NS_PER_S // SAMPLE_RATE < self._least_ns(into):
                return False
        self._playing = True
        self._sounding = False
        if source.position:
            self._risen = 0
        return True

    def _uniform(self) -> int:
        """How many samples come before the next frame begins, or a joint begins or ends."""
        position = self._source.position
        left = FRAME - position % FRAME
        into = position - self._joint
        if into >= OVERLAP:
            return left
        return min(left, -into if into < 0 else OVERLAP - into)

    def _read(self, part: Samples) -> int:
        source = self._source
        into = source.position - self._joint
        got = source.read(part)
        if 0 <= into < OVERLAP:
            self._cross(part[:got], into)
        return got

    def _cross(self, part: Samples, into: int) -> None:
        """Fade, from the sample `into` of a joint on, into what is `_lag` samples ahead; at its end go on there."""
        stop = into + len(part)
        part *= self._out_of[into:stop]
        part += self._entering[into:stop]
        if stop == OVERLAP:
            self._source.skip(self._lag)

    def _count_burst(self, count: int) -> None:
        """Blocks that a device asks for at once, as it may where its own period is longer, are as one."""
        now = now_ns()
        if now - self._asked_ns < count * NS_PER_S // SAMPLE_RATE // 2:
            self._burst += count
        else:
            self._bursts.append(self._burst)
            self._burst = count
        self._asked_ns = now

    def _begin_frame(self, filled: int, count: int, dac_ns: int) -> None:
        source = self._source
        if source.available > self.queue_frames * FRAME:
            # Down to two: with one alone the next would have to come within the block.
            self._skip((source.available // FRAME - 2) * FRAME)
        mark = self._ring.mark(source.position // FRAME)
        if mark is None:
            return
        self._jitter.add(mark)
        self.prebuffer_ns = max(self._initial_prebuffer_ns, min(FRAME_NS, self._jitter.spread_ns))
        into = self._burst - count + filled
        self._waits_ns.append(now_ns() - mark.end_ns + into * NS_PER_S // SAMPLE_RATE)
        if self._starting:
            self._starting -= 1
            self._disturbed |= self._jitter.began_late_ns > _LATE_NS
        if self._disturbed:
            self._recover(into)
        self._heard.mark(
            position=self._heard.position + filled,
            frame=mark.frame,
            captured_ns=mark.captured_ns,
            start_ns=dac_ns + filled * NS_PER_S // SAMPLE_RATE,
            end_ns=mark.end_ns,
        )

    def _disturb(self) -> None:
        """What comes from now on may wait for longer than it has to."""
        self._disturbed = True
        self._waits_ns.clear()
        self._calm = 0

    def _recover(self, into: int) -> None:
        """Shorten the frame that begins, `into` samples of what is asked for at a time, if frames wait for too long.

        Only after a gap, an underrun of the device or a first frame that was late, until their surplus is gone: a
        healthy stream is left alone.
        """
        if len(self._waits_ns) < _STEADY:
            return
        spare = (min(self._waits_ns) - self._least_ns(into)) * SAMPLE_RATE // NS_PER_S
        grid = self._grid()
        surplus = into % grid + spare // grid * grid
        if surplus >= LEAST:
            self._shorten(surplus)
            return
        self._misses = 0
        self._calm += 1
        self._disturbed = self._calm < _CALM or self.prebuffer_ns > self._initial_prebuffer_ns

    def _least_ns(self, into: int) -> int:
        """How long, from its completion until the device comes to it, a frame has to wait at least.

        It begins `into` samples of what is asked for at a time. It has to be there when the first of those is asked
        for, and so has each of the next ones, which begin at other places of theirs, as far apart as the grid.
        """
        grid = self._grid()
        burst = heapq.nlargest(_ACCIDENTS + 1, (grid, *self._bursts))[-1]
        return self.prebuffer_ns + (max(0, burst - grid) + into % grid) * NS_PER_S // SAMPLE_RATE

    def _grid(self) -> int:
        """Samples between places at which frames may begin in what is asked for at a time."""
        return math.gcd(FRAME, *self._bursts)

    def _shorten(self, most: int) -> None:
        """Take samples out of the frame that begins, `most` at most, where it is heard least."""
        self._calm = 0
        position = self._ahead.position = self._source.position
        if position % FRAME or self._ahead.read(self._frame) < FRAME:
            return  # the writer has come round
        joint = find_joint(self._frame, most, ALIKE - self._misses * _CONCESSION)
        if joint is None:
            self._misses += 1
            return
        self._joint, self._lag = position + joint.at, joint.lag
        entering = self._frame[joint.at + joint.lag :][:OVERLAP]
        np.multiply(entering, self._into, out=self._entering)
        shorter_ns = joint.lag * NS_PER_S // SAMPLE_RATE
        for index in range(_STEADY):
            self._waits_ns[index] -= shorter_ns

    def _skip(self, count: int) -> None:
        """Pass over the next `count` samples, fading from the first of them into what follows."""
        source = self._source
        goal = source.position + count
        # From silence there is nothing to fade out, and a fade out that is under way goes on.
        if self._sounding and self._faded == FADE:
            got = source.read(self._fading)
            source.position -= got
            self._fading[got:] = 0
            self._fading *= self._fall
            if self._risen < FADE:
                self._fading *= self._rise[self._risen]
            self._faded = 0
        source.skip(max(0, goal - source.position))
        self._risen = 0
        self._waits_ns.clear()

    def _begin_gap(self) -> None:
        if not (self._leaving or self._source.ended or self._ring.paused):
            self._heard.count("gaps")
        self._disturb()
        # Backwards from the last sample but one: no step is larger than one that was just played.
        np.multiply(self._recent[-2::-1], self._fall, out=self._fading)
        self._faded = 0
        self._playing = False  # last: `silent` is asked in another thread

    def _blend(self, part: Samples) -> None:
        """Fade `part` in, over what is left of a fade out, if a gap or a skip came before it."""
        if self._risen < FADE:
            count = min(len(part), FADE - self._risen)
            part[:count] *= self._rise[self._risen : self._risen + count]
            self._risen += count
        self._add_fade(part)

    def _conceal(self, part: Samples) -> None:
        part.fill(0)
        self._add_fade(part)

    def _add_fade(self, part: Samples) -> None:
        if self._faded < FADE:
            count = min(len(part), FADE - self._faded)
            part[:count] += self._fading[self._faded : self._faded + count]
            self._faded += count

    def _remember(self, out: Samples) -> None:
        """Keep the last samples sent, to fade out on."""
        recent, count = self._recent, min(len(out), len(self._recent))
        if count:
            recent[:-count] = recent[count:]
            recent[-count:] = out[len(out) - count :]


class Playback:
    """Owns the output device. `Player.fill` runs in the device's thread, everything else in the main one."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._capture = context.rings["capture"]
        self._playback = context.rings["playback"]
        self._heard = context.rings["heard"]
        self._drift = Drift()
        config = context.config
        self._prebuffer_ns = round(settings.prebuffer_ms(config) * NS_PER_MS)
        self._player = self._new_player(config.playback.queue_frames, config.playback.volume)
        self._settings = threading.Lock()
        self._held = Held(context, "output", self._open_present, self._begin_anew, self._fade_out)
        self._spec = config.playback.output
        self._latency_ms = config.playback.latency_ms
        self._has_more = True
        self._taken_ns = self._last_dry_ns = 0
        self._dry_ns: deque[int] = deque(maxlen=_DRY)
        self._frame = devices.silence(FRAME)
        self._running = False
        self._finished = False
        self._next_mark = self._heard.mark_count
        ledger = self._heard.ledger()
        self._xruns, self._gaps = ledger.xruns, ledger.gaps
        self._lost_input = self._capture.ledger().xruns

    def _new_player(self, queue_frames: int, volume: float) -> Player:
        player = Player(self._playback, self._heard, self._prebuffer_ns, queue_frames)
        player.volume = volume
        return player

    @property
    def detail(self) -> str:
        return self._held.detail

    def open(self) -> None:
        self._held.open(self._spec, wait=self._heard.position > 0)

    def _open_present(self) -> devices.Device:
        device = self._open(self._spec, self._latency_ms, resume=self._heard.position > 0)
        self._spec = devices.by_name(self._spec, device)
        return device

    def _begin_anew(self) -> None:
        """Go on, as a successor would, where a device was lost: from silence, with the newest frames if many wait."""
        with self._settings:
            player = self._player
            self._pass_over(player.queue_frames)
            self._player = self._new_player(player.queue_frames, player.volume)
            self._next_mark = self._heard.mark_count
        self._taken_ns = now_ns()

    def _pass_over(self, queue_frames: int) -> None:
        source = Consumer(self._playback)
        if source.available > queue_frames * FRAME:
            source.skip((self._playback.position // FRAME - 2) * FRAME - source.position)

    def _fill(self, out: Samples, dac_ns: int, xrun: bool) -> None:
        self._player.fill(out, dac_ns, xrun)

    def _open(self, spec: str, latency_ms: float, *, resume: bool) -> devices.Device:
        return devices.open_output(
            spec,
            block=worker.samples_of(self._context.config.playback.block_ms),
            latency_ms=latency_ms,
            resume=resume,
            on_block=self._fill,
            correction_ppm=lambda: self._drift.correction_ppm,
            skew_ppm=self._context.config.faults.output_ppm,
        )

    def start(self) -> None:
        self._held.start()
        self._taken_ns = now_ns()
        self._running = True

    def device_latency_ms(self) -> float:
        return self._held.device.latency_ms

    def wakes(self) -> HasFileno | None:
        return None

    def work(self) -> bool:
        """Report the frames sent since the last look, and the end."""
        if failure := self._held.failure():
            raise failure
        ledger, lost_input = self._heard.ledger(), self._capture.ledger().xruns
        if (ledger.xruns, lost_input) != (self._xruns, self._lost_input):
            self._drift.expect_shift()
        self._lost_input = lost_input
        self._drift.see(self._capture.anchor, self._heard.anchor)
        self._heard.drift_ppm = self._drift.ppm
        report, now = self._context.report, now_ns()
        queued = self._playback.ledger().waiting // FRAME
        while (mark := self._heard.mark(self._next_mark)) is not None:
            self._next_mark += 1
            mean, peak = self._level_before(mark.position)
            report(
                TimingRecord(
                    stage="playback",
                    frame=mark.frame,
                    start_ns=mark.end_ns,
                    end_ns=mark.start_ns,
                    queued=queued,
                    mic_to_speaker_ms=(mark.start_ns - mark.captured_ns) / NS_PER_MS,
                    prebuffer_ms=self._player.prebuffer_ns / NS_PER_MS,
                    level_dbfs=dbfs(mean),
                    peak_dbfs=dbfs(peak),
                )
            )
        self._next_mark = max(self._next_mark, self._heard.mark_count - self._heard.mark_capacity + 1)
        underruns, gaps = ledger.xruns - self._xruns, ledger.gaps - self._gaps
        self._xruns, self._gaps = ledger.xruns, ledger.gaps
        if underruns:
            report(XrunRecord(stage="playback", kind="xrun", count=underruns, time_ns=now))
            self._ran_dry(now)
        if gaps:
            report(XrunRecord(stage="playback", kind="gap", count=gaps, time_ns=now))
        if self._player.ended and not self._finished and now > self._player.last_sound_ns:
            self._finished = True
            report(Finished(stage="playback"))
        return False

    def _ran_dry(self, now: int) -> None:
        """Have a device that runs dry again and again keep more ahead."""
        dry, before, self._last_dry_ns = self._dry_ns, self._last_dry_ns, now
        if now - self._taken_ns < _ONE_NS:
            return
        if dry and now - before < _ONE_NS and now - dry[-1] < _ONE_AT_MOST_NS:
            return
        dry.append(now)
        if len(dry) == _DRY and now - dry[0] < _DRY_WITHIN_NS:
            self._ask_for_more(min(max(2 * self._latency_ms, _LEAST_LATENCY_MS), _MOST_LATENCY_MS))

    def _ask_for_more(self, latency_ms: float) -> None:
        if not (self._has_more and self._held.works and latency_ms > self._latency_ms):
            return
        what = f"output {self._held.detail} ran dry {_DRY} times within a minute, as the machine was held up"
        more = f"playback.latency_ms = {latency_ms:g} in place of {self._latency_ms:g}"
        try:
            self._switch(self._spec, latency_ms)
        except DeviceLostError:
            raise
        except DeviceError as error:
            self._has_more = False
            self._context.log("warning", f"{what}, and cannot be had with more latency: {error}")
        else:
            self._context.log("warning", f"{what}: opened anew with {more}, so heard later")

    def _level_before(self, position: int) -> tuple[float, float]:
        """Of what was sent in the 80 ms before `position`."""
        if position < FRAME:
            return 0.0, 0.0
        RingReader(self._heard, position - FRAME).read(self._frame)
        return level(self._frame)

    def finish(self) -> None:
        """Only capture ends a stream; the end reaches this stage through the ring."""

    def apply(self, command: AnyCommand) -> int:
        match command:
            case Output(spec=spec):
                self._switch(spec, self._context.config.playback.latency_ms)
            case Set():
                self._set(command)
        return accounting.next_frame("playback", **self._context.rings)

    def _set(self, command: Set) -> None:
        values = messages.given(command)
        with self._settings:
            player = self._player
            player.volume = values.get("volume", player.volume)
            player.queue_frames = values.get("queue_frames", player.queue_frames)
            if "prebuffer_ms" in values:
                self._context.config.playback.prebuffer_ms = values["prebuffer_ms"]
                self._prebuffer_ns = round(settings.prebuffer_ms(self._context.config) * NS_PER_MS)
                player.begin_with(self._prebuffer_ns)

    def _switch(self, spec: str, latency_ms: float) -> None:
        """Take another output, or the same with another latency.

        Where it cannot be opened or started, the present one stays or is opened again. Raises DeviceError.
        """
        held = self._held
        device = held.open_other(spec, lambda: self._open(spec, latency_ms, resume=False), present=spec == self._spec)
        self._fade_out()
        held.let_go()
        try:
            device.start()
        except DeviceError as error:
            device.stop()
            held.take_back(error)
        finally:
            self._player.stay()
        held.take(device)
        self._spec, self._latency_ms, self._has_more = devices.by_name(spec, device), latency_ms, True
        self._dry_ns.clear()
        self._taken_ns = now_ns()
        self._drift.expect_shift()

    def _fade_out(self) -> None:
        if self._running and self._held.works:
            self._player.leave()
            until = time.monotonic() + _FADE_OUT_S
            while not self._player.silent and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(min(_FADE_OUT_S, self._held.device.latency_ms / 1_000))

    def stop(self) -> None:
        """Fade out, then let go of the device."""
        self._fade_out()
        self._held.close()


class Copier:
    """Offline: hands on each frame as it comes, and nothing before, between or after them."""

    def __init__(self, playback: Ring, heard: Ring) -> None:
        self._source = Consumer(playback)
        self._heard = RingWriter(heard)
        self._frame = devices.silence(FRAME)

    @property
    def ended(self) -> bool:
        """Whether the stream has ended and all of it was written."""
        return self._source.ended

    def move(self, write: devices.Write) -> bool:
        """Write the next frame, if it is there; returns whether it was. Raises DeviceError where some were lost."""
        source, heard, expected = self._source, self._heard, self._source.position
        count = source.read(self._frame)
        if source.position != expected + count:
            raise DeviceError(f"{source.position - count - expected} samples were overwritten before they were written")
        if not count:
            return False
        part = self._frame[:count]
        write(part)
        heard.begin()
        heard.write(part)
        source.consume(count)
        heard.commit()
        return True


class Offline:
    """Playback where nobody listens: every frame into a file, as fast as they come."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._heard = context.rings["heard"]
        self._copier = Copier(context.rings["playback"], self._heard)
        self._device: devices.EagerOutput | None = None
        self._finished = False

    @property
    def detail(self) -> str:
        return "" if self._device is None else self._device.detail

    def open(self) -> None:
        copier, spec = self._copier, self._context.config.playback.output
        self._device = devices.open_sink(spec, move=copier.move, ended=lambda: copier.ended)

    def start(self) -> None:
        if self._device is not None:
            self._device.start()

    def device_latency_ms(self) -> float:
        return 0.0

    def wakes(self) -> HasFileno | None:
        return None

    def work(self) -> bool:
        """Report the end, when the file is closed."""
        device = self._device
        if device is not None and (failure := device.failure()):
            raise failure
        if device is not None and device.complete and not self._finished:
            self._finished = True
            self._context.report(Finished(stage="playback"))
        return False

    def finish(self) -> None:
        """Only capture ends a stream; the end reaches this stage through the ring."""

    def apply(self, command: AnyCommand) -> int:
        """No command is carried out here."""
        return self._heard.position // FRAME

    def stop(self) -> None:
        """Close the file."""
        if self._device is not None:
            self._device.stop()


def make(context: Context) -> worker.Stage:
    """The stage that the settings ask for."""
    return Offline(context) if context.config.offline else Playback(context)


if __name__ == "__main__":
    worker.main("playback", make)
