// Chroma Load Model: what the chosen settings need on this machine, and behind a disclosure what the others would.
import { fill, h } from "../lib/dom.js";
import { chain } from "../lib/node_panel.js";
import { t } from "../lib/words.js";
import { setWidgets, valueOf } from "./graph.js";
import { LivePanel } from "./live_panel.js";

const CLOSED = 54;
const OPEN = 344;
const OPENED = "chromakitPlanOpen";
const NAMES = ["flavour", "precision", "text_precision", "offload", "resident_blocks", "offload_during_startup"];
const FILES = ["folder", "transformer", "text_encoder", "vae"];
const PUBLISHED = "as published";
/** @param {number} bytes */
const gib = (bytes) => (bytes / 2 ** 30).toFixed(bytes < 2 ** 30 ? 2 : 1);

/** @extends {LivePanel<PlanLook>} */
export class Plan extends LivePanel {
  /** @param {PageNode} node */
  constructor(node) {
    super(node, "plan", "plan/rows");
    chain(node, { onConfigure: () => this.restore() });
  }

  height() {
    return this.open ? OPEN : CLOSED;
  }

  /** The widgets; but the size of somebody's own files under the flavour tiny is not known here. */
  question() {
    const own = FILES.some((name) => (valueOf(this.node, name) ?? PUBLISHED) !== PUBLISHED);
    return own && valueOf(this.node, "flavour") === "tiny" ? this.t("own_files") : this.values(NAMES);
  }

  get open() {
    return Boolean(this.node.properties?.[OPENED]);
  }

  /** The disclosure as the node was saved, whose size has the panel's height in it. */
  restore() {
    this.panel.settled();
    if (this.details) this.details.open = this.open;
  }

  /** @param {PlanLook} plan */
  show(plan) {
    const chosen = plan.rows.find((row) => row.marks.includes("chosen"));
    this.details = h("details", { open: this.open }, h("summary", chosen && this.line(plan, chosen)), this.table(plan));
    this.details.addEventListener("toggle", () => this.disclosed());
    fill(this.body, this.details);
  }

  disclosed() {
    const open = this.details?.open;
    if (open === undefined || open === this.open) return;
    this.node.properties ??= {};
    this.node.properties[OPENED] = open;
    this.panel.resized();
  }

  /**
   * One line: what the chosen row needs, and whether it fits.
   * @param {PlanLook} plan
   * @param {PlanRow} row
   */
  line(plan, row) {
    const [sampling, training] = [row.fits.includes("sampling"), row.fits.includes("training")];
    const budget = plan.shared ? plan.host_budget_bytes : plan.device_budget_bytes;
    const need = (/** @type {Purpose} */ purpose) => (plan.shared ? row.host_bytes : row[`${purpose}_bytes`]);
    const key = sampling && training ? "fits" : sampling ? "only_sampling" : training ? "only_training" : "too_large";
    const most = Math.max(need("sampling"), need("training"));
    const crowded = !sampling && need("sampling") <= budget && row.host_bytes > plan.host_budget_bytes;
    const text = this.t(crowded ? "computer" : key, {
      need: gib({ fits: most, only_sampling: need("training"), only_training: need("sampling"), too_large: need("sampling") }[key]),
      budget: gib(budget),
      host: gib(row.host_bytes),
      host_budget: gib(plan.host_budget_bytes),
    });
    return h("span", { class: key === "fits" ? "ck-fits" : "ck-warning", title: text }, text);
  }

  /** @param {PlanLook} plan */
  table(plan) {
    const names = ["precision", "t5", "offload", "sampling", "training", "computer"];
    const head = h("tr", names.map((name) => h("th", { scope: "col" }, this.t(`column.${name}`))));
    const about = this.t("about", {
      device: plan.device_name, size: plan.size, budget: gib(plan.device_budget_bytes), host: gib(plan.host_budget_bytes),
    });
    return h(
      "div.ck-scroll",
      { tabIndex: 0 },
      h("table.ck-plan", h("thead", head), h("tbody", plan.rows.flatMap((row) => this.rows(row)))),
      h("p.ck-faint", about),
      plan.recommended.map((choice) => h("p.ck-faint", advice(plan, choice))),
    );
  }

  /** A row, and below it what is to say about it. @param {PlanRow} row */
  rows(row) {
    const chosen = row.marks.includes("chosen");
    const advised = row.marks.some((mark) => mark.startsWith("recommended"));
    const name = [row.fits.length ? "" : "ck-faint", chosen ? "ck-chosen" : ""].join(" ").trim();
    const mode = row.offload === "block" ? `block ${row.resident_blocks}` : row.offload;
    const need = (/** @type {Purpose} */ purpose) =>
      h("td", { class: row.fits.includes(purpose) ? "ck-number" : "ck-number ck-faint" }, gib(row[`${purpose}_bytes`]));
    const cells = [row.precision, row.text_precision, mode].map((text) => h("td", text));
    const made = [
      h("tr", { class: name, "aria-current": chosen ? "true" : null },
        cells, need("sampling"), need("training"), h("td.ck-number", gib(row.host_bytes))),
    ];
    const marks = row.marks.map((mark) => this.t(`mark.${mark}`));
    if (marks.length) {
      const use = h("button", { onclick: () => this.use(row) }, this.t("use"));
      const badge = h("span", { class: advised ? "ck-badge" : "ck-faint" }, `↳ ${marks.join(" · ")}`);
      made.push(h("tr", { class: name }, h("td", { colSpan: 6 }, h("div.ck-row", badge, advised && !chosen && use))));
    }
    return made;
  }

  /** @param {PlanRow} row */
  use({ precision, text_precision, offload, offload_during_startup, resident_blocks }) {
    const blocks = offload === "block" ? { resident_blocks } : {};
    setWidgets(this.node, { precision, text_precision, offload, offload_during_startup, ...blocks });
  }
}

/**
 * What to choose on this machine, in a sentence.
 * @param {PlanLook} plan
 * @param {PlanChoice} choice
 */
export function advice(plan, choice) {
  const mode = choice.offload === "block" ? `block ${choice.resident_blocks}` : choice.offload;
  const need = { device: gib(choice.device_peak_bytes), host: gib(choice.host_peak_bytes) };
  return t(`widgets.plan.advice.${choice.purpose}.${choice.fits ? "fits" : "too_large"}`, {
    precision: choice.precision, t5: choice.text_precision, offload: mode,
    need: t(`widgets.plan.advice.${plan.shared ? "shared" : "need"}`, need),
  });
}
