// A job's curves: loss, held-out loss as a whole and by noise level, learning rate, gradient norm, time a step.
import { fill, h } from "../lib/dom.js";
import { Chart, joined } from "../lib/chart.js";
import { loss, rate } from "../lib/format.js";
import { t } from "../lib/words.js";
import { measured } from "./curve_feed.js";

/** @typedef {{ series: Line[], data: Table }} Lines */

/** @param {number} value */
const seconds = (value) => `${value.toPrecision(3)} s`;

/** From blue for fine detail (low noise) to red for composition (high noise). @param {number} share */
const bandColour = (share) => `hsl(${Math.round(220 - 220 * share)} 75% 55%)`;

/**
 * @param {"lr" | "grad_norm" | "seconds"} name
 * @param {Omit<Line, "label">} options
 * @returns {(curve: Curve) => Lines}
 */
const column = (name, options) => (curve) => ({
  series: [{ label: t(`curves.${name}`), ...options }],
  data: [curve.step, curve[name]],
});

/** Views of what is measured on held-out images, if there are any. */
const MEASURED = new Set(["heldout", "gain"]);

/** @type {Record<string, (curve: Curve) => Lines>} */
const VIEWS = {
  loss(curve) {
    const heldout = curve.heldout.length ? [heldoutSeries()] : [];
    /** @type {Table} */
    const table = [curve.step, curve.loss, curve.loss_smooth];
    return {
      series: [
        { label: t("curves.loss"), colour: "--ck-accent", width: 1, alpha: 0.3, value: loss },
        { label: t("curves.loss_smooth"), colour: "--ck-accent", width: 2.5, value: loss },
        ...heldout,
      ],
      data: heldout.length ? joined([table, measured(curve)]) : table,
    };
  },
  heldout(curve) {
    return bands(curve, (entry, i) => entry.by_sigma?.[i] ?? null, loss);
  },
  gain(curve) {
    const base = curve.base?.by_sigma;
    /** @param {Measurement} entry @param {number} i */
    const change = (entry, i) => (base && entry.by_sigma ? 100 * (entry.by_sigma[i] / base[i] - 1) : null);
    return bands(curve, change, (value) => `${value > 0 ? "+" : ""}${value.toFixed(1)} %`);
  },
  lr: column("lr", { colour: "--ck-good", width: 2, value: rate }),
  grad_norm: column("grad_norm", { colour: "--ck-warn", width: 1, value: loss }),
  seconds: column("seconds", { colour: "--ck-faint", width: 1, value: seconds }),
};

/** @returns {Line} */
function heldoutSeries() {
  return { label: t("curves.heldout_loss"), colour: "--ck-warn", width: 2, points: true, value: loss };
}

/**
 * A line for each noise level of the held-out measurement.
 * @param {Curve} curve
 * @param {(entry: Measurement, i: number) => number | null} value
 * @param {(value: number) => string} words
 * @returns {Lines}
 */
function bands(curve, value, words) {
  const steps = curve.heldout.map((entry) => entry.step);
  const last = curve.sigmas.length - 1;
  return {
    series: curve.sigmas.map((sigma, i) => ({
      label: `σ ${sigma.toFixed(2)}`,
      colour: bandColour(i / last),
      points: true,
      value: words,
    })),
    data: [steps, ...curve.sigmas.map((_, i) => curve.heldout.map((entry) => value(entry, i)))],
  };
}

/** The chart, what it shows to choose above it, and a sentence about it below. */
export class Curves {
  constructor() {
    /** @type {Curve | null} */
    this.curve = null;
    this.lines = "";
    this.chart = new Chart({ series: [], label: t("curves.chart"), height: 220 });
    this.what = h(
      "select",
      { "aria-label": t("curves.what"), onchange: () => this.#draw() },
      Object.keys(VIEWS).map((name) => h("option", { value: name }, t(`curves.view_${name}`))),
    );
    this.log = h("input", { type: "checkbox", onchange: () => this.#draw() });
    this.reset = h("button", { onclick: () => this.chart.reset() }, t("chart.reset"));
    this.about = h("div.ck-faint");
    this.element = h(
      "section.ck-curves",
      h("div.ck-row", this.what, h("label", this.log, " ", t("chart.log")), this.reset),
      this.chart.element,
      this.about,
    );
  }

  destroy() {
    this.chart.destroy();
  }

  /** @param {Curve} curve */
  show(curve) {
    this.curve = curve;
    this.#draw();
  }

  #draw() {
    const name = this.what.value;
    this.log.disabled = name === "gain";
    if (!this.curve) return;
    const { series, data } = VIEWS[name](this.curve);
    const logarithmic = this.log.checked && name !== "gain";
    const lines = `${name} ${series.length} ${logarithmic}`;
    const empty = !data[0].length;
    this.chart.element.hidden = empty;
    fill(this.about, t(empty ? (MEASURED.has(name) ? "curves.none_heldout" : "curves.none") : `curves.about_${name}`));
    if (empty) return;
    if (lines !== this.lines) {
      this.lines = lines;
      this.chart.logarithmic = logarithmic;
      this.chart.setSeries(series, data);
    } else this.chart.show(data);
  }
}
