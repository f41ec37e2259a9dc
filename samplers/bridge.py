"""The diffusion bridge that learned prompts walk (arXiv 2604.04924; E-Bridge, arXiv 2604.10983): from a degraded latent to a clean one.

    X_t = (1 - t) ((1 - lam) X0 + lam Y) + t X_T,    lam = t / T0,    t from T0 down to 0

Flow models hold X_t itself, at sigma = t. Others hold x = X_t / (1 - t) = (1 - lam) X0 + lam Y + sigma X_T, at sigma = t / (1 - t). In both
the model's denoised D = x - sigma * output is the same thing, and a flow's velocity is (X_t - D) / t. Training and sampling get their
states from `Path`.
"""

import logging
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import trange

import comfy.samplers

from ..model_patches.host import context_windows, held_mask, is_flow, unit_noise
from ..model_patches.learned_prompt_patch import trained_times
from ..model_patches.lq_condition import LatentCondition
from ..model_patches.published_prompt import T0

NODE = "Bridge Sampler"
LEAST_TIME, STEPS = 1e-4, 20
YPT, E_BRIDGE = "YPT", "E-Bridge"
ESTIMATORS = (YPT, E_BRIDGE)
PUBLISHED_SEED = 42
# What counts as the same T0: the steps of the node's input are 0.01.
SAME_TIME = 0.005
Number = TypeVar("Number", float, Tensor)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Path:
    """The bridge in the coordinates of one model. Sigmas are numbers, or tensors that broadcast with latents.

    Attributes:
        t0: T0, where it begins, in 0..1; below 1 unless the model is a flow.
        flow: whether x = (1 - sigma) x0 + sigma n, as flow models have it, or x = x0 + sigma n.
    """

    t0: float
    flow: bool

    @classmethod
    def of(cls, model_sampling: Any, t0: float = T0) -> "Path":
        """The bridge of a model.

        Raises:
            ValueError: for a T0 that the model's schedule does not reach.
        """
        path = cls(t0, is_flow(model_sampling))
        last = path.time(float(model_sampling.sigma_max))
        if not 0 < t0 <= last * (1 + 1e-4):
            raise ValueError(f"t0 is {t0:g}, and this model knows times above 0 and up to {last:.3g}. "
                             f"Use a smaller one; {T0} is published.")
        return path

    def time(self, sigma: Number) -> Number:
        """t of a sigma."""
        return sigma if self.flow else sigma / (1 + sigma)

    def sigma(self, time: Number) -> Number:
        """Sigma of a t."""
        return time if self.flow else time / (1 - time)

    def shares(self, sigma: Number) -> tuple[Number, Number, Number]:
        """What a state is made of: the factors of X0, of Y and of X_T."""
        time = self.time(sigma)
        signal, lam = (1 - time if self.flow else 1.0), time / self.t0
        return signal * (1 - lam), signal * lam, sigma

    def state(self, sigma: Number, x0: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Return the state at a sigma, between X0 = x0 and the degraded y with the noise X_T."""
        clean, degraded, noisy = self.shares(sigma)
        return clean * x0 + degraded * y + noisy * noise

    def noise(self, sigma: float, x: Tensor, x0: Tensor, y: Tensor) -> Tensor:
        """Return the X_T with which x is the state at a sigma."""
        clean, degraded, noisy = self.shares(sigma)
        return (x - clean * x0 - degraded * y) / noisy

    def x0(self, sigma: Number, denoised: Tensor, y: Tensor, estimator: str) -> Tensor:
        """Return X0 as the model's denoised D implies it.

        YPT: D itself, x_t - t v; the model has learned to leave Y behind: v = (X_T - X0) + (1 - t) / T0 (Y - X0).
        E-Bridge: v = X_T - X0, so that D = C X0 + A Y with A = (1 - t) t / T0 and C = 1 - A.
        """
        if estimator == YPT:
            return denoised
        time = self.time(sigma)
        a = (1 - time) * time / self.t0
        return (denoised - a * y) / (1 - a)


def least_time(model_sampling: Any, path: Path) -> float:
    """Return t_min: the published one, or where the model's schedule ends if it is a discrete one that ends before."""
    return LEAST_TIME if path.flow else max(LEAST_TIME, path.time(float(model_sampling.sigma_min)))


def bridge_sigmas(model_sampling: Any, t0: float = T0, steps: int = STEPS) -> Tensor:
    """Return (steps + 1) sigmas: even times from T0 down to t_min, whatever the model's shift, and 0.

    The model is called once for each but the last.

    Raises:
        ValueError: for a T0 that the model's schedule does not reach.
    """
    path = Path.of(model_sampling, t0)
    times = torch.linspace(t0, min(t0, least_time(model_sampling, path)), steps, dtype=torch.float64)
    return torch.cat([path.sigma(times), times.new_zeros(1)]).float()


@dataclass(frozen=True)
class Bridge:
    """How to walk it.

    Attributes:
        degraded: (B, C, ...) Y as a VAE gives it, one for all or one each; None for the latent that sampling is given.
        estimator: of X0, one of ESTIMATORS.
        keep_noise: the X_T of the start throughout, as E-Bridge does; otherwise the one that each prediction implies, as YPT does.
        seed: of noise that is the same for every picture and run; None for the noise that sampling is given.
        window, overlap: frames of video that the model sees at once, and that neighbours share; 0 for all at once.
    """

    degraded: Tensor | None = None
    estimator: str = YPT
    keep_noise: bool = False
    seed: int | None = None
    window: int = 0
    overlap: int = 0

    def sampler(self) -> comfy.samplers.Sampler:
        """Return it as the host samples; T0 is the first of the sigmas."""
        return comfy.samplers.KSAMPLER(sample_bridge, {"bridge": self})


@torch.no_grad()
def sample_bridge(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict | None = None, callback: Any = None, disable: bool | None = None,
                  bridge: Bridge = Bridge()) -> Tensor:
    """Walk the bridge down the sigmas; a function as the host's samplers are.

    Raises:
        ValueError: when the degraded latent does not fit, and when there is no noise.
    """
    given = dict(extra_args or {})
    base, mask = model.inner_model.inner_model, given.pop("denoise_mask", None)
    steps = sigmas.tolist()
    if steps[0] == 0:
        return x
    sampling = base.model_sampling
    flow = is_flow(sampling)
    path = Path(Path(1.0, flow).time(steps[0]), flow)
    _warn_of_other_times(given.get("model_options", {}), path.t0)
    y, noise = _degraded(model, base, bridge.degraded, x), unit_noise(sampling, _noise(model.noise, bridge.seed)).to(x)
    try:
        given["model_options"] = context_windows(given.get("model_options", {}), base, x, bridge.window, bridge.overlap)
    except ValueError as error:
        raise ValueError(f"{NODE}: {error}") from error
    x, ones = path.state(steps[0], y, y, noise), x.new_ones(len(x))
    for i in trange(len(steps) - 1, disable=disable):
        sigma, following = steps[i], steps[i + 1]
        x0 = path.x0(sigma, model(x, sigmas[i] * ones, denoise_mask=None, **given), y, bridge.estimator)
        if mask is not None:
            # States are made of the held picture from here on, so that nothing else is left to hold.
            x0 = torch.lerp(model.latent_image, x0, held_mask(model, mask, sigmas[i] * ones, given["model_options"]).to(x0))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})
        if following > 0 and not bridge.keep_noise:
            noise = path.noise(sigma, x, x0, y)
        x = path.state(following, x0, y, noise) if following > 0 else x0
    return x


