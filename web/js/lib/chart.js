// A chart of values over training steps: uPlot with the page's colours, zoom by mouse and keyboard, a logarithmic scale.
import uPlot from "../vendor/uplot.js";
import { h } from "./dom.js";
import { t } from "./words.js";

const ZOOM_STEP = 0.8;
const PAN_STEP = 0.15;

/** Colours for several lines of equal rank, told apart in both themes. */
export const LINES = ["#3b82f6", "#e08e0b", "#22a861", "#d6457f", "#8b5cf6", "#0ea5b7", "#c2410c", "#7c8a0a"];

/**
 * A chart in a holder that it makes: `element`, `show(data)`, `setLogarithmic(on)`, `reset()`, `destroy()`.
 *
 * There is a line for each column of the data but the first, which is the step. A colour is a CSS colour or the name of
 * one of our CSS variables.
 */
export class Chart {
  /** @param {{ series: Line[], label: string, height?: number, logarithmic?: boolean }} options */
  constructor({ series, height = 190, logarithmic = false, label }) {
    this.series = series;
    this.height = height;
    this.logarithmic = logarithmic;
    /** @type {Table | null} */
    this.data = null;
    /** @type {uPlot | null} */
    this.plot = null;
    this.ink = "";
    this.zoomed = false;
    this.element = h("div.ck-chart", { tabIndex: 0, role: "img", "aria-label": label, title: t("chart.help") });
    this.element.addEventListener("keydown", (event) => this.#key(event));
    this.resizes = new ResizeObserver(() => this.#fit());
    this.resizes.observe(this.element);
    // A theme changes the variables that the colours come from; what is drawn on a canvas does not follow by itself.
    this.themes = new MutationObserver(() => this.ink !== this.#colour("--ck-ink") && this.#build());
    for (const root of [document.documentElement, document.body]) {
      this.themes.observe(root, { attributes: true, attributeFilter: ["class", "style"] });
    }
  }

  /** Draw these columns; a zoom stays. @param {Table} data */
  show(data) {
    this.data = data;
    if (!this.plot) return this.#build();
    const { min = 0, max = 0 } = this.plot.scales.x;
    this.plot.setData(this.#drawable(data), !this.zoomed);
    if (this.zoomed) this.plot.setScale("x", { min, max });
    this.#showLast();
  }

  /**
   * Another set of lines.
   * @param {Line[]} series
   * @param {Table} data
   */
  setSeries(series, data) {
    this.series = series;
    this.data = data;
    this.#build();
  }

  /** @param {boolean} on */
  setLogarithmic(on) {
    this.logarithmic = on;
    this.#build();
  }

  /** Show all steps again. */
  reset() {
    this.zoomed = false;
    if (this.data) this.plot?.setData(this.#drawable(this.data), true);
  }

  destroy() {
    this.resizes.disconnect();
    this.themes.disconnect();
    this.plot?.destroy();
    this.plot = null;
  }

  /** What a CSS variable stands for now, in a form that a canvas takes. @param {string} name */
  #colour(name) {
    if (!name.startsWith("--")) return name;
    this.element.style.setProperty("color", `var(${name})`);
    const found = getComputedStyle(this.element).color;
    this.element.style.removeProperty("color");
    return found;
  }

  /**
   * On a logarithmic scale there is no place for zero.
   * @param {Table} data
   * @returns {Table}
   */
  #drawable([steps, ...columns]) {
    if (!this.logarithmic) return [steps, ...columns];
    return [steps, ...columns.map((column) => column.map((value) => (value != null && value > 0 ? value : null)))];
  }

  #build() {
    if (!this.data || !this.element.isConnected || !this.element.clientWidth) return;
    const window_ = this.zoomed && this.plot ? { ...this.plot.scales.x } : null;
    this.plot?.destroy();
    this.ink = this.#colour("--ck-ink");
    const [faint, line] = [this.#colour("--ck-faint"), this.#colour("--ck-line")];
    const axis = { stroke: faint, grid: { stroke: line, width: 0.5 }, ticks: { stroke: line, width: 0.5 }, font: "11px system-ui" };
    const lines = this.series.map((one) => ({
      label: one.label,
      stroke: this.#colour(one.colour),
      width: one.width ?? 1.5,
      alpha: one.alpha ?? 1,
      dash: one.dash,
      spanGaps: true,
      points: { show: one.points ?? false, size: 6 },
      /** @type {uPlot.Series.Value} */
      value: (plot, value, column) => {
        const newest = () => (plot.cursor.idx == null ? [...plot.data[column]].findLast((each) => each != null) : null);
        /** @type {number | null | undefined} */
        const shown = value ?? newest();
        return shown == null ? "–" : (one.value?.(shown) ?? shown.toPrecision(4));
      },
    }));
    const plot = new uPlot(
      {
        width: this.element.clientWidth,
        height: this.height,
        scales: { x: { time: false }, y: this.logarithmic ? { distr: 3 } : {} },
        axes: [{ ...axis, size: 28 }, { ...axis, size: 52 }],
        series: [{ label: t("chart.step"), value: (_, value) => value ?? "–" }, ...lines],
        cursor: { drag: { x: true, y: false }, points: { size: 6 } },
        hooks: { setSelect: [({ select }) => void (this.zoomed ||= select.width > 0)] },
      },
      this.#drawable(this.data),
      this.element,
    );
    this.plot = plot;
    plot.over.addEventListener("dblclick", () => (this.zoomed = false));
    plot.over.addEventListener("mouseleave", () => this.#showLast());
    if (window_) plot.setScale("x", { min: window_.min ?? 0, max: window_.max ?? 0 });
    this.#showLast();
  }

  /** While the mouse points at nothing, the legend has each line's newest value (once uPlot has done its own drawing). */
  #showLast() {
    setTimeout(() => this.plot?.cursor.idx == null && this.data && this.plot?.setLegend({ idx: this.data[0].length - 1 }));
  }

  #fit() {
    if (!this.plot) return this.#build();
    if (this.element.clientWidth) this.plot.setSize({ width: this.element.clientWidth, height: this.height });
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const { plot } = this;
    if (!plot || !this.data?.[0]?.length) return;
    const { min = 0, max = 0 } = plot.scales.x;
    const span = max - min;
    /** @param {number} low @param {number} high */
    const move = (low, high) => {
      this.zoomed = true;
      plot.setScale("x", { min: low, max: high });
    };
    const inset = (span * (1 - ZOOM_STEP)) / 2;
    /** @type {Record<string, () => void>} */
    const keys = {
      "+": () => move(min + inset, max - inset),
      "-": () => move(min - inset / ZOOM_STEP, max + inset / ZOOM_STEP),
      ArrowLeft: () => move(min - span * PAN_STEP, max - span * PAN_STEP),
      ArrowRight: () => move(min + span * PAN_STEP, max + span * PAN_STEP),
      0: () => this.reset(),
    };
    const work = keys[event.key === "=" ? "+" : event.key];
    if (!work) return;
    event.preventDefault();
    event.stopPropagation();
    work();
  }
}

/** Several charts' columns over one axis of steps. @param {Table[]} tables */
export const joined = (tables) => /** @type {Table} */ (uPlot.join(tables));
