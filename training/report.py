"""A run of training in words."""

from pathlib import Path

from .loop import Progress, Result


def duration(seconds: float) -> str:
    """Say a time as people do: "40 s", "12 min", "3 h 5 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def progress_line(progress: Progress) -> str:
    """Say how far a run is, in one line."""
    figures = "".join(f", {name} {value:.4g}" for name, value in progress.figures.items() if len(progress.figures) > 1)
    return f"step {progress.step} of {progress.steps}, loss {progress.loss:.4g}{figures}, {duration(progress.seconds_left)} left"


def report(result: Result, folder: Path | None) -> str:
    """Say what came out, in a few lines."""
    lines = [f"{result.step} steps in {duration(result.seconds)}" + ("" if result.finished else ", not finished")]
    if result.validations:
        first, last = result.validations[0], result.validations[-1]
        lines += [
            f"PSNR of the degraded validation pictures: {last.degraded:.2f} dB",
            f"PSNR of the restored ones: {first.restored:.2f} dB after {first.step} steps, {last.restored:.2f} dB after {last.step}",
        ]
    lost = result.step - len(result.losses)
    if lost:
        lines.append(f"{lost} steps were lost because the gradient was not finite")
    return "\n".join([*lines, *([f"run folder: {folder}"] if folder else [])])
