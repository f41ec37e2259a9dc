"""Nodes that damage good pictures on purpose, to try restorations on and to train with."""

from typing import Any

import torch
from torch import Tensor

from comfy_api.latest import io

from ..degradations import limits, operators, real_esrgan
from ..degradations.recipe import REAL_ESRGAN as REAL_ESRGAN_KIND
from ..degradations.recipe import Recipe, Step, enlarged
from ..model_patches.errors import telling
from ..model_patches.framing import check_finite, check_pictures, resize, rgb_pictures
from .inputs import seed_input

MendDegradation = io.Custom("MEND_DEGRADATION")
DEGRADE, REAL_ESRGAN = "Degrade Image", "Real-ESRGAN Degradation"


def _float(name: str, default: float, step: float, tooltip: str) -> io.Input:
    least, most = limits.RANGES[name]
    return io.Float.Input(name, default=float(default), min=least, max=most, step=step, round=False, tooltip=tooltip)


def _grey_noise() -> io.Input:
    return io.Boolean.Input("grey_noise", default=False, tooltip="The same noise in all three channels, so that it has no colour.")


def _shot(default: float) -> io.Input:
    return _float("shot", default, 0.05, "Strength of the shot noise, which is stronger in bright parts. 1 is 256 photons at white.")


def _method(name: str, default: str, tooltip: str) -> io.Input:
    return io.Combo.Input(name, options=list(limits.OPTIONS[name]), default=default, tooltip=tooltip)


def _noise_and_blur() -> dict[str, list[io.Input]]:
    return {
        "gaussian noise": [_float("sigma", 25, 1, "Deviation of the noise, in levels of 255. 50 is very strong."), _grey_noise()],
        "poisson noise": [_shot(1.0), _grey_noise()],
        "blur": [
            _float("width", 2, 0.1, "Deviation of the blur in pixels, along its angle. 0 switches it off."),
            _float("width_across", 0, 0.1, "Deviation across the angle. 0 makes it the same in all directions."),
            _float("blur_angle", 0, 1, "Direction of the blur in degrees, counter-clockwise from horizontal."),
            io.Combo.Input(
                "profile", options=list(limits.OPTIONS["profile"]), default="gaussian",
                tooltip="gaussian: a bell. generalised: a bell with a form of its own. plateau: flat on top with long tails.",
            ),
            _float("beta", 1, 0.1, "Form of the generalised and plateau profiles. Higher is flatter on top and steeper at the edge."),
        ],
        "ringing": [_float("cutoff", 0.5, 0.01, "Finest detail that is kept, as a fraction of what the pixels can hold.")],
        "motion blur": [
            _float("length", 15, 2, "Length of the movement in pixels."),
            _float("motion_angle", 0, 1, "Direction of the movement in degrees, counter-clockwise from horizontal."),
        ],
        "defocus": [_float("radius", 4, 0.5, "Radius in pixels of the disc that a point becomes.")],
    }  # fmt: skip


def _storage() -> dict[str, list[io.Input]]:
    return {
        "resize": [
            _float("factor", 4, 0.1, "How many times smaller both sides become."),
            _method("method", "area", "How the picture is made smaller. bilinear and bicubic leave jagged edges."),
            _method("up_method", "bicubic", "How it is enlarged again."),
            io.Boolean.Input("keep_size", default=True, tooltip="Enlarge the picture to its old size again. Off leaves it small."),
        ],
        "jpeg": [io.Int.Input("quality", default=30, min=1, max=100, tooltip="JPEG quality. Blocks show below about 40.")],
    }  # fmt: skip


