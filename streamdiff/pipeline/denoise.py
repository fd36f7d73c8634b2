"""The stage that denoises: a contiguous run of denoising steps, each with its own key-value cache.

Axes: B streams, T latent frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamdiff import flow
from streamdiff.config import EngineConfig
from streamdiff.errors import StreamdiffError
from streamdiff.memory import Kept, SinkMemory, StepMemory
from streamdiff.models import cost
from streamdiff.models.dit import AudioCondition, CausalDiT, TextCondition
from streamdiff.models.served.cross import ServedText
from streamdiff.models.served.history import history_scales
from streamdiff.models.served.options import Precision, StepOptions
from streamdiff.models.served.step import ServedStep, ServedWeights
from streamdiff.pipeline.device import on_device
from streamdiff.pipeline.packet import Packet, RefreshSink, Rewind, SetReference, SwitchPrompt
from streamdiff.rope import FrameRotations, Rotation, first_shift, sink_position
from streamdiff.trace import Observer, Silent, span


def _on(device: torch.device, x: Tensor) -> Tensor:
    """Copy a tensor to a device asynchronously, through pinned memory; from pageable memory it would synchronise.

    Pinned memory is handed out again only when the copy from it is done.
    """
    if x.device == device:
        return x
    return x.pin_memory().to(device, non_blocking=True) if x.device.type == "cpu" else x.to(device)


@dataclass(slots=True, eq=False)
class _Step:
    """One denoising step of this rank: its noise level, the next one, and its KV cache."""

    index: int
    sigma: float
    sigma_next: float
    memory: StepMemory
    velocity: ServedStep


class DenoiseStage:
    """Takes a chunk through a contiguous run of denoising steps, each with its own history.

    ``steps`` are indices into ``config.sigmas``. ``seed`` and ``stream`` key the fresh noise of the re-noising
    sampler; the Euler sampler draws none. ``weights``: those of ``dit`` with these ``options``, where several
    stages share them. ``on_velocity`` is told (step, velocity) of every forward.
    """

    def __init__(
        self,
        dit: CausalDiT,
        config: EngineConfig,
        steps: Sequence[int],
        *,
        seed: int = 0,
        stream: int = 0,
        num_streams: int = 1,
        options: StepOptions | None = None,
        weights: ServedWeights | None = None,
        observer: Observer | None = None,
        on_velocity: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self._dit = dit
        self._config = config
        self._seed = seed
        self._stream = stream
        self._observer = observer or Silent()
        self._on_velocity = on_velocity
        self._reference: SetReference | None = None
        self._prompt: SwitchPrompt | None = None
        self._text: ServedText | None = None
        self._told = [0, 0]
        """Number of the reference that counts, and of the prompt: each is told once."""
        self._options = options = StepOptions() if options is None else options
        with torch.inference_mode():
            self._weights = ServedWeights(dit, options) if weights is None else weights.apart()
            self._clean = dit.modulation(0.0)
            self.sink = SinkMemory(
                num_layers=config.dit.num_layers,
                num_streams=num_streams,
                moving_tokens=config.frame_tokens,
                still_tokens=cost.sink_tokens(config) - config.frame_tokens,
                num_heads=config.dit.num_heads,
                head_dim=config.dit.head_dim,
                dtype=dit.dtype,
                device=dit.device,
            )
            self._steps = [self._make_step(index) for index in steps]
            self._motion_rotation = dit.motion_rotation(config.latent_hw) if config.motion_latents > 0 else None
            rows, columns = config.latent_hw[0] // config.dit.patch[1], config.latent_hw[1] // config.dit.patch[2]
            self._rotations = FrameRotations(rows, columns, config.dit.rotary_pairs, device=dit.device)

    def _make_step(self, index: int) -> _Step:
        config, options = self._config, self._options
        modulation = self._dit.modulation(config.sigmas[index])
        eight_bits = options.history is Precision.FP8
        memory = StepMemory(
            self.sink,
            chunk_tokens=config.chunk_tokens,
            window_chunks=config.memory.window_chunks,
            slack_chunks=config.memory.slack_chunks,
            keeps_first=config.memory.keeps_first,
            impl=options.resolved(self._dit.device),
            scales=history_scales(self._dit, (modulation, self._clean)) if eight_bits else None,
        )
        served = ServedStep(self._weights, modulation, memory, options)
        return _Step(index, config.sigmas[index], config.sigmas[index + 1], memory, served)

    @torch.inference_mode()
    def warm(self) -> None:
        """Compile and capture all that a stream will need, so that its first chunk is as fast as the others.

        Call it before the first packet: MemoryOrderError afterwards. The stage is left as if it were new.
        """
        if not self._weights.needs_warming:
            return
        with on_device(self._dit.device):
            self._warm()

    def _warm(self) -> None:
        device, silence = self._dit.device, self._silence()
        (_, prompt) = silence.commands
        assert isinstance(prompt, SwitchPrompt)
        audio = None
        if silence.audio_BZEA is not None:
            audio = self._weights.audio_condition(_on(device, silence.audio_BZEA))
        text = self._weights.text_condition(prompt.text_BPC)
        for step in self._steps:
            step.velocity.warm(_on(device, silence.latent_BCTHW), self._own_rotation(0), text, audio)
        # What stands around the steps is compiled at its first use too: a chunk of silence, seen and heard by nobody.
        observer, on_velocity = self._observer, self._on_velocity
        self._observer, self._on_velocity = Silent(), None
        try:
            self.step(silence)
        finally:
            self._observer, self._on_velocity = observer, on_velocity
            self._reference = self._prompt = self._text = None
            self.sink.wipe()
            for step in self._steps:
                step.memory.wipe()

    def _silence(self) -> Packet:
        """The first chunk of a stream, all zeros, on the host as the intake makes it: the memory that it is copied
        through is reserved as well.
        """
        config = self._config
        B = self.sink.values_ZBSNK.shape[1]
        latent_BCTHW = torch.zeros(B, config.dit.in_dim, config.frames_per_chunk, *config.latent_hw)
        audio_BZEA = None
        if config.dit.audio is not None:
            features = (config.dit.audio.num_features, config.dit.audio.feature_dim)
            audio_BZEA = torch.zeros(B, *features, config.video_frames_per_chunk)
        reference_BCTHW, motion_BCTHW = latent_BCTHW[:, :, :1], None
        if config.motion_latents:
            motion_BCTHW = reference_BCTHW.expand(-1, -1, config.motion_latents, -1, -1)
        text_BPC = torch.zeros(B, 1, config.dit.text_dim)
        return Packet(
            chunk=0,
            epoch=0,
            lead=config.memory.sink_lead_min,
            latent_BCTHW=latent_BCTHW,
            audio_BZEA=audio_BZEA,
            commands=(SetReference(reference_BCTHW, motion_BCTHW), SwitchPrompt(text_BPC)),
        )

    def _settle(self) -> None:
        """Synchronise when traced, so that a span measures the work and not its launch."""
        if self._dit.device.type == "cuda" and not isinstance(self._observer, Silent):
            torch.cuda.current_stream(self._dit.device).synchronize()

    def _own_rotation(self, first_frame: int) -> Rotation:
        return self._rotations.at(first_frame, self._config.frames_per_chunk)

    @property
    def memories(self) -> list[StepMemory]:
        """The history of each of its steps."""
        return [step.memory for step in self._steps]

    @property
    def memory_bytes(self) -> int:
        """Bytes of all histories and of the pristine sink."""
        return self.sink.num_bytes + sum(step.memory.num_bytes for step in self._steps)

    def begin(self, *, seed: int, stream: int) -> None:
        """Serve another stream from now on; see `SeatedStage`."""
        self._seed, self._stream = seed, stream

    def kept(self) -> Kept:
        """See `KeptStage`. The sink and the prompt's keys are not in it: they follow from reference and prompt."""
        reference, text = self._told
        tensors: dict[str, Tensor] = {}
        if self._reference is not None:
            tensors[f"reference{reference}"] = self._reference.reference_BCTHW
            if self._reference.motion_BCTHW is not None:
                # It comes with a stream and stays, while the reference may be refreshed; it is small.
                tensors[f"motion{reference}"] = self._reference.motion_BCTHW
        if self._prompt is not None:
            tensors[f"prompt{text}"] = self._prompt.text_BPC
        steps = [step.memory.kept() for step in self._steps]
        for number, step in enumerate(steps):
            tensors |= step.within(f"step{number}")
        key = [self._seed, self._stream]
        return Kept({"key": key, "told": list(self._told), "steps": [dict(step.facts) for step in steps]}, tensors)

    @torch.inference_mode()
    def resume(self, kept: Kept) -> None:
        """See `KeptStage`."""
        facts, tensors = kept.facts, kept.tensors
        (self._seed, self._stream), self._told = facts["key"], list(facts["told"])
        reference, text = self._told
        self._reference = self._prompt = self._text = None
        with on_device(self._dit.device):
            if (latent_BCTHW := tensors.get(f"reference{reference}")) is not None:
                self._reference = SetReference(latent_BCTHW, tensors.get(f"motion{reference}"))
            if (text_BPC := tensors.get(f"prompt{text}")) is not None:
                self._prompt = SwitchPrompt(text_BPC)
                self._text = self._weights.text_condition(text_BPC)
            for number, step in enumerate(self._steps):
                step.memory.resume(kept.part(f"step{number}", facts["steps"][number]))
            if self._reference is not None and self._prompt is not None:
                self._prefill(self._reference, self._prompt)

    @torch.inference_mode()
    def step(self, packet: Packet) -> Packet:
        with on_device(self._dit.device):
            return self._step(packet)

    def _step(self, packet: Packet) -> Packet:
        self._obey(packet)
        if self._text is None or self._reference is None:
            raise StreamdiffError(
                f"chunk {packet.chunk} came before a reference and a prompt; "
                "the first packet of a stream carries SetReference and SwitchPrompt"
            )
        config = self._config
        first_frame = packet.chunk * config.frames_per_chunk
        own = self._own_rotation(first_frame)
        sink = self._rotations.at(sink_position(first_frame, lead=packet.lead, origin=config.memory.sink_position))
        moved: Rotation | None = None
        if config.memory.keeps_first:
            shift = first_shift(first_frame, reach=config.memory.first_reach)
            moved = self._rotations.shift(shift, config.frames_per_chunk)
        audio = self._hear(packet)
        x = _on(self._dit.device, packet.latent_BCTHW).to(torch.float32)
        for step in self._steps:
            with span(self._observer, "denoise", chunk=packet.chunk, epoch=packet.epoch, step=step.index):
                step.memory.admit(packet.chunk)
                step.memory.turn_sink(sink)
                if moved is not None:
                    step.memory.turn_first(moved)
                velocity = step.velocity(x, own, self._text, audio)
                self._settle()
                if self._on_velocity is not None:
                    self._on_velocity(step.index, velocity)
                x = self._sampled(x, velocity, step, packet.chunk)
        return replace(packet, latent_BCTHW=x)

    def _sampled(self, x: Tensor, velocity: Tensor, step: _Step, chunk: int) -> Tensor:
        """The chunk at the next noise level: an Euler step, or fresh noise on the data that the velocity predicts."""
        if not self._config.renoise or step.sigma_next <= 0:
            return flow.euler_step(x, velocity, sigma=step.sigma, sigma_next=step.sigma_next)
        noise = flow.step_noise(tuple(x.shape), seed=self._seed, stream=self._stream, chunk=chunk, step=step.index)
        return flow.renoise_step(x, velocity, _on(x.device, noise), sigma=step.sigma, sigma_next=step.sigma_next)

    def _hear(self, packet: Packet) -> AudioCondition | None:
        if self._config.dit.audio is None:
            return None
        if packet.audio_BZEA is None:
            raise StreamdiffError(f"chunk {packet.chunk} came without sound to a model that listens")
        return self._weights.audio_condition(_on(self._dit.device, packet.audio_BZEA))

    def _obey(self, packet: Packet) -> None:
        stale_sink = False
        for command in packet.commands:
            match command:
                case SetReference():
                    self._reference = command
                    self._told[0] += 1
                    for step in self._steps:
                        step.memory.clear()
                    stale_sink = True
                case SwitchPrompt():
                    self._prompt = command
                    self._told[1] += 1
                    self._text = self._weights.text_condition(command.text_BPC)
                    stale_sink = True
                case RefreshSink():
                    if command.latent_BCTHW is None or self._reference is None:
                        raise StreamdiffError(
                            f"chunk {packet.chunk} asks for the sink of chunk {command.source_chunk}, "
                            "but its latent did not come along"
                        )
                    self._reference = replace(self._reference, reference_BCTHW=command.latent_BCTHW)
                    self._told[0] += 1
                    stale_sink = True
                case Rewind():
                    for step in self._steps:
                        step.memory.rewind(command.chunk)
                case _:
                    pass  # ReturnLatent speaks to the link
        if stale_sink and self._reference is not None and self._prompt is not None:
            with span(self._observer, "sink", chunk=packet.chunk):
                self._prefill(self._reference, self._prompt)

    def _prefill(self, reference: SetReference, prompt: SwitchPrompt) -> None:
        self._dit.prefill_sink(
            reference.reference_BCTHW,
            reference.motion_BCTHW if self._config.motion_latents > 0 else None,
            self._text if isinstance(self._text, TextCondition) else self._dit.text_condition(prompt.text_BPC),
            self._clean,
            self.sink,
            position=self._config.memory.sink_position,
        )
        for step in self._steps:
            step.memory.take_sink(self._motion_rotation)
