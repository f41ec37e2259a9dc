"""The reports of comfy-test: what is accepted passes, and anything else fails although comfy-test itself never does."""

import pytest
from comfy_test.orchestration.levels import hazards, warnings

from mend.dev.pack_checks import ACCEPTED, nothing_new

PATH_EDIT = "import sys\nsys.path" ".insert(0, 'folder')\n"  # in two pieces, or the report finds this line
CUDA_AT_IMPORT = "import torch\nSTREAM = torch.cuda.current_stream()\n"


def pack_of(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("level", "files"), [
    (warnings, {"nodes/clean.py": "WIDTH = 1\n"}),
    (warnings, {"training/headless.py": PATH_EDIT}),
    (warnings, {"lab/weights/unet.safetensors": "", "lab/trained/dit.safetensors": ""}),
    (hazards, {"nodes/clean.py": "WIDTH = 1\n"}),
    (hazards, {"dev/bench/size.py": "made = torch.rand(2).half()\n"}),
])  # fmt: skip
def test_what_is_accepted_passes(tmp_path, level, files):
    assert nothing_new("level", level, pack_of(tmp_path, files))


@pytest.mark.parametrize(("level", "files", "said"), [
    (warnings, {"training/headless.py": PATH_EDIT, "nodes/other.py": PATH_EDIT}, "nodes/other.py:2"),
    (warnings, {"lab/unet.safetensors": "", "nodes/unet.safetensors": ""}, "nodes/unet.safetensors"),
    (warnings, {"stray.py": ""}, "stray.py"),
    (hazards, {"nodes/other.py": CUDA_AT_IMPORT}, "nodes/other.py:2"),
])  # fmt: skip
def test_what_is_new_fails_and_is_named(tmp_path, capsys, level, files, said):
    assert not nothing_new("level", level, pack_of(tmp_path, files))
    assert "comfy-test level: FAILED" in (shown := capsys.readouterr().err) and said in shown


def test_what_is_accepted_is_a_check_of_comfy_test():
    assert ACCEPTED.keys() <= {name for level in (warnings, hazards) for *_, name, _, _ in level.CHECKS}
