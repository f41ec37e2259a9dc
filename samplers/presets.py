"""Settings of F-PAM by kind of damage: the published weights, with our starts and, since psi starts close to the truth, a slower rate.

Published weights are those of the reference for low light, haze and noise; colourise and blind are ours.
"""

from .alignment import Alignment

ALIGNMENTS = {
    "blind": Alignment(content=0.2, content_features=0.3, style=0.5, distance_features=2e-3, residual=5e-5, style_rate=4e-5, residual_rate=4e-5),
    "low light": Alignment(content=0.02, content_features=0.3, style=0.8, distance_features=2e-3, residual=5e-5, style_rate=4e-5, residual_rate=4e-5),
    "haze": Alignment(content=0.2, content_features=0.5, style=0.2, distance_features=5e-3, residual=0.0, style_rate=1e-4, residual_rate=2e-5, grid=12),
    "noise": Alignment(content=3.0, content_features=0.002, style=0.001, distance_features=0.0, residual=0.0, style_rate=1e-4, residual_rate=1e-3),
    "colourise": Alignment(content=0.02, content_features=0.3, style=0.8, distance_features=2e-3, residual=0.0, style_rate=4e-5, residual_rate=4e-5,
                           grey=True),
}
