// The training room: one wide page over ComfyUI, four steps from a folder of images to a LoRA. What is chosen (folder,
// aim, job, what was typed for it) is a setting of ComfyUI's user; everything else is the host's, too.
import { api } from "../../../../scripts/api.js";
import { fill, h, throttled } from "../lib/dom.js";
import { ask, askJson, jsonPost, reason } from "../lib/http.js";
import { t } from "../lib/words.js";
import { notify } from "../jobs/notices.js";
import { help } from "../jobs/words.js";
import * as aim from "./aim.js";
import * as choose from "./choose.js";
import * as images from "./images.js";
import * as watch from "./watch.js";

/** @type {Record<RoomStep, StepModule>} */
const STEPS = { images, aim, watch, choose };
const NAMES = /** @type {RoomStep[]} */ (Object.keys(STEPS));
const KEPT = "/settings/Chroma.Room";
const KEPT_MILLISECONDS = 500;
const NOTICE_MILLISECONDS = 8000;
const FOCUSABLE = "button, select, input, textarea, summary, a[href], [tabindex]";
/** @type {RoomView} */
const FIRST = { step: "images", folder: "", trigger: "", size: 0, aim: "", job: "", typed: {} };

/** @type {Room | null} */
let open = null;
/** @type {Promise<RoomView> | null} */
let chosen = null; // before, in this page or another

/**
 * Open the room, at a step or for a job if one is given; the open one where there is one.
 * @param {Partial<RoomView>} [view]
 */
export async function openRoom(view = {}) {
  /** @type {RoomView} */
  let before;
  try {
    before = await (chosen ??= kept());
  } catch (error) {
    chosen = null; // not to be written over
    return notify("error", t("room.title"), reason(error));
  }
  if (!open) {
    open = new Room(before, () => (open = null));
    document.body.append(open.element);
  }
  const { step, ...others } = view;
  open.choose(others);
  open.go(step ?? open.view.step);
}

/** @returns {Promise<RoomView>} */
async function kept() {
  const found = (await askJson(KEPT)) ?? {};
  const fits = (/** @type {[string, unknown]} */ [name, value]) => Object.hasOwn(found, name) && typeof found[name] === typeof value;
  const view = { ...FIRST, ...Object.fromEntries(Object.entries(FIRST).filter(fits).map(([name]) => [name, found[name]])) };
  return NAMES.includes(view.step) ? view : { ...view, step: FIRST.step };
}

