"""A loop from microphone to speaker, both opened at a rate of their own because they claim not to do 24 kHz.

    python -m tests.own_rate RATE

Prints "running", runs until a line comes on standard input, and prints the latency from microphone to speaker, in ms,
that follows from the dates the devices give.
"""

import statistics
import sys
from collections import deque
from typing import Any

from pipeline.audio import Samples
from pipeline.topology import SAMPLE_RATE
from procs import devices
from tests.soundserver import MICROPHONE, SPEAKER

BLOCK = 240
LATENCY_MS = 100.0
AHEAD = 2_400
"""Samples kept between the two, so that neither waits for the other."""


class Loop:
    """What was heard, with the date of its first sample, until it is asked for."""

    def __init__(self) -> None:
        self.samples = deque([0.0] * AHEAD)
        self.heard_ns: dict[int, int] = {}
        self.heard = 0
        self.told = -AHEAD
        self.latencies_ms: deque[float] = deque(maxlen=100)

    def hear(self, samples: Samples, adc_ns: int, xrun: bool) -> None:
        self.heard_ns[self.heard] = adc_ns
        self.samples.extend(samples.tolist())
        self.heard += len(samples)

    def tell(self, samples: Samples, dac_ns: int, xrun: bool) -> None:
        if len(self.samples) < len(samples):
            samples.fill(0)
            return
        for index in range(len(samples)):
            at = self.told + index
            if at in self.heard_ns:
                due_ns = dac_ns + index * 1_000_000_000 // SAMPLE_RATE
                self.latencies_ms.append((due_ns - self.heard_ns.pop(at)) / 1e6)
            samples[index] = self.samples.popleft()
        self.told += len(samples)


def only(rate: int) -> None:
    """Have every device refuse another rate than `rate`, and call that its own."""
    sd = devices._portaudio()
    ask = sd.query_devices

    def own_rate(*arguments: Any) -> Any:
        found = ask(*arguments)
        return found | {"default_samplerate": float(rate)} if isinstance(found, dict) else found

    def refuse(**settings: Any) -> None:
        if settings["samplerate"] != rate:
            raise sd.PortAudioError("Invalid sample rate", -9997)

    sd.query_devices, sd.check_input_settings, sd.check_output_settings = own_rate, refuse, refuse


def main() -> None:
    only(int(sys.argv[1]))
    loop = Loop()
    speaker = devices.open_output(
        f"device:{SPEAKER}", block=BLOCK, latency_ms=LATENCY_MS, resume=False, on_block=loop.tell
    )
    microphone = devices.open_input(
        f"device:{MICROPHONE}", block=BLOCK, latency_ms=LATENCY_MS, resume_at=0, on_block=loop.hear, on_end=lambda: None
    )
    speaker.start()
    microphone.start()
    print("running", flush=True)
    sys.stdin.readline()
    microphone.stop()
    speaker.stop()
    assert microphone.failure() is None
    print(statistics.median(loop.latencies_ms))


if __name__ == "__main__":
    main()