def _light_and_weather() -> dict[str, list[io.Input]]:
    return {
        "haze": [
            _float("density", 1.2, 0.05, "How thick the haze is. 0.6 is a veil, 1.8 is fog."),
            _float("airlight", 0.85, 0.01, "Brightness of the haze itself."),
            io.Image.Input(
                "depth", optional=True,
                tooltip="How far away everything is, as a grey picture. Without it a depth is made up: far at the top, near at the bottom. "
                "The degradation output always makes one up.",
            ),
            io.Combo.Input(
                "white_is", options=["near", "far"], default="near",
                tooltip="What white means in the depth picture. Most depth estimators paint near things white.",
            ),
        ],
        "low light": [
            _float("exposure", 0.25, 0.01, "Brightness that white keeps."),
            _float("gamma", 2.2, 0.1, "How much further the shadows sink."),
            _shot(0.5),
            _float("grain", 5, 0.5, "Deviation of the noise of the sensor, in levels of 255."),
        ],
        "rain": [
            _float("rain", 0.5, 0.01, "How much rain falls."),
            _float("streak_length", 25, 2, "Length of a streak in pixels."),
            _float("streak_angle", 75, 1, "Direction of the streaks in degrees, counter-clockwise from horizontal."),
        ],
        "snow": [
            _float("snow", 0.5, 0.01, "How much snow falls."),
            _float("flake_size", 3, 0.5, "Radius in pixels of the largest flakes."),
        ],
        "fading": [
            _float("fading", 0.7, 0.01, "How far colour and contrast have gone. At 1 only a pale print is left."),
            _float("tint", 0.5, 0.01, "How yellow the paper has become."),
        ],
        "grey": [_float("greyness", 1, 0.01, "How much of the colour is lost. 1 leaves none.")],
    }  # fmt: skip


def _seed() -> io.Input:
    return seed_input("Fixes everything random. Each further picture of a batch uses the next seed.")


def _words_input() -> io.Input:
    return io.String.Input(
        "words", optional=True, force_input=True, tooltip="Words of a degradation before this one, which the new words are appended to."
    )


def _recipe_input() -> io.Input:
    return MendDegradation.Input(
        "degradation", optional=True,
        tooltip="Where image comes from another degradation: its degradation output, which this one is appended to.",
    )  # fmt: skip


def _outputs() -> list[io.Output]:
    return [
        io.Image.Output(display_name="image", tooltip="The damaged picture; transparency is kept, grey becomes RGB."),
        io.String.Output(
            display_name="words", tooltip="What is wrong with it, such as 'noisy, compressed'. Use it in a negative prompt, or append more."
        ),
        MendDegradation.Output(
            display_name="degradation",
            tooltip="The recipe of the whole chain up to here, without masks, depth pictures and seeds. Connect it to Paired Data to train "
            "on the damage that you see.",
        ),
    ]


