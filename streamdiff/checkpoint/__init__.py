"""Files to modules, strictly: tensors that are missing, unexpected, misshapen, no weights or not finite are named.

    load_dit(config, folder, lora=...)   shards of safetensors into a `CausalDiT`, the LoRA merged on the way
    load_strict(module, tensors)         a state dict into any module

Nothing is loaded silently in part (the published loader accepts a LoRA of which no key matches).
"""

from streamdiff.checkpoint.dit import check_dit, load_dit, official_dit_name
from streamdiff.checkpoint.lora import LORA_TARGETS, LoRA, lora_modules, read_lora
from streamdiff.checkpoint.shipped import shipped, shipped_face
from streamdiff.checkpoint.strict import check_names_and_shapes, load_strict, read_safetensors, safetensors_shapes
from streamdiff.checkpoint.vae import load_light_decoder, load_vae

__all__ = [
    "LORA_TARGETS",
    "LoRA",
    "check_dit",
    "check_names_and_shapes",
    "load_dit",
    "load_light_decoder",
    "load_strict",
    "load_vae",
    "lora_modules",
    "official_dit_name",
    "read_lora",
    "read_safetensors",
    "safetensors_shapes",
    "shipped",
    "shipped_face",
]
