// Chroma Dataset: what is in the folder, before anything runs.
import { fill, h } from "../lib/dom.js";
import { address } from "../lib/http.js";
import { learn, told } from "../lib/words.js";
import { companionValues, sourceOf, targetsOf, valueOf } from "./graph.js";
import { LivePanel } from "./live_panel.js";

const HEIGHT = 206;
const WARNED = 96;
const CHIPS = 6;

/** @extends {LivePanel<DatasetLook>} */
export class Dataset extends LivePanel {
  /** @param {PageNode} node */
  constructor(node) {
    super(node, "dataset", "datasets/look");
    /** Whether the warnings are. */
    this.unfolded = false;
  }

  height() {
    return HEIGHT + (this.unfolded ? WARNED : 0);
  }

  /** The widgets, and the flavour of the model that the Chroma Train LoRA at the other end trains. */
  question() {
    const values = { ...this.values(), ...companionValues(this.node, "options") };
    if (!values.folder) return this.t(values.folder == null ? "linked" : "empty");
    const models = targetsOf(this.node, "ChromaTrainLora").map((node) => sourceOf(node, "model")?.node);
    const flavour = models.map((node) => valueOf(node, "flavour")).find(Boolean);
    return flavour ? { ...values, flavour } : values;
  }

  /** @param {DatasetLook} found */
  show(found) {
    learn(found.codes);
    const assumed = found.size_from === "assumed" ? "size_assumed" : found.size_from === "model" ? "size_model" : "size";
    const counts = this.t("counts", { pictures: found.pictures, captions: found.captions });
    const again = h("button.ck-quiet", { onclick: () => this.again(), "aria-label": this.t("again"), title: this.t("again") }, "⟳");
    const size = h("li.ck-faint", { title: this.t(`${assumed}_tip`) }, this.t(assumed, { size: found.size }));
    fill(
      this.body,
      h("div.ck-row.ck-nowrap", { title: found.summary.join("\n") }, h("span.ck-strong.ck-clip", counts), again),
      this.chips(size, found.buckets),
      this.warnings(found.warnings.map(told)),
      this.sheet(found),
    );
  }

  /**
   * What size is meant, and the sizes that are trained, the most frequent first: shape, size, count.
   * @param {HTMLElement} size
   * @param {Bucket[]} buckets
   */
  chips(size, buckets) {
    const sorted = [...buckets].sort((a, b) => b.count - a.count);
    const rest = sorted.slice(CHIPS);
    const chip = (/** @type {Bucket} */ { width, height, count }) => {
      const longest = Math.max(width, height);
      const shape = { width: `${(11 * width) / longest}px`, height: `${(11 * height) / longest}px` };
      return h("li.ck-chip", h("i", { style: shape, "aria-hidden": "true" }), `${width}×${height}`, h("b", String(count)));
    };
    const title = rest.map((b) => `${b.width}×${b.height}: ${b.count}`).join("\n");
    const more = rest.length > 0 && h("li.ck-faint", { title }, this.t("more", { count: rest.length }));
    return h("ul.ck-chips", { "aria-label": this.t("buckets") }, size, sorted.slice(0, CHIPS).map(chip), more);
  }

  /** @param {string[]} texts */
  warnings(texts) {
    if (!texts.length) return h("div.ck-faint", this.t("no_warnings"));
    const label = texts.length === 1 ? this.t("warning") : this.t("warnings", { count: texts.length });
    const details = h(
      "details.ck-warnings",
      { open: this.unfolded },
      h("summary.ck-warning.ck-clip", { title: texts[0] }, `${label}: ${texts[0]}`),
      h("ul.ck-scroll", { tabIndex: 0 }, texts.map((text) => h("li", text))),
    );
    details.addEventListener("toggle", () => {
      if (details.open === this.unfolded) return;
      this.unfolded = details.open;
      this.panel.resized();
    });
    return details;
  }

  /** Small images, cropped as in training; a click opens the whole contact sheet. @param {DatasetLook} found */
  sheet(found) {
    const tile = (/** @type {Thumbnail} */ { name, caption, notes, image }) => {
      const title = [name, caption, ...notes.map((note) => `! ${told(note)}`)].filter(Boolean).join("\n");
      const inside = image ? h("img", { src: image, alt: name, loading: "lazy", draggable: false }) : "✕";
      return h("span", { class: notes.length ? "ck-tile ck-doubt" : "ck-tile", title }, inside);
    };
    const href = address(found.sheet);
    return h("a.ck-tiles", { href, target: "_blank", rel: "noopener", "aria-label": this.t("open") }, found.thumbnails.map(tile));
  }
}
