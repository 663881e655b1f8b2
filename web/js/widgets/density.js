// Chroma Training Settings: how often each noise level is trained, and how the learning rate goes.
import { fill } from "../lib/dom.js";
import { SmallChart } from "./small_chart.js";
import { targetsOf, valueOf } from "./graph.js";
import { LivePanel } from "./live_panel.js";

const HEIGHT = 214;
const NAMES = [
  "sigma_draw", "sigma_remap", "sigma_scale", "sigma_shift", "sigma_shift_value", "sigma_minimum", "sigma_maximum",
  "warmup_steps", "lr_schedule", "lr_cycles", "lr_power",
];

class Density extends LivePanel {
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
    const steps = targetsOf(this.node, "ChromaTrainLora").map((node) => valueOf(node, "steps")).find((value) => value > 0);
    return { ...this.values(NAMES), ...(steps ? { steps } : {}) };
  }

  show({ centres, density, plain, size, steps, rates }, asked) {
    const top = Math.max(...density, ...plain) * 1.05;
    const points = centres.map((at, i) => [at, density[i]]);
    fill(this.body, this.levels.root, this.rates.root);
    this.levels.set({
      points,
      also: [centres.map((at, i) => [at, plain[i]])],
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

/** Put the plots on a Chroma Training Settings node. */
export function attachDensity(node) {
  return new Density(node);
}
