"""Key-value caches: what a denoising step remembers of its own stream, at its own noise level.

Every step keeps a history of its own: the keys and values that it computed itself, from the noisy chunk it was given
(Live Avatar, timestep-forcing). Per layer there is one buffer of fixed address,

    [ sink | slot 0 | slot 1 | ... | slot W-1 ]

and chunk c always lives in slot ``c mod W``. Softmax does not care about the order of keys once they carry their
positions, so a chunk attends to one dense prefix of that buffer: no concatenation, no mask, no eviction.

- The chunks' keys are stored already rotated to their absolute positions.
- The sink's keys are kept un-rotated in a pristine copy and rotated from it into the buffer for every chunk. Rotating
  the rotated keys again would lose a little each time: 5 % after 100 chunks in bfloat16, 52 % after 1000.
- A window may keep the first chunk for good, in slot 0; the others take turns in the slots after it. Its keys move
  along with the stream like the sink's, turned from a copy.
- A slot that is overwritten is first copied to a spill, so that ``slack_chunks`` chunks can be taken back.
- Keys and values may lie in eight bits (e4m3) with one scale per token and head: half the memory. The pristine sink
  does not, so that turning it rounds once.

What is where is decided with integers in `Ring` (`ring`); `StepMemory` (`step`) moves the tensors.
"""

from streamdiff.memory.kept import Kept
from streamdiff.memory.ring import Restore, Ring, Slot, sink_lead
from streamdiff.memory.step import LayerMemory, SinkMemory, StepMemory

__all__ = ["Kept", "LayerMemory", "Restore", "Ring", "SinkMemory", "Slot", "StepMemory", "sink_lead"]