/** The open room. What steps may use of it is the interface `TrainingRoom` of types.d.ts. */
class Room {
  /** @param {RoomView} view @param {() => void} closed */
  constructor(view, closed) {
    this.closed = closed;
    this.before = document.activeElement;
    this.view = view;
    this.keep = throttled(() => {
      ask(KEPT, { ...jsonPost(this.view), keepalive: true }).catch(() => {});
    }, KEPT_MILLISECONDS);
    /** @type {Map<RoomStep, Step>} */
    this.built = new Map();
    /** @type {Set<(changed: Partial<RoomView>) => void>} */
    this.listeners = new Set();
    this.timer = 0;
    this.tabs = NAMES.map((name, i) => this.#tab(name, i));
    this.panels = NAMES.map((name) => h("div.ck-panel", { role: "tabpanel", id: `ck-room-${name}`, "aria-labelledby": `ck-room-tab-${name}`, hidden: true }));
    const close = h("button.ck-quiet", { title: t("room.close"), "aria-label": t("room.close"), onclick: () => this.close() }, "✕");
    const title = h("h1", { id: "ck-room-title" }, t("room.title"));
    const list = h("div.ck-steps", { role: "tablist", "aria-labelledby": "ck-room-title" }, this.tabs);
    this.note = h("div.ck-notice", { role: "status", "aria-live": "polite" });
    this.element = h(
      "div.chromakit.ck-room",
      { role: "dialog", "aria-modal": "true", "aria-labelledby": "ck-room-title", tabIndex: -1 },
      h("header", title, list, help("room"), close),
      h("div.ck-main", this.panels),
      this.note,
    );
    this.element.addEventListener("keydown", (event) => this.#key(event));
    // A button that is switched off or taken away while it has the focus leaves it to the page's body.
    this.lost = (/** @type {KeyboardEvent} */ event) => event.target === document.body && this.#key(event);
    document.addEventListener("keydown", this.lost, true);
    this.again = () => this.built.get(this.view.step)?.refresh?.();
    api.addEventListener("reconnected", this.again); // to a host that was away
    // What is dropped or pasted here is not meant for the canvas below.
    for (const name of ["dragover", "drop", "paste", "wheel"]) this.element.addEventListener(name, (event) => event.stopPropagation());
  }

  /** @param {Partial<RoomView>} changed */
  choose(changed) {
    const view = new Map(Object.entries(this.view));
    const news = Object.fromEntries(Object.entries(changed).filter(([name, value]) => view.get(name) !== value));
    if (!Object.keys(news).length) return;
    Object.assign(this.view, news);
    this.keep();
    for (const listener of [...this.listeners]) listener(news);
  }

  /** @param {(changed: Partial<RoomView>) => void} listener */
  onChoice(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  /** @param {RoomStep} step */
  go(step) {
    this.choose({ step });
    const number = NAMES.indexOf(step);
    const found = this.built.get(step) ?? STEPS[step].build(this);
    if (!this.built.has(step)) {
      this.built.set(step, found);
      fill(this.panels[number], found.element);
    }
    this.panels.forEach((panel, i) => (panel.hidden = i !== number));
    this.tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === number));
      tab.tabIndex = i === number ? 0 : -1;
    });
    found.refresh?.();
    this.tabs[number].focus();
  }

  /** @param {string} text @param {"info" | "error"} [kind] */
  notice(text, kind = "info") {
    clearTimeout(this.timer);
    this.note.setAttribute("role", kind === "error" ? "alert" : "status");
    const close = h("button.ck-quiet", { "aria-label": t("room.dismiss"), onclick: () => fill(this.note) }, "✕");
    fill(this.note, text && h("span", { class: kind === "error" ? "ck-error" : "" }, text), text && close);
    if (kind === "info") this.timer = setTimeout(() => fill(this.note), NOTICE_MILLISECONDS);
  }

  /** @param {unknown} error */
  failed(error) {
    this.notice(reason(error), "error");
  }

  close() {
    clearTimeout(this.timer);
    for (const step of this.built.values()) step.destroy?.();
    document.removeEventListener("keydown", this.lost, true);
    api.removeEventListener("reconnected", this.again);
    this.element.remove();
    this.closed();
    if (this.before instanceof HTMLElement) this.before.focus();
  }

  /** @param {RoomStep} name @param {number} i */
  #tab(name, i) {
    return h(
      "button",
      { role: "tab", id: `ck-room-tab-${name}`, "aria-controls": `ck-room-${name}`, title: `Alt+${i + 1}`, onclick: () => this.go(name) },
      h("b", { "aria-hidden": "true" }, String(i + 1)),
      t(STEPS[name].title),
    );
  }

  /**
   * The keys of the room; none of them, nor any other, reaches the page's own shortcuts.
   * @param {KeyboardEvent} event
   */
  #key(event) {
    event.stopPropagation();
    if (event.defaultPrevented) return;
    const digit = /^(?:Digit|Numpad)([1-4])$/.exec(event.code);
    if (event.altKey && digit) this.go(NAMES[Number(digit[1]) - 1]);
    else if (event.key === "Escape") this.close();
    else if (event.key === "Tab") return this.#hold(event);
    else if (this.tabs.some((tab) => tab === event.target) && ["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) {
      const now = NAMES.indexOf(this.view.step);
      const next = { ArrowLeft: now + NAMES.length - 1, ArrowRight: now + 1, Home: 0, End: NAMES.length - 1 }[event.key] ?? now;
      this.go(NAMES[next % NAMES.length]);
    } else return;
    event.preventDefault();
  }

  /** The focus goes round within the room. @param {KeyboardEvent} event */
  #hold(event) {
    const all = /** @type {HTMLElement[]} */ ([...this.element.querySelectorAll(FOCUSABLE)]);
    const reached = all.filter((each) => each.tabIndex >= 0 && !each.matches(":disabled") && each.checkVisibility());
    const [first, last] = [reached[0], reached[reached.length - 1]];
    const [from, to] = event.shiftKey ? [first, last] : [last, first];
    if (document.activeElement !== from && this.element.contains(document.activeElement) && document.activeElement !== this.element) return;
    event.preventDefault();
    to?.focus();
  }
}
