"""Pulling from a small hub on the loopback: what is fetched, what runs then use, and every way in which it fails."""

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.hf_api
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from pipeline import cache, download, inventory
from pipeline.checkpoints import find, synthesize
from pipeline.layout import CONFIG_FILE, MIMI_FILE, QUALITIES, TOKENIZER_FILE
from tests.helpers import refusal
from tests.hub_server import Hub, Repository, Request, serve

REPO = "someone/tiny-moshi"
MODEL_FILE = QUALITIES["q4"].file
MODEL_BREAK = 100_000
"""Bytes of the model's file, some MB, after which its connection breaks."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny q4 checkpoint, not to be written to."""
    return synthesize(tmp_path_factory.mktemp("original"), "q4", "tiny").folder


@pytest.fixture
def hub(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with that checkpoint, and an empty cache."""
    with serve({REPO: original}) as made:
        use(made.endpoint, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(download, "RETRY_S", 0.0)
        # What of a broken connection's last chunk had come is lost: 10 MB at most, and here less.
        for module in (huggingface_hub.constants, huggingface_hub.file_download):
            monkeypatch.setattr(module, "DOWNLOAD_CHUNK_SIZE", MODEL_BREAK // 10, raising=False)
        yield made


def use(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, after huggingface_hub was imported."""
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download, huggingface_hub.hf_api):
        for name, value in {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
            monkeypatch.setattr(module, name, value, raising=False)


@pytest.fixture
def changed(original: Path, tmp_path: Path) -> Path:
    """Another checkpoint, whose config alone is different."""
    folder = Path(shutil.copytree(original, tmp_path / "changed"))
    rewrite(folder, note="newer")
    return folder


def rewrite(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(raw | changes))


def pull(quality: str = "q4", revision: str = "main", repo: str = REPO) -> Path:
    return download.fetch(download.plan(repo, quality, revision))


def states(model: str | None = REPO) -> dict[str, str]:
    return {verdict.file: verdict.state for verdict in inventory.verify(model, "q4")}


def flip(path: Path, offset: int = -1) -> None:
    """Change one bit of a file, which keeps its length."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.resolve().write_bytes(content)


class TestPull:
    def test_what_is_told_before_is_what_is_fetched(self, hub: Hub, original: Path) -> None:
        plan = download.plan(REPO, "q4")
        assert {planned.file.name: planned.file.size for planned in plan.files} == {
            path.name: path.stat().st_size for path in original.iterdir()
        }
        here = [planned.file.name for planned in plan.files if not planned.missing_bytes]
        assert here == [CONFIG_FILE]
        assert plan.missing_bytes == plan.total_bytes - (original / CONFIG_FILE).stat().st_size
        folder = download.fetch(plan)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in original.iterdir()
        }
        assert hub.requests == [Request(name, 0) for name in (CONFIG_FILE, MODEL_FILE, MIMI_FILE, TOKENIZER_FILE)]
        assert download.plan(REPO, "q4").missing_bytes == 0

    def test_nothing_is_fetched_twice(self, hub: Hub) -> None:
        pull()
        hub.requests.clear()
        pull()
        assert hub.requests == []

    def test_only_what_a_run_needs(self, hub: Hub, changed: Path) -> None:
        (changed / "README.md").write_text("hello")
        (changed / QUALITIES["bf16"].file).write_bytes(b"large")
        hub.repositories[REPO].commit(changed)
        assert sorted(path.name for path in pull().iterdir()) == sorted(
            [CONFIG_FILE, MODEL_FILE, MIMI_FILE, TOKENIZER_FILE]
        )

    def test_files_under_the_names_that_the_config_gives(self, hub: Hub, changed: Path) -> None:
        names = {"moshi_name": "tuned.safetensors", "mimi_name": "mimi.safetensors", "tokenizer_name": "words.model"}
        for old, new in zip((MODEL_FILE, MIMI_FILE, TOKENIZER_FILE), names.values(), strict=True):
            (changed / old).rename(changed / new)
        rewrite(changed, **names)
        hub.repositories[REPO].commit(changed)
        pull()
        found = find(REPO)
        assert [found.model_file.name, found.mimi_file.name, found.tokenizer_file.name] == list(names.values())

    def test_official_names_where_the_config_gives_none(self, hub: Hub, changed: Path) -> None:
        (changed / CONFIG_FILE).write_text(
            json.dumps({key: value for key, value in json.loads((changed / CONFIG_FILE).read_text()).items() if not
                        key.endswith("_name")})
        )  # fmt: skip
        hub.repositories[REPO].commit(changed)
        pull()
        assert find(REPO).mimi_file.name == MIMI_FILE

    def test_what_an_older_commit_has_in_common_is_not_fetched_again(self, hub: Hub, changed: Path) -> None:
        pull()
        hub.repositories[REPO].commit(changed)
        hub.requests.clear()
        pull()
        assert hub.requests == [Request(CONFIG_FILE, 0)]


class TestRevision:
    def test_a_run_uses_what_was_pulled_until_it_is_pulled_again(self, hub: Hub, changed: Path) -> None:
        pull()
        first = hub.repositories[REPO].refs["main"]
        second = hub.repositories[REPO].commit(changed)
        assert find(REPO).folder.name == first
        # Another program has asked for the newest one: that is not what was pulled.
        (cache.root(REPO) / "refs" / "main").write_text(second)
        assert find(REPO).folder.name == first
        pull()
        assert find(REPO).folder.name == second
        assert find(REPO).config["note"] == "newer"

    def test_a_commit_a_tag_and_a_branch(self, hub: Hub, changed: Path) -> None:
        repository = hub.repositories[REPO]
        first = repository.refs["main"]
        repository.refs["v1"] = first
        second = repository.commit(changed, "tuned")
        for revision, commit in ((first, first), ("tuned", second), ("v1", first), (second, second)):
            pull(revision=revision)
            assert find(REPO).folder.name == commit
            entry = next(entry for entry in inventory.entries() if entry.repo == REPO)
            assert (entry.revision, entry.commit, entry.folder) == (revision, commit, str(find(REPO).folder))

    def test_what_another_program_downloaded_is_found(self, hub: Hub, original: Path) -> None:
        for path in original.iterdir():
            huggingface_hub.hf_hub_download(REPO, path.name, cache_dir=cache.hub())
        assert find(REPO).folder.name == hub.repositories[REPO].refs["main"]
        assert set(states().values()) == {"ok"}

    def test_a_damaged_record(self, hub: Hub) -> None:
        pull()
        (cache.root(REPO) / cache.RECORD_FILE).write_text("{")
        assert refusal(lambda: find(REPO)).endswith(f"run: pipeline models pull {REPO}")
        assert [entry.problem for entry in inventory.entries() if entry.problem] == []
        pull()
        assert find(REPO)


class TestInterrupted:
    def test_a_later_pull_goes_on(self, hub: Hub, original: Path) -> None:
        hub.breaks = [MODEL_BREAK, *[0] * 20]
        line = refusal(pull)
        assert line == f"model {REPO}: the hub cannot be reached: check the network, and try again"
        assert refusal(lambda: find(REPO)) == f"{REPO} is only partly downloaded, run: pipeline models pull {REPO}"
        hub.breaks = []
        hub.requests.clear()
        plan = download.plan(REPO, "q4")
        here = {planned.file.name: planned.here_bytes for planned in plan.files}
        assert here[MODEL_FILE] == MODEL_BREAK
        download.fetch(plan)
        assert Request(MODEL_FILE, MODEL_BREAK) in hub.requests
        assert find(REPO).model_file.read_bytes() == (original / MODEL_FILE).read_bytes()

    def test_a_pull_goes_on_by_itself_while_that_brings_anything(self, hub: Hub) -> None:
        hub.breaks = [MODEL_BREAK, MODEL_BREAK]
        pull()
        assert [request.start for request in hub.requests if request.file == MODEL_FILE] == [
            0,
            MODEL_BREAK,
            2 * MODEL_BREAK,
        ]

    def test_the_one_before_is_used_meanwhile(self, hub: Hub, changed: Path) -> None:
        before = pull()
        flip(changed / MODEL_FILE)
        hub.repositories[REPO].commit(changed)
        hub.breaks = [MODEL_BREAK, *[0] * 20]
        refusal(pull)
        assert find(REPO).folder == before

    @pytest.mark.parametrize("left", [b"x" * MODEL_BREAK, b"x" * 100_000_000], ids=["another", "longer"])
    def test_what_is_left_of_something_else(self, hub: Hub, original: Path, left: bytes) -> None:
        plan = download.plan(REPO, "q4")
        part = cache.root(REPO) / "blobs" / f"{plan.record.files[1].digest}.incomplete"
        part.write_bytes(left)
        if len(left) == MODEL_BREAK:
            line = refusal(pull)
            assert f"{MODEL_FILE} was damaged on its way: it has the SHA-256 " in line
        pull()
        assert find(REPO).model_file.read_bytes() == (original / MODEL_FILE).read_bytes()

    def test_damage_on_the_way(self, hub: Hub) -> None:
        hub.corrupt = True
        assert "was damaged on its way" in refusal(pull)
        hub.corrupt = False
        pull()
        assert set(states().values()) == {"ok"}

    def test_by_another_program_that_is_at_it(self, hub: Hub) -> None:
        plan = download.plan(REPO, "q4")
        part = cache.root(REPO) / "blobs" / f"{plan.record.files[1].digest}.incomplete"
        with part.open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert refusal(pull) == f"model {REPO}: is being downloaded by another program"


class TestDisk:
    def test_too_little_is_told_before_the_start(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = download.plan(REPO, "q4")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000_000))
        hub.requests.clear()
        assert refusal(lambda: download.fetch(plan)) == (
            f"model {REPO}: needs {download.size(plan.missing_bytes)} more in {cache.root(REPO)}, which has 4.0 MB free"
        )
        assert hub.requests == []

    def test_what_is_here_needs_none(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        pull()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        pull()

    def test_full_all_the_same(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        plan = download.plan(REPO, "q4")
        monkeypatch.setattr(download, "http_get", fail)
        assert refusal(lambda: download.fetch(plan)).startswith(f"model {REPO}: the disk is full: make room")

    def test_a_cache_that_cannot_be(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "cache").write_bytes(b"")
        assert "cannot be written: " in refusal(pull)

    @pytest.mark.parametrize(
        ("count", "text"), [(999, "999 B"), (1_000, "1.0 kB"), (8_100_000, "8.1 MB"), (5_190_030_628, "5.2 GB")]
    )
    def test_sizes_for_people(self, count: int, text: str) -> None:
        assert download.size(count) == text


class TestRefused:
    def test_no_such_repository(self, hub: Hub) -> None:
        line = refusal(lambda: pull(repo="someone/else"))
        assert line.startswith("model someone/else: is not on the hub, or not for everyone: check the name")

    def test_no_such_revision(self, hub: Hub) -> None:
        assert refusal(lambda: pull(revision="v9")) == (
            f"model {REPO}: has no revision 'v9': expected a branch, a tag or a commit"
        )

    def test_gated(self, hub: Hub) -> None:
        hub.repositories[REPO].gated = True
        assert refusal(pull).startswith(f"model {REPO}: is gated: ask for access on its page")

    @pytest.mark.parametrize(
        ("status", "line"),
        [
            (403, "the hub refuses access (403): set HF_TOKEN"),
            (500, "the hub answers with an error (500): try again later"),
        ],
    )
    def test_an_answer_that_is_an_error(self, hub: Hub, status: int, line: str) -> None:
        hub.status = status
        assert refusal(pull).startswith(f"model {REPO}: {line}")

    def test_no_token(self, hub: Hub) -> None:
        hub.status = 401
        assert refusal(pull).endswith("set HF_TOKEN to your token")

    def test_offline_by_choice(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OfflineModeIsEnabled("offline mode is enabled")

        monkeypatch.setattr(download, "HfApi", refuse)
        assert refusal(pull) == f"model {REPO}: HF_HUB_OFFLINE is set: unset it to download"

    def test_no_network(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        use("http://127.0.0.1:9", monkeypatch)
        assert refusal(pull) == f"model {REPO}: the hub cannot be reached: check the network, and try again"

    def test_something_that_is_no_hub(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        use(f"{hub.endpoint}/{REPO}/resolve/main/{CONFIG_FILE}?", monkeypatch)
        assert "what answers is no model hub" in refusal(pull)

    def test_no_repositorys_name(self, hub: Hub) -> None:
        assert refusal(lambda: pull(repo="some--one/x")) == (
            "model 'some--one/x': expected a repository such as kyutai/moshiko-mlx-q4"
        )

    def test_no_checkpoint(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "README.md").write_text("nothing here")
        hub.repositories[REPO].commit(tmp_path / "empty")
        assert f"has no {MODEL_FILE}, {MIMI_FILE}, {TOKENIZER_FILE}; is it a q4 checkpoint" in refusal(pull)

    def test_another_kind_of_model_before_anything_large_is_fetched(self, hub: Hub, changed: Path) -> None:
        rewrite(changed, conditioners={"description": {}})
        hub.repositories[REPO].commit(changed)
        assert "is not of a dialogue model: it sets conditioners" in refusal(pull)
        assert hub.requests == [Request(CONFIG_FILE, 0)]

    def test_another_quality_under_this_ones_name_leaves_what_was_pulled(self, hub: Hub, tmp_path: Path) -> None:
        before = pull()
        wrong = synthesize(tmp_path / "wrong", "bf16", "tiny").folder
        (wrong / QUALITIES["bf16"].file).rename(wrong / MODEL_FILE)
        rewrite(wrong, moshi_name=MODEL_FILE)
        hub.repositories[REPO].commit(wrong)
        assert "is bf16 (bfloat16), not q4 (4 bit, groups of 32)" in refusal(pull)
        assert find(REPO).folder == before


class TestVerify:
    @pytest.mark.parametrize("name", [CONFIG_FILE, MODEL_FILE, MIMI_FILE, TOKENIZER_FILE])
    def test_one_bit_and_a_pull_that_mends_it(self, hub: Hub, name: str) -> None:
        folder = pull()
        assert set(states().values()) == {"ok"}
        flip(folder / name)
        assert {file for file, state in states().items() if state != "ok"} >= {name}
        assert states()[name] == "damaged"
        hub.requests.clear()
        pull()
        assert hub.requests == [Request(name, 0)]
        assert set(states().values()) == {"ok"}

    def test_what_it_says(self, hub: Hub) -> None:
        folder = pull()
        flip(folder / MODEL_FILE)
        (folder / MIMI_FILE).unlink()
        (folder / TOKENIZER_FILE).resolve().write_bytes(b"short")
        verdicts = {verdict.file: verdict for verdict in inventory.verify(REPO, "q4")}
        assert verdicts[MODEL_FILE].fault.startswith("has the SHA-256 ")
        assert (verdicts[MIMI_FILE].state, verdicts[MIMI_FILE].fault) == ("missing", f"not in {folder}")
        assert verdicts[TOKENIZER_FILE].fault.startswith("is 5 bytes long, expected ")
        assert {verdict.checked for verdict in verdicts.values()} == {"hash"}

    def test_a_folder_by_its_headers(self, changed: Path) -> None:
        verdicts = inventory.verify(str(changed), "q4")
        assert [(verdict.file, verdict.state, verdict.checked) for verdict in verdicts] == [
            (CONFIG_FILE, "ok", "header"),
            (MODEL_FILE, "ok", "header"),
            (MIMI_FILE, "ok", "header"),
            (TOKENIZER_FILE, "ok", "presence"),
        ]
        with (changed / MIMI_FILE).open("r+b") as file:
            file.truncate(1000)
        rewrite(changed, num_layers=3)
        assert states(str(changed)) == {
            CONFIG_FILE: "ok",
            MODEL_FILE: "damaged",
            MIMI_FILE: "damaged",
            TOKENIZER_FILE: "ok",
        }
        (changed / CONFIG_FILE).write_text("{")
        assert states(str(changed)) == {CONFIG_FILE: "damaged"}

    def test_without_a_network(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        pull()

        def no_network(*_: Any, **__: Any) -> None:
            raise AssertionError("verify() used the network")

        monkeypatch.setattr("socket.socket.connect", no_network)
        assert set(states().values()) == {"ok"}

    def test_nothing_there(self, hub: Hub) -> None:
        assert "is not downloaded" in refusal(lambda: inventory.verify(REPO, "q4"))


def test_the_list_has_every_official_one_and_what_else_was_pulled(hub: Hub, original: Path) -> None:
    hub.repositories["kyutai/moshika-mlx-q4"] = Repository()
    hub.repositories["kyutai/moshika-mlx-q4"].commit(original)
    pull()
    pull(repo="kyutai/moshika-mlx-q4")
    entries = inventory.entries()
    official = [f"kyutai/{voice}-mlx-{quality}" for voice in ("moshiko", "moshika") for quality in QUALITIES]
    assert [entry.repo for entry in entries] == [*official, REPO]
    assert [entry.repo for entry in entries if entry.folder] == ["kyutai/moshika-mlx-q4", REPO]
    assert entries[-1].bytes == sum(path.stat().st_size for path in original.iterdir())
    assert find("moshika").folder == Path(entries[3].folder)
    (find(REPO).folder / MIMI_FILE).unlink()
    assert f"is only partly downloaded, run: pipeline models pull {REPO}" in inventory.entries()[-1].problem
