"""Ranks on one machine are out of reach; on several, what is not signed by them counts for nothing."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from streamdiff.cli import machine
from streamdiff.errors import ConfigError, RankFailed
from streamdiff.output import part_of
from streamdiff.pipeline.group import Group, World
from streamdiff.pipeline.link import Activity, Doing
from streamdiff.pipeline.meeting import NOTHING, Meeting, Place, listening, private_folder
from streamdiff.pipeline.run import run_rank
from streamdiff.pipeline.watch import Failure, Limits, Watch
from tests.generate.processes import ROOT, environment, write_inputs
from tests.hostile.listeners import listening_at
from tests.pipeline.faults import endless_source, layout
from tests.pipeline.line import SleepingStage
from tests.pipeline.ranks import run_ranks

SECRET, OTHER = b"a secret of the ranks", b"what a stranger guesses"
VERDICT = '{"rank": 1, "chunk": 3, "what": "died\\u001b[2J", "was_stopped": false}'


@pytest.fixture
def store() -> TCPStore:
    server = listening("127.0.0.1", 0)
    port = server.getsockname()[1]
    return TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20),
        master_listen_fd=server.detach(),
    )  # fmt: skip


def test_what_ranks_say_reaches_the_others(store: TCPStore) -> None:
    one, two = Meeting(store, SECRET, "watch"), Meeting(store, SECRET, "watch")
    one.set("a", "ä: 1")
    assert two.get_many(["a"]) == ["ä: 1"]
    assert one.compare_set("b", "", NOTHING) == two.compare_set("b", "", NOTHING) == NOTHING
    assert one.compare_set("b", NOTHING, "mine") == "mine"
    assert two.compare_set("b", NOTHING, "yours") == "mine"


def _forgeries(store: TCPStore) -> Iterator[None]:
    """Ways to write a verdict without the secret."""
    ours = Meeting(store, SECRET, "watch")
    for text in (VERDICT, f"{'0' * 64}:{VERDICT}", f":{VERDICT}", "", ":", "x" * (1 << 17)):
        yield store.set("failure", text)
    yield Meeting(store, OTHER, "watch").set("failure", VERDICT)
    for key, purpose in (("other", "watch"), ("failure", "attempt 1 watch"), ("ailure", "watchf")):
        Meeting(store, SECRET, purpose).set(key, VERDICT)
        yield store.set("failure", store.get(key).decode())
    ours.set("failure", VERDICT)
    signed = store.get("failure").decode()
    yield store.set("failure", signed.replace('"chunk": 3', '"chunk": 4'))
    yield store.set("failure", signed + " ")
    yield store.set("failure", signed.upper())


def test_a_forged_verdict_is_refused(store: TCPStore, caplog: pytest.LogCaptureFixture) -> None:
    count = 0
    for count, _ in enumerate(_forgeries(store), 1):  # noqa: B007
        ours = Meeting(store, SECRET, "watch")
        assert ours.get_many(["failure"]) == [NOTHING]
        assert ours.compare_set("failure", NOTHING, "ours") == "ours", "it keeps ours out"
        assert Meeting(store, SECRET, "watch").get_many(["failure"]) == ["ours"]
    assert count == 13
    assert len(caplog.messages) == count
    assert all("without the secret" in line and line.isprintable() for line in caplog.messages)


def _watch(rank: int, store: TCPStore) -> Watch:
    watch = Watch(
        rank, 2, Meeting(store, SECRET, "watch"), limits=Limits(deadline_s=60), host=None, picture=lambda *_: "picture"
    )
    working = Activity(Doing.WORKING, 7, time.monotonic())
    watch.activity = lambda: working
    watch.start()
    return watch


def _wait_until_heard(watch: Watch, *, timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    while any(report.beat is None for report in watch.reports().values()):
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_a_stranger_ends_no_stream(store: TCPStore) -> None:
    """A verdict of his own, heartbeats in the name of a rank; then a real verdict still gets through."""
    watches = [_watch(rank, store) for rank in range(2)]
    try:
        for watch in watches:
            _wait_until_heard(watch)
        store.set("failure", VERDICT)
        for text in ('{"count": 1}', "[" * 10_000, "nonsense"):
            store.set("beat/1", text)
        rounds = watches[0]._num_rounds
        end_s = time.monotonic() + 60
        while watches[0]._num_rounds < rounds + 3:
            assert time.monotonic() < end_s
            time.sleep(0.02)
        assert [watch.failure for watch in watches] == [None, None]
        watches[1].propose(Failure(1, 7, "failed: ValueError: boom"))
        found = [watch.wait_for_verdict(60.0) for watch in watches]
        assert [str(failure) for failure in found] == ["rank 1 failed: ValueError: boom"] * 2
    finally:
        for watch in watches:
            watch.leave()


@pytest.mark.parametrize("text", [
    "[]", "{}", "nonsense", "[" * 10_000, '{"rank": 9, "chunk": 0, "what": "x", "was_stopped": false}',
    '{"rank": "1", "chunk": 0, "what": "x", "was_stopped": false}', VERDICT.replace("3", "1e999"),
    VERDICT.replace("{", '{"rank": 0, '),
])  # fmt: skip
def test_a_verdict_that_cannot_be_read_is_one_line(store: TCPStore, text: str) -> None:
    """Without a secret, as on one machine, another program of the same user may still write nonsense."""
    watch = Watch(0, 2, Meeting(store, None, ""), limits=Limits(), host=None, picture=lambda *_: "picture")
    assert "cannot be read" in str(watch._verdict(text))
    assert str(watch._verdict(text)).isprintable()
    assert str(watch._verdict(VERDICT)) == "rank 1 died\\x1b[2J"


def meet_and_look(world: World) -> list[str]:
    with Group(world, layout(world.size), limits=Limits(deadline_s=60)) as group:
        link = group.link(source=endless_source(3), deliver=lambda _: None)
        found = [*listening_at()]
        run_rank(SleepingStage(0.01), link)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the sockets of a process")
def test_ranks_of_one_machine_listen_to_nobody_else() -> None:
    found = [outcome.value for outcome in run_ranks(meet_and_look, 3, timeout_s=120)]
    assert all(addresses for addresses in found), "nobody listens, so nothing was looked at"
    assert all(ipaddress.ip_address(address).is_loopback for addresses in found for address in addresses), found


def test_ranks_of_several_machines_need_a_secret() -> None:
    world = {"rank": 0, "size": 2, "host": "10.0.0.1"}
    for more in ({}, {"is_local": False, "host": "127.0.0.1"}):
        with pytest.raises(ConfigError, match="STREAMDIFF_SECRET_FILE"):
            World(**{**world, **more})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="16 or more"):
        World(**world, secret=b"short")  # type: ignore[arg-type]
    assert "secret" not in repr(World(**world, secret=SECRET))  # type: ignore[arg-type]


TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip


def _world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **more: str) -> World:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, value in {**TORCHRUN, "NCCL_SOCKET_IFNAME": "lo", **more}.items():
        monkeypatch.setenv(name, value)
    world = machine.world_from_environment()
    assert world is not None
    return world


def test_ranks_of_one_torchrun_find_a_place_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places = [_world(monkeypatch, tmp_path, RANK=str(rank)).place for rank in range(3)]
    assert len(set(places)) == 1
    for name, value in (("MASTER_PORT", "29501"), ("TORCHELASTIC_RESTART_COUNT", "1"), ("TORCHELASTIC_RUN_ID", "x")):
        assert _world(monkeypatch, tmp_path, **{name: value}).place not in places
        monkeypatch.setenv(name, TORCHRUN[name])
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert _world(monkeypatch, tmp_path).place not in places


def test_ranks_meet_at_their_own_place_whatever_store_a_launcher_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a store of the launcher's, rank 0 would listen where MASTER_ADDR says."""
    shared = _world(monkeypatch, tmp_path)
    own = _world(monkeypatch, tmp_path, TORCHELASTIC_USE_AGENT_STORE="False")
    assert shared.place is not None
    assert own.place == shared.place
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    alone = machine.world_from_environment()
    assert alone is not None
    assert alone.place is None, "nobody launched it"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the sockets of a process")
