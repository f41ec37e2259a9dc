"""Settings of F-PAM, the quality prior and the posterior by kind of damage: the published weights, with our starts.

Published weights are those of the reference for low light, haze and noise; colourise and blind are ours.
"""

from .alignment import Alignment
from .quality import Quality

ALIGNMENTS = {
    "blind": Alignment(content=0.2, content_features=0.3, style=0.5, distance_features=2e-3, residual=5e-5, style_rate=4e-5, residual_rate=4e-5),
    "low light": Alignment(content=0.02, content_features=0.3, style=0.8, distance_features=2e-3, residual=5e-5, style_rate=4e-5, residual_rate=4e-5),
    "haze": Alignment(content=0.2, content_features=0.5, style=0.2, distance_features=5e-3, residual=0.0, style_rate=1e-4, residual_rate=2e-5, grid=12),
    "noise": Alignment(content=3.0, content_features=0.002, style=0.001, distance_features=0.0, residual=0.0, style_rate=1e-4, residual_rate=1e-3),
    "colourise": Alignment(content=0.02, content_features=0.3, style=0.8, distance_features=2e-3, residual=0.0, style_rate=4e-5, residual_rate=4e-5,
                           grey=True),
}
QUALITIES = {
    "off": None,
    "low light": Quality(exposure=0.01, exposure_patch=32, exposure_below=0.1, chroma=0.01, chroma_below=0.1),
    "haze": Quality(exposure=0.0, exposure_patch=64, exposure_below=0.15, chroma=0.001, chroma_below=0.15, clarity=0.01, clarity_below=0.15),
}
