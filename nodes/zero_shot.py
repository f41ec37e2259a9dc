"""LD-RPS, zero-shot restoration by recurrent posterior sampling in latent space, as parts that chain (arXiv 2507.00790)."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from comfy_api.latest import io

from ..model_patches.errors import telling
from ..model_patches.framing import rgb_pictures
from ..model_patches.host_vae import check_latent_channels
from ..model_patches.perceptual import vgg16_weights
from ..samplers.alignment import Alignment
from ..samplers.first_guess import first_guess, known_degradation
from ..samplers.guided_model import GuidedModel
from ..samplers.matched_start import MatchedStart, latent_noise
from ..samplers.posterior_guidance import NODE as GUIDANCE
from ..samplers.posterior_guidance import Posterior
from ..samplers.presets import ALIGNMENTS
from ..samplers.quality import Quality
from ..samplers.recurrence import NODE as RENOISING
from ..samplers.recurrence import RecurrentSampler
from .inputs import seed_input, usable_mask

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import Sampler
    from comfy.sd import VAE

AlignmentSocket = io.Custom("MEND_ALIGNMENT")
QualitySocket = io.Custom("MEND_QUALITY")

OF_PRESET = "-1 keeps the preset's value."
BELOW = "Acts once sampling has come down to this model timestep (of 1000)."


def _weight(name: str, most: float, step: float, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=-1.0, min=-1.0, max=most, step=step, round=False, advanced=True, tooltip=f"{tooltip} {OF_PRESET}")


def _count(name: str, most: int, tooltip: str) -> io.Input:
    return io.Int.Input(name, default=-1, min=-1, max=most, advanced=True, tooltip=f"{tooltip} {OF_PRESET}")


class FPAMAlignment(io.ComfyNode):
    """Declares F-PAM Alignment."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendFPAMAlignment",
            display_name="F-PAM Alignment",
            category="restoration/zero-shot",
            description="Choose what is wrong with the picture. During sampling a small network learns what this damage does to a clean "
            "picture, so that the restoration can be compared with the picture you have.",
            search_aliases=["fpam", "alignment", "ld-rps", "denoise photo", "dehaze", "low light", "colorize", "blind restoration"],
            inputs=[
                io.Combo.Input(
                    "preset", options=list(ALIGNMENTS), default="blind",
                    tooltip="noise: grain and speckle. low light: too dark. haze: fog and veil. colourise: grey photographs. blind: "
                    "anything else.",
                ),
                _weight("content", 10, 0.01, "How much the learned damage must keep the content of the picture."),
                _weight("content_features", 10, 0.001, "The same, measured in perceptual features."),
                _weight("style", 10, 0.001, "How much its result must look like the damaged picture (discriminator D1)."),
                _weight("distance_features", 1, 0.0001, "Perceptual part of the distance to the damaged picture; the pixel part weighs 1."),
                _weight("residual", 1, 0.00001, "Weight of the discriminator D2, which compares what was removed."),
                _weight("rate", 0.1, 0.00001, "Learning rate of F-PAM."),
                _weight("style_rate", 0.1, 0.00001, "Learning rate of D1."),
                _weight("residual_rate", 0.1, 0.00001, "Learning rate of D2."),
                _count("updates", 100, "Training steps of F-PAM at each sampling step, at least 1 with a random start."),
                _count(
                    "warmup", 1000, "Training steps before guidance begins, when sampling starts late, at least 1 with a random start."
                ),
                _count("crop", 2048, "Side in pixels of the crops it trains on."),
                _count("grid", 64, "Rows and columns of the damage map: 1 for damage that is the same everywhere, more for haze."),
                io.Combo.Input(
                    "start", options=["aligned", "random"], default="aligned", advanced=True,
                    tooltip="aligned: begin at the damage the quality prior implies. random: begin knowing nothing, as published (needs "
                    "hundreds of steps).",
                ),
            ],
            outputs=[AlignmentSocket.Output(display_name="alignment", tooltip="For Apply Posterior Guidance and First Guess.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, preset: str, start: str, **overrides: float) -> io.NodeOutput:
        """Return the preset with what the user has set."""
        changes = {name: value for name, value in overrides.items() if value >= 0}
        at_least_one = {"crop", "grid"}
        if start == "random":
            changes["coarse"] = 1
            changes.setdefault("grid", 1)  # the paper has one factor a channel
            at_least_one |= {"updates", "warmup"}  # what knows nothing yet must not guide
        for name in changes.keys() & at_least_one:
            changes[name] = max(1, changes[name])
        return io.NodeOutput(replace(ALIGNMENTS[preset], start=start, **changes))


class QualityPrior(io.ComfyNode):
    """Declares Quality Prior."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendQualityPrior",
            display_name="Quality Prior",
            category="restoration/zero-shot",
            description="Say what a good photograph looks like, whatever it shows: well lit, free of a colour cast, free of haze. Set a "
            "weight to 0 to leave that side alone.",
            search_aliases=["quality", "exposure", "brightness", "white balance", "dehaze", "dark channel", "ld-rps"],
            inputs=[
                io.Float.Input(
                    "exposure", default=0.001, min=0, max=10, step=0.001, round=False,
                    tooltip="Weight of good exposure. Above 0, pictures are brought towards the target.",
                ),
                io.Float.Input(
                    "exposure_target", default=0.45, min=0.05, max=0.95, step=0.01, tooltip="Brightness that counts as well exposed."
                ),
                io.Float.Input(
                    "chroma", default=0.0, min=0, max=10, step=0.001, round=False,
                    tooltip="Weight of neutral colour: pulls the mean colour towards grey. Leave at 0 for pictures that are meant to be "
                    "one colour.",
                ),
                io.Float.Input(
                    "clarity", default=0.0, min=0, max=10, step=0.001, round=False,
                    tooltip="Weight of clear air. Above 0, the veil of haze is lifted (dark channel prior).",
                ),
                io.Int.Input(
                    "exposure_patch", default=128, min=1, max=1024, advanced=True,
                    tooltip="Side in pixels of the neighbourhoods whose brightness is judged.",
                ),
                io.Int.Input("exposure_below", default=100, min=0, max=1000, advanced=True, tooltip=f"Exposure. {BELOW}"),
                io.Int.Input("chroma_below", default=100, min=0, max=1000, advanced=True, tooltip=f"Chroma. {BELOW}"),
                io.Int.Input("clarity_below", default=150, min=0, max=1000, advanced=True, tooltip=f"Clarity. {BELOW}"),
            ],
            outputs=[QualitySocket.Output(display_name="quality", tooltip="For Apply Posterior Guidance and First Guess.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, exposure: float, exposure_target: float, chroma: float, clarity: float, exposure_patch: int, exposure_below: int,
        chroma_below: int, clarity_below: int,
    ) -> io.NodeOutput:  # fmt: skip
        """Return the constraints, with model timesteps as fractions of the schedule."""
        return io.NodeOutput(Quality(exposure=exposure, exposure_target=exposure_target, exposure_patch=exposure_patch,
                                     exposure_below=exposure_below / 1000, chroma=chroma, chroma_below=chroma_below / 1000,
                                     clarity=clarity, clarity_below=clarity_below / 1000))


class FirstGuess(io.ComfyNode):
    """Declares First Guess."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendFirstGuess",
            display_name="First Guess",
            category="restoration/zero-shot",
            description="Correct brightness and undo haze, as the quality prior asks, without any model; grain is smoothed so that it is not "
            "brightened too. Encode the result for sampling to start from; lost detail is left to the model.",
            search_aliases=["auto levels", "brighten", "dehaze", "tone", "exposure fix", "ld-rps"],
            inputs=[
                io.Image.Input("degraded", tooltip="The damaged picture."),
                AlignmentSocket.Input("alignment", tooltip="From F-PAM Alignment: the kind of damage."),
                QualitySocket.Input(
                    "quality", optional=True, tooltip="From Quality Prior. Without it the picture is passed on unchanged."
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The guess, as large as the input.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, degraded: Tensor, alignment: Alignment, quality: Quality | None = None) -> io.NodeOutput:
        """Return the guesses, each made from its own picture alone."""
        pictures = rgb_pictures(degraded, "First Guess", "degraded").float().movedim(-1, 1).split(1)
        guesses = [first_guess(y, known_degradation(y, quality, alignment.grid, alignment.grey)) for y in pictures]
        return io.NodeOutput(torch.cat(guesses).movedim(1, -1))


class ApplyPosteriorGuidance(io.ComfyNode):
    """Declares Apply Posterior Guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendApplyPosteriorGuidance",
            display_name=GUIDANCE,
            category="restoration/zero-shot",
            description="Make a model restore a picture without training: while it samples, what it predicts is kept consistent with the "
            "damaged picture. Written for SD, SDXL, SD3, FLUX and single WAN frames; tried on tiny models of these kinds, measured on the "
            "lab's.",
            search_aliases=["restore", "zero-shot", "ld-rps", "posterior sampling", "dps", "denoise", "enhance", "fix photo"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Vae.Input("vae", tooltip="The VAE of that model; its decoder compares predictions with your picture."),
                io.Image.Input(
                    "degraded",
                    tooltip="The damaged picture itself, not the first guess, of the same size as the picture you encoded: one for all latents, "
                    "or one each.",
                ),
                AlignmentSocket.Input("alignment", tooltip="From F-PAM Alignment."),
                QualitySocket.Input(
                    "quality", optional=True, tooltip="From Quality Prior, to mend brightness, colour cast or haze too."
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White where the damaged picture is to be followed; black parts are left to the model."
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=100.0, step=0.05, round=False,
                    tooltip="How closely to follow the damaged picture. Lower when damage shows through, higher when the result drifts "
                    "away. 0 switches it off.",
                ),
                io.Int.Input(
                    "t1", default=700, min=0, max=1000,
                    tooltip="Guidance begins when sampling has come down to this model timestep (of 1000); before it F-PAM only learns.",
                ),
                io.Int.Input(
                    "steps", default=2, min=1, max=50, advanced=True,
                    tooltip="Solver steps at each guided sampling step, each one pass back through the VAE decoder.",
                ),
                io.Int.Input(
                    "every", default=1, min=1, max=50, advanced=True,
                    tooltip="Guide every k-th sampling step and repeat the last correction in between: faster.",
                ),
                io.Float.Input(
                    "noise", default=0.0, min=0.0, max=1.0, step=0.001, round=False, advanced=True,
                    tooltip="Grain in the damaged picture: standard deviation, with pixel values from 0 to 1 (50 of 255 is 0.196). 0 measures it.",
                ),
                io.Boolean.Input(
                    "companion", default=False, advanced=True,
                    tooltip="Sample a second, free picture alongside that shows F-PAM clean statistics, as published. Twice the model's "
                    "work.",
                ),
                io.Combo.Input(
                    "gradient", options=["prediction", "through model"], default="prediction", advanced=True,
                    tooltip="prediction: back through the VAE only. through model: also through the denoiser; exact, slower, needs far "
                    "more memory, no quantised models.",
                ),
                io.Combo.Input(
                    "update", options=["solve", "published"], default="solve", advanced=True,
                    tooltip="solve: find the best compromise of model and picture. published: one fixed gradient step, as in the reference "
                    "(hundreds of steps).",
                ),
                io.Float.Input(
                    "published_scale", default=40000.0, min=0.0, max=1e7, step=100.0, advanced=True,
                    tooltip="Scale s of the published update.",
                ),
                io.Int.Input(
                    "tile", default=96, min=16, max=1024, advanced=True,
                    tooltip="Side in latent pixels above which the decoder works on overlapping tiles. Lower it when memory runs out.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model under guidance. Sample it like any other.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: "ModelPatcher", vae: "VAE", degraded: Tensor, alignment: Alignment, strength: float, t1: int, steps: int, every: int,
        noise: float, companion: bool, gradient: str, update: str, published_scale: float, tile: int, quality: Quality | None = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        """Return the model under guidance."""
        check_latent_channels(vae, model.model, GUIDANCE)
        pictures, mask = rgb_pictures(degraded, GUIDANCE, "degraded"), usable_mask(mask, GUIDANCE)
        through_model, published = gradient == "through model", update == "published"
        settings = Posterior(strength=strength, guide_below=t1 / 1000, steps=steps, every=every, noise=noise, companion=companion,
                             through_model=through_model, published=published, published_scale=published_scale, tile=tile)
        vgg = None
        if alignment.content_features or alignment.distance_features:
            with telling(f"{GUIDANCE}:"):
                vgg = vgg16_weights()
            logging.info("Mend: perceptual features come from %s", "VGG16" if vgg else "the VAE encoder")
        return io.NodeOutput(GuidedModel(settings, alignment, quality, vae, pictures, mask, vgg).attach(model))


class NoiseMatchedStart(io.ComfyNode):
    """Declares Noise-Matched Start."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendNoiseMatchedStart",
            display_name="Noise-Matched Start",
            category="restoration/zero-shot",
            description="Begin sampling at the noise that the picture already has, instead of hiding it under more. Measures the grain, "
            "finds the place in the model's schedule where it belongs, and adds only what is missing.",
            search_aliases=["sigmas", "denoise", "noise level", "schedule", "img2img", "start at step", "grain", "zero-shot"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample."),
                io.Vae.Input("vae", tooltip="The VAE that encodes the picture."),
                io.Image.Input("image", tooltip="The picture that is encoded for sampling: the damaged one, or that of First Guess."),
                io.Int.Input("steps", default=4, min=1, max=1000, tooltip="How many steps lead from there to the clean picture."),
                io.Float.Input(
                    "at_least", default=0.1, min=0.01, max=0.93, step=0.01,
                    tooltip="Share of noise to start from even if the picture has less, like denoise: the more, the more the model may "
                    "change.",
                ),
                seed_input("Seed of the noise that is added.", name="noise_seed"),
            ],
            outputs=[
                io.Noise.Output(display_name="noise", tooltip="For SamplerCustomAdvanced: what the picture lacks."),
                io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustomAdvanced: the schedule from there."),
                io.Float.Output(display_name="start", tooltip="The share of noise that it starts from, 0 to 1."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: "ModelPatcher", vae: "VAE", image: Tensor, steps: int, at_least: float, noise_seed: int) -> io.NodeOutput:
        """Return noise, schedule and where it starts."""
        if not (0 < at_least < 1 and steps >= 1):  # the host checks the ranges of widgets, but not of what is linked to them
            raise ValueError(
                f"Noise-Matched Start: 'at_least' is {at_least:g} and 'steps' {steps}; give a share between 0 and 1, and one step or more."
            )
        check_latent_channels(vae, model.model, "Noise-Matched Start")
        pictures = rgb_pictures(image, "Noise-Matched Start")
        start = MatchedStart.of([latent_noise(model, vae, picture) for picture in pictures.split(1)], at_least, noise_seed)
        sigmas = start.sigmas(model.get_model_object("model_sampling"), steps)
        return io.NodeOutput(start, sigmas, start.share)


class RecurrentRenoising(io.ComfyNode):
    """Declares Recurrent Re-noising."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendRecurrentRenoising",
            display_name=RENOISING,
            category="restoration/zero-shot",
            description="Run a sampler again on its own result: noise it part of the way, sample, repeat, as LD-RPS does. On the lab's model "
            "one to three extra rounds cost 0.1 to 0.9 dB; try 0 first. Works with any model.",
            search_aliases=["recurrent", "refine", "renoise", "multi pass", "iterate sampler", "ld-rps"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler to repeat."),
                io.Int.Input(
                    "rounds", default=0, min=0, max=20,
                    tooltip="Extra passes after the first. 0 is the sampler alone; each more changes more, for better or worse.",
                ),
                io.Float.Input(
                    "gamma", default=0.3, min=0.01, max=0.99, step=0.01,
                    tooltip="How far each pass goes back, as a fraction of the schedule: low keeps more, high changes more. The paper "
                    "uses 0.5.",
                ),
                io.Vae.Input(
                    "vae", optional=True,
                    tooltip="When connected, each pass decodes and encodes its start again, as the paper words it; slower.",
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, sampler: "Sampler", rounds: int, gamma: float, vae: "VAE | None" = None) -> io.NodeOutput:
        """Return the sampler that repeats."""
        return io.NodeOutput(RecurrentSampler(sampler, rounds, gamma, vae))


NODES = [FPAMAlignment, QualityPrior, FirstGuess, NoiseMatchedStart, ApplyPosteriorGuidance, RecurrentRenoising]
