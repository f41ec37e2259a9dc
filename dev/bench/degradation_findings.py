"""What `python dev bench degradation_space` writes: the names of its methods, its tables, and what was asked beside what was found."""

import argparse
from typing import Any

from . import report
from .degradation_oracle import COMPOSITE, TASKS

LATENT, PIXEL, IMAGE = "degradation space, latent form", "degradation space, pixel form", "image space"
WORDS, DEGRADED, CONCATENATION = "text words instead of a chart", "no null subtraction", "concatenation instead of IRB"
SHOWN = "damage always shown under the noise"
DENOISER = "degradation space, pixel-space denoiser"
# What stands for the whole method in composite damage, blind restoration and gains: a prior has one of them.
MAIN = (LATENT, DENOISER)
# By prior, from the table's top to its bottom; transformers have no first convolution to widen.
METHODS_OF = {
    "unet": (LATENT, PIXEL, IMAGE, WORDS, DEGRADED, CONCATENATION, SHOWN),
    "dit": (LATENT, PIXEL, IMAGE, WORDS, DEGRADED, SHOWN),
    "pixel": (DENOISER,),
}
# The forms that the ceilings compare.
FORMS = {"latent": LATENT, "pixel": PIXEL}
TOLD_NOTHING, BLIND, ONE_STEP = "told of nothing", "blind estimate", "one step"
# To what doing nothing is near.
INPUTS = {LATENT: "to_encoded_input", PIXEL: "to_input", IMAGE: "to_encoded_input", DENOISER: "to_input"}

COLUMNS = ("method", "degradation", "prior", "n", "seeds", "parameters", "psnr", "psnr_std", "ssim", "haarpsi", "to_input", "to_encoded_input", "seconds")
MEANS = ("method", "seeds", "psnr", "gain", "ssim", "haarpsi")
CEILINGS = """## What each form of degradation diffusion can reach: `python dev bench degradation_space --ceilings`

The true residual through the lab's VAE, PSNR / SSIM, on four scenes that nothing was trained on: what no model of a form can do better than. The latent
form returns Dec(E(LQ) - y0), which is the clean picture through the VAE; the pixel form returns LQ less the decoded residual. On a model that samples
pixels (the lab's prior "pixel") the latent form has no VAE to pass, and no ceiling.
"""
INTRODUCTION = """## Diffusion in the degradation space on the lab's {prior}: `python dev bench degradation_space --prior {prior}`

A small-scale reproduction on the lab prior (lab/README.md). Every model learned all tasks at once ({tasks}, and haze with noise upon it; several strengths
each), {steps} steps of {batch} crops of {crop} px, at one learning rate of {rate:g}, {change}. Restored from pure noise with {sampling}
Euler steps, no prompt; "one step" answers with the mean of all damage that the picture may have. The chart of the instruction is one that no training
drew; its damage is of the same strength as the picture's, with other noise.
Four scenes, seeds as named; PSNR in dB. to_input is the PSNR of the result to the damaged picture, to_encoded_input to that picture through the VAE: how
much nothing was done. The gain is over the damaged picture.
"""
PIXELS = """This prior samples pixels: nothing passes a VAE, and the latent form is taken of pixels. Of what learns, its own weights do at a tenth of the rate.
"""


def evidence(own: list[dict[str, Any]], prior: str, options: argparse.Namespace, better: dict[str, str], settings: dict[str, Any]) -> str:
    """A prior's section: what was asked, means, and every row.

    Args:
        own: its rows.
        prior: one of METHODS_OF.
        options: of the command.
        better: by degradation, the form whose ceiling is higher.
        settings: what INTRODUCTION says of training and sampling.
    """
    missing = [method for method in METHODS_OF[prior] if method not in {row["method"] for row in own}]
    introduction = INTRODUCTION.format(prior=prior, tasks=", ".join(TASKS), steps=options.steps, **settings)
    introduction += PIXELS if prior == "pixel" else ""
    if missing:
        introduction += f"Not measured yet: {'; '.join(missing)}.\n"
    means = report.markdown(averages(own), MEANS)
    return "\n".join([introduction, *asked(own, better), "", "Means over the seven tasks:", "", means, "Task by task:", "", report.markdown(own, COLUMNS)])


