"""The degradation tokenizer (Defusion, arXiv 2506.16960): a VQ-VAE of test charts, whose codes say what a degradation does to a picture.

z_v = z(degraded chart) - z(clean chart of the same layout); a chart that was not degraded gives zeros.

The paper has no code. This is the smallest network of its kind: diffusers' VQModel has layers that the host can neither cast nor load on
demand, puts beta on the codebook instead of the commitment, and has no way to bring unused codes back. Codes and features lie on a sphere,
as in ViT-VQGAN (arXiv 2110.04627), so that no code starts out of reach.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config_values import one_of, whole_number
from .framing import rgb_pictures
from .host import inference_module, run_module, trained_operations
from .residual_block import ResidualBlock
from .weights_file import ANY_FAMILY, Weights, part_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KIND = "degradation_tokenizer"
ENCODER, DECODER, DISCRIMINATOR = "encoder.", "decoder.", "discriminator."
GROUPS = 8


@dataclass(frozen=True)
class Instruction:
    """A visual instruction: what a degradation does, shown on a test chart.

    Attributes:
        tokens: z_v, (B or 1, N, width), row by row over the chart; float32 on the CPU. Zeros say that nothing is degraded.
        codebook: fingerprint of the tokenizer that made them; tokens of another one mean something else.
        words: what is wrong, such as "noisy, dark"; empty where nothing is known.
    """

    tokens: Tensor
    codebook: str
    words: str = ""


@dataclass(frozen=True)
class Size:
    """Measures of a tokenizer.

    Attributes:
        patch: side of the squares of pixels that the first layer takes.
        widths: channels at each resolution; each halves the last.
        blocks: residual blocks at each.
        codes: how many there are.
        width: of a code.
        chart: side in pixels of the charts it learns from.
        critic: channels of the critic's layers.
        critic_start: step at which the critic sets in.
    """

    patch: int
    widths: tuple[int, ...]
    blocks: int
    codes: int
    width: int
    chart: int
    critic: tuple[int, ...]
    critic_start: int

    @property
    def cell(self) -> int:
        """Side in pixels of what one token stands for."""
        return self.patch * 2 ** (len(self.widths) - 1)


SIZES = {
    "full": Size(1, (64, 128, 256, 256, 512), 2, 1024, 256, 256, (64, 128, 256), 10_000),
    "lab": Size(4, (64, 96), 1, 512, 64, 128, (32, 64), 500),
}


class TokenEncoder(nn.Module):
    """Charts to features and to the codes nearest to them."""

    def __init__(self, size: Size, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.patch, self.cell, self.width = size.patch, size.cell, size.width
        self.stem = operations.Conv2d(3 * size.patch**2, size.widths[0], 3, padding=1, **factory)
        self.levels = nn.ModuleList()
        for index, channels in enumerate(size.widths):
            down = [operations.Conv2d(size.widths[index - 1], channels, 3, stride=2, padding=1, **factory)] if index else []
            self.levels.append(nn.Sequential(*down, *(ResidualBlock(channels, GROUPS, operations, **factory) for _ in range(size.blocks))))
        self.out = operations.Conv2d(size.widths[-1], size.width, 1, **factory)
        self.codes = nn.Parameter(torch.empty(size.codes, size.width, **factory))

    def features(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 of any size -> (B, h, w, width) of length 1; edges are repeated up to whole cells."""
        height, width = pictures.shape[-2:]
        x = F.pad(2 * pictures - 1, (0, -width % self.cell, 0, -height % self.cell), mode="replicate")
        x = self.stem(F.pixel_unshuffle(x, self.patch))
        for level in self.levels:
            x = level(x)
        return F.normalize(self.out(F.silu(x)).movedim(1, -1), dim=-1)

    def codebook(self, like: Tensor) -> Tensor:
        """Return the codes, (codes, width) of length 1."""
        return F.normalize(self.codes.to(like), dim=-1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the tokens (B, N, width) of pictures (B, 3, H, W): the nearest codes, of a mean square of 1."""
        features = self.features(pictures)
        codes = self.codebook(features)
        return F.embedding(nearest(features, codes), codes).flatten(1, 2) * self.width**0.5


class ChartDecoder(nn.Module):
    """Codes to charts; for training, and to look at what the codes hold."""

    def __init__(self, size: Size, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.patch = size.patch
        self.stem = operations.Conv2d(size.width, size.widths[-1], 1, **factory)
        self.levels = nn.ModuleList()
        for index, channels in reversed(list(enumerate(size.widths))):
            up = [operations.Conv2d(channels, size.widths[index - 1], 3, padding=1, **factory)] if index else []
            self.levels.append(nn.Sequential(*(ResidualBlock(channels, GROUPS, operations, **factory) for _ in range(size.blocks)), *up))
        self.norm = operations.GroupNorm(GROUPS, size.widths[0], **factory)
        self.out = operations.Conv2d(size.widths[0], 3 * size.patch**2, 3, padding=1, **factory)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, h, w, width) of length 1 -> (B, 3, H, W), about 0..1."""
        x = self.stem(codes.movedim(-1, 1))
        for index, level in enumerate(self.levels):
            x = level(x)
            if index < len(self.levels) - 1:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
        return 0.5 + 0.5 * F.pixel_shuffle(self.out(F.silu(self.norm(x))), self.patch)


class Critic(nn.Module):
    """Tells patches of charts from those of decoded ones."""

    def __init__(self, size: Size, operations: Any, **factory: Any) -> None:
        super().__init__()
        channels = (3, *size.critic)
        self.layers = nn.ModuleList(operations.Conv2d(a, b, 4, stride=2, padding=1, **factory) for a, b in zip(channels, channels[1:]))
        self.norms = nn.ModuleList(operations.GroupNorm(GROUPS, c, **factory) for c in size.critic[1:])
        self.out = operations.Conv2d(channels[-1], 1, 3, padding=1, **factory)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 -> (B, 1, h, w), higher where it looks like a chart."""
        x = 2 * pictures - 1
        for index, layer in enumerate(self.layers):
            x = layer(x)
            x = F.leaky_relu(self.norms[index - 1](x) if index else x, 0.2)
        return self.out(x)


class TokenizerNetwork(nn.Module):
    """All parts; the critic only where there is one."""

    def __init__(self, size: Size, critic: bool, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.encoder = TokenEncoder(size, operations, **factory)
        self.decoder = ChartDecoder(size, operations, **factory)
        if critic:
            self.discriminator = Critic(size, operations, **factory)


def nearest(features: Tensor, codes: Tensor) -> Tensor:
    """Return the index of the nearest code of each feature: (..., width) and (codes, width), all of length 1 -> (...)."""
    return (features @ codes.T).argmax(-1)


def new_weights(size: str, charts: Tensor, adversarial: bool = True, seed: int = 0) -> Weights:
    """Return a fresh tokenizer. Its codes are features of charts, so that they are in use from the start.

    Args:
        size: one of SIZES.
        charts: (B, H, W, 3) in 0..1, with at least as many cells as there are codes.
        adversarial: learn against a critic too, from SIZES[size].critic_start on.
        seed: fixes the weights.
    """
    measures = SIZES[size]
    with torch.inference_mode(False), torch.no_grad():
        network = TokenizerNetwork(measures, adversarial, trained_operations)
        generator = torch.Generator().manual_seed(seed)
        for name, p in network.named_parameters():
            if ".norm" in name:
                p.fill_(float(name.endswith("weight")))
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
        features = torch.cat([network.encoder.features(chart.clone().movedim(-1, 1)).flatten(0, 2) for chart in charts.split(1)])
        network.encoder.codes.copy_(features[torch.randperm(len(features), generator=generator)[: measures.codes]])
        tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    config = {"size": size, "adversarial": adversarial, "critic_start": measures.critic_start}
    return Weights(KIND, ANY_FAMILY, config, tensors, "a new degradation tokenizer")


def check_fit(weights: Weights, node: str, training: bool = False) -> Size:
    """Check that weights are a whole tokenizer, and return its measures.

    Args:
        weights: to check.
        node: for messages.
        training: whether the decoder and the critic are needed too.

    Raises:
        ValueError: naming the node, the weights and what is wrong.
    """
    weights.expect(KIND, node)
    size, critic = weights.config.get("size"), weights.config.get("adversarial")
    if not one_of(size, SIZES) or not isinstance(critic, bool) or (critic and not whole_number(weights.config.get("critic_start"))):
        raise ValueError(f"{node}: {weights.name} describes itself as {weights.config}, and a size ({', '.join(SIZES)}) was expected. "
                         "Update the pack, or save the file again.")
    with torch.device("meta"):
        wanted = TokenizerNetwork(SIZES[size], critic, nn).state_dict()
    for name, tensor in wanted.items():
        found = weights.tensors.get(name)
        if found is None and not training and not name.startswith(ENCODER):
            continue
        if found is None or found.shape != tensor.shape:
            shape = "missing" if found is None else "x".join(map(str, found.shape))
            raise ValueError(f"{node}: {weights.name} is incomplete: {name} is {shape}, expected {'x'.join(map(str, tensor.shape))}. "
                             "Load another file, or train it anew.")
    return SIZES[size]


def for_use(weights: Weights) -> Weights:
    """Return what making tokens needs, without decoder and critic: to travel in other files."""
    return Weights(weights.kind, weights.family, weights.config, _encoder_tensors(weights), weights.name)


def fingerprint(weights: Weights) -> str:
    """Return a text that is the same for tokenizers that make the same tokens: in full and in half (fp16) precision alike."""

    def digest() -> str:
        made = hashlib.blake2b(digest_size=12)
        for name, tensor in sorted(_encoder_tensors(weights).items()):
            made.update(name.encode() + tensor.detach().half().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return made.hexdigest()

    return weights.once("codebook", digest)


def encoder_patcher(weights: Weights) -> "ModelPatcher":
    """Return the encoder as a model that the host loads beside others; made once for each object of weights."""

    def make() -> "ModelPatcher":
        # In half precision and back: what `fingerprint` vouches for.
        tensors = {name: tensor.half().float() for name, tensor in part_of(weights.tensors, ENCODER).items()}
        return inference_module(lambda **factory: TokenEncoder(SIZES[weights.config["size"]], **factory), tensors)

    return weights.once(KIND, make)


def difference(weights: Weights, degraded: Tensor, clean: Tensor) -> Tensor:
    """Return z_v of charts (B, H, W, 3) and (1 or B, H, W, 3) in 0..1 with a checked tokenizer: (B, N, width), float32 on the CPU."""
    patcher = encoder_patcher(weights)
    tokens = [run_module(patcher, chart.float().movedim(-1, 1)).detach().cpu() for charts in (degraded, clean) for chart in charts.split(1)]
    return torch.cat(tokens[: len(degraded)]) - torch.cat(tokens[len(degraded):])


def instruction_of(weights: Weights, degraded: Tensor, clean: Tensor, words: str, node: str) -> Instruction:
    """Make a visual instruction.

    Args:
        weights: a tokenizer.
        degraded, clean: square charts of the same layout, IMAGEs of any size from 32 pixels on; one clean chart may stand for all degraded
            ones.
        words: what is wrong with the degraded one.
        node: for messages.

    Raises:
        ValueError: naming the node and the input.
    """
    check_fit(weights, node)
    degraded, clean = rgb_pictures(degraded, node, "degraded"), rgb_pictures(clean, node, "clean")
    if degraded.shape[1:] != clean.shape[1:] or len(clean) not in (1, len(degraded)):
        (one, other) = (f"{len(charts)} of {charts.shape[2]} x {charts.shape[1]} pixels" for charts in (degraded, clean))
        raise ValueError(f"{node}: 'degraded' holds {one}, and 'clean' {other}. Connect the same chart before and after the damage, in one "
                         "size.")
    height, width = clean.shape[1:3]
    if height != width:
        # Tokens say where they lie by their number, and models learn from square charts.
        raise ValueError(f"{node}: the charts on 'degraded' and 'clean' are {width} x {height} pixels, and a chart has to be square, as "
                         "Visual Ground draws it. Crop both in the same way.")
    return Instruction(difference(weights, degraded, clean), fingerprint(weights), words)


def blended(instructions: list[tuple[Instruction, float]], node: str) -> Instruction:
    """Return the sum of instructions times their weights, with the words of those whose weight is not 0.

    Raises:
        ValueError: when they come from different tokenizers, charts of different sizes, or batches that do not go together.
    """
    first = instructions[0][0]
    for other, _ in instructions[1:]:
        check_codebook(other, first.codebook, node)
        if other.tokens.shape[1] != first.tokens.shape[1]:
            raise ValueError(f"{node}: the instructions have {first.tokens.shape[1]} and {other.tokens.shape[1]} tokens. "
                             "Make both from charts of the same size.")
    batch = max(len(instruction.tokens) for instruction, _ in instructions)
    if any(len(instruction.tokens) not in (1, batch) for instruction, _ in instructions):
        sizes = " and ".join(str(len(instruction.tokens)) for instruction, _ in instructions)
        raise ValueError(f"{node}: the instructions are for {sizes} pictures. Give one for all, or one each.")
    tokens = sum(weight * instruction.tokens for instruction, weight in instructions)
    words = [word.strip() for instruction, weight in instructions if weight for word in instruction.words.split(",") if word.strip()]
    return Instruction(tokens, first.codebook, ", ".join(dict.fromkeys(words)))


def check_codebook(instruction: Instruction, codebook: str, node: str) -> None:
    """Check that an instruction was made with the tokenizer of that fingerprint.

    Raises:
        ValueError: naming the node.
    """
    if instruction.codebook != codebook:
        raise ValueError(f"{node}: the visual instruction was made with another tokenizer (codebook {instruction.codebook[:8]}, expected "
                         f"{codebook[:8]}), whose tokens mean something else. Encode the charts with the tokenizer that this was trained "
                         "with.")


def _encoder_tensors(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.tensors.items() if name.startswith(ENCODER)}
