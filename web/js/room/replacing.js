// Find and replace in all captions of a folder; how often is said before anything is written.
import { h, say } from "../lib/dom.js";
import { t } from "../lib/words.js";

/** Behind a disclosure; `count()` after the captions changed. */
export class Replacing {
  /** @param {() => Folder} folder gives the one that is shown */
  constructor(folder) {
    this.folder = folder;
    const field = (/** @type {string} */ key) => h("input", { type: "text", "aria-label": t(`room.images.${key}`), placeholder: t(`room.images.${key}`), oninput: () => this.count() });
    this.find = field("find");
    this.put = field("put");
    this.whole = h("input", { type: "checkbox", onchange: () => this.count() });
    this.matches = h("span.ck-faint", { role: "status" });
    this.all = h("button", { "data-action": "replace", onclick: () => this.#replace() }, t("room.images.replace_all"));
    const row = h("div.ck-group", this.find, this.put, h("label", this.whole, " ", t("room.images.whole")), this.all, this.matches);
    this.element = h("details.ck-replace", h("summary", t("room.images.replace")), row);
  }

  #found() {
    const pattern = this.find.value && patternOf(this.find.value, this.whole.checked);
    return this.folder().images.flatMap(({ name, caption }) => {
      const count = pattern && caption ? [...caption.matchAll(pattern)].length : 0;
      return count && caption ? [{ name, caption, count }] : [];
    });
  }

  count() {
    const found = this.#found();
    const count = found.reduce((sum, each) => sum + each.count, 0);
    say(this.matches, this.find.value ? t("room.images.matches", { count, captions: found.length }) : "");
    this.all.disabled = !count;
  }

  #replace() {
    const [from, to] = [this.find.value, this.put.value];
    const texts = this.#found().map(({ name, caption }) => [name, replaced(caption, from, to, this.whole.checked)]);
    return this.folder().write(Object.fromEntries(texts), t("room.images.did_replace", { from, to }));
  }
}

/**
 * Where a text stands in another, also as part of a word unless `whole`; the case of letters does not count.
 * @param {string} text
 * @param {boolean} whole
 */
function patternOf(text, whole) {
  const literal = text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  return new RegExp(whole ? `(?<![\\p{L}\\p{N}_])${literal}(?![\\p{L}\\p{N}_])` : literal, "giu");
}

/**
 * The text with `to` wherever `from` stands.
 * @param {string} text
 * @param {string} from
 * @param {string} to
 * @param {boolean} whole
 */
export const replaced = (text, from, to, whole) => text.replace(patternOf(from, whole), () => to);
