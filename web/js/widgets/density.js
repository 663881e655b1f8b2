// Chroma Training Settings and Chroma Noise Settings: how often each noise level is trained, and how the learning rate goes.
import { fill } from "../lib/dom.js";
import { SmallChart } from "./small_chart.js";
import { companionValues, targetsOf, valueOf } from "./graph.js";
import { LivePanel } from "./live_panel.js";

const HEIGHT = 214;
const NAMES = [
  "sigma_draw", "sigma_remap", "sigma_scale", "sigma_shift", "sigma_shift_value", "sigma_minimum", "sigma_maximum",
  "sigma_shift_first", "warmup_steps", "lr_schedule", "lr_cycles", "lr_power",
];

/** @extends {LivePanel<DensityLook>} */
export class Density extends LivePanel {
  /** @param {PageNode} node */
  constructor(node) {
    super(node, "density", "density");
    this.levels = new SmallChart(this.t("title"));
    this.rates = new SmallChart(this.t("rates"));
    this.rates.root.classList.add("ck-low");
  }

  height() {
    return HEIGHT;
  }

  /** The widgets, and the steps of the Chroma Train LoRA that the settings go to. */
  question() {
    const trainers = targetsOf(this.node, "ChromaTrainLora");
    const steps = trainers.map((node) => Number(valueOf(node, "steps"))).find((value) => value > 0);
    const linked = Object.entries(companionValues(this.node, "settings")).filter(([name]) => NAMES.includes(name));
    return { ...this.values(NAMES), ...Object.fromEntries(linked), ...(steps ? { steps } : {}) };
  }

  /** @param {DensityLook} found @param {Record<string, unknown>} asked */
  show({ centres, density, plain, size, steps, rates }, asked) {
    const top = Math.max(...density, ...plain) * 1.05;
    /** @param {number[]} values @returns {Point[]} */
    const over = (values) => centres.map((at, i) => [at, values[i]]);
    fill(this.body, this.levels.root, this.rates.root);
    this.levels.set({
      points: over(density),
      also: [over(plain)],
      kind: "area",
      x: [0, 1],
      y: [0, top],
      ticks: { x: [[0, "0"], [0.5, "σ"], [1, "1"]], y: [[1, "1"]] },
      caption: this.t(asked.sigma_shift === "dynamic" ? "caption_dynamic" : "caption", { size }),
      read: (i) => this.t("value", { sigma: centres[i].toFixed(2), times: density[i].toFixed(2) }),
    });
    this.rates.set({
      points: rates,
      x: [0, Math.max(1, steps - 1)],
      y: [0, 1],
      ticks: { x: [[0, "0"], [Math.max(1, steps - 1), String(steps)]], y: [[0, "0"], [1, "1"]] },
      caption: this.t(asked.steps ? "rates_caption" : "rates_assumed", { steps }),
      read: (i) => this.t("rate", { step: rates[i][0], share: (100 * rates[i][1]).toFixed(1) }),
    });
  }
}
