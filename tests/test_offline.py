"""pipeline.offline: words out of pieces, and where they are written."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.messages import Accounting, TextRecord
from pipeline.offline import Result, Transcript
from pipeline.words import Word, Words


def words(*pieces: tuple[int, str]) -> list[str]:
    """The lines that pieces of text, each with its frame, make."""
    joined = Words()
    found = [word for frame, text in pieces for word in joined.add(frame, text)]
    return [word.line() for word in [*found, *joined.end()]]


def test_a_piece_that_begins_with_a_space_begins_a_word() -> None:
    pieces = (155, " he"), (156, "llo"), (157, " there"), (160, "."), (161, " Yes")
    assert words(*pieces) == ["12.40  hello", "12.56  there.", "12.88  Yes"]


def test_the_first_piece_begins_a_word_whatever_it_begins_with() -> None:
    assert words((0, "so"), (1, "on")) == ["0.00  soon"]


@pytest.mark.parametrize("space", [" ", "  ", "\n", "\t"])
def test_white_space_alone_ends_a_word_and_is_none(space: str) -> None:
    assert words((0, "one"), (1, space), (3, "two"), (4, space)) == ["0.00  one", "0.24  two"]


def test_several_words_of_one_frame_share_its_time() -> None:
    assert words((10, " one two"), (11, "fold three")) == ["0.80  one", "0.80  twofold", "0.88  three"]


def test_no_text_is_no_word() -> None:
    assert words() == words((0, ""), (1, " ")) == []


def test_a_word_is_complete_when_the_next_begins() -> None:
    joined = Words()
    assert list(joined.add(0, " he")) == []
    assert list(joined.add(1, "llo")) == []
    assert list(joined.add(2, " you")) == [Word(0.0, "hello")]
    assert list(joined.end()) == [Word(0.16, "you")]
    assert list(joined.end()) == []


def test_after_hours_times_are_still_whole_hundredths() -> None:
    assert words((450_001, "late")) == ["36000.08  late"]


def say(transcript: Transcript, *pieces: tuple[int, str]) -> None:
    for frame, text in pieces:
        transcript.add(TextRecord(frame=frame, text=text, time_ns=0))


def test_standard_output_gets_each_word_when_it_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    transcript = Transcript(None, to_stdout=True)
    transcript.begin()
    say(transcript, (0, "good"), (1, " day"))
    assert capsys.readouterr().out == "0.00  good\n"
    transcript.end()
    assert capsys.readouterr().out == "0.08  day\n"


def test_a_file_gets_the_words_instead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "words.txt"
    path.write_text("of an earlier run\n" * 9)
    transcript = Transcript(path, to_stdout=True)
    assert path.read_text().startswith("of an earlier run")  # until there are others
    transcript.begin()
    say(transcript, (0, "good"), (1, " day"))
    transcript.end()
    assert path.read_text() == "0.00  good\n0.08  day\n"
    assert capsys.readouterr().out == ""
    assert transcript.words == [Word(0.0, "good"), Word(0.08, "day")]


def test_words_may_go_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    transcript = Transcript(None, to_stdout=False)
    transcript.begin()
    say(transcript, (0, "good"))
    transcript.end()
    assert capsys.readouterr().out == ""
    assert transcript.words == [Word(0.0, "good")]


def test_a_file_that_cannot_be_written_is_an_error_before_anything_begins(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "words.txt"):
        with pytest.raises(ConfigError, match="cannot be written"):
            Transcript(path, to_stdout=False)


def test_what_goes_wrong_later_is_one_line_too(tmp_path: Path) -> None:
    transcript = Transcript(tmp_path / "words.txt", to_stdout=False)
    (tmp_path / "words.txt").mkdir()
    with pytest.raises(ConfigError, match=r"^transcript \S+words\.txt: cannot be written: Is a directory$"):
        transcript.begin()


def test_the_last_line_says_how_fast_it_went() -> None:
    result = Result(
        complete=True, input="in.wav", output="out.wav", seed=0, audio_s=15.6, wall_s=6.5, speed=2.4, words=[],
        accounting=Accounting(),
    )  # fmt: skip
    assert result.line() == "15.60 s of audio in 6.50 s: 2.4 times real time"
