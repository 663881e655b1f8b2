// A small plot in SVG: axes, lines, areas and points, a value under the pointer or the arrow keys.
import { h, svg as s } from "../lib/dom.js";

const PAD = { left: 24, right: 8, top: 6, bottom: 16 };

export class SmallChart {
  /** @param {string} label what it shows, for screen readers. */
  constructor(label) {
    this.svg = s("svg", { class: "ck-plot", role: "img", tabindex: "0", "aria-label": label });
    this.caption = h("div.ck-caption.ck-faint.ck-clip", { role: "status" });
    this.root = h("div.ck-chart", this.svg, this.caption);
    /** @type {Drawing | null} */
    this.data = null;
    /** @type {number | null} */
    this.at = null;
    /** @type {Point[]} where the points are */
    this.spots = [];
    this.edges = [0, 0];
    this.hair = s("path", { class: "ck-hair" });
    this.mark = s("circle", { class: "ck-mark", r: 3.5 });
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.pick(null));
    this.svg.addEventListener("blur", () => this.pick(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  /** Draw something else. @param {Drawing} data */
  set(data) {
    this.data = data;
    this.at = null;
    this.draw();
  }

  draw() {
    const { data, svg } = this;
    const [width, height] = [svg.clientWidth, svg.clientHeight];
    if (!data || width < 40 || height < 30) return;
    const [x0, x1, y0, y1] = [...data.x, ...data.y];
    /** @type {(point: Point) => Point} */
    const place = ([x, y]) => [
      PAD.left + ((x - x0) / (x1 - x0 || 1)) * (width - PAD.left - PAD.right),
      height - PAD.bottom - ((y - y0) / (y1 - y0 || 1)) * (height - PAD.top - PAD.bottom),
    ];
    this.spots = data.points.map(place);
    const path = (/** @type {Point[]} */ points) => points.map(place).map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
    const [left, bottom] = place([x0, y0]);
    const [right, top] = place([x1, y1]);
    const made = [s("path", { class: "ck-axis", d: `M${left} ${top}V${bottom}H${right}` })];
    for (const [at, text] of data.ticks.y) {
      const y = place([x0, at])[1];
      made.push(s("path", { class: "ck-grid", d: `M${left} ${y}H${right}` }));
      made.push(s("text", { class: "ck-tick", x: left - 4, y: y + 3, "text-anchor": "end" }, text));
    }
    for (const [at, text] of data.ticks.x) {
      const x = place([at, y0])[0];
      const anchor = x > width - 24 ? "end" : x < left + 8 ? "start" : "middle";
      made.push(s("text", { class: "ck-tick", x, y: height - 4, "text-anchor": anchor }, text));
    }
    for (const each of data.also ?? []) made.push(s("polyline", { class: "ck-behind", points: path(each) }));
    if (data.kind === "area") {
      const [first, last] = [data.points[0][0], data.points[data.points.length - 1][0]];
      made.push(s("polygon", { class: "ck-area", points: path([[first, y0], ...data.points, [last, y0]]) }));
    }
    made.push(s("polyline", { class: "ck-line", points: path(data.points) }));
    if (data.dots) for (const [x, y] of this.spots) made.push(s("circle", { class: "ck-dot", cx: x, cy: y, r: 1.8 }));
    svg.replaceChildren(...made, this.hair, this.mark);
    this.edges = [top, bottom];
    this.pick(this.at);
  }

  /** Say the value of point `at`, or the caption for null. @param {number | null} at */
  pick(at) {
    if (!this.data || !this.hair.parentNode) return;
    this.at = at;
    const there = at != null;
    for (const each of [this.hair, this.mark]) each.setAttribute("visibility", there ? "visible" : "hidden");
    this.caption.textContent = there ? this.data.read(at) : this.data.caption;
    this.caption.title = this.data.caption;
    if (!there) return;
    const [x, y] = this.spots[at];
    this.hair.setAttribute("d", `M${x} ${this.edges[0]}V${this.edges[1]}`);
    this.mark.setAttribute("cx", String(x));
    this.mark.setAttribute("cy", String(y));
  }

  /** @param {PointerEvent} event */
  point(event) {
    if (!this.spots.length) return;
    // The page may have scaled the node: from its pixels to the drawing's.
    const box = this.svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / (box.width || 1)) * this.svg.clientWidth;
    const away = this.spots.map((spot) => Math.abs(spot[0] - x));
    this.pick(away.indexOf(Math.min(...away)));
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    const step = Number(event.key === "ArrowRight") - Number(event.key === "ArrowLeft");
    if (!step || !this.spots.length) return;
    event.preventDefault();
    this.pick(Math.max(0, Math.min(this.spots.length - 1, this.at == null ? 0 : this.at + step)));
  }
}
