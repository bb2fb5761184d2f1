"""The benchmark of the front ends: that it hears what is there, and that both run."""

import importlib.util
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import soundfile

from bench import frontend, results, upstream
from bench.frontend import Case, Figures, Gap, Heard, listen, sound
from pipeline.audio import FADE, falling, rising
from pipeline.topology import SAMPLE_RATE
from tests.runs import Samples

LAG: Final = 5_000
GAP: Final = 2_400
CUT_AT: Final = 30_000
MS: Final = 1_000 / SAMPLE_RATE


def silence(count: int) -> Samples:
    return np.zeros(count, np.float32)


@pytest.fixture
def microphone() -> Samples:
    """3 s of speech, silence around it."""
    return np.concatenate((silence(500), sound(3, seed=1), silence(9_500)))


def played(microphone: Samples, between: Samples, skipped: int = 0) -> Samples:
    """The microphone's sound LAG samples later, and from a place in it on still later by `between`."""
    cut = microphone[:CUT_AT], between, microphone[CUT_AT + skipped :]
    return np.concatenate((silence(LAG), *cut))[: len(microphone)]


def lags_ms(heard: Heard) -> list[float]:
    """What was found, without repetitions."""
    found = [round(ms, 2) for _, ms in heard.latency_ms]
    return [ms for ms, before in zip(found, [-1.0, *found], strict=False) if ms != before]


def test_latency_is_found_to_the_sample(microphone: Samples) -> None:
    heard = listen(microphone, played(microphone, silence(0)))
    assert lags_ms(heard) == [round(LAG * MS, 2)]
    assert len(heard.latency_ms) >= 27
    assert (heard.gaps, heard.lost_ms) == ([], 0)


def test_a_gap_that_is_cut_adds_its_length_to_the_latency(microphone: Samples) -> None:
    heard = listen(microphone, played(microphone, silence(GAP)))
    assert lags_ms(heard) == [round(LAG * MS, 2), round((LAG + GAP) * MS, 2)]
    assert [(gap.samples, gap.is_cut) for gap in heard.gaps] == [(GAP, True)]
    assert heard.lost_ms == 0


@pytest.mark.parametrize(("at", "clicks"), [(31_337, True), (629, False)])  # within a period; where it is zero
def test_a_step_that_the_sound_does_not_have_is_a_click(at: int, clicks: bool) -> None:
    tone = np.sin(np.arange(40_000) / 50, dtype=np.float32)
    (gap,) = frontend._gaps(np.concatenate((tone[:at], silence(GAP), tone[at:])))
    assert gap.is_click == clicks


def test_a_gap_that_is_faded_is_not_cut(microphone: Samples) -> None:
    speaker = played(microphone, silence(GAP))
    at = LAG + CUT_AT
    speaker[at - FADE : at] *= falling()
    speaker[at + GAP : at + GAP + FADE] *= rising()
    (gap,) = listen(microphone, speaker).gaps
    assert (gap.is_cut, gap.is_click) == (False, False)
    assert abs(gap.samples - GAP) <= 2  # a fade begins or ends with zero


def test_what_is_left_out_is_lost(microphone: Samples) -> None:
    heard = listen(microphone, played(microphone, silence(0), skipped=1_000))
    assert lags_ms(heard) == [round(LAG * MS, 2), round((LAG - 1_000) * MS, 2)]
    assert heard.lost_ms == pytest.approx(1_000 * MS)