class DegradeImage(io.ComfyNode):
    """Declares Degrade Image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        settings = {**_noise_and_blur(), **_storage(), **_light_and_weather()}
        return io.Schema(
            node_id="MendDegradeImage",
            display_name=DEGRADE,
            category="restoration/degradation",
            description="Damages a good picture in one chosen way: noise, blur, loss of resolution, JPEG, haze, low light, rain, snow or "
            "fading. Chain several for several kinds of damage. Use it to see what a restoration can do, or to make training pairs.",
            search_aliases=["add noise", "blur", "motion blur", "jpeg artifacts", "haze", "fog", "rain", "snow", "low light", "old photo"],
            inputs=[
                io.Image.Input("image", tooltip="The good picture, of any size; grey, RGB or with transparency."),
                io.DynamicCombo.Input(
                    "kind", options=[io.DynamicCombo.Option(kind, inputs) for kind, inputs in settings.items()],
                    tooltip="What to do to the picture. Each kind has strengths of its own.",
                ),
                _seed(),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="White where the picture is damaged; black parts stay as they are. Not part of the degradation output.",
                ),
                _words_input(),
                _recipe_input(),
            ],
            outputs=_outputs(),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, image: Tensor, kind: dict, seed: int, mask: Tensor | None = None, words: str = "", degradation: Recipe | None = None
    ) -> io.NodeOutput:  # fmt: skip
        """Return the damaged pictures, the words and the recipe."""
        pictures = rgb_pictures(image, DEGRADE)
        settings = dict(kind)
        name = settings.pop("kind")
        recipe = _appended(degradation, name, {key: value for key, value in settings.items() if key not in ("depth", "white_is")}, DEGRADE)
        if name == "haze":
            settings["depth"] = _depth(settings.get("depth"), settings.pop("white_is"), pictures)
        elif name == "resize" and mask is not None and not settings["keep_size"]:
            raise ValueError(f"{DEGRADE}: 'mask' cannot be used where the picture becomes smaller. Turn 'keep_size' on, or disconnect 'mask'.")
        where = None if mask is None else _fitted(_mask_pictures(mask), pictures, "mask")
        degraded, new = operators.degrade(pictures, name, seed, where, **settings)
        return io.NodeOutput(_with_alpha(degraded, image), operators.joined(words, new), recipe)


class RealESRGANDegradation(io.ComfyNode):
    """Declares Real-ESRGAN Degradation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendRealESRGANDegradation",
            display_name=REAL_ESRGAN,
            category="restoration/degradation",
            description="Damages a picture the way most restoration models are trained: blur, resizing, noise and JPEG, twice over, in "
            "strengths drawn by the seed. Use it to compare restorations on realistic damage, or to make training pairs.",
            search_aliases=["real-esrgan", "realesrgan", "second-order degradation", "super resolution", "low quality", "lq"],
            inputs=[
                io.Image.Input("image", tooltip="The good picture, of any size; grey, RGB or with transparency."),
                io.Combo.Input(
                    "preset", options=list(limits.OPTIONS["preset"]), default="mild",
                    tooltip="standard: as Real-ESRGAN was trained; little detail survives. mild: the weaker set of diffusion restorers.",
                ),
                io.Int.Input("scale", default=4, min=1, max=8, tooltip="How many times smaller the picture becomes on the way."),
                io.Boolean.Input(
                    "keep_size", default=True,
                    tooltip="Enlarge the result to the old size again, bicubic, as diffusion restorers want it. Off leaves it small.",
                ),
                _seed(),
                _words_input(),
                _recipe_input(),
            ],
            outputs=_outputs(),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, image: Tensor, preset: str, scale: int, keep_size: bool, seed: int, words: str = "", degradation: Recipe | None = None
    ) -> io.NodeOutput:  # fmt: skip
        """Return the damaged pictures, the words and the recipe."""
        pictures = rgb_pictures(image, REAL_ESRGAN)
        settings = {"preset": preset, "scale": scale, "keep_size": keep_size}
        recipe = _appended(degradation, REAL_ESRGAN_KIND, settings, REAL_ESRGAN)
        degraded, new = real_esrgan.degrade(pictures, preset, scale, seed)
        if keep_size:
            degraded = enlarged(degraded, pictures)
        return io.NodeOutput(_with_alpha(degraded, image), operators.joined(words, new), recipe)


def _appended(before: Recipe | None, kind: str, settings: dict[str, Any], node: str) -> Recipe:
    with telling(f"{node}:"):  # the host checks the ranges of widgets, but not of what is linked to them
        step = Step.of(kind, settings)
    return (before or Recipe()).then(step)


def _with_alpha(degraded: Tensor, image: Tensor) -> Tensor:
    if image.shape[-1] != 4:
        return degraded
    return torch.cat([degraded, resize(image[..., 3:], (degraded.shape[1], degraded.shape[2]))], -1)


def _mask_pictures(mask: Tensor) -> Tensor:
    """Return (B, H, W, 1) in 0..1 of a MASK."""
    if mask.ndim not in (2, 3):
        raise ValueError(f"{DEGRADE}: 'mask' has the shape {tuple(mask.shape)}, not batch x height x width. Connect a MASK output.")
    return mask.reshape(-1, *mask.shape[-2:], 1).clamp(0, 1) if mask.numel() else mask.reshape(0, 1, 1, 1)


def _depth(depth: Tensor | None, white_is: str, pictures: Tensor) -> Tensor | None:
    """Return the distances that a depth picture means, (1 or B, H, W, 1) in 0..1."""
    if depth is None:
        return None
    white = _fitted(depth, pictures, "depth")[..., :3].mean(-1, keepdim=True).clamp(0, 1)
    return 1 - white if white_is == "near" else white


def _fitted(extra: Tensor, pictures: Tensor, name: str) -> Tensor:
    """Resize (1 or B, H', W', C) to the pictures it goes with."""
    check_pictures(extra, DEGRADE, name)
    check_finite(extra, DEGRADE, name)
    if len(extra) not in (1, len(pictures)):
        raise ValueError(f"{DEGRADE}: '{name}' holds {len(extra)} pictures for {len(pictures)} in 'image'. Give one for all, or one each.")
    return resize(extra, (pictures.shape[1], pictures.shape[2])).to(pictures)


NODES = [DegradeImage, RealESRGANDegradation]
