"""Train the lab prior: `python dev train-lab [vae] [decoder] [unet] [dit] [pixel]`. Everything follows from seeds; a killed run goes on where it stood."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp import autocast

from . import headless
from .autoencoder import autoencoder_loss, build_autoencoder, crops, encode, finest_scale
from .denoisers import PIXEL, build_dit, build_unet, dropped_ids, flow_loss, sd_alphas_cumprod, unet_loss
from .optimizer import MuonAdam
from .photographs import EVALUATION, evaluation_photograph
from .pictures import cached_pictures
from .resume import Average, load_run, save_run
from .vocabulary import PAD, WORDS, describe

# Denoisers learn on crops of the latents first, which cost a quarter, then on whole ones: (share of the steps before which this holds, side, batch).
DENOISER_STAGES = ((0.7, 16, 16), (1.0, 32, 8))
# The same of pixels.
PIXEL_STAGES = ((0.8, 64, 8), (1.0, 128, 4))
# Share of the UNet's steps after which high noise levels count as much as low ones.
EVEN_FROM = 0.6
WEIGHTS = Path(__file__).parent / "weights"
# Parts in the order in which all of them are trained, and how many steps each takes.
STEPS = {"vae": 3450, "decoder": 1000, "unet": 3700, "dit": 2500, "pixel": 1500}
SAVE_EVERY = 60.0
PREVIEW_PICTURES = 64
# The host's SD3 latent format, which the UNet and the DiT use: process_in(z) = (z - shift) * scale.
LATENT_SCALE, LATENT_SHIFT = 1.5305, 0.0609


def train(name: str, module: nn.Module, loss_of: Callable[[int], tuple[Tensor, Tensor]], run: Path, steps: int, peak: float,
          evaluate: Callable[[Average, int], None], made_with: dict[str, str], missing: bool = False) -> Average:
    """Train to `steps`, saving about once a minute.

    Args:
        name: what the log calls it.
        module: trained in place; its parameters that require gradients are optimised.
        loss_of: step -> (loss, figure for the log).
        run: file that holds the state of the run.
        steps: total steps, over all resumptions.
        peak: highest learning rate.
        evaluate: called with the averaged weights and the steps taken before the run is saved: what is saved has its weights written.
        made_with: what the run depends on besides `steps`; one that was begun with something else is refused.
        missing: whether those weights are not there, so that a run with nothing left to do writes them again.

    Returns:
        The averaged weights.
    """
    average = Average(module)
    optimizer = MuonAdam(module, peak)
    made_with = {"steps": str(steps), **made_with}
    step = load_run(run, module, average, optimizer, made_with)
    if step >= steps and missing:
        evaluate(average, step)
    saved, begun, figures = time.monotonic(), time.monotonic(), []
    for step in range(step, steps):
        torch.manual_seed(step)
        loss, figure = loss_of(step)
        optimizer.step(loss, step, steps)
        average.update(module, step)
        figures.append(figure)
        if time.monotonic() - saved > SAVE_EVERY or step == steps - 1:
            recent = torch.stack(figures[-100:]).mean().item()
            log(f"{name} step {step + 1}/{steps} figure {recent:.4f} {time.monotonic() - begun:.0f} s")
            evaluate(average, step + 1)
            save_run(run, step + 1, module, average, optimizer, made_with)
            saved = time.monotonic()
    return average


def train_autoencoder(cache: Path, device: torch.device, steps: int, count: int, decoder_only: bool = False, missing: bool = False) -> None:
    """Train the VAE and write lab/weights/vae.safetensors; with `decoder_only` the latents of existing weights stay what they are."""
    store = cached_pictures(cache, count)
    model = build_autoencoder().to(device, memory_format=torch.channels_last)
    made_with = {"pictures": str(count)}
    if decoder_only:
        made_with["latents"] = encoder_digest()
        model.load_state_dict(load_file(WEIGHTS / "vae.safetensors"))
        model.taesd_encoder.requires_grad_(False)
    held_out = torch.stack([evaluation_photograph(name) for name in EVALUATION]).to(device)

    def loss_of(step: int) -> tuple[Tensor, Tensor]:
        with half_precision(device):
            finest = 1 if decoder_only else finest_scale(step, steps)
            return autoencoder_loss(model, crops(store, step).to(device, memory_format=torch.channels_last), finest)

    def evaluate(average: Average, done: int) -> None:
        averaged = build_autoencoder().to(device)
        averaged.load_state_dict({**model.state_dict(), **average.shadow})
        with torch.no_grad():
            error = (averaged.taesd_decoder(averaged.taesd_encoder(held_out)).clamp(0, 1) - held_out).square().flatten(1).mean(1)
        log("vae held-out PSNR " + " ".join(f"{v:.2f}" for v in (-10 * error.log10()).tolist()))
        averaged.vae_scale.fill_(LATENT_SCALE)
        averaged.vae_shift.fill_(LATENT_SHIFT)
        save_weights(weights_file("vae"), averaged.state_dict(),
                     {"mend.kind": "lab_vae", "mend.lab.steps": str(done), "mend.preview": json.dumps(preview_colours(averaged, store, device))})

    name = "decoder" if decoder_only else "vae"
    train(name, model, loss_of, cache / f"{name}.run.safetensors", steps, 4e-4 if decoder_only else 1e-3, evaluate, made_with, missing)


def preview_colours(model: nn.Module, store: np.ndarray, device: torch.device) -> tuple[list[list[float]], list[float]]:
    """Fit what the host's previews need: colours in -1..1 as a linear function of the 16 channels that samplers see.

    Returns:
        (16 x 3 factors, 3 biases).
    """
    pictures = torch.from_numpy(store[:PREVIEW_PICTURES].copy()).permute(0, 3, 1, 2).to(device).float() / 255
    with torch.no_grad():
        z = model.taesd_encoder(pictures)
    colours = torch.nn.functional.avg_pool2d(pictures, pictures.shape[-1] // z.shape[-1]) * 2 - 1
    channels = torch.cat([z, torch.ones_like(z[:, :1])], 1).movedim(1, -1).flatten(0, 2)
    solution = torch.linalg.lstsq(channels.double().cpu(), colours.movedim(1, -1).flatten(0, 2).double().cpu()).solution
    rounded = [[round(value, 4) for value in row] for row in solution.tolist()]
    return rounded[:-1], rounded[-1]


def encode_pictures(cache: Path, device: torch.device, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return latents (count, 16, 32, 32) and captions (count, n) of word ids, made once for every encoder and kept in the cache."""
    latents_file = cache / f"latents-{count}-{encoder_digest()}.npy"
    if latents_file.exists():
        return np.load(latents_file, mmap_mode="r"), captions(cache, count)
    store = cached_pictures(cache, count)
    model = build_autoencoder().to(device)
    model.load_state_dict(load_file(WEIGHTS / "vae.safetensors"))
    model.to(memory_format=torch.channels_last)
    rows = []
    for start in range(0, count, 32):
        x = torch.from_numpy(store[start:start + 32]).permute(0, 3, 1, 2).to(device).float() / 255
        with torch.no_grad(), half_precision(device):
            rows.append(encode(model, x).cpu().half().numpy())
        if start % 1024 == 0:
            log(f"encoded {start}/{count}")
    save_array(latents_file, np.concatenate(rows))
    return np.load(latents_file, mmap_mode="r"), captions(cache, count)