def _degraded(model: Any, base: Any, degraded: Tensor | None, x: Tensor) -> Tensor:
    """Return Y for every row, as the model sees latents."""
    if degraded is None:
        if not model.latent_image.any():
            raise ValueError(f"{NODE}: the latent to sample is empty, and 'degraded' is not connected. "
                             "Encode the damaged picture and connect it to either.")
        return _finite(model.latent_image.to(x), "the latent to sample")
    raw = degraded.unsqueeze(2) if x.ndim == 5 and degraded.ndim == 4 else degraded
    if raw.shape[1] == x.shape[1]:
        raw = base.process_latent_in(raw.float())
    return _finite(LatentCondition("", raw, None, NODE).fitted(x)[:, :-1].to(x), "'degraded'")


def _warn_of_other_times(model_options: dict[str, Any], t0: float) -> None:
    """Say so if prompts were trained on a bridge that begins elsewhere."""
    for node, trained in trained_times(model_options.get("transformer_options", {})):
        if abs(trained - t0) > SAME_TIME:
            log.warning("%s: the prompt of %s was trained from t0 %g, and this run begins at %.3g. Set t0 of Bridge Sigmas to %g if the "
                        "result is poor.", NODE, node, trained, t0, trained)


def _finite(y: Tensor, name: str) -> Tensor:
    if not y.isfinite().all():
        raise ValueError(f"{NODE}: {name} holds NaN or infinite values; if a VAE made them, run it in a higher precision.")
    return y


def _noise(noise: Tensor, seed: int | None) -> Tensor:
    if seed is None:
        if not noise.any():
            raise ValueError(f"{NODE}: the noise is all 0, as DisableNoise and add_noise off give it. The bridge begins at the damaged picture "
                             "under noise; it cannot go on where another sampler stopped. Connect RandomNoise, and all of Bridge Sigmas.")
        return noise
    # One generator a row: a picture gets the same noise alone, in a batch, and as a frame among others.
    return torch.stack([torch.randn(row.shape, generator=torch.Generator().manual_seed(seed)).to(row) for row in noise])
