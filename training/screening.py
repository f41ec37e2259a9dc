"""Which samples of a source can be trained on, found out from the headers of their pictures."""

import logging
from collections.abc import Iterable, Sequence

from ..model_patches import host
from .decoding import UnreadableError
from .sources import NODE, LeftOut, Sample, Source

log = logging.getLogger(__name__)


def screen(source: Source, crop: int) -> tuple[list[Sample], list[LeftOut]]:
    """Return the samples that can be read and are large enough, and what is left out; each group of the latter is logged.

    Args:
        source: where they come from.
        crop: side of the square that is cut out of each, in pixels.

    Raises:
        ValueError: when none is left.
    """
    kept, reasons = [], {}
    for sample in source.samples:
        host.interrupt_point()
        found = _flaw(sample, crop)
        if found is None:
            kept.append(sample)
        else:
            reason, detail = found
            reasons.setdefault(reason, []).append(f"{sample.name} ({detail})")
    left_out = [*source.left_out, *(LeftOut(reason, tuple(names)) for reason, names in reasons.items())]
    if not kept:
        raise ValueError(f"{NODE}: nothing can be trained on in {source.place}. {_sentences(left_out)} {_advice(reasons, crop)}")
    for entry in left_out:
        log.warning("%s: %s: %s.", NODE, source.place, entry.text())
    return kept, left_out


def _flaw(sample: Sample, crop: int) -> tuple[str, str] | None:
    """Return why a sample cannot be used, and the detail that belongs to its name."""
    try:
        size = sample.good.size()
        other = size if sample.degraded is None else sample.degraded.size()
    except UnreadableError as error:
        return "cannot be read", str(error)
    if size != other:
        return "differ in size from their degraded picture", f"{_text(size)} and {_text(other)} pixels"
    if size[0] < crop:
        return f"are smaller than the crop of {crop} pixels", f"{_text(size)} pixels"
    return None


def _text(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _sentences(left_out: Iterable[LeftOut]) -> str:
    return " ".join(f"{entry.text()}." for entry in left_out)


def _advice(reasons: Iterable[str], crop: int) -> str:
    if any("crop" in reason for reason in reasons):
        return f"Lower crop below {crop}, or give larger pictures."
    if any("differ" in reason for reason in reasons):
        return "Enlarge the degraded pictures to the size of the good ones first."
    return "Give picture files that are whole."
