"""What an operator watches, for Prometheus: `Meters.text` is what ``/metrics`` answers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_MS = (5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 500, 750, 1_000, 2_000, 5_000)
STAGES = ("end of turn", "transcript", "first word", "first sound", "answer", "voice", "face", "encode", "interrupt")
"""Stages of a turn that have a series of their own; any other is counted as ``other``."""


class Meters:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.capacity = Gauge("streamdiff_capacity", "Sessions that may run at once.", registry=registry)
        self.sessions = Gauge("streamdiff_sessions", "Sessions that run.", registry=registry)
        self.viewers = Gauge("streamdiff_viewers", "Viewers that are sent pictures.", registry=registry)
        self.opened = Counter("streamdiff_sessions_opened", "Sessions that were opened.", registry=registry)
        self.ended = Counter(
            "streamdiff_sessions_ended", "Sessions that ended, by reason.", ["reason"], registry=registry
        )
        self.refused = Counter(
            "streamdiff_refused", "Requests for a session turned away.", ["reason"], registry=registry
        )
        self.denied = Counter("streamdiff_denied", "Requests without a valid token.", registry=registry)
        self.beats = Counter("streamdiff_frames", "Frames that left the pump.", registry=registry)
        self.late = Counter("streamdiff_late_frames", "Frames that came too late from a stream.", registry=registry)
        self.dropped = Counter("streamdiff_dropped_frames", "Frames made and taken back.", registry=registry)
        self.keys = Counter("streamdiff_keyframes", "Keyframes encoded.", registry=registry)
        self.problems = Counter(
            "streamdiff_problems", "Messages that were not understood.", ["code"], registry=registry
        )
        self.stage_ms = Histogram(
            "streamdiff_stage_ms", "How long a stage of a turn took.", ["stage"], buckets=_MS, registry=registry
        )
        self.freezes = Counter("streamdiff_viewer_freezes", "Freezes that browsers counted.", registry=registry)
        self.concealed = Counter(
            "streamdiff_viewer_concealed_samples", "Samples that browsers had to invent.", registry=registry
        )
        self.jitter_ms = Histogram(
            "streamdiff_viewer_jitter_buffer_ms", "Delay of browsers' jitter buffers.", buckets=_MS, registry=registry
        )
        self.round_trip_ms = Histogram(
            "streamdiff_viewer_round_trip_ms", "Round trip to browsers.", buckets=_MS, registry=registry
        )

    def stage(self, name: str, ms: float) -> None:
        """A stage of a turn took so long."""
        self.stage_ms.labels(name if name in STAGES else "other").observe(ms)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
