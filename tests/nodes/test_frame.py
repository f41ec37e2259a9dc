"""MendFrameImage and MendUnframeImage: what is framed comes back unchanged, and what cannot be framed is refused by name."""

import pytest
import torch

from mend.model_patches import framing
from mend.nodes.frame import FrameImage, UnframeImage

SHAPES = [(1, 1, 1, 3), (1, 7, 513, 3), (1, 64, 64, 3), (1, 33, 50, 1), (1, 33, 50, 4), (3, 20, 31, 3), (3, 20, 31, 4), (1, 2, 90, 4)]


def picture(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def frame(image, scale=1.0, multiple=16):
    return FrameImage.execute(image, scale, multiple).result


def unframe(image, frame):
    return UnframeImage.execute(image, frame).result[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("multiple", [8, 16, 64])
def test_round_trip_is_exact(shape, multiple):
    image = picture(*shape)
    kept = image.clone()
    framed, info = frame(image, multiple=multiple)
    assert framed.shape[0] == shape[0] and framed.shape[3] == 3
    assert framed.shape[1] % multiple == framed.shape[2] % multiple == 0
    assert framed.shape[1] - shape[1] < multiple and framed.shape[2] - shape[2] < multiple
    expected = image.expand(-1, -1, -1, 3) if shape[3] == 1 else image
    assert torch.equal(unframe(framed, info), expected)
    assert torch.equal(image, kept)


def test_round_trip_through_the_host(run_prompt):
    image = picture(2, 7, 513, 4)
    prompt = {
        "1": {"class_type": "TestGiven", "inputs": {"name": "image"}},
        "2": {"class_type": "MendFrameImage", "inputs": {"image": ["1", 0], "scale": 1.0, "multiple": 16}},
        "3": {"class_type": "MendUnframeImage", "inputs": {"image": ["2", 0], "frame": ["2", 1]}},
        "4": {"class_type": "TestCapture", "inputs": {"value": ["2", 0]}},
        "5": {"class_type": "TestCapture", "inputs": {"value": ["3", 0]}},
    }
    values = run_prompt(prompt, given={"image": image}).values
    assert values["4"].shape == (2, 16, 528, 3)
    assert torch.equal(values["5"], image)


def test_padding_mirrors_the_picture_on_all_sides():
    framed, info = frame(picture(1, 10, 10, 3))
    assert info.offset == (3, 3)
    inner = framed[:, 3:13, 3:13]
    assert torch.equal(framed[:, :3, 3:13], inner[:, 1:4].flip(1))
    assert torch.equal(framed[:, 3:13, 13:], inner[:, :, -4:-1].flip(2))


def test_too_small_to_mirror_repeats_the_edge():
    image = picture(1, 1, 1, 3)
    assert torch.equal(frame(image)[0], image.expand(1, 16, 16, 3))


@pytest.mark.parametrize(("scale", "size"), [(4.0, (80, 124)), (0.5, (10, 16)), (1.5, (30, 46))])
def test_scale_changes_the_size_and_alpha_follows(scale, size):
    image = torch.full((1, 20, 31, 4), 0.25)
    framed, info = frame(image, scale)
    out = unframe(framed, info)
    assert out.shape == (1, *size, 4)
    torch.testing.assert_close(out, torch.full_like(out, 0.25))


def test_scaling_stays_in_range_and_does_not_depend_on_the_batch():
    image = (picture(2, 16, 16, 3) > 0.5).float() * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
    both = frame(image, 3.0)[0]
    assert both[0].max() <= 1 and both[1].max() <= 0.5 and both.min() >= 0
    assert torch.equal(both[1:], frame(image[1:], 3.0)[0])


def test_scaling_keeps_more_than_8_bits():
    fine = torch.linspace(0, 0.01, 64).view(1, 1, 64, 1).expand(1, 64, 64, 3)
    assert len(frame(fine, 2.0)[0].unique()) > 30


def test_enlarged_results_fit():
    image = picture(1, 20, 31, 4)
    framed, info = frame(image)
    out = unframe(framed.repeat_interleave(2, 1).repeat_interleave(2, 2), info)
    assert out.shape == (1, 40, 62, 4)
    assert torch.equal(out[:, ::2, ::2, :3], image[..., :3])


def test_alpha_is_repeated_for_a_longer_batch():
    image = picture(2, 20, 31, 4)
    framed, info = frame(image)
    out = unframe(framed.repeat(2, 1, 1, 1)[:3], info)
    assert torch.equal(out[..., 3], image[[0, 1, 0], ..., 3])
    assert torch.equal(unframe(framed[:1], info), image[:1])


def test_opaque_alpha_is_left_out():
    image = torch.cat([picture(2, 20, 31, 3), torch.ones(2, 20, 31, 1)], -1)
    assert torch.equal(unframe(*frame(image)), image[..., :3])


def test_half_precision_pictures():
    image = picture(1, 7, 9, 4).half()
    framed, info = frame(image, 2.0)
    assert framed.dtype == torch.float16 and unframe(framed, info).dtype == torch.float16


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(0, 8, 8, 3), "Frame Image: 'image' holds no pixels"),
        (torch.zeros(1, 0, 8, 3), "Frame Image: 'image' holds no pixels"),
        (torch.zeros(1, 8, 8, 2), "Frame Image: 'image' has 2 channels"),
        (torch.zeros(8, 8, 3), "Frame Image: 'image' has the shape"),
        (torch.stack([torch.zeros(8, 8, 3), torch.full((8, 8, 3), float("nan"))]), "Frame Image: 'image' has NaN or infinite .* picture 2 of 2"),
        (torch.full((1, 8, 8, 3), float("inf")), "Frame Image: 'image' has NaN or infinite"),
    ],
)
def test_unusable_pictures_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        frame(image)


def test_too_large_a_scale_is_refused():
    with pytest.raises(ValueError, match="Frame Image: 'image' would be .* at scale 8, .* Lower 'scale'"):
        frame(torch.zeros(1, 8, 4096, 3), 8.0)


@pytest.mark.parametrize("size", [(32, 64), (48, 64), (24, 32), (16, 16)])
def test_pictures_of_another_size_are_refused(size):
    _, info = frame(picture(1, 20, 31, 3))
    with pytest.raises(ValueError, match=rf"Unframe Image: 'image' is {size[1]} x {size[0]} pixels, but this frame .* 32 x 32"):
        unframe(torch.zeros(1, *size, 3), info)


def test_host_names_the_node_in_the_error(run_prompt):
    prompt = {
        "1": {"class_type": "TestGiven", "inputs": {"name": "image"}},
        "2": {"class_type": "MendFrameImage", "inputs": {"image": ["1", 0], "scale": 1.0, "multiple": 16}},
        "3": {"class_type": "TestCapture", "inputs": {"value": ["2", 0]}},
    }
    result = run_prompt(prompt, given={"image": torch.full((1, 8, 8, 3), float("nan"))}, check=False)
    assert not result.success and "Frame Image: 'image' has NaN" in result.error_text()


def test_pad_to_is_the_identity_where_nothing_is_missing():
    image = picture(2, 16, 32, 3)
    assert torch.equal(framing.pad_to(image, (16, 32)), image)
