// A panel that asks the host a question made of its node's widgets, and shows the answer to the last one asked.
import { app } from "../../../../scripts/app.js";
import { debounced, fill, h, say } from "../lib/dom.js";
import { post, reason } from "../lib/http.js";
import { addPanel, chain, nodeData, onWidgets, widgetValues } from "../lib/node_panel.js";
import { t } from "../lib/words.js";

export const SETTING = "Chroma.Panels";
const WAIT = 250;

/** @typedef {Record<string, unknown>} Question */

/** @type {Set<LivePanel<never>>} */
const panels = new Set();

/** Something changed somewhere in the graph: every panel asks again whose question is another one now. */
export function touchAll() {
  for (const panel of panels) panel.touch();
}

/** The host, which may have been away, is back: every panel asks again. */
export function askAll() {
  for (const panel of panels) panel.again();
}

/** Show or hide all panels. @param {boolean} on */
export function showAll(on) {
  for (const panel of panels) panel.toggle(on);
}

function isOn() {
  return Boolean(app.ui?.settings?.getSettingValue?.(SETTING) ?? true);
}

/**
 * What stands on a node. A kind of panel has `height()`, its pixels on the node with the margins; `question()`, the body
 * of the request or, as a text, why there is none; and `show(answer, question)`.
 * @template Answer
 */
export class LivePanel {
  /**
   * @param {PageNode} node the node that it stands on
   * @param {string} name a key under `widgets` of the words
   * @param {string} path of the route under /chromakit
   */
  constructor(node, name, path) {
    this.node = node;
    this.name = name;
    this.path = path;
    /** @type {string | null} the question that was asked last, as a text */
    this.asked = null;
    this.waiting = false;
    this.on = isOn();
    this.note = h("div.ck-note.ck-faint", { role: "status" });
    this.body = h("div.ck-body");
    this.root = h("section.chromakit.ck-node.ck-live", { "aria-label": this.t("title") }, this.body, this.note);
    this.root.dataset.panel = name;
    this.panel = addPanel(node, `chromakit_${name}`, this.root, () => (this.on ? this.height() : 0));
    this.touch = debounced(() => this.ask(), WAIT);
    onWidgets(node, touchAll);
    // Not before it stands in a graph: the page also makes nodes that it only shows, in its library for one.
    chain(node, { onAdded: () => this.start(), onRemoved: () => panels.delete(this) });
    if (!this.on) this.hide(true);
  }

  height() {
    return 0;
  }

  /** @returns {Question | string} */
  question() {
    return "";
  }

  /** @param {Answer} _answer @param {Question} _question */
  show(_answer, _question) {}

  start() {
    panels.add(this);
    this.toggle(isOn());
    this.touch();
  }

  /** @param {string} key @param {Record<string, unknown>} [values] */
  t(key, values) {
    return t(`widgets.${this.name}.${key}`, values);
  }

  /**
   * The values of these widgets, linked ones left out; without names those of all inputs that the node has.
   * @param {string[]} [names]
   * @returns {WidgetValues}
   */
  values(names) {
    const { required, optional } = nodeData(this.node).input ?? {};
    const wanted = names ?? Object.keys({ ...required, ...optional });
    return Object.fromEntries(Object.entries(widgetValues(this.node)).filter(([name]) => wanted.includes(name)));
  }

  /** Ask if the question is not the one that was asked last; while an answer is awaited, ask when it is there. */
  async ask() {
    if (!this.on || !panels.has(this)) return;
    const question = this.question();
    const asked = typeof question === "string" ? question : JSON.stringify(question);
    if (asked === this.asked || this.waiting) return;
    this.asked = asked;
    if (typeof question === "string") {
      this.fail(question, false);
      return;
    }
    this.waiting = true;
    const slow = setTimeout(() => this.tell(t("widgets.looking")), 150);
    try {
      const answer = /** @type {Answer} */ (await post(this.path, question));
      if (this.isCurrent()) {
        this.tell("");
        this.root.classList.remove("ck-failed");
        this.show(answer, question);
      }
    } catch (error) {
      if (this.isCurrent()) this.fail(reason(error), true);
    } finally {
      clearTimeout(slow);
      this.waiting = false;
    }
    this.ask();
  }

  /** Whether the question that was asked last is still the question. */
  isCurrent() {
    const question = this.question();
    return this.asked === (typeof question === "string" ? question : JSON.stringify(question));
  }

  /** Ask again though nothing on the node changed. */
  again() {
    this.asked = null;
    this.ask();
  }

  /** @param {string} message @param {boolean} isError */
  fail(message, isError) {
    fill(this.body);
    this.root.classList.add("ck-failed");
    this.tell(message, isError);
  }

  /** @param {string} text */
  tell(text, isError = false) {
    say(this.note, text);
    this.note.title = text;
    this.note.className = `ck-note ${isError ? "ck-error" : "ck-faint"}`;
  }

  /** @param {boolean} on */
  toggle(on) {
    if (on === this.on) return;
    this.on = on;
    this.hide(!on);
    this.panel.resized();
    this.ask();
  }

  /** @param {boolean} away */
  hide(away) {
    this.panel.widget.hidden = away;
    this.root.style.setProperty("display", away ? "none" : "");
    if (away) this.panel.settled();
  }
}
