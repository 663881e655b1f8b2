"""Drawing, captions and the plain image test, without any model."""

import numpy as np
import pytest

from tools.tiny.world import (
    COLOURS,
    LARGE_FROM,
    MARGIN,
    PALETTE,
    RADIUS_RANGE,
    SHAPES,
    SIZE,
    SMALL_BELOW,
    Scene,
    caption,
    draw,
    plain_caption,
    read_image,
    sample_scene,
    wide_image,
)


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def test_palette_is_well_separated():
    colours = np.array(list(PALETTE.values()), float)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=2)
    assert len(COLOURS) >= 8 and len(SHAPES) >= 5
    assert distance[~np.eye(len(colours), dtype=bool)].min() > 90


def test_image_test_reads_drawn_images():
    for scene in scenes(300):
        reading = read_image(draw(scene))
        assert (reading.shape, reading.colour, reading.background) == (scene.shape, scene.colour, scene.background)
        assert reading.iou > 0.7
        assert np.hypot(reading.cx - scene.cx, reading.cy - scene.cy) < 2
        assert abs(reading.radius - scene.radius) < 2


def test_image_test_survives_noise():
    rng = np.random.default_rng(3)
    right = 0
    for scene in scenes(200, seed=1):
        noisy = (draw(scene) + rng.normal(0, 12, (SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)
        reading = read_image(noisy)
        right += (reading.shape, reading.colour, reading.background) == (scene.shape, scene.colour, scene.background)
    assert right >= 196


def test_image_test_refuses_what_is_no_known_shape():
    plain = np.full((SIZE, SIZE, 3), PALETTE["green"], np.uint8)
    assert read_image(plain).shape is None and read_image(plain).background == "green"
    specks = plain.copy()
    specks[np.random.default_rng(0).random((SIZE, SIZE)) < 0.3] = PALETTE["white"]
    assert read_image(specks).shape is None
    stripes = plain.copy()
    stripes[:, 8:12] = stripes[:, 30:34] = stripes[:, 50:54] = PALETTE["red"]
    assert read_image(stripes).shape is None


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_smooth_and_area_is_exact(shape):
    """White on black at two sizes: the area grows with the square of the radius, and edge pixels are grey."""
    small, large = (draw(Scene(shape, "white", "black", 32, 32, r, (0, 0))).astype(float) for r in (12.0, 24.0))
    areas = [(image[..., 0].mean() - 15) / 235 * SIZE**2 for image in (small, large)]
    assert areas[1] / areas[0] == pytest.approx(4, rel=0.03)
    if shape not in ("square", "cross"):  # their edges may fall between pixels
        assert ((large[..., 0] > 40) & (large[..., 0] < 220)).sum() > 20


def test_scenes_stay_inside_the_frame():
    for scene in scenes(500, seed=2):
        reach = scene.radius + MARGIN - 1e-6
        assert reach <= scene.cx <= SIZE - reach and reach <= scene.cy <= SIZE - reach
        assert RADIUS_RANGE[0] <= scene.radius <= RADIUS_RANGE[1]
        assert scene.colour != scene.background


def test_same_seed_same_world():
    first, second = (
        [(draw(s).tobytes(), caption(s, rng)) for s in (sample_scene(rng) for _ in range(20))]
        for rng in (np.random.default_rng(5), np.random.default_rng(5))
    )
    assert first == second


def test_captions_tell_the_truth():
    rng = np.random.default_rng(6)
    for scene in scenes(400, seed=6):
        text = caption(scene, rng)
        assert text.endswith(f"{scene.background} background")
        others = [c for c in COLOURS if c not in (scene.colour, scene.background)]
        assert not set(text.split()) & set(others)
        assert not set(text.split()) & (set(SHAPES) - {scene.shape})
        assert ("small" not in text or scene.radius < SMALL_BELOW) and (
            "large" not in text or scene.radius >= LARGE_FROM
        )
    assert plain_caption("ring", "orange", "red") == "an orange ring on a red background"


def test_wide_images_are_wide():
    rng = np.random.default_rng(8)
    images = np.stack([wide_image(rng) for _ in range(60)])
    assert images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE, 3)
    colours = [len(np.unique(p.reshape(-1, 3), axis=0)) for p in images]
    assert np.median(colours) > 20
