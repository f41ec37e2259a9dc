"""One normaliser for LoRA files of other tools: whatever they call a layer, its factors come back under the host's own keys."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .host_lora import LoraTarget, convert_lora, layer_shape, lora_targets

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

# What stands before a layer's path, in any order and number. The underscored ones spell the whole path with underscores.
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "unet.", "lora_unet_", "lora_transformer_", "lycoris_")
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoders?(_\d)?\.|lora_te\d?_|lora_prior_te_|text_model\.)")

# Diffusers calls WAN's layers by these names; the host has no table of them.
WAN_NAMES = (
    (r"\.self_attn\.", ".attn1."), (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])$", r".to_\1"), (r"\.o$", ".to_out.0"), (r"\.([kv])_img$", r".add_\1_proj"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"), (r"\.ffn\.2$", ".ffn.net.2"),
    (r"\.before_proj$", ".proj_in"), (r"\.after_proj$", ".proj_out"), (r"^head\.head$", "proj_out"),
    (r"^time_embedding\.0$", "condition_embedder.time_embedder.linear_1"),
    (r"^time_embedding\.2$", "condition_embedder.time_embedder.linear_2"),
    (r"^text_embedding\.0$", "condition_embedder.text_embedder.linear_1"),
    (r"^text_embedding\.2$", "condition_embedder.text_embedder.linear_2"),
    (r"^img_emb\.proj\.1$", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3$", "condition_embedder.image_embedder.ff.net.2"),
    (r"^time_projection\.1$", "condition_embedder.time_proj"),
)  # fmt: skip

# How a key ends: one of the two factors, or anything else that the host reads at a layer, or what it would read wrongly.
FACTOR = (
    r"[._]lora[._](?P<side>up|down)\.weight"
    r"|\.lora_linear_layer\.(?P<linear>up|down)\.weight"
    r"|\.lora_(?P<letter>[AB])(\.default\w*)?(\.weight)?"
)
OTHER = (
    r"alpha|dora_scale|reshape_weight|lora_mid\.weight|diff|diff_b|set_weight|w_norm|b_norm"
    r"|hada_\w+|lokr_\w+|oft_blocks|rescale|[ab][12]\.weight"
)
UNREAD = r"lora_magnitude_vector(\.default\w*)?(\.weight)?|lora_B(\.default\w*)?\.bias"
KEY = re.compile(rf"(?P<name>.+?)({FACTOR}|\.(?P<other>{OTHER})|\.(?P<unread>{UNREAD}))")
UP, DOWN, ALPHA, MID = "lora_B.weight", "lora_A.weight", "alpha", "lora_mid.weight"
ROLES = {"up": UP, "B": UP, "down": DOWN, "A": DOWN}
# Nothing by themselves.
COMPANIONS = {ALPHA, MID, "dora_scale", "reshape_weight"}


@dataclass
class Entry:
    """What a file holds under one name of one layer, or of a part of a fused layer.

    Attributes:
        name: as the file spells it.
        target: what it stands for in the model.
        tensors: by role, which is the host's own suffix.
        keys: their keys.
        readable: whether the host would read all of it as it is meant.
    """

    name: str
    target: LoraTarget
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    readable: bool = True

    @property
    def plain(self) -> bool:
        """Whether it is a pair of factors and nothing more."""
        return {UP, DOWN} <= set(self.tensors) <= {UP, DOWN, ALPHA}

    @property
    def rank(self) -> int:
        """Columns of the up factor."""
        return self.tensors[DOWN].shape[0]

    def alpha(self, default: float | None) -> float:
        """Return the file's alpha, else the default, else the rank, which means a scale of 1."""
        if ALPHA in self.tensors:
            return float(self.tensors[ALPHA])
        return float(self.rank) if default is None else float(default)