def encoder_digest() -> str:
    """Hash of the VAE's encoder: what latents, and all that learns from them, belong to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(WEIGHTS / "vae.safetensors").items()):
        if name.startswith("taesd_encoder."):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:8]


def captions(cache: Path, count: int) -> np.ndarray:
    """Return (count, n) word ids of the training pictures, read once and kept in the cache."""
    file = cache / f"captions-{count}.npy"
    if not file.exists():
        ids = [[WORDS.index(word) for word in describe(image / np.float32(255))] for image in cached_pictures(cache, count)]
        width = max(map(len, ids))
        save_array(file, np.array([row + [PAD] * (width - len(row)) for row in ids], np.int16))
    return np.load(file)


def train_denoiser(kind: str, cache: Path, device: torch.device, steps: int, count: int, missing: bool = False) -> None:
    """Train the UNet, the DiT or the UNet on pixels and write lab/weights/<kind>.safetensors."""
    pixels = kind == "pixel"
    made_with = {"pictures": str(count)}
    if pixels:
        samples, words = cached_pictures(cache, count).transpose(0, 3, 1, 2), captions(cache, count)
    else:
        samples, words = encode_pictures(cache, device, count)
        made_with["latents"] = encoder_digest()
    model = {"unet": build_unet, "dit": build_dit, "pixel": lambda: build_unet(PIXEL)}[kind]().to(device, memory_format=torch.channels_last)
    alphas_cumprod = sd_alphas_cumprod()

    def loss_of(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((2, step))
        side, batch = next((side, batch) for share, side, batch in (PIXEL_STAGES if pixels else DENOISER_STAGES) if step < share * steps)
        rows = rng.integers(len(samples), size=batch)
        top, left = rng.integers(samples.shape[-1] - side + 1, size=2)
        z = torch.from_numpy(samples[np.sort(rows), :, top:top + side, left:left + side]).to(device, memory_format=torch.channels_last).float()
        z = z / 127.5 - 1 if pixels else z
        ids = dropped_ids(words[np.sort(rows)], rng).to(device)
        with half_precision(device):
            return unet_loss(model, z, ids, alphas_cumprod, step >= EVEN_FROM * steps) if kind == "unet" else flow_loss(model, z, ids, pooled_too=kind == "dit")

    def evaluate(average: Average, done: int) -> None:
        tensors = {**model.state_dict(), **average.shadow}
        tensors.pop("net.pos_embed", None)
        renamed = {k.replace("net.", "model.diffusion_model.", 1) if k.startswith("net.") else k: v for k, v in tensors.items()}
        save_weights(weights_file(kind), renamed, {"mend.kind": f"lab_{kind}", "mend.lab.steps": str(done)})

    train(kind, model, loss_of, cache / f"{kind}.run.safetensors", steps, 1.5e-3, evaluate, made_with, missing)


def half_precision(device: torch.device) -> autocast:
    """bfloat16 where it is fast: processors without matrix units for it take ten times as long as in float32."""
    return autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def log(line: str) -> None:
    """Write a line of the training log at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def save_array(file: Path, array: np.ndarray) -> None:
    """Write an array atomically: what a killed run left half written would be taken for whole."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.save(stream, array)
    os.replace(temporary, file)


def weights_file(part: str) -> Path:
    """Where a part's weights are written; the VAE and its decoder share a file."""
    return WEIGHTS / ("vae.safetensors" if part == "decoder" else f"{part}.safetensors")


def save_weights(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write half-precision weights with metadata, atomically."""
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file({k: v.detach().cpu().half().contiguous() for k, v in tensors.items()}, temporary, {"mend.version": "1", **metadata})
    os.replace(temporary, file)


def main() -> None:
    """Train the named parts, or all of them in order."""
    parser = argparse.ArgumentParser(prog="python dev train-lab", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*STEPS, []], help="default: all, in this order")
    parser.add_argument("--cache", type=Path, required=True, help="where pictures, latents and unfinished runs are kept")
    parser.add_argument("--steps", type=int, help="steps of each part, in place of its own number")
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    headless.boot()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = arguments.parts or list(STEPS)
    missing = {part for part in parts if not weights_file(part).exists()}  # asked before the VAE is written, since its decoder has the same file
    for part in parts:
        steps = arguments.steps or STEPS[part]
        if part in ("vae", "decoder"):
            train_autoencoder(arguments.cache, device, steps, arguments.pictures, part == "decoder", part in missing)
        else:
            train_denoiser(part, arguments.cache, device, steps, arguments.pictures, part in missing)


if __name__ == "__main__":
    main()
