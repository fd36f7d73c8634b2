"""``streamdiff serve``: a page that a person talks to, on this machine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streamdiff import signals
from streamdiff.cli.verify import LOG_SUFFIX, add_sign_argument, sign, signer_from
from streamdiff.errors import BackendError, ConfigError, InputError
from streamdiff.options import DAY_S, SECONDS, Number, Whole

if TYPE_CHECKING:
    from aiortc import RTCIceServer

    from streamdiff.avatar.engine import AvatarEngine
    from streamdiff.conversation.mind import Mind
    from streamdiff.conversation.mouth import Mouth
    from streamdiff.serve.calls import Call, TalkFactory
    from streamdiff.serve.cast import Cast
    from streamdiff.serve.gate import Gate
    from streamdiff.serve.limits import Limits
    from streamdiff.serve.permits import Permits
    from streamdiff.serve.register import Register
    from streamdiff.serve.worker import Link
    from streamdiff.voice import Synthesizer

HELP = "talk to a face in the browser"
DESCRIPTION = (
    "Serve a page with a face that listens and answers. Needs no GPU. Prints the address; opens nothing by itself. "
    "On any other address than this machine's own it starts only with --token-key."
)
_USE = 0.8
"""Share of a core that sessions may fill; the rest keeps frames in time when all speak at once. Of one core, for Python
runs one thread at a time: three sessions that asked for 1.4 cores were given 0.9 (perf/bench_serve.py).
"""
_RATE = 30.0
_PROBE_TEXT = "How much does it cost to say this sentence, which is neither short nor very long?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``streamdiff serve``."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=Whole(0, 65_535), default=8100, help="port to listen on, 0: any (default: %(default)s)")
    add(
        "--avatar",
        type=Path,
        action="append",
        metavar="FILE",
        help="a photo or a bundle of `streamdiff avatar`; several times: a choice (default: the demo's)",
    )
    add("--size", type=int, choices=(256, 512), default=256, help="pixels along a side, for a photo")
    add("--voice", default="heart", help="as `streamdiff talk --voice` (default: %(default)s)")
    add(
        "--mind",
        default="scripted",
        metavar="URL",
        help="who answers: an OpenAI-compatible chat endpoint (key: OPENAI_API_KEY), `scripted`, which says that it "
        "is no language model, or `none`: what is typed is read aloud (default: %(default)s)",
    )
    add("--mind-model", default="default", metavar="NAME", help="which model of that endpoint")
    add("--instructions", default="", metavar="TEXT", help="what the mind is told to be")
    add(
        "--ear",
        default="moonshine",
        metavar="NAME",
        help="who understands the microphone: moonshine, whisper, the URL of an OpenAI-compatible endpoint, or none "
        "(default: %(default)s)",
    )
    add("--no-photos", action="store_true", help="let nobody bring a photograph of their own")
    seats = parser.add_argument_group("seats")
    add = seats.add_argument
    add(
        "--capacity",
        type=Whole(1, 10_000),
        metavar="N",
        help="sessions at once (default: what this machine was measured to hold)",
    )
    add("--per-user", type=Whole(1, 10_000), metavar="N", help="sessions at once of one user (default: no limit)")
    add("--idle", type=SECONDS, default=300.0, metavar="S", help="end a session in which nobody does anything")
    add(
        "--lifetime", type=SECONDS, default=3600.0, metavar="S", help="end a session in any case (default: %(default)s)"
    )
    add("--linger", type=Number(0, DAY_S), default=30.0, metavar="S", help="wait for a viewer who lost the connection")
    add(
        "--drain",
        type=Number(0, 600),
        default=10.0,
        metavar="S",
        help="on SIGTERM, wait for faces to finish a sentence",
    )
    add(
        "--workers",
        type=Whole(1, 256),
        default=1,
        metavar="N",
        help="processes that share the port, about one per core",
    )
    add("--worker-of", help=argparse.SUPPRESS)
    wire = parser.add_argument_group("wire")
    add = wire.add_argument
    add("--codec", choices=("vp8", "h264"), default="vp8", help="of the pictures (default: %(default)s)")
    add("--mark", default="", metavar="TEXT", help='words on every picture, such as "AI generated"')
    add("--ice", action="append", default=[], metavar="URL", help="stun:HOST:PORT, or turn:USER:PASSWORD@HOST:PORT")
    add("--origin", action="append", default=[], metavar="URL", help="another page that may call, https://example.org")
    add(
        "--simli",
        action="store_true",
        help="also speak Simli's wire protocol under /compose, for programs that know it; its session tokens are part "
        "of URLs, which proxies log, so it is off by default",
    )
    add("--token-key", type=Path, metavar="FILE", help="key that bearer tokens are signed with, 32 bytes or more")
    add(
        "--rate",
        type=Number(0, 1e6, above=True),
        metavar="N",
        help="sessions that one user may begin in a minute, and a fourth of those that "
        "one address may; a photograph counts for five (default: 30 with --token-key, else no limit)",
    )
    add("--proxy", action="append", default=[], metavar="ADDRESS", help="of a proxy whose X-Forwarded-For is believed")
    add("--mint", metavar="USER", help="print a token for this user, signed with --token-key, and stop")
    add(
        "--require-consent",
        type=Path,
        metavar="FILE",
        help="show only whose bundle holds a consent signed by one of these public keys (`streamdiff avatar consent`)",
    )
    add("--withdrawn", type=Path, metavar="FILE", help="list of withdrawn consents and users; read again as it changes")
    add("--audit", type=Path, metavar="FILE", help="record who saw whom in a hash-chained log, FILE.jsonl")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="one trace per turn, OpenTelemetry's JSON lines; with --workers a file for each, FILE-0, FILE-1",
    )
    add(
        "--record",
        type=Path,
        metavar="FOLDER",
        help="keep what every session shows, with its sound, as a film in this folder; the page says so. Not of "
        "photographs that users bring. 1 GiB of the disk is left free",
    )
    add_sign_argument(parser, "with --record, sign every film")
    add("--log", choices=("text", "json"), default="text", help="how to write the log (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """``streamdiff serve``."""
    try:
        import aiohttp
        import aiortc
        import prometheus_client

        del aiohttp, aiortc, prometheus_client
    except ImportError as error:
        raise BackendError(f"serving needs {error.name}; pip install 'streamdiff[serve]'") from None
    signals.handle()
    _check(args)
    if args.mint is not None:
        from streamdiff.serve.tokens import mint

        print(mint(_key(args.token_key), args.mint))
        return 0
    _log(args.log)
    gate = _gate(args.host, args.token_key)
    if args.workers > 1:
        return _front(args, gate)
    import torch

    torch.set_num_threads(1)
    if args.worker_of is not None:
        from streamdiff.serve.worker import Link

        asyncio.run(_serve(args, gate, Link.read(args.worker_of)))
        return 0
    asyncio.run(_serve(args, gate))
    return 0


def _front(args: argparse.Namespace, gate: Gate) -> int:
    """Share the port among processes of their own."""
    from streamdiff.serve.front import Front

    if args.capacity is not None and args.capacity < args.workers:
        raise ConfigError(f"--capacity {args.capacity} leaves some of {args.workers} workers without a seat")

    def words(slot: int) -> list[str]:
        share = None if args.capacity is None else (args.capacity + slot) // args.workers
        seats = [] if share is None else ["--capacity", str(share)]
        return [sys.executable, "-m", "streamdiff", *args.argv, "--workers", "1", *seats]

    def up(port: int, capacity: int, why: str) -> None:
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"http://{host}:{port}/\nholds {capacity} sessions in {args.workers} processes: {why}", flush=True)

    front = Front(words, args.workers, gate=gate, per_user=args.per_user, limits=_limits(args), drain_s=args.drain)
    return asyncio.run(front.run(args.host, args.port, on_up=up))


async def _serve(args: argparse.Namespace, gate: Gate, link: Link | None = None) -> None:
    from streamdiff.conversation.mouth import open_mouth
    from streamdiff.serve.calls import Calls
    from streamdiff.serve.cast import Cast
    from streamdiff.serve.leases import Leases, Terms
    from streamdiff.serve.mark import mark_of
    from streamdiff.serve.media import media
    from streamdiff.serve.realtime import realtime
    from streamdiff.serve.realtime_calls import realtime_calls
    from streamdiff.serve.server import House, application, serve
    from streamdiff.serve.simli import simli
    from streamdiff.serve.whep import whep

    voice = open_mouth(args.voice)
    talk, answers = _talk(args, voice)
    engines = {name: _engine(path, args.size, voice) for name, path in _named(args.avatar).items()}
    if args.mark:
        for engine in engines.values():
            mark_of(args.mark, *engine.size)  # what does not fit is said before anybody comes
    permits = _permits(args, engines)
    capacity, why = _capacity(args.capacity, next(iter(engines.values())))
    terms = Terms(
        capacity=capacity, per_user=args.per_user, idle_s=args.idle, lifetime_s=args.lifetime, linger_s=args.linger
    )

    def load(path: Path) -> AvatarEngine:
        return _engine(path, args.size, voice)

    takes_photos = not args.no_photos and args.require_consent is None  # a photograph brings no signed record
    prefix = "" if link is None else link.prefix
    with (
        Cast(engines, load=load if takes_photos else None, prefix=prefix) as cast,
        _turns(args.trace, link) as traced,
        _films(args, cast) as filmed,
    ):
        calls = Calls(
            Leases(terms, prefix=prefix),
            cast.open,
            talk=talk,
            codec=args.codec,
            permits=permits,
            register=_register(args, engines),
            mark=args.mark,
            watch=_both(traced, filmed),
        )
        house = House(
            calls=calls,
            cast=cast,
            gate=gate,
            host=args.host,
            ice_servers=_ice_servers(args.ice),
            origins=frozenset(args.origin),
            mind="" if args.mind == "none" else args.mind,
            limits=_limits(args) if link is None else None,  # the process in front has counted already
        )

        def up(port: int) -> None:
            if link is not None:
                link.is_up(capacity, f"{why}; {answers}")
                return
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"http://{host}:{port}/")
            print(f"holds {capacity} {'session' if capacity == 1 else 'sessions'}: {why}; {answers}")
            sys.stdout.flush()

        # What is loaded stays, and no collection need look through it: that would hold frames up, and come so seldom
        # that sessions which have ended, megabytes each, waited for it.
        gc.collect()
        gc.freeze()
        app = application(house, [realtime, realtime_calls, whep, media, *([simli] if args.simli else [])])
        if link is None:
            await serve(app, host=args.host, port=args.port, drain_s=args.drain, on_up=up)
        else:
            await link.serve(app, drain_s=args.drain, on_up=up)


def _permits(args: argparse.Namespace, engines: Mapping[str, AvatarEngine]) -> Permits | None:
    """Whom this server may show. Whoever may not be shown at the start is said at the start."""
    if args.require_consent is None and args.withdrawn is None:
        return None
    from streamdiff.serve.permits import Permits, Signed
    from streamdiff.trust.keys import need_cryptography, read_public_keys

    need_cryptography()
    trusted = None if args.require_consent is None else read_public_keys(args.require_consent)
    bundles = {name: engine.bundle for name, engine in engines.items()}
    signed = {name: Signed(b.sha256, b.statements) for name, b in bundles.items() if b is not None}
    scopes = ("live",) if args.record is None else ("live", "film")
    permits = Permits(signed, trusted=trusted, scopes=scopes, withdrawn=args.withdrawn)
    for name in engines:
        permits.check(name, "")
    return permits


def _register(args: argparse.Namespace, engines: Mapping[str, AvatarEngine]) -> Register | None:
    if args.audit is None:
        return None
    from streamdiff import __version__
    from streamdiff.serve.register import Register
    from streamdiff.trust.audit import AuditError, AuditLog

    if args.audit.suffix != LOG_SUFFIX:
        raise ConfigError(f"--audit {args.audit} must end in {LOG_SUFFIX}; try {args.audit.with_suffix(LOG_SUFFIX)}")
    log = AuditLog(args.audit)
    try:
        log.write("began", version=__version__, pid=os.getpid())
    except AuditError as error:
        raise InputError(str(error)) from error
    return Register(log, {name: "" if e.bundle is None else e.bundle.sha256 for name, e in engines.items()})


@contextlib.contextmanager
def _turns(file: Path | None, link: Link | None) -> Generator[Callable[[Call], None] | None]:
    """Who is told of every call, to trace it."""
    if file is None:
        yield None
        return
    from streamdiff.serve.turns import Turns

    own = file if link is None else file.with_name(f"{file.stem}-{link.slot}{file.suffix}")
    with contextlib.closing(Turns(own)) as turns:
        yield turns.watch


@contextlib.contextmanager
def _films(args: argparse.Namespace, cast: Cast) -> Generator[Callable[[Call], None] | None]:
    """Who is told of every call, to film it. Photographs that users bring are promised to be forgotten."""
    if args.record is None:
        yield None
        return
    from streamdiff.serve.record import Recorder

    signer = signer_from(args)

    def finish(film: Path) -> None:
        sign(signer, film)

    with Recorder(args.record, may=lambda avatar: cast.owner(avatar) is None, finish=finish) as recorder:
        yield recorder.watch


def _both(*watches: Callable[[Call], None] | None) -> Callable[[Call], None]:
    def watch(call: Call) -> None:
        for each in watches:
            if each is not None:
                each(call)

    return watch


def _check(args: argparse.Namespace) -> None:
    if args.sign is not None and args.record is None:
        raise ConfigError("--sign signs films, and without --record FOLDER there are none")
    if not 0 <= args.port < 65_536:
        raise ConfigError(f"--port must lie in 0..65535, got {args.port}")
    if not 1 <= args.workers <= 256:
        raise ConfigError(f"--workers must lie in 1..256, got {args.workers}; about as many as there are cores")
    if args.drain < 0 or args.drain > 600:
        raise ConfigError(f"--drain must lie in 0..600 seconds, got {args.drain:g}")


def _gate(host: str, key_file: Path | None) -> Gate:
    """Who may come in. A server that others can reach needs a key."""
    from streamdiff.serve.gate import Loopback, is_loopback

    if key_file is None:
        if not is_loopback(host):
            raise ConfigError(
                f"--host {host} can be reached by others: give --token-key FILE, whose key signs the tokens that let "
                "them in, or listen on 127.0.0.1"
            )
        return Loopback()
    from streamdiff.serve.tokens import TokenGate

    return TokenGate(_key(key_file))


def _limits(args: argparse.Namespace) -> Limits | None:
    from streamdiff.serve.limits import Limits

    rate = _RATE if args.rate is None and args.token_key is not None else args.rate
    return None if rate is None else Limits(rate, proxies=args.proxy)


def _key(file: Path | None) -> bytes:
    if file is None:
        raise ConfigError("--mint needs --token-key FILE, the key that the server checks tokens with")
    try:
        return file.read_bytes().strip()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _talk(args: argparse.Namespace, mouth: Mouth) -> tuple[TalkFactory | None, str]:
    """Who answers, and what to say about it."""
    from streamdiff.conversation.ear import SpeechEar, open_ear
    from streamdiff.conversation.mind import open_mind
    from streamdiff.serve.talk import talking

    if args.mind == "none":
        return None, "reads aloud what is typed"
    key = os.environ.get("OPENAI_API_KEY", "")

    def mind() -> Mind:
        return open_mind(args.mind, model=args.mind_model, api_key=key)

    mind()  # what is wrong with it is said before anybody comes
    ear: SpeechEar | None = None
    hears = "understands no microphone"
    if args.ear != "none":
        try:
            ear = open_ear(args.ear, api_key=key)
            hears = f"hears with {args.ear}"
        except (BackendError, InputError) as error:
            logging.getLogger("streamdiff.serve").warning("nobody will be heard: %s", error)
    talk = talking(mind, args.mind, ear=ear, mouth=mouth, instructions=args.instructions)
    return talk, f"{hears}, answers from {args.mind}"


def _named(paths: Sequence[Path] | None) -> dict[str, Path | None]:
    """Avatars by the names of their files, which must differ."""
    if not paths:
        return {"demo": None}
    named: dict[str, Path | None] = {path.stem: path for path in paths}
    if len(named) < len(paths):
        raise ConfigError("two avatars have one name; rename a file")
    return named


def _engine(path: Path | None, size: int, voice: Synthesizer) -> AvatarEngine:
    from streamdiff.avatar.engine import AvatarEngine

    return AvatarEngine.load(path, size=size, voice=voice)


def _capacity(asked: int | None, engine: AvatarEngine) -> tuple[int, str]:
    """Sessions that this machine can hold, and where the number comes from."""
    if asked is not None:
        if asked < 1:
            raise ConfigError(f"--capacity must be at least 1, got {asked}")
        return asked, "as asked for"
    cost_s = frame_cost_s(engine)
    num = max(1, int(_USE / engine.fps / cost_s))
    height, width = engine.size
    return num, f"a spoken frame of {width}x{height} costs {cost_s * 1e3:.1f} ms, and one process fills about a core"


def frame_cost_s(engine: AvatarEngine) -> float:
    """CPU seconds of a spoken frame: voice, motion, picture and packets."""
    from streamdiff.serve.clock import Blocks
    from streamdiff.serve.encoder import SoundEncoder, VideoEncoder

    height, width = engine.size
    video, opus = VideoEncoder(width, height, engine.fps), SoundEncoder(engine.rate_hz)
    blocks = Blocks(engine.rate_hz)
    with engine.stream() as stream:
        stream.next()
        began_s = time.process_time()
        segment, num = stream.say(_PROBE_TEXT), 0
        while not segment.done:
            shown = stream.next()
            assert shown is not None
            video.encode(shown.frames_THWC[0], num, key=num == 0)
            for first, block_S in blocks.push(shown.sound_S):
                opus.encode(block_S, first)
            num += 1
        return (time.process_time() - began_s) / max(1, num)


def _ice_servers(urls: Sequence[str]) -> list[RTCIceServer]:
    from aiortc import RTCIceServer

    servers: list[RTCIceServer] = []
    for url in urls:
        scheme, _, rest = url.partition(":")
        login, _, where = rest.rpartition("@")
        user, _, password = login.partition(":")
        if scheme not in ("stun", "stuns", "turn", "turns") or not where:
            raise ConfigError(f"--ice looks like stun:HOST:PORT or turn:USER:PASSWORD@HOST:PORT, got {url!r}")
        servers.append(RTCIceServer(f"{scheme}:{where}", username=user or None, credential=password or None))
    return servers


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        line = {"at": round(record.created, 3), "level": record.levelname.lower(), "where": record.name}
        if message.startswith("session "):
            session, _, message = message.removeprefix("session ").partition(": ")
            line["session"] = session
        line["message"] = message
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _log(kind: str) -> None:
    """The application decides about logs, and this is the application: one line per event, on stderr."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonLines() if kind == "json" else plain)
    root = logging.getLogger("streamdiff")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    root.propagate = False