def test_nothing_of_a_launched_run_can_be_reached_from_elsewhere(tmp_path: Path) -> None:
    """``launch/ranks.sh``: neither the launcher nor a rank listens anywhere but on loopback."""
    words = ["generate", *write_inputs(tmp_path), "--seconds", "600", "--out", str(tmp_path / "film.mp4")]
    with (tmp_path / "said").open("wb") as said:
        launcher = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "ranks.sh"), "2", *words],
            env=environment(VIRTUAL_ENV=sys.prefix, TMPDIR=str(tmp_path)),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        part, end_s = part_of(tmp_path / "film.mp4"), time.monotonic() + 400
        while not (part.exists() and part.stat().st_size > 5_000):
            assert time.monotonic() < end_s, (tmp_path / "said").read_text()
            assert launcher.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        found = {process: set(listening_at(process)) for process in (launcher.pid, *map(int, ranks))}
    finally:
        os.killpg(launcher.pid, signal.SIGTERM)
        launcher.wait(120)
    assert len(found) == 3
    assert found[launcher.pid] == set()
    assert any(found.values()), "nobody listens, so nothing was looked at"
    assert all(ipaddress.ip_address(address).is_loopback for some in found.values() for address in some), found


def test_on_several_machines_the_network_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    several = {"LOCAL_WORLD_SIZE": "2", "RANK": "0", "STREAMDIFF_SECRET_FILE": str(tmp_path / "secret")}
    world = _world(monkeypatch, tmp_path, **several)
    assert (world.is_local, world.place, world.secret) == (False, None, SECRET)
    machine.warn_of_the_network(world)
    said = capsys.readouterr().err
    assert "private network" in said
    assert "node7:29500" in said
    assert "NCCL_SOCKET_IFNAME=lo" in said
    machine.warn_of_the_network(_world(monkeypatch, tmp_path, LOCAL_WORLD_SIZE="3"))
    assert capsys.readouterr().err == ""


def test_a_place_is_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    place = Place.on_this_machine(4321)
    place.tell(folder / "place.json")
    assert Place.told_in(folder / "place.json", 5.0) == place
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="this user alone"):
        private_folder()
    (folder / "place.json").unlink()
    folder.rmdir()
    (tmp_path / "mine").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="this user alone"):
        private_folder()


@pytest.mark.parametrize("text", ["", "{}", '{"port": 0, "secret": "00"}', '{"port": "1", "secret": "00"}'])
def test_a_place_that_cannot_be_read_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "place.json").write_text(text)
    with pytest.raises(RankFailed, match="not what rank 0 writes"):
        Place.told_in(tmp_path / "place.json", 5.0)
    with pytest.raises(RankFailed, match="rank 0 did not join"):
        Place.told_in(tmp_path / "nowhere.json", 0.0)


def test_a_dead_launcher_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    from streamdiff.pipeline import group

    with pytest.raises(RankFailed, match="the launcher does not answer"):
        group._await_launcher(World(rank=0, size=2, port=port, agent_store=True), patience_s=0.1)