def native_lora(tensors: dict[str, Tensor], model: "BaseModel", alpha: float | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """Bring a LoRA under the host's own keys, `diffusion_model.<path>.lora_A.weight`, `.lora_B.weight`, `.alpha`, with every layer whole.

    Parts of layers that the host keeps fused (q, k and v; FLUX's linear1) are packed block-wise into one pair of factors whose rank is the
    sum of theirs, so that they also work where the host can patch whole layers only. DoRA, LoHa, LoKr, differences and the like keep their
    own suffixes and are the host's to apply. Text encoders are no part of a diffusion model: their keys are left over, untouched; see
    `is_text_encoder_key`.

    Args:
        tensors: a file's content; native, kohya, diffusers, PEFT, OneTrainer, LyCORIS and attention processor names may be mixed.
        model: the host's model, for its layers and what other tools call them.
        alpha: `lora_alpha` of PEFT's adapter_config.json, for layers that bring no alpha of their own. Without it these are scaled by 1.

    Returns:
        The tensors, unchanged where nothing had to be packed, and the keys that found no place, in the file's spelling and order: unknown
        layers, factors that do not fit the layer or lack their partner, a second name for what the file has already named, and forms that
        the host would apply in another way than they are meant (PEFT's DoRA and biases; DoRA, LoHa and LoKr of a part of a fused layer).
    """
    converted = convert_lora(tensors)
    native: dict[str, Tensor] = {}
    placed: set[str] = set()
    for key, entries in _entries(converted, lora_names(model)).items():
        shape = layer_shape(model, key)
        taken = _applicable(entries, shape)
        native.update(_layer(key, taken, shape, alpha))
        placed.update(file_key for entry in taken for file_key in entry.keys)
    return native, _left(tensors, {key: tensor for key, tensor in converted.items() if key not in placed})


def is_text_encoder_key(key: str) -> bool:
    """Tell keys of text encoders, which the host's own LoRA loader applies to a CLIP, from keys that nobody knows."""
    return TEXT_ENCODER.match(key) is not None


def lora_names(model: "BaseModel") -> dict[str, LoraTarget]:
    """Return all that files call this model's layers: the host's own names as they are, and all names without prefixes and dots."""
    targets = lora_targets(model)
    bare: dict[str, LoraTarget] = {}
    for name, target in [*targets.items(), *_wan_names(targets).items()]:
        bare.setdefault(_bare(name), target)
    return {**bare, **targets}


def _left(tensors: dict[str, Tensor], unplaced: dict[str, Tensor]) -> list[str]:
    """Return keys as the file spells and orders them; the host's conversion may have renamed some and added one of its own."""
    left = set(unplaced) | {id(tensor) for key, tensor in unplaced.items() if key not in tensors}
    return [key for key, tensor in tensors.items() if key in left or id(tensor) in left]


def _bare(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name.replace(".processor.", ".").replace(".", "_").lstrip("_")


def _wan_names(targets: dict[str, LoraTarget]) -> dict[str, LoraTarget]:
    names = {}
    if "diffusion_model.blocks.0.self_attn.q" in targets:
        for name, target in targets.items():
            if name.startswith("diffusion_model."):
                path = name.removeprefix("diffusion_model.")
                for pattern, replacement in WAN_NAMES:
                    path = re.sub(pattern, replacement, path)
                names[path] = target
    return names


def _entries(tensors: dict[str, Tensor], names: dict[str, LoraTarget]) -> dict[str, list[Entry]]:
    """Sort a file's tensors by the weights they belong to; what is named twice belongs to the first name, as the host reads it once."""
    found: dict[LoraTarget, Entry] = {}
    for key, tensor in tensors.items():
        parts = KEY.fullmatch(key)
        target = parts and (names.get(parts["name"]) or names.get(_bare(parts["name"])))
        if not target:
            continue
        entry = found.setdefault(target, Entry(parts["name"], target))
        role = ROLES.get(parts["side"] or parts["linear"] or parts["letter"] or "", parts["other"] or parts["unread"])
        if entry.name != parts["name"] or role in entry.tensors:
            continue
        entry.tensors[role] = tensor
        entry.keys.append(key)
        entry.readable &= not parts["unread"]
    by_weight: dict[str, list[Entry]] = {}
    for entry in found.values():
        by_weight.setdefault(entry.target.key, []).append(entry)
    return by_weight


def _applicable(entries: list[Entry], shape: tuple[int, ...]) -> list[Entry]:
    """Return the entries of a layer that can be applied together: factors of it and of its parts, or one entry of another form."""
    fitting = [entry for entry in entries if _fits(entry, shape)]
    other = [entry for entry in fitting if not entry.plain]
    return other[:1] or fitting


def _fits(entry: Entry, shape: tuple[int, ...]) -> bool:
    roles = set(entry.tensors)
    if not entry.readable or roles <= COMPANIONS or not (entry.plain or entry.target.whole):
        return False
    if not roles & {UP, DOWN, MID}:
        return True
    if not {UP, DOWN} <= roles:
        return False
    up, down, mid = entry.tensors[UP], entry.tensors[DOWN], entry.tensors.get(MID)
    if min(up.ndim, down.ndim, len(shape)) < 2 or (mid is None and up.shape[1:].numel() != down.shape[0]) or not down.numel():
        return False
    columns = down.shape[1:].numel() * (1 if mid is None else mid.shape[2:].numel())
    rows = entry.target.rows[1] if entry.target.rows else shape[0]
    return "reshape_weight" in roles or (up.shape[0], columns) == (rows, torch.Size(shape[1:]).numel())


def _layer(key: str, entries: list[Entry], shape: tuple[int, ...], alpha: float | None) -> dict[str, Tensor]:
    """Return one layer's tensors under native keys."""
    if not entries:
        return {}
    path, first = key.removesuffix(".weight"), entries[0]
    if not first.plain:
        made = dict(first.tensors)
        if MID in made:
            made["lora_up.weight"], made["lora_down.weight"] = made.pop(UP), made.pop(DOWN)
        if {UP, "lora_up.weight"} & set(made):
            made[ALPHA] = torch.tensor(first.alpha(alpha))
    elif len(entries) == 1 and first.target.whole:
        factors = {role: first.tensors[role] for role in (DOWN, UP)}
        made = {role: factor.flatten(1) if len(shape) == 2 else factor for role, factor in factors.items()}
        made[ALPHA] = torch.tensor(first.alpha(alpha))
    else:
        made = _packed(entries, shape[0], alpha)
    return {f"{path}.{role}": tensor for role, tensor in made.items()}


def _packed(entries: list[Entry], height: int, alpha: float | None) -> dict[str, Tensor]:
    """Stack factors so that their one product is the sum of all: every up factor in its own rows and columns.

    The host scales all of it by one alpha / rank; where the entries' own scales differ, the up factors make up for it, in float32.
    """
    alphas = [entry.alpha(alpha) for entry in entries]
    ranks = [entry.rank for entry in entries]
    scales = [a / rank for a, rank in zip(alphas, ranks)]
    ups = [entry.tensors[UP].flatten(1) for entry in entries]
    if min(scales) != max(scales):
        common = max(scales, key=abs)
        ups = [up.float() * (scale / common) for up, scale in zip(ups, scales)]
        alphas = [common * rank for rank in ranks]
    up = torch.cat([_in_rows(entry.target, part, height) for entry, part in zip(entries, ups)], dim=1)
    down = torch.cat([entry.tensors[DOWN].flatten(1) for entry in entries])
    return {DOWN: down, UP: up, ALPHA: torch.tensor(sum(alphas))}


def _in_rows(target: LoraTarget, up: Tensor, height: int) -> Tensor:
    """Put an up factor (rows, rank) where it belongs in a layer of this height."""
    up = target.reorder(up) if target.reorder else up
    if target.rows is None:
        return up
    first, count = target.rows
    placed = up.new_zeros(height, up.shape[1])
    placed[first:first + count] = up
    return placed
