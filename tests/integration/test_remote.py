"""A run that is reached from a second machine: by keys alone, and unharmed by those who have none."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.client import AsyncClient, Client
from pipeline.errors import ControlError
from pipeline.messages import StageRecord, TimingRecord
from pipeline.timing import now_ns
from tests.runs import TIMEOUT_S, Run, Runs
from tests.test_control import free_port

ECHO = ("--engine", "echo", "--input", "silence", "--output", "null")


class Machines(Runs):
    """Two of them on one: the first has runs, the second a folder of keys of its own and no runs."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = self.folder / "keys"
        self.environment["PIPELINE_KEYS_DIR"] = str(self.keys)
        self.second = Runs({"PIPELINE_KEYS_DIR": str(self.folder / "second")})
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"

    def exchange_keys(self) -> None:
        """What the documentation tells to do."""
        made = json.loads(self.ok("keys", "--client", "laptop", "--json"))
        (self.folder / "second").mkdir(mode=0o700)
        for path in made["files"]:
            shutil.move(path, self.folder / "second")

    def ok(self, *arguments: str) -> str:
        done = self.call(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def listening(self) -> Run:
        path = self.config(f'[remote]\nlisten = "tcp://{self.address}"\n')
        return self.up("--config", str(path), *ECHO)

    def far(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """`pipeline ARGUMENTS --remote ...` on the second machine."""
        return self.second.call(*arguments, "--remote", self.address)


@pytest.fixture
def machines() -> Iterator[Machines]:
    with Machines() as made, made.second:
        yield made


def test_status_send_and_down_from_the_second_machine(machines: Machines) -> None:
    machines.exchange_keys()
    with machines.listening() as run:
        pid = run.running()["pid"]
        done = machines.far("status", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["pid"] == pid
        muted = machines.far("send", "mute")
        assert muted.stdout.startswith("mute: done by capture, from frame "), muted.stderr
        assert run.status()["muted"]
        refused = machines.far("send", "input", "spec=file:nowhere.wav")
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
        ended = machines.far("down")
        assert ended.returncode == 0, ended.stderr
        assert "captured" in ended.stdout
        assert run.wait() == 0, run.err
    assert machines.leftovers() == []
    gone = machines.far("status")
    assert gone.returncode == 2
    assert "did not answer within 5 s" in gone.stderr


def test_events_from_the_second_machine(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    machines.exchange_keys()
    monkeypatch.setenv("PIPELINE_KEYS_DIR", str(machines.folder / "second"))
    with Client(remote=machines.address).events("state.capture", "timing.*", timeout_s=TIMEOUT_S) as events:
        with machines.listening() as run:
            heard = [event for event, _ in zip(events, range(20), strict=False)]
            states = [event.state for event in heard if isinstance(event, StageRecord)]
            assert states == sorted(states, key=["starting", "ready", "running"].index)
            assert {event.stage for event in heard if isinstance(event, TimingRecord)} >= {"capture", "inference"}
            assert asyncio.run(_frames_far_away(machines.address)) == 5
            assert run.interrupt() == 0
        first_over_ns = now_ns()
        with machines.listening() as run:  # the same subscription, the next run
            run.running()
            after = (event for event in events if isinstance(event, StageRecord) and event.time_ns > first_over_ns)
            assert next(after).stage == "capture"
            assert run.interrupt() == 0


async def _frames_far_away(address: str) -> int:
    client = AsyncClient(remote=address)
    assert (await client.send("unmute")).stage == "capture"
    assert (await client.status()).engine == "echo"
    count = 0
    async for _ in client.events("timing.playback", timeout_s=TIMEOUT_S):
        count += 1
        if count == 5:
            break
    return count


def test_who_has_no_key_gets_nothing_and_the_run_goes_on(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    machines.exchange_keys()
    with machines.listening() as run, contextlib.ExitStack() as strangers:
        before = run.running()
        for port in (machines.port, machines.port + 1):
            for words in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4_096)):
                stranger = strangers.enter_context(socket.create_connection(("127.0.0.1", port)))
                stranger.sendall(words)
        stolen = machines.folder / "stolen"
        stolen.mkdir(mode=0o700)
        monkeypatch.setenv("PIPELINE_KEYS_DIR", str(stolen))
        with pytest.raises(ControlError, match=r"expected .*remote\.key"):
            Client(remote=machines.address)
        other = Machines()
        with other, other.second:  # whose laptop has a key, of another machine
            other.exchange_keys()
            shutil.copy(other.folder / "second" / "client.key_secret", stolen)
        shutil.copy(machines.folder / "second" / "remote.key", stolen)
        client = Client(remote=machines.address)
        with pytest.raises(ControlError, match="did not answer"):
            client.send("mute", timeout_s=1)
        assert list(client.events(timeout_s=0.5)) == []
        (machines.keys / "clients" / "laptop.key").unlink()  # let in no more, from now on
        assert machines.far("status").returncode == 2
        after = run.status()
        assert not after["muted"]
        assert after["accounting"]["played"] > before["accounting"]["played"]
        assert after["accounting"]["dropped"] == 0
        assert all(stage["restarts"] == 0 for stage in after["stages"].values())
        assert run.interrupt() == 0, run.err


@pytest.mark.parametrize("detach", [(), ("--detach",)])
def test_a_run_without_keys_does_not_begin(machines: Machines, detach: tuple[str, ...]) -> None:
    path = machines.config(f'[remote]\nlisten = "tcp://{machines.address}"\n')
    done = machines.call("up", "--config", str(path), *ECHO, *detach)
    assert done.returncode == 2
    assert done.stderr == (
        f"pipeline: remote.listen = 'tcp://{machines.address}': expected keys in {machines.keys}: "
        "make them with `pipeline keys`\n"
    )
    assert done.stdout == ""
    assert machines.leftovers() == []


@pytest.mark.parametrize(
    ("listen", "line"),
    [
        (
            "tcp://0.0.0.0",
            "settings.toml: remote.listen = 'tcp://0.0.0.0': expected tcp://ADDRESS:PORT, with a PORT from",
        ),
        ("tcp://192.0.2.1:5570", "remote.listen: tcp://192.0.2.1:5570: cannot assign requested address"),
    ],
)
def test_an_address_that_will_not_do(machines: Machines, listen: str, line: str) -> None:
    machines.ok("keys")
    path = machines.config(f'[remote]\nlisten = "{listen}"\n')
    done = machines.call("up", "--config", str(path), *ECHO)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert line in done.stderr
    assert machines.leftovers() == []


def test_a_port_that_is_taken(machines: Machines) -> None:
    machines.ok("keys")
    with socket.create_server(("127.0.0.1", machines.port + 1)), machines.listening() as run:
        assert run.wait() == 2
        assert run.err == f"pipeline: remote.listen: tcp://127.0.0.1:{machines.port + 1}: address already in use\n"
    assert machines.leftovers() == []


def test_the_command_keys(machines: Machines) -> None:
    first = machines.ok("keys")
    assert machines.ok("keys") == first
    said = machines.ok("keys", "--client", "laptop")
    assert str(machines.keys / "laptop") in said
    assert "let in: laptop" in machines.ok("keys")
    again = machines.call("keys", "--client", "laptop")
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1
    secrets = list(machines.keys.rglob("*_secret"))
    assert len(secrets) == 2
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)


# Completion, in processes of their own


def completed(runs: Runs, *words: str) -> list[str]:
    """What a shell is told of the last word."""
    environment = {
        "_PIPELINE_COMPLETE": "zsh_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    program = "from pipeline.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=runs.environment | environment,
        cwd=runs.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()[1::3]


def test_a_shell_completes_verbs_keys_values_and_names(machines: Machines) -> None:
    for name in ("alpha", "beta"):
        folder = machines.folder / "run" / name
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    assert completed(machines, "pipeline", "send", "re") == ["resume", "reset", "restart", "record"]
    assert completed(machines, "pipeline", "send", "restart", "stage=p") == ["stage=playback"]
    assert completed(machines, "pipeline", "send", "record", "o") == ["on="]
    assert completed(machines, "pipeline", "status", "--name", "a") == ["alpha"]


def test_bash_completes(machines: Machines) -> None:
    """By the script that is printed, in a real bash."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    script = """
        eval "$(pipeline completion bash)"
        COMP_WORDS=(pipeline send restart stage = p); COMP_CWORD=5
        _pipeline_completion pipeline 2>/dev/null
        echo "${COMPREPLY[*]}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [bash, "-c", script], env=machines.environment | {"PATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "playback\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_says_how_it_is_installed(machines: Machines, shell: str) -> None:
    first, *script = machines.ok("completion", shell).splitlines()
    assert first.startswith("# To have it in every shell, add to ~/.")
    assert f"pipeline completion {shell}" in first
    assert any(f"_PIPELINE_COMPLETE={shell}_complete" in line for line in script)
