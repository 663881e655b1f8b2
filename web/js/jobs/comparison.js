// Smoothed losses of several jobs over one another.
import { fill, h } from "../lib/dom.js";
import { Chart, LINES, joined } from "../lib/chart.js";
import { loss } from "../lib/format.js";
import { t } from "../lib/words.js";
import { CurveFeed, measured } from "./curve_feed.js";
import { find, listen } from "./store.js";

const POINTS = 400;

/** A chart that shows itself while at least two jobs are chosen. */
export class Comparison {
  constructor() {
    /** @type {Map<string, CurveFeed>} */
    this.feeds = new Map();
    this.element = h("div.ck-compare", { hidden: true });
    this.chart = new Chart({ series: [], label: t("compare.chart"), height: 200 });
    this.what = h(
      "select",
      { "aria-label": t("compare.what"), onchange: () => this.#draw(true) },
      h("option", { value: "loss_smooth" }, t("compare.loss")),
      h("option", { value: "heldout" }, t("compare.heldout")),
    );
    const log = h("input", { type: "checkbox", onchange: () => this.chart.setLogarithmic(log.checked) });
    const head = h("div.ck-row", this.what, h("label", log, " ", t("chart.log")));
    fill(this.element, head, this.chart.element);
    this.unlisten = listen((id) => id && this.feeds.get(id)?.refresh());
  }

  destroy() {
    this.unlisten();
    this.show([]);
    this.chart.destroy();
  }

  /** Compare these jobs. @param {string[]} ids */
  show(ids) {
    const wanted = new Set(ids.length > 1 ? ids : []);
    let changed = false;
    for (const [id, feed] of this.feeds) {
      if (wanted.has(id)) continue;
      feed.stop();
      this.feeds.delete(id);
      changed = true;
    }
    for (const id of wanted) {
      if (this.feeds.has(id)) continue;
      this.feeds.set(id, new CurveFeed(id, POINTS, () => this.#draw(false)));
      changed = true;
    }
    this.element.hidden = !wanted.size;
    if (changed && wanted.size) this.#draw(true);
  }

  /** @param {boolean} otherLines */
  #draw(otherLines) {
    const ready = [...this.feeds].flatMap(([id, { curve }]) => (curve ? [{ id, curve }] : []));
    if (!ready.length) return;
    const heldout = this.what.value === "heldout";
    const data = joined(ready.map(({ curve }) => (heldout ? measured(curve) : [curve.step, curve.loss_smooth])));
    const series = ready.map(({ id }, i) => ({
      label: find(id)?.name ?? id,
      colour: LINES[i % LINES.length],
      width: 2,
      points: heldout,
      value: loss,
    }));
    if (otherLines || series.length !== this.chart.series.length) this.chart.setSeries(series, data);
    else this.chart.show(data);
  }
}