@pytest.mark.parametrize("at", range(8 * SAMPLE_RATE, 11 * SAMPLE_RATE, SAMPLE_RATE // 4))
def test_words_that_were_said_before_are_not_taken_for_those_at_a_gap(at: int) -> None:
    microphone = np.concatenate((silence(500), sound(14, seed=1), silence(9_500)))
    heard = listen(microphone, np.concatenate((silence(LAG), microphone[:at], silence(240), microphone[at:])))
    assert max(ms for _, ms in heard.latency_ms) <= (LAG + 240) * MS


def test_silence_is_no_answer(microphone: Samples) -> None:
    with pytest.raises(ValueError, match="nothing of what the microphone heard"):
        listen(microphone, silence(len(microphone)))


def test_a_latency_that_comes_back_is_away_until_then() -> None:
    late = [(at / 10, 100.0 if at < 30 else 300.0 if at < 50 else 101.0) for at in range(100)]
    figures = frontend.summary(Heard(late, [Gap(2_400, True, False)], 0.0), stalled_s=2.5)
    assert figures["away_s"] == pytest.approx(4.9 - 2.5 + 0.1)
    assert (figures["start_ms"], figures["end_ms"], figures["max_ms"]) == (100, 101, 300)
    assert (figures["gaps"], figures["cuts"], figures["clicks"], figures["gap_ms"]) == (1, 1, 0, 100)
    assert figures["latency"][0] == [-2.5, 100]


def test_the_stand_in_for_the_codec_gives_back_the_frame_that_codes_stand_for() -> None:
    codec = upstream.Codec("none")
    frames = [np.full(1_920, number, np.float32) for number in range(3)]
    assert codec.get_encoded() is None
    for frame in frames:
        codec.encode(frame)
    codes = [codec.get_encoded() for _ in frames]
    assert codec.get_decoded() is None
    for code in codes[1:]:
        assert code is not None
        assert code.shape == (upstream.CODEBOOKS, 1)
        assert code.dtype == np.uint32
        codec.decode(code.transpose(1, 0))
    assert [codec.get_decoded(), codec.get_decoded(), codec.get_decoded()] == [frames[1], frames[2], None]


def test_a_frame_of_an_hour_later_has_its_own_codes() -> None:
    for number in (0, 2_047, 2_048, 5_000_000):
        assert upstream.number_of(upstream.codes_of(number).T) == number


def test_the_stand_in_for_the_model_takes_its_time_and_says_when_it_answers_the_microphone(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    model = upstream.Generator(20, 10, 0, str(ready), model=None, max_steps=1, check=False)
    began_s = time.monotonic()
    for step in range(upstream.WARM_UP_FRAMES):
        model.step(step)
        assert model.last_audio_tokens() == (step if step else None)  # as upstream's, whose first step answers nothing
    assert time.monotonic() - began_s >= 0.02 * upstream.WARM_UP_FRAMES
    assert not ready.exists()
    assert model.step(None).tolist() == [upstream.PENDING]
    assert ready.exists()


def figures(p50_ms: float, end_ms: float, cuts: int) -> Figures:
    heard = Heard([(float(at), p50_ms if at < 20 else end_ms) for at in range(24)], [Gap(24, True, True)] * cuts, 0.0)
    told = {"before": {"xruns": {"playback": 1}}, "after": {"xruns": {"playback": 1 + cuts}}}
    return {**frontend.summary(heard), "cpu_percent": 10.0, "told": told, "exit_code": 0}


def test_targets_are_met_or_missed(tmp_path: Path) -> None:
    quiet = {"ours": [figures(200, 200, 0)], "upstream": [figures(270, 270, 3)]}
    stall = {"ours": [figures(200, 205, 0)], "upstream": [figures(400, 2_400, 1)]}
    section = frontend.section({"quiet": quiet, "stall of 2 s": stall}, "0.3.0", 1.0, "command")
    assert [target.met for target in section.targets] == [False, True, True, True]
    assert "70 ms less" in section.targets[0].measured
    assert section.targets[1].measured == "0 (of 0 gaps); upstream 4 (of 4 gaps)"
    assert [plot.name for plot in section.plots] == ["frontend-latency", "frontend-stall"]
    assert all(len(row) == len(table.columns) for table in section.tables for row in table.rows)
    results.write(section, tmp_path / "section.json")
    assert results.read(tmp_path / "section.json") == section


def test_where_upstream_is_not_installed_ours_is_told_alone() -> None:
    found = {"quiet": {"ours": [figures(200, 200, 0)]}, "stall of 2 s": {"ours": [figures(200, 205, 1)]}}
    section = frontend.section(found, None, 1.0, "command")
    assert [target.met for target in section.targets] == [False, False, True, True]
    assert "ran dry, 1 times" in section.targets[1].why
    assert all("upstream's package is not installed" in target.measured for target in section.targets[:-1])
    assert [list(plot.series) for plot in section.plots] == [["ours"], ["ours"]]
    assert len(section.tables[0].rows) == 2


def test_a_run_that_does_not_end_cleanly_misses_a_target() -> None:
    found = {"quiet": {"ours": [figures(200, 200, 0), figures(200, 200, 0) | {"exit_code": 1}]}}
    assert (frontend._clean(found).measured, frontend._clean(found).met) == ("1 of 2; others 1", False)


@pytest.mark.parametrize("sides", ["ours", "upstream", "ours and upstream"])
def test_a_trial_that_fails_is_told_beside_the_others(sides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(begin: object, case: Case, seconds: float, seed: int) -> Figures:
        side = "ours" if begin is frontend.ours else "upstream"
        if seed == 0 and side in sides:
            raise ValueError("first\nlast")
        return figures(200 if side == "ours" else 300, 200, 0)

    monkeypatch.setattr(frontend, "trial", trial)
    cases = [(Case(name), 1.0, repeats) for name, repeats in (("quiet", 2), ("stall of 2 s", 1))]
    found = frontend.measure(cases, Path(sys.executable))
    section = frontend.section(found, "0.3.0", 1.0, "command")
    faults = section.tables[-1]
    assert faults.title == "Trials that failed"
    assert {tuple(row[1:]) for row in faults.rows} == {(side, "1", "ValueError: last") for side in sides.split(" and ")}
    assert "100 ms less" in section.targets[0].measured
    assert section.targets[-1].met == ("ours" not in sides)
    assert all(len(row) == len(table.columns) for table in section.tables for row in table.rows)


def test_the_command_on_the_page_has_no_file_and_can_be_repeated() -> None:
    arguments = frontend._parser().parse_args(["--json", "/tmp/x.json", "--seconds", "5", "all cores busy"])  # noqa: S108
    assert frontend.command(arguments) == "python -m bench.frontend --seconds 5 'all cores busy'"


def test_without_a_sound_server_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.frontend"])
    monkeypatch.setattr(frontend, "missing", lambda: "pulseaudio")
    with pytest.raises(SystemExit, match="2"):
        frontend.main()
    said = capsys.readouterr().err
    assert said == "bench.frontend needs a virtual sound server: pulseaudio is missing (make system)\n"


def test_the_end_of_a_recording_is_the_speakers_last_second(tmp_path: Path) -> None:
    both = np.random.default_rng(1).uniform(-1, 1, (2 * SAMPLE_RATE, 2)).astype(np.float32)
    soundfile.write(tmp_path / "both.wav", both, SAMPLE_RATE, subtype="FLOAT")
    assert np.array_equal(frontend._tail(tmp_path / "both.wav"), both[SAMPLE_RATE:, 1])


@pytest.mark.usefixtures("sound_cable")  # the trials have one each of their own: here it says whether there can be one
@pytest.mark.parametrize("side", ["ours", "upstream"])
def test_a_front_end_is_heard_through_the_devices(side: str) -> None:
    if side == "upstream" and importlib.util.find_spec("moshi_mlx") is None:
        pytest.skip("moshi_mlx is not installed")
    begin = {"ours": frontend.ours, "upstream": frontend.upstream(Path(sys.executable))}[side]
    found = frontend.trial(begin, Case("short", step_ms=5, stall_s=0.5), seconds=4)
    assert 80 < found["start_ms"] < 2_000
    assert found["gaps"] >= 1
    assert found["gap_ms"] > 100
    assert found["cpu_percent"] > 0
    if side == "upstream":
        assert found["cuts"] >= 1  # nothing is ever faded there
        assert found["end_ms"] > found["start_ms"] + 200
