// @ts-check
// A curve small enough for a node: an SVG that scales with it.
import { svg } from "./dom.js";

const [WIDTH, HEIGHT, EDGE] = [200, 60, 3];

/**
 * Draw lines over one another into an SVG element, `lines` as `{values, colour, width, opacity}`; null values are gaps that
 * are bridged. The vertical range is that of the middle 96 % of all values, so that one spike does not flatten the rest.
 * @param {Element} element
 * @param {number[]} x
 * @param {SparkLine[]} lines
 */
export function drawSpark(element, x, lines) {
  const sorted = lines.flatMap((line) => line.values).filter(isNumber).sort((a, b) => a - b);
  element.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  element.setAttribute("preserveAspectRatio", "none");
  if (x.length < 2 || !sorted.length) return element.replaceChildren();
  const low = sorted[Math.floor(0.02 * (sorted.length - 1))];
  const high = Math.max(sorted[Math.ceil(0.98 * (sorted.length - 1))], low + 1e-9);
  const [first, last] = [x[0], x[x.length - 1]];
  /** @param {number} step @param {number} value */
  const place = (step, value) => {
    const right = ((step - first) / (last - first || 1)) * WIDTH;
    const up = Math.min(1, Math.max(0, (value - low) / (high - low)));
    return `${right.toFixed(1)},${(EDGE + (1 - up) * (HEIGHT - 2 * EDGE)).toFixed(1)}`;
  };
  element.replaceChildren(
    ...lines.map(({ values, colour, width = 1.5, opacity = 1 }) =>
      svg("polyline", {
        points: x.flatMap((step, i) => (isNumber(values[i]) ? [place(step, values[i])] : [])).join(" "),
        fill: "none",
        "stroke-width": width,
        "vector-effect": "non-scaling-stroke",
        style: `stroke:${colour};opacity:${opacity}`,
      }),
    ),
  );
}

/** @param {number | null} value @returns {value is number} */
function isNumber(value) {
  return Number.isFinite(value);
}

/**
 * An empty SVG element for `drawSpark`.
 * @param {string} label
 */
export const sparkElement = (label) => svg("svg", { class: "ck-spark", role: "img", "aria-label": label });
