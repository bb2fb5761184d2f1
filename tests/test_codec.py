"""procs.model.codec: which codec it is, what may be waited for where, and rustymimi without an end."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

import mlx.core as mx
import numpy as np
import pytest
import rustymimi

from pipeline.checkpoints import FULL_MIMI, SIZES, Checkpoint, Size, synthesize
from pipeline.errors import CheckpointError
from pipeline.topology import FRAME
from procs.engines import Samples
from procs.model import codec
from procs.model.codec import Codec, Codes, MlxMimi, RustMimi
from tests.helpers import PATIENCE_S, speech_like, wait_until

CODEBOOKS: Final = 8


def frames_of(count: int, seed: int = 0) -> list[Samples]:
    return np.split(speech_like(count, seed), count)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return synthesize(tmp_path_factory.mktemp("tiny"), "bf16", "tiny")


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """A tiny model with a codec of the official dimensions, 385 MB, not left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "full codec", Size(SIZES["tiny"].config, FULL_MIMI))
        checkpoint = synthesize(tmp_path_factory.mktemp("full"), "bf16", "full codec")
    yield checkpoint
    checkpoint.mimi_file.unlink()


class TestChoice:
    @pytest.mark.parametrize("name", [None, "mlx", "rust"])
    @pytest.mark.parametrize("device", [mx.cpu, mx.gpu])
    def test_other_dimensions_than_the_official_ones_run_in_mlx_alone(
        self, tiny: Checkpoint, name: Any, device: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mx, "default_device", lambda: device)
        assert codec.choose(tiny, name) == "mlx"

    @pytest.mark.parametrize(
        ("device", "metal", "chosen"),
        [(mx.cpu, False, "rust"), (mx.gpu, False, "mlx"), (mx.gpu, True, "rust"), (mx.cpu, True, "rust")],
    )
    def test_of_the_official_ones_the_faster_is_taken(
        self, tiny: Checkpoint, device: Any, metal: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        official = replace(tiny, mimi_shape=FULL_MIMI)
        monkeypatch.setattr(mx, "default_device", lambda: device)
        monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
        assert codec.choose(official, None) == chosen
        assert codec.choose(official, "mlx") == "mlx"
        assert codec.choose(official, "rust") == "rust"

    def test_what_is_chosen_is_loaded(self, tiny: Checkpoint) -> None:
        loaded = codec.load(tiny, "rust")
        assert isinstance(loaded, MlxMimi)
        assert loaded.name == "mlx"

    def test_a_file_that_is_none_is_one_line(self, full_size: Checkpoint, tiny: Checkpoint, tmp_path: Path) -> None:
        for checkpoint in (full_size, tiny):
            broken = tmp_path / "mimi.safetensors"
            broken.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
            with pytest.raises(CheckpointError) as caught:
                codec.load(replace(checkpoint, mimi_file=broken), None)
            assert str(caught.value).startswith(f"{broken} does not load: ")
            assert "\n" not in str(caught.value)


class Tokenizer:
    """Stands in for rustymimi's: remembers what it was given since its reset."""

    alive: ClassVar["weakref.WeakSet[Tokenizer]"] = weakref.WeakSet()
    made: ClassVar[int] = 0

    def __init__(self) -> None:
        kind = type(self)
        self.number = kind.made
        kind.made += 1
        kind.alive.add(self)
        self.given: list[int] = []
        self.resets = 0

    def reset(self) -> None:
        self.resets += 1


Said = tuple[int, int]
"""Which tokenizer answered, and how many frames it had been given before."""


def step(tokenizer: Tokenizer, given: int) -> Said:
    tokenizer.given.append(given)
    return tokenizer.number, len(tokenizer.given) - 1


@pytest.fixture
def short_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 frames for the first tokenizer and 8 more for each one after, of which it hears 4 before; 2 to load it."""
    monkeypatch.setattr(codec, "LIFE", 12)
    monkeypatch.setattr(codec, "OVERLAP", 4)
    monkeypatch.setattr(codec, "_LOAD", 2)
    # A class of the test's own: what an earlier test's relay is still loading is not counted here.
    own = type("Tokenizer", (Tokenizer,), {"made": 0, "alive": weakref.WeakSet()})
    monkeypatch.setattr(sys.modules[__name__], "Tokenizer", own)


@pytest.mark.usefixtures("short_lives")
class TestRelay:
    def said(self, relay: codec._Relay, numbers: range) -> list[Said]:
        return [relay.begin(number).result(PATIENCE_S)[0] for number in numbers]

    def test_one_takes_over_from_another_without_a_gap(self) -> None:
        said = self.said(codec._Relay(Tokenizer, step), range(36))
        assert [number for number, _ in said] == [0] * 12 + [1] * 8 + [2] * 8 + [3] * 8
        # Each has heard the frames before its first one, and then every one.
        assert [before for _, before in said] == [*range(12), *range(4, 12), *range(4, 12), *range(4, 12)]

    def test_none_is_given_more_frames_than_its_life(self) -> None:
        relay = codec._Relay(Tokenizer, step)
        assert max(before for _, before in self.said(relay, range(100))) == codec.LIFE - 1

    def test_the_real_numbers_stay_below_what_rustymimi_can(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        assert codec.LIFE < 4_096
        # When a tokenizer takes over, the next one's loading is still to come.
        assert codec.OVERLAP < codec.LIFE - codec.OVERLAP - codec._LOAD

    def test_both_are_given_the_same_frames_in_the_overlap(self) -> None:
        relay = codec._Relay(Tokenizer, step)
        self.said(relay, range(11))
        first = relay._present
        assert relay._next is not None
        second = relay._next.result()
        self.said(relay, range(11, 12))
        assert relay._present is second
        assert first.given == list(range(12))
        assert second.given == [8, 9, 10, 11]

    def test_the_old_one_is_let_go(self) -> None:
        relay = codec._Relay(Tokenizer, step)
        for number in range(0, 60, 10):
            self.said(relay, range(number, number + 10))
            gc.collect()
            alive = {tokenizer.number for tokenizer in Tokenizer.alive}
            assert alive <= {relay._present.number, relay._present.number + 1}
        assert Tokenizer.made == 1 + 6 + 1  # six took over, and one is loaded

    def test_a_reset_reaches_both(self) -> None:
        relay = codec._Relay(Tokenizer, step)
        self.said(relay, range(10))
        first = relay._present
        assert relay._next is not None
        relay.reset()
        self.said(relay, range(10, 11))
        assert (first.resets, relay._next.result().resets) == (1, 1)

    def test_a_reset_comes_after_what_was_begun_before_it(self) -> None:
        seen: list[tuple[int, int]] = []

        def watched(tokenizer: Tokenizer, given: int) -> None:
            seen.append((given, tokenizer.resets))

        relay = codec._Relay(Tokenizer, watched)
        relay.begin(0)
        relay.begin(1)
        relay.reset()
        relay.begin(2).result(PATIENCE_S)
        assert seen == [(0, 0), (1, 0), (2, 1)]

    def test_a_reset_does_not_lengthen_a_life(self) -> None:
        """rustymimi's own counts go on."""
        relay = codec._Relay(Tokenizer, step)
        self.said(relay, range(7))
        relay.reset()
        assert [number for number, _ in self.said(relay, range(7, 14))] == [0] * 5 + [1] * 2

    def test_the_next_one_is_loaded_while_the_present_one_works(self) -> None:
        go = threading.Event()
        makes: list[str] = []

        def make() -> Tokenizer:
            makes.append(threading.current_thread().name)
            if len(makes) > 1:
                assert go.wait(PATIENCE_S)
            return Tokenizer()

        relay = codec._Relay(make, step)
        said = self.said(relay, range(8))  # the last before the next one is needed
        assert [number for number, _ in said] == [0] * 8
        wait_until(lambda: len(makes) == 2, "the loading")
        assert makes[1] != makes[0]
        go.set()
        assert [number for number, _ in self.said(relay, range(8, 13))] == [0] * 4 + [1]

    def test_what_goes_wrong_in_loading_is_told(self) -> None:
        made = []

        def make() -> Tokenizer:
            made.append(0)
            if len(made) > 1:
                raise OSError("the file went away")
            return Tokenizer()

        relay = codec._Relay(make, step)
        assert len(self.said(relay, range(9))) == 9  # the ninth is the first that the next one was to hear as well
        with pytest.raises(OSError, match="the file went away"):
            self.said(relay, range(9, 10))

    def test_who_waits_for_a_frame_does_not_wait_for_the_next_one_to_hear_it(self) -> None:
        go = threading.Event()
        makes: list[Tokenizer] = []

        def make() -> Tokenizer:
            makes.append(Tokenizer())
            return makes[-1]

        def slow(tokenizer: Tokenizer, given: int) -> int:
            if tokenizer is not makes[0]:
                assert go.wait(PATIENCE_S)
            return given

        relay = codec._Relay(make, slow)
        assert [relay.begin(number).result(PATIENCE_S)[0] for number in range(9)] == list(range(9))
        assert len(makes) == 2
        go.set()

    def test_renewed_it_is_as_it_was_at_first(self) -> None:
        makes: list[Tokenizer] = []

        def make() -> Tokenizer:
            makes.append(Tokenizer())
            return makes[-1]

        relay = codec._Relay(make, step)
        self.said(relay, range(5))
        relay.renew()
        assert len(makes) == 2
        assert relay._present is makes[1]
        assert relay._frames == 0

    def test_what_goes_wrong_with_a_frame_is_told_to_who_waits_for_it(self) -> None:
        def broken(tokenizer: Tokenizer, given: int) -> int:
            if given == 1:
                raise ValueError("no frame")
            return given

        relay = codec._Relay(Tokenizer, broken)
        pending = [relay.begin(number) for number in range(3)]
        assert pending[0].result(PATIENCE_S)[0] == 0
        with pytest.raises(ValueError, match="no frame"):
            pending[1].result(PATIENCE_S)
        assert pending[2].result(PATIENCE_S)[0] == 2


def both(made: Codec, frame: Samples) -> tuple[Codes, Samples]:
    codes, _ = made.hear(frame).result()
    return codes, made.say(codes).result()[0]


class TestRustMimi:
    def test_it_goes_on_past_the_end_of_a_tokenizer(
        self, full_size: Checkpoint, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        life = 5
        # Two positions a frame: a tokenizer that is given more frames than its life raises.
        monkeypatch.setattr(rustymimi, "Tokenizer", partial(rustymimi.Tokenizer, max_seq_len=2 * life))
        alone = rustymimi.Tokenizer(str(full_size.mimi_file), num_codebooks=CODEBOOKS)
        codes = np.zeros((1, CODEBOOKS, 1), np.uint32)
        for _ in range(life):
            alone.decode_step(codes)
        with pytest.raises(ValueError, match="narrow"):
            alone.decode_step(codes)
        monkeypatch.setattr(codec, "LIFE", life)
        monkeypatch.setattr(codec, "OVERLAP", 1)
        monkeypatch.setattr(codec, "_LOAD", 1)
        made = codec.load(full_size, "rust")
        assert isinstance(made, RustMimi)
        assert made.name == "rust"
        for number in range(2 * life):
            sound, _ = made.say(np.full(CODEBOOKS, number, np.uint32)).result()
            assert (sound.shape, sound.dtype.name) == ((FRAME,), "float32")
            assert np.isfinite(sound).all()
            assert sound.any()
        for frame in frames_of(2):
            heard, _ = made.hear(frame).result()
            assert (heard.shape, heard.dtype.name) == ((CODEBOOKS,), "uint32")
            assert heard.max() < FULL_MIMI.bins

    def test_a_new_conversation_is_like_the_first_but_for_one_frames_codes(self, full_size: Checkpoint) -> None:
        made, given = RustMimi(full_size.mimi_file, CODEBOOKS), frames_of(3)
        first = [both(made, frame) for frame in given]
        made.reset()
        heard = [made.hear(frame).result()[0] for frame in given]
        said = [made.say(codes).result()[0] for codes, _ in first]
        assert all(np.array_equal(codes, expected) for codes, (expected, _) in zip(heard[1:], first[1:], strict=True))
        assert all(np.allclose(sound, expected, atol=1e-6) for sound, (_, expected) in zip(said, first, strict=True))

    def test_a_frame_may_change_once_it_was_given(self, full_size: Checkpoint) -> None:
        given = frames_of(2)
        made = RustMimi(full_size.mimi_file, CODEBOOKS)
        expected = [made.hear(frame).result()[0] for frame in given]
        made = RustMimi(full_size.mimi_file, CODEBOOKS)
        buffer, pending = np.empty(FRAME, np.float32), []
        for frame in given:
            buffer[:] = frame
            pending.append(made.hear(buffer))
        buffer[:] = np.nan
        assert all(np.array_equal(one.result()[0], codes) for one, codes in zip(pending, expected, strict=True))


class TestMlxMimi:
    @pytest.fixture
    def make(self, tiny: Checkpoint) -> Callable[[], Codec]:
        return lambda: codec.load(tiny, "mlx")

    def test_results_are_read_in_any_thread(self, make: Callable[[], Codec]) -> None:
        given = frames_of(10)
        alone, made = make(), make()
        expected = [both(alone, frame) for frame in given]
        with ThreadPoolExecutor(1) as other:
            for frame, (codes, sound) in zip(given, expected, strict=True):
                hearing = made.hear(frame)
                saying = made.say(codes)
                assert np.array_equal(other.submit(hearing.result).result(PATIENCE_S)[0], codes)
                assert np.array_equal(other.submit(saying.result).result(PATIENCE_S)[0], sound)

    def test_frames_may_be_begun_before_the_one_before_is_done(self, make: Callable[[], Codec]) -> None:
        given = frames_of(10)
        alone, made = make(), make()
        expected = [alone.hear(frame).result()[0] for frame in given]
        pending = [made.hear(frame) for frame in given]
        assert all(np.array_equal(one.result()[0], codes) for one, codes in zip(pending, expected, strict=True))

    def test_a_frame_may_change_once_it_was_given(self, make: Callable[[], Codec]) -> None:
        given = frames_of(2)
        alone, made = make(), make()
        buffer = given[0].copy()
        pending = made.hear(buffer)
        buffer[:] = np.nan
        assert np.array_equal(pending.result()[0], alone.hear(given[0]).result()[0])
        assert np.array_equal(made.hear(given[1]).result()[0], alone.hear(given[1]).result()[0])

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
    def test_a_sample_that_is_no_sound_does_harm_until_a_reset(self, make: Callable[[], Codec], value: float) -> None:
        """Which is why the engine cleans what it is given."""
        given = frames_of(6)
        alone, made = make(), make()
        expected = [alone.hear(frame).result()[0] for frame in given]
        broken = given[0].copy()
        broken[100] = value
        made.hear(broken)
        assert not np.array_equal(made.hear(given[1]).result()[0], expected[1])
        made.reset()
        assert all(
            np.array_equal(made.hear(frame).result()[0], codes) for frame, codes in zip(given, expected, strict=True)
        )