def averages(own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over all tasks of the methods that have them all, and their gain over the damaged picture."""
    found, base = [], {row["degradation"]: row["psnr"] for row in own if row["method"] == "degraded"}
    for method in dict.fromkeys(row["method"] for row in own):
        rows = [row for row in own if row["method"] == method and row["degradation"] in TASKS]
        if len(rows) == len(TASKS):
            figures_of = {name: sum(row[name] for row in rows) / len(rows) for name in ("psnr", "ssim", "haarpsi")}
            gain = sum(row["psnr"] - base[row["degradation"]] for row in rows) / len(rows)
            found.append({"method": method, "seeds": rows[0]["seeds"], "gain": gain, **figures_of})
    return found


def asked(own: list[dict[str, Any]], better: dict[str, str]) -> list[str]:
    """What was expected of the method beside what was found, one line each; only what the rows can answer.

    Args:
        own: rows of one prior.
        better: by degradation, the form ("latent", "pixel") whose ceiling is higher.
    """
    psnr = {(row["method"], row["degradation"]): row["psnr"] for row in own}
    whole = {method for method, _ in psnr if all((method, name) in psnr for name in TASKS)}
    lines = _over_image_space(psnr, whole, better)
    for method, to in INPUTS.items():
        lines += _doing_nothing(own, method, to)
    for main in MAIN:
        lines = [*_over_damage(psnr, whole, main), *lines, *_blind(psnr, whole, main), *_composite(psnr, main)]
    return lines


def _over_damage(psnr: dict[tuple[str, str], float], whole: set[str], main: str) -> list[str]:
    if main not in whole:
        return []
    gains = {name: psnr[main, name] - psnr["degraded", name] for name in ("noise 50", "haze", "low light")}
    return [f"- Over the damaged picture, 3 dB expected: {_listed(gains, '+.1f')}."]


def _over_image_space(psnr: dict[tuple[str, str], float], whole: set[str], better: dict[str, str]) -> list[str]:
    lines = []
    if {LATENT, IMAGE} <= whole:
        over = {name: psnr[LATENT, name] - psnr[IMAGE, name] for name in TASKS}
        lines.append(f"- Latent form over image space, 1.5 dB expected in the mean: {sum(over.values()) / len(TASKS):+.2f} ({_listed(over, '+.1f')}).")
    if {LATENT, PIXEL, IMAGE} <= whole:
        chosen = {f"{name} {better[name]}": psnr[FORMS[better[name]], name] - psnr[IMAGE, name] for name in TASKS}
        lines.append("- For each damage the form whose ceiling is higher, over image space, 1.5 dB expected in the mean: "
                     f"{sum(chosen.values()) / len(TASKS):+.2f} ({_listed(chosen, '+.1f')}).")
    return lines


def _doing_nothing(own: list[dict[str, Any]], method: str, to: str) -> list[str]:
    lines = []
    rows = [row for row in own if row["method"].startswith(f"{method}, told of") and row["degradation"] in TASKS]
    for label in (TOLD_NOTHING, "the wrong damage"):
        near = {row["degradation"]: row[to] for row in rows if row["method"].endswith(TOLD_NOTHING) == (label == TOLD_NOTHING)}
        if near:
            wanted = "" if method == IMAGE else ", 30 dB expected"
            told = label if label == TOLD_NOTHING else f"told of {label}"
            lines.append(f"- {method[0].upper()}{method[1:]}, {told}, {to}{wanted}: {_listed(near, '.1f')}.")
    return lines


def _blind(psnr: dict[tuple[str, str], float], whole: set[str], main: str) -> list[str]:
    if f"{main}, {BLIND}" not in whole:
        return []
    true = {name: (main, name) for name in TASKS} | {COMPOSITE: (f"{main}, told of {COMPOSITE}", COMPOSITE)}
    blind = {name: (f"{main}, {BLIND}", name) for name in true}
    lost = {name: psnr[blind[name]] - psnr[key] for name, key in true.items() if {key, blind[name]} <= psnr.keys()}
    return [f"- Blind beside the true instruction, at most 1 dB less expected: {_listed(lost, '+.1f')}."]


def _composite(psnr: dict[tuple[str, str], float], main: str) -> list[str]:
    keys = {name: (f"{main}, told of {name}", COMPOSITE) for name in (COMPOSITE, "haze", "noise 25")}
    told = [f"{psnr[key]:.1f} told of {name}" for name, key in keys.items() if key in psnr]
    return [f"- A picture with {COMPOSITE}, at {psnr['degraded', COMPOSITE]:.1f} dB: {', '.join(told)}."] if told else []


def _listed(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())
