"""What guards against files, networks and moments that a stranger chooses, each with the test that holds it.

Every entry takes one guard out of a copy of the sources; the test named beside it must then fail.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Safeguard:
    """In ``file``, ``guard`` becomes ``gone``; then one of ``tests`` (a file below ``tests/``, and ``-k``) fails."""

    name: str
    file: str
    guard: str
    gone: str
    tests: str
    choice: str = ""
    nth: int = 0
    """Which of the places that read the same."""


_CODE = "hostile/test_no_file_can_name_code.py"
_SUPPLY = "hostile/test_supply_is_what_was_tested.py"
_OUTPUTS = "hostile/test_outputs_are_whole_or_not_there.py"
_SIGNALS = "hostile/test_signals_are_obeyed_at_any_moment.py"
_NETWORK = "hostile/test_network_strangers_are_not_heard.py"
_TASK = "hostile/test_the_landmarker_is_known_by_its_hash.py"
_PICTURES, _BUNDLE = "media/test_any_picture_can_be_read.py", "avatar/test_identity_is_one_verified_file.py"
_SOUND = "media/test_any_voice_can_be_read.py"
_CONSENT = "trust/test_a_consent_fits_one_bundle_and_one_time.py"
_WITHDRAWN = "trust/test_a_withdrawn_consent_ends_a_session.py"
_AUDIT, _FILM = "trust/test_an_audit_log_shows_what_was_done_to_it.py", "trust/test_a_signed_film_says_who_made_it.py"
_DOORS = "serve/test_asking_too_often_is_answered_429.py"

SAFEGUARDS = (
    *(Safeguard(f"pickle in a {what}", "tensorfile.py", "weights_only=True", "weights_only=False", _CODE,
                "weights_only", nth)
      for nth, what in enumerate((".pth", "checkpoint"))),
    Safeguard("pickle in an .npz", "tensorfile.py", "allow_pickle=False", "allow_pickle=True", _CODE, "no_pickles"),
    Safeguard("the landmarker's hash", "avatar/landmarks.py", "if sha256_of(data) != TASK_SHA256:", "if False:", _TASK),
    Safeguard("its hash in the cache", "avatar/landmarks.py",
              " and sha256_of(place.read_bytes()) == TASK_SHA256", "", _TASK),
    Safeguard("its hash in a wheel", "avatar/landmarks.py",
              "if sha256_of(data) != TASK_SHA256:", "if False:", _TASK, nth=1),
    Safeguard("Moonshine's hash in a wheel", "conversation/recogniser.py", "if sha256_of(raw) != digest:", "if False:",
              _SUPPLY, "moonshine"),
    Safeguard("its hash in the cache", "conversation/recogniser.py",
              "and sha256_of((path / n).read_bytes()) == digest ", "", _SUPPLY, "cache"),
    Safeguard("Whisper's hash", "avatar/quality.py", "if sha256_of(model) != _RECOGNISER_SHA256:", "if False:",
              _SUPPLY, "whisper"),
    Safeguard("the embedder's hash", "avatar/quality.py", "if sha256_of(data) != _EMBEDDER_SHA256:", "if False:",
              _SUPPLY, "embedder"),
    Safeguard("the hash of shipped weights", "packaged.py", "!= digest:", "is None:", _SUPPLY, "changed_bit"),
    Safeguard("finite weights", "tensorfile.py", "if all(are_finite) else [name]", "if True else [name]",
              "checkpoint/test_weights_load_strictly_or_not_at_all.py", "copied_block"),
    Safeguard("a refused download", "avatar/fetch.py", "    if _is_refused:", "    if False:", _SUPPLY, "refused"),
    Safeguard("wheels alone", "avatar/fetch.py", ', "--only-binary", ":all:"', "", _SUPPLY, "wheels"),
    Safeguard("the hash of a bundle", "avatar/bundle.py",
              'if bundle.sha256 != file.metadata.get("sha256"):', "if False:", _BUNDLE),
    Safeguard("protocols of sound", "media/source.py", '"protocol_whitelist": "file",', "", _SOUND, "files_alone"),
    Safeguard("containers of sound", "media/source.py", '"format_whitelist": ",".join(_CONTAINERS),', "",
              _SOUND, "files_alone or list_of_other"),
    Safeguard("formats of pictures", "media/picture.py", ", formats=FORMATS", "", _PICTURES),
    Safeguard("SIGTERM", "signals.py", "(signal.SIGINT, signal.SIGTERM)", "(signal.SIGINT,)", _SIGNALS, "shielded"),
    Safeguard("a shield", "signals.py", "_state.depth += 1", "pass", _SIGNALS, "shielded"),
    Safeguard("what was lost", "signals.py",
              "signal.pthread_kill(threading.main_thread().ident or 0, number)", "pass", _SIGNALS, "lost"),
    Safeguard("the end by force", "signals.py", "os._exit(128", "print(128", _SIGNALS, "come_back"),
    Safeguard("one writer", "output.py", "        if not _lock(fd):\n            os.close(fd)\n            break\n", "",
              _OUTPUTS, "second"),
    Safeguard("the old film", "output.py", "self.finish(replaces=False)", "self.finish()", _OUTPUTS, "cut_short"),
    Safeguard("the empty film", "media/video.py", "if self._num_frames == 0:", "if False:", _OUTPUTS, "empty"),
    Safeguard("pipes and devices", "output.py", "if not stat.S_ISREG(found):", "if False:", _OUTPUTS, "device"),
    Safeguard("inputs that are outputs", "output.py", "written.samefile(path)", "False", _OUTPUTS, "input"),
    Safeguard("signed words", "pipeline/meeting.py",
              "hmac.compare_digest(self._signed(key, value).encode(), raw)", "True", _NETWORK, "forged"),
    Safeguard("a secret between machines", "pipeline/group.py",
              "if not self.is_local and self.size > 1 and self.secret is None:", "if False:", _NETWORK, "secret"),
    Safeguard("loopback for the store", "pipeline/group.py",
              "listening(world.host, world.port) if hosts", "None if hosts", _NETWORK, "nobody_else"),
    Safeguard("loopback for gloo", "pipeline/transport.py",
              'hostname="127.0.0.1"', 'hostname="0.0.0.0"', _NETWORK, "nobody_else"),
    Safeguard("a private folder", "pipeline/meeting.py", "folder.lstat()", "folder.stat()", _NETWORK, "user_alone"),
    Safeguard("words that a terminal obeys", "facts.py",
              "c if c.isprintable() else repr(c)[1:-1]", "c", _NETWORK, "cannot_be_read"),
    Safeguard("signatures", "trust/keys.py", ".verify(signature, _to_sign(kind, payload))", "", _CONSENT, "signature"),
    Safeguard("whom to trust", "trust/consent.py", "if key.raw not in known:", "if False:", _CONSENT, "trusted"),
    Safeguard("the end of a consent", "trust/consent.py", "if consent.expires <= now:", "if False:",
              _CONSENT, "expires"),
    Safeguard("whose consent it is", "trust/consent.py", "if named != sha256:", "if False:", _CONSENT, "expires"),
    Safeguard("consent at the lease", "serve/calls.py", "await self._permit(self._permits, avatar, user)", "pass",
              _WITHDRAWN, "nothing_is_allocated"),
    Safeguard("consent in mid-session", "serve/calls.py", "await self._revoke(self._permits)", "pass",
              _WITHDRAWN, "withdrawal_ends"),
    Safeguard("the chain of the audit log", "trust/audit.py", 'if record["prev"] != verdict.head.hash:', "if False:",
              _AUDIT, "own_hash"),
    Safeguard("no session unrecorded", "serve/register.py", "raise Unrecorded(why, retry_after_s=30) from error",
              "del why, error", _AUDIT, "no_session_is_opened"),
    Safeguard("films that name an address", "trust/credentials.py", '"remote_manifest_fetch": False',
              '"remote_manifest_fetch": True', _FILM, "network"),
    Safeguard("a token at every door", "serve/server.py", "if not is_public and not getattr",
              "if False and not getattr", _DOORS, "no_door"),
    Safeguard("rates of an address", "serve/limits.py", "self._addresses.take(address, cost)", "pass",
              _DOORS, "address"),
)  # fmt: skip
