"""What the settings of degradations may be: the ranges of the nodes, which recipes from files have to keep too."""

from . import kernels, real_esrgan, resizing

RANGES: dict[str, tuple[float, float]] = {
    "sigma": (0, 255), "shot": (0, 10), "width": (0, 10), "width_across": (0, 10), "blur_angle": (-180, 180), "beta": (0.1, 8),
    "cutoff": (0.05, 1), "length": (1, 61), "motion_angle": (-180, 180), "radius": (0, 30), "factor": (1, 32), "quality": (1, 100),
    "density": (0, 10), "airlight": (0, 1), "exposure": (0.01, 1), "gamma": (1, 5), "grain": (0, 100), "rain": (0, 1),
    "streak_length": (3, 61), "streak_angle": (-180, 180), "snow": (0, 1), "flake_size": (0.5, 20), "fading": (0, 1), "tint": (0, 1),
    "greyness": (0, 1), "scale": (1, 8),
}  # fmt: skip
OPTIONS: dict[str, tuple[str, ...]] = {
    "profile": kernels.SHAPES, "method": resizing.METHODS, "up_method": resizing.METHODS, "preset": tuple(real_esrgan.PRESETS),
}  # fmt: skip
