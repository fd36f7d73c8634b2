"""wav2vec2 as a streaming audio encoder: hidden states of a window around each hop of video frames.

Axes: B streams (1 here), Z hidden states per moment, E width of one, A video frames, S waveform samples.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from streamdiff.errors import BackendError, CheckpointError, ConfigError
from streamdiff.facts import Facts, parse_json
from streamdiff.media import frame_boundary
from streamdiff.models.audio.encoder import (
    SPEECH_HZ,
    FeatureStream,
    as_sound,
    require_fps,
)
from streamdiff.tensorfile import is_finite, listed, read_bytes

if TYPE_CHECKING:
    from transformers import Wav2Vec2Model


class Wav2Vec2Features:
    """All hidden states of a wav2vec2 model per video frame: what Wan2.2-S2V was trained on.

    `encode_whole` is the published recipe (Wan2.2 ``audio_encoder.py``): hidden states at 50 Hz, moved to
    30 Hz by linear interpolation, of which video frame i reads number round(30 i / fps). It sees the whole
    file at every moment. `stream` sees, for each hop of frames, ``context_s`` before it and ``lookahead_s``
    after it, and runs the model once on that window: memory and time per hop do not depend on how long the
    voice lasts. With unlimited context and look-ahead, and the length known beforehand, the two agree to 1e-5
    of the largest value.

    Three things differ in a stream; perf/audio_context.py measures each:

    - The window cuts attention and the positional convolution (which alone reaches 1.28 s each way).
    - Zero mean and unit variance of the waveform, a property of the whole file, become running statistics:
      every sample so far, the past forgotten with time constant ``statistics_s``.
    - The published interpolation pins the ends of both rates together, which makes the features of a file run
      ahead of its sound, by up to 40 ms at its end. A stream of unknown length keeps the true ratio 5:3.

    Z is 25 and E is 1024 for wav2vec2-large. The last state is the normalised output of the encoder, as the
    published code had it from transformers 4 (5.x no longer normalises the last of its ``hidden_states``).

    Args:
        model: a Wav2Vec2Model in eval mode; see `load`.
        context_s: sound heard before a hop, seconds; math.inf keeps everything.
        lookahead_s: sound heard beyond a hop, seconds: the latency it costs.
        statistics_s: time constant of the running statistics, seconds; math.inf never forgets.
        hop_frames: video frames per run of the model; a chunk, usually.
        normalise: whether the waveform is brought to zero mean and unit variance (xlsr models: yes).
    """

    rate_hz = SPEECH_HZ

    def __init__(
        self,
        model: Wav2Vec2Model,
        *,
        context_s: float = 8.0,
        lookahead_s: float = 0.16,
        statistics_s: float = 30.0,
        hop_frames: int = 12,
        normalise: bool = True,
    ) -> None:
        if context_s < 0 or lookahead_s < 0 or statistics_s <= 0 or hop_frames < 1:
            raise ConfigError(
                "context_s and lookahead_s must not be negative, statistics_s and hop_frames must be "
                f"positive, got {context_s=}, {lookahead_s=}, {statistics_s=}, {hop_frames=}"
            )
        kernels, strides = list(model.config.conv_kernel), list(model.config.conv_stride)
        if math.prod(strides) * _FEATURE_HZ != self.rate_hz:
            raise CheckpointError(
                f"the published recipe takes {_FEATURE_HZ} hidden states per second, but strides {strides} "
                f"give {self.rate_hz / math.prod(strides):g}; use a wav2vec2 with the usual strides"
            )
        self.context_s, self.lookahead_s, self.statistics_s = context_s, lookahead_s, statistics_s
        self.hop_frames = hop_frames
        self.normalise = normalise
        self.num_features: int = model.config.num_hidden_layers + 1
        self.feature_dim: int = model.config.hidden_size
        self._model = model
        parameter = next(model.parameters())
        self.device, self._dtype = parameter.device, parameter.dtype
        self.stride_samples = math.prod(strides)
        self.field_samples = 1 + sum((k - 1) * math.prod(strides[:i]) for i, k in enumerate(kernels))

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        context_s: float = 8.0,
        lookahead_s: float = 0.16,
        statistics_s: float = 30.0,
        hop_frames: int = 12,
    ) -> Wav2Vec2Features:
        """Open a published wav2vec2 directory (config.json and weights), without the network.

        Raises:
            CheckpointError: no such directory, files missing, weights that do not fill the model.
            BackendError: transformers is not installed.
        """
        path = Path(directory)
        model: Any = _open_published(path)  # its `to` is typed as another function
        processor = path / "preprocessor_config.json"
        settings = _settings(processor) if processor.is_file() else {}
        return cls(
            model.to(device=device, dtype=dtype).eval().requires_grad_(False),
            context_s=context_s,
            lookahead_s=lookahead_s,
            statistics_s=statistics_s,
            hop_frames=hop_frames,
            normalise=bool(settings.get("do_normalize", True)),
        )

    def stream(self, fps: int, *, total_samples: int | None = None) -> FeatureStream:
        """Begin to listen; ``total_samples``, where known, gives the published interpolation of a file."""
        return _Wav2Vec2Stream(self, fps, self._time_map(total_samples))

    def encode_whole(self, samples_S: Tensor, fps: int, *, num_frames: int | None = None) -> Tensor:
        """All columns [1, Z, E, A] of a sound as the published code makes them; memory grows with its length.

        ``num_frames`` cuts the columns, or appends zeros as the published code does up to a whole clip.
        """
        samples_S = as_sound(samples_S)
        if self.normalise:
            wide_S = samples_S.double()
            samples_S = _standardised(samples_S, float(wide_S.mean()), float(wide_S.var(correction=0)))
        states_ZTE = self.hidden_states(samples_S)
        times = self._time_map(len(samples_S))
        assert times.last is not None
        heard = next(i for i in itertools.count() if times.moment(i, fps) > times.last)
        columns_BZEA = self.columns(states_ZTE, 0, [times.position(i, fps) for i in range(heard)])
        missing = 0 if num_frames is None else max(0, num_frames - heard)
        return torch.nn.functional.pad(columns_BZEA, (0, missing))[..., :num_frames]

    def hidden_states(self, samples_S: Tensor) -> Tensor:
        """The input of every layer and the output of the last, [Z, T, E] at 50 Hz, float32."""
        samples_S = torch.nn.functional.pad(samples_S, (0, max(0, self.field_samples - len(samples_S))))
        states: list[Tensor] = []

        def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self._model.encoder.layers]
        try:
            with torch.no_grad():
                output = self._model(samples_S[None].to(self.device, self._dtype))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([*states, output.last_hidden_state]).float()

    def _features_in(self, num_samples: int) -> int:
        """Hidden states per layer that so many samples give."""
        return max(0, num_samples - self.field_samples) // self.stride_samples + 1

    def _time_map(self, total_samples: int | None) -> _TimeMap:
        if total_samples is None:
            return _TimeMap(step=Fraction(_FEATURE_HZ, _MOMENT_HZ), last=None)
        num_features = self._features_in(total_samples)
        # In float, as published: the truncation must fall on the same side.
        num_moments = max(1, int(num_features / float(_FEATURE_HZ) * _MOMENT_HZ))
        step = Fraction(num_features - 1, num_moments - 1) if num_moments > 1 else Fraction(0)
        return _TimeMap(step=step, last=num_moments - 1)

    def columns(self, states_ZTE: Tensor, first: int, positions: list[Fraction]) -> Tensor:
        """Read hidden states between their moments; ``first`` is the number of the first one given."""
        last = first + states_ZTE.shape[1] - 1
        inside = [min(max(position, Fraction(first)), Fraction(last)) for position in positions]
        below = torch.tensor([math.floor(position) - first for position in inside], device=states_ZTE.device)
        above = (below + 1).clamp(max=last - first)
        share_AE = states_ZTE.new_tensor([float(position % 1) for position in inside])[:, None]
        columns_ZAE = states_ZTE[:, below] * (1 - share_AE) + states_ZTE[:, above] * share_AE
        return columns_ZAE.transpose(1, 2)[None].contiguous()


_FEATURE_HZ = 50
_MOMENT_HZ = 30


@dataclass(frozen=True, slots=True)
class _TimeMap:
    """Which hidden state a video frame reads, in exact fractions."""

    step: Fraction
    """Hidden states per moment of the 30 Hz grid."""
    last: int | None
    """Last moment of the grid; None while the sound goes on."""

    def moment(self, frame: int, fps: int) -> int:
        """The moment of the 30 Hz grid nearest to a frame; halves go to the even one, as in numpy."""
        return round(Fraction(frame * _MOMENT_HZ, fps))

    def position(self, frame: int, fps: int) -> Fraction:
        moment = self.moment(frame, fps)
        return self.step * (moment if self.last is None else min(moment, self.last))


class _RunningStatistics:
    """Mean and variance of the samples so far, older ones counting less and less."""

    def __init__(self, time_constant_samples: float) -> None:
        self._time_constant = time_constant_samples
        self._weight = self._sum = self._sum_of_squares = 0.0

    def update(self, samples_S: Tensor) -> None:
        keep = math.exp(-len(samples_S) / self._time_constant)
        wide_S = samples_S.double()
        self._weight = keep * self._weight + len(samples_S)
        self._sum = keep * self._sum + float(wide_S.sum())
        self._sum_of_squares = keep * self._sum_of_squares + float(wide_S.square().sum())

    @property
    def mean(self) -> float:
        return self._sum / max(self._weight, 1.0)

    @property
    def variance(self) -> float:
        return max(0.0, self._sum_of_squares / max(self._weight, 1.0) - self.mean**2)


def _standardised(samples_S: Tensor, mean: float, variance: float) -> Tensor:
    return (samples_S - mean) / math.sqrt(variance + 1e-7)


class _Wav2Vec2Stream:
    """Runs the model on one window per hop; which window is arithmetic on sample numbers alone."""

    def __init__(self, encoder: Wav2Vec2Features, fps: int, times: _TimeMap) -> None:
        require_fps(fps, encoder.rate_hz)
        self._encoder = encoder
        self._fps = fps
        self._times = times
        self._statistics = _RunningStatistics(encoder.statistics_s * encoder.rate_hz)
        self._num_measured = 0
        self._blocks: list[Tensor] = []
        self._kept_from = 0
        self._num_samples = 0
        self._num_hops = 0
        self._last_window: tuple[int, int] | None = None
        self._last_states_ZTE = torch.empty(0)

    def push(self, samples_S: Tensor) -> Tensor:
        samples_S = as_sound(samples_S)
        self._blocks.append(samples_S)
        self._num_samples += len(samples_S)
        columns: list[Tensor] = []
        while self._num_samples >= self._window_end(self._num_hops):
            columns.append(self._next_hop(self._encoder.hop_frames))
        return self._joined(columns)

    def finish(self) -> Tensor:
        num_frames = -(-self._num_samples * self._fps // self._encoder.rate_hz)
        columns: list[Tensor] = []
        while (left := num_frames - self._num_hops * self._encoder.hop_frames) > 0:
            columns.append(self._next_hop(min(left, self._encoder.hop_frames)))
        return self._joined(columns)

    def _window_start(self, hop: int) -> int:
        """Where the window of a hop begins: on the grid of the convolutions, so that states line up."""
        begins = self._boundary(hop * self._encoder.hop_frames)
        if math.isinf(self._encoder.context_s):
            return 0
        stride = self._encoder.stride_samples
        return max(0, begins - round(self._encoder.context_s * self._encoder.rate_hz)) // stride * stride

    def _window_end(self, hop: int) -> float:
        ends = self._boundary((hop + 1) * self._encoder.hop_frames)
        return ends + self._encoder.lookahead_s * self._encoder.rate_hz

    def _boundary(self, frame: int) -> int:
        return frame_boundary(frame, self._fps, self._encoder.rate_hz)

    def _next_hop(self, num_frames: int) -> Tensor:
        start = self._window_start(self._num_hops)
        end = math.floor(min(self._window_end(self._num_hops), self._num_samples))
        states_ZTE = self._states(start, end)
        first_frame = self._num_hops * self._encoder.hop_frames
        positions = [self._times.position(first_frame + i, self._fps) for i in range(num_frames)]
        self._num_hops += 1
        self._forget(self._window_start(self._num_hops))
        return self._encoder.columns(states_ZTE, start // self._encoder.stride_samples, positions)

    def _states(self, start: int, end: int) -> Tensor:
        if self._last_window != (start, end):
            if self._encoder.normalise:
                self._statistics.update(self._slice(self._num_measured, end))
                self._num_measured = end
            samples_S = self._slice(start, end)
            if self._encoder.normalise:
                samples_S = _standardised(samples_S, self._statistics.mean, self._statistics.variance)
            self._last_states_ZTE = self._encoder.hidden_states(samples_S)
            self._last_window = (start, end)
        return self._last_states_ZTE

    def _slice(self, start: int, end: int) -> Tensor:
        self._blocks = [torch.cat(self._blocks)]
        return self._blocks[0][start - self._kept_from : end - self._kept_from]

    def _forget(self, before: int) -> None:
        """Drop samples that neither a window nor the statistics will ask for again."""
        before = min(before, self._num_samples)
        if self._encoder.normalise:
            before = min(before, self._num_measured)
        if before > self._kept_from:
            self._blocks = [self._slice(before, self._num_samples).clone()]
            self._kept_from = before

    def _joined(self, columns: list[Tensor]) -> Tensor:
        if not columns:
            shape = (1, self._encoder.num_features, self._encoder.feature_dim, 0)
            return torch.zeros(shape, device=self._encoder.device)
        return torch.cat(columns, dim=-1)


def _open_published(path: Path) -> Wav2Vec2Model:
    """The model of a published directory, every weight of it there."""
    weights = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
    if not (path / "config.json").is_file() or not any((path / name).is_file() for name in weights):
        raise CheckpointError(
            f"{path} is not a wav2vec2 directory: it needs config.json and one of {', '.join(weights)}; "
            "download wav2vec2-large-xlsr-53-english there"
        )
    try:
        from transformers import Wav2Vec2Model
    except ImportError as error:
        raise BackendError(
            "wav2vec2 needs transformers, which is not installed; pip install 'streamdiff[encoders]'"
        ) from error
    _check_config(path / "config.json")
    try:
        loaded: Any = Wav2Vec2Model.from_pretrained(str(path), local_files_only=True, output_loading_info=True)
        model, info = loaded
    except Exception as error:
        # A stranger's bytes may fail anywhere inside the reader.
        raise CheckpointError(f"cannot load wav2vec2 from {path}: {_first_line(error)}; download it again") from error
    # A mask embedding is only used in training and often not published.
    missing = sorted(set(info["missing_keys"]) - {"masked_spec_embed"})
    misshapen = sorted(str(key) for key in info["mismatched_keys"])
    if missing or misshapen:
        raise CheckpointError(f"the weights in {path} do not fill a wav2vec2: missing {missing}, misshapen {misshapen}")
    if broken := [name for name, weight in model.named_parameters() if not is_finite(weight)]:
        raise CheckpointError(f"the weights in {path} hold NaN or infinity ({listed(broken)}); download them again")
    return model


def _settings(path: Path) -> dict[str, object]:
    try:
        found = parse_json(read_bytes(path, 1 << 20))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
    return found if isinstance(found, dict) else {}


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_LARGEST = 16_384


def _check_config(path: Path) -> None:
    """A config is a stranger's: a model of a billion layers would be built before its weights are missed."""

    def fail(why: str) -> NoReturn:
        raise CheckpointError(f"{path} describes no wav2vec2: {why}; download it again")

    try:
        facts = Facts(parse_json(read_bytes(path, 1 << 20)), fail)
    except ValueError as error:
        fail(str(error))
    for name in _SIZES:
        if name in facts.names:
            facts.whole(name, 1, _LARGEST)
    for name in ("conv_dim", "conv_kernel", "conv_stride"):
        if name in facts.names:
            facts.numbers(name, 1, _LARGEST)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
