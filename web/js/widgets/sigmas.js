// Chroma Tail Sigmas: the noise levels over the steps.
import { fill } from "../lib/dom.js";
import { SmallChart } from "./small_chart.js";
import { isLinked, sourceOf, valueOf } from "./graph.js";
import { LivePanel } from "./live_panel.js";

const HEIGHT = 150;

/** @extends {LivePanel<SigmasLook>} */
export class Sigmas extends LivePanel {
  /** @param {PageNode} node */
  constructor(node) {
    super(node, "sigmas", "sigmas");
    this.assumed = false;
    this.chart = new SmallChart(this.t("title"));
  }

  height() {
    return HEIGHT;
  }

  /** The widgets; a size that comes by a link is that of the Chroma Empty Latent at its other end, where one is. */
  question() {
    const values = this.values();
    this.assumed = false;
    for (const side of ["width", "height"]) {
      if (!isLinked(this.node, side)) continue;
      const from = sourceOf(this.node, side);
      const size = from?.node.comfyClass === "ChromaEmptyLatent" ? valueOf(from.node, side) : undefined;
      if (size == null) this.assumed = true;
      else values[side] = size;
    }
    return values;
  }

  /** @param {SigmasLook} found */
  show({ sigmas, width, height }) {
    const steps = sigmas.length - 1;
    const points = sigmas.map((sigma, i) => /** @type {Point} */ ([i, sigma]));
    fill(this.body, this.chart.root);
    this.chart.set({
      points,
      x: [0, steps],
      y: [0, 1],
      dots: steps <= 60,
      ticks: { x: [[0, "0"], [steps, String(steps)]], y: [[0, "0"], [1, "1"]] },
      caption: this.t(this.assumed ? "assumed" : "caption", { steps, width, height }),
      read: (i) => this.t("value", { step: i, sigma: sigmas[i].toFixed(4) }),
    });
  }
}
