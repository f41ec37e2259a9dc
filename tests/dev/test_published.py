"""The pack's own weights are stored in half precision and read back in full."""

import os
import stat

import torch

from mend.dev.bench.published import full_weights, store, weights_of
from mend.model_patches.weights_file import Weights


class Learned:
    """What a trainee has to say of itself."""

    kind, family, config = "restoration_adapter", "SD1.5", {"rank": 4}

    def state_dict(self):
        return {"network.weight": torch.nn.Parameter(torch.tensor([[1 / 3, 2.0]])), "residual.deviation": torch.tensor(0.1)}


def test_what_is_stored_is_read_back(tmp_path):
    file = tmp_path / "own.safetensors"
    store(Weights("restoration_adapter", "SD1.5", {"rank": 9}, {"other": torch.zeros(2)}), file)
    store(weights_of(Learned()), file)
    found = full_weights(file)
    assert (found.kind, found.family, found.config, found.name) == ("restoration_adapter", "SD1.5", {"rank": 4}, file.name)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in found.tensors.values())
    assert torch.equal(found.tensors["network.weight"], torch.tensor([[1 / 3, 2.0]]).half().float())
    assert float(found.tensors["residual.deviation"]) == float(torch.tensor(0.1)), "single numbers keep their precision"
    assert os.name != "posix" or stat.S_IMODE(file.stat().st_mode) == 0o644
