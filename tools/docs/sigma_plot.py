"""Draws docs/images/sigmas.png: the noise levels of 25 steps at 1024², for each option of the schedule.

python -m tools.docs.sigma_plot
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from chroma_core.sampling.schedule import sampling_sigmas

ROOT = Path(__file__).resolve().parents[2]
STEPS, TOKENS = 25, 4096
CURVES = {
    "linear, dynamic shift (default)": ({}, "#1f5fbf"),
    "tail bias 0.5": ({"tail_bias": 0.5}, "#d1701f"),
    "tail bias 1": ({"tail_bias": 1.0}, "#a8321c"),
    "beta, dynamic shift": ({"spacing": "beta"}, "#2b8a4b"),
    "beta, no shift": ({"spacing": "beta", "flow_shift": "none"}, "#7a4bb0"),
    "linear, no shift": ({"flow_shift": "none"}, "#777777"),
}
SCALE = 2  # drawn twice as large, then reduced, for smooth lines
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 420, 46, 16, 16, 40


def main() -> None:
    size = WIDTH * SCALE, HEIGHT * SCALE
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13 * SCALE)

    def place(step: float, sigma: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / STEPS
        return x * SCALE, (TOP + (HEIGHT - TOP - BOTTOM) * (1 - sigma)) * SCALE

    for i in range(6):
        draw.line([place(0, i / 5), place(STEPS, i / 5)], fill="#e4e4e4", width=SCALE)
        x, y = place(0, i / 5)
        draw.text((x - 8 * SCALE, y), f"{i / 5:.1f}", fill="#444444", font=font, anchor="rm")
        x, y = place(5 * i, 0)
        draw.text((x, y + 6 * SCALE), str(5 * i), fill="#444444", font=font, anchor="mt")
    draw.text((place(STEPS / 2, 0)[0], (HEIGHT - 6) * SCALE), "step", fill="#444444", font=font, anchor="mb")
    draw.text(place(0.6, 0.52), "sigma", fill="#444444", font=font)
    for i, (name, (options, colour)) in enumerate(CURVES.items()):
        points = [place(step, float(sigma)) for step, sigma in enumerate(sampling_sigmas(STEPS, TOKENS, **options))]
        draw.line(points, fill=colour, width=2 * SCALE, joint="curve")
        for x, y in points:
            draw.ellipse((x - 2 * SCALE, y - 2 * SCALE, x + 2 * SCALE, y + 2 * SCALE), fill=colour)
        x, y = place(0.6, 0.42 - 0.065 * i)
        draw.line([(x, y), (x + 22 * SCALE, y)], fill=colour, width=3 * SCALE)
        draw.text((x + 28 * SCALE, y), name, fill="#222222", font=font, anchor="lm")
    target = ROOT / "docs" / "images" / "sigmas.png"
    picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).quantize(64).save(target, optimize=True)
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
