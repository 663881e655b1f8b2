// One image of a data set: all of it with the frame that is trained, its caption, what is wrong with it.
import { debounced, fill, h, say } from "../lib/dom.js";
import { t, told } from "../lib/words.js";
import { maskOf, sourceOf } from "./folder.js";
import { paintMask } from "./mask.js";

const SIDE = 320;
const PAUSE = 900; // milliseconds without a key, after which a caption is written
const STEP = 0.05;

/** @param {number} share */
const percent = (share) => `${(100 * share).toFixed(3)}%`;

/** @param {HTMLImageElement} picture @param {string} source */
function load(picture, source) {
  if (picture.getAttribute("src") !== source) picture.src = source;
}

/** A list item that follows `show(image)`. */
export class Card {
  /** @param {FolderImage} image @param {Folder} folder */
  constructor(image, folder) {
    this.image = image;
    this.folder = folder;
    this.seen = false; // whether it is in view, or nearly
    this.key = ""; // what stands here, as a text; empty: it may have been changed here since
    this.refused = false; // whether the caption that stands here could not be written
    this.writing = 0; // captions on their way to the host
    this.picture = h("img", { decoding: "async", draggable: false, alt: "" });
    this.frame = h("div.ck-crop");
    this.shade = h("img.ck-shade", { alt: "", hidden: true });
    this.look = h("div.ck-whole", this.picture, this.shade, this.frame);
    this.masking = h("button.ck-quiet", { "data-action": "mask", onclick: () => paintMask(this.image, this.folder, this.masking) }, "◐");
    this.name = h("span.ck-strong.ck-clip");
    this.size = h("span.ck-faint");
    const away = h("button.ck-quiet", { onclick: () => this.remove() }, "✕");
    this.away = away;
    this.trouble = h("div.ck-trouble");
    this.caption = h("textarea", { rows: 3, placeholder: t("room.images.caption_hint") });
    this.tags = h("div.ck-tags");
    this.element = h(
      "li.ck-card",
      h("div.ck-row.ck-nowrap", this.name, this.masking, away),
      this.look,
      this.size,
      this.trouble,
      this.caption,
      this.tags,
    );
    const soon = debounced(() => this.write(), PAUSE);
    this.caption.addEventListener("input", () => {
      soon();
      this.#tag();
    });
    this.caption.addEventListener("change", () => this.write());
    this.element.addEventListener("focusin", () => this.#tag());
    this.element.addEventListener("focusout", ({ relatedTarget }) => {
      if (relatedTarget instanceof Node && !this.element.contains(relatedTarget)) this.#untag();
    });
    this.#dragFrame();
    this.show(image);
  }

  /** @param {FolderImage} image */
  show(image) {
    this.image = image;
    const { name, size, bucket, frame, skipped, notes } = image;
    const own = Boolean(this.folder.found?.own);
    // What is being typed stays, as does what is not written yet or could not be.
    const typed = document.activeElement === this.caption || this.refused || this.writing > 0;
    if (!typed && this.caption.value !== (image.caption ?? "")) this.caption.value = image.caption ?? "";
    const key = JSON.stringify([image, own]);
    if (key === this.key) return; // hundreds that stay as they are would hold up the page
    this.key = key;
    this.element.dataset.name = name;
    say(this.name, name);
    this.name.title = name;
    this.shade.hidden = !image.mask;
    this.see(this.seen);
    this.masking.hidden = !own || !size;
    this.masking.classList.toggle("ck-chosen", Boolean(image.mask));
    this.masking.title = t(image.mask ? "room.mask.change" : "room.mask.paint_one", { name });
    this.masking.setAttribute("aria-label", this.masking.title);
    this.picture.alt = t("room.images.picture", { name });
    this.look.classList.toggle("ck-unreadable", !size);
    this.look.style.setProperty("--ck-aspect", size ? String(size[0] / size[1]) : "1");
    if (frame) this.#place(frame);
    this.frame.hidden = !frame;
    say(this.size, size && bucket ? t("room.images.size", { size: size.join("×"), bucket: bucket.join("×") }) : "");
    this.#handle(own);
    this.away.hidden = !own;
    this.away.title = t("room.images.remove", { name });
    this.away.setAttribute("aria-label", this.away.title);
    this.caption.setAttribute("aria-label", t("room.images.caption", { name }));
    this.caption.readOnly = !own || image.caption == null;
    this.caption.hidden = !size;
    if (this.tags.childElementCount) this.#tag();
    this.element.classList.toggle("ck-skipped", Boolean(skipped));
    this.element.classList.toggle("ck-doubtful", Boolean(image.twin));
    this.#complain(skipped, notes, own);
  }

  /**
   * Small images are asked for in view alone: hundreds that were scrolled past would hold up whatever is asked next.
   * @param {boolean} seen
   */
  see(seen) {
    this.seen = seen;
    const { name, size, version, mask } = this.image;
    if (!seen && !this.picture.complete) this.picture.removeAttribute("src");
    if (seen && size) load(this.picture, sourceOf(this.folder, name, SIDE, version));
    if (seen && mask) load(this.shade, sourceOf(this.folder, maskOf(name), SIDE, mask));
  }

  /** Write the caption as it stands now. */
  async write() {
    if (this.caption.readOnly) return;
    this.writing += 1;
    this.refused = !(await this.folder.write({ [this.image.name]: this.caption.value }, t("room.images.did_caption", { name: this.image.name })));
    this.writing -= 1;
    this.key = "";
    this.show(this.image);
  }

  remove() {
    const { name } = this.image;
    const next = this.element.nextElementSibling ?? this.element.previousElementSibling;
    next?.querySelector("textarea")?.focus({ preventScroll: true });
    return this.folder.change("remove", { names: [name], label: t("room.images.did_remove", { name }) });
  }

  /** @param {string} skipped @param {string[]} notes @param {boolean} own */
  #complain(skipped, notes, own) {
    const { name, twin, size, caption, convertible } = this.image;
    const convert = () => this.folder.change("convert", { names: [name], label: t("room.images.did_convert", { name }) });
    const texts = [...(skipped ? [t("room.images.skipped", { why: told(skipped) })] : []), ...notes.map(told)];
    const writing = own && skipped && size && caption === "";
    const button = (/** @type {string} */ key, /** @type {() => unknown} */ work) => h("button", { "data-mend": key, onclick: work }, t(`room.images.${key}`));
    fill(
      this.trouble,
      texts.map((text) => h("p", { class: skipped ? "ck-error" : "ck-warning" }, text)),
      writing && button("write", () => this.caption.focus()),
      own && twin && button("remove_twin", () => this.remove()),
      own && convertible && button("convert", convert),
      own && !size && button("remove_file", () => this.remove()),
    );
  }

  // --- the crop ---

  /** @param {FolderImage["frame"] & {}} frame */
  #place([left, top, right, bottom]) {
    const places = { left, top, width: right - left, height: bottom - top };
    for (const [name, value] of Object.entries(places)) this.frame.style.setProperty(name, percent(value));
  }

  /** How much of the image the frame leaves out, along its two sides. */
  #overhang() {
    const [left, top, right, bottom] = this.image.frame ?? [0, 0, 1, 1];
    return [1 - (right - left), 1 - (bottom - top)];
  }

  /** The frame is a slider where there is something to choose. @param {boolean} own */
  #handle(own) {
    const [across, down] = this.#overhang();
    const movable = own && Math.max(across, down) > 0.005;
    this.frame.classList.toggle("ck-movable", movable);
    const about = {
      role: "slider", tabindex: "0", "aria-label": t("room.images.crop", { name: this.image.name }), title: t("room.images.crop_tip"),
      "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": String(Math.round(100 * this.image.crop)),
      "aria-orientation": across > down ? "horizontal" : "vertical",
    };
    for (const [name, value] of Object.entries(about)) {
      if (movable) this.frame.setAttribute(name, value);
      else this.frame.removeAttribute(name);
    }
  }

  #dragFrame() {
    const { frame } = this;
    let [start, from, at] = [0, 0, 0];
    const movable = () => frame.classList.contains("ck-movable");
    const across = () => this.#overhang()[0] > this.#overhang()[1];
    /** @param {number} crop */
    const move = (crop) => {
      at = Math.min(1, Math.max(0, crop));
      const side = across() ? "left" : "top";
      frame.style.setProperty(side, percent(Math.max(...this.#overhang()) * at));
      frame.setAttribute("aria-valuenow", String(Math.round(100 * at)));
    };
    const keep = () => {
      const { name, crop } = this.image;
      this.key = "";
      if (at !== crop) this.folder.change("crops", { crops: { [name]: Number(at.toFixed(4)) }, label: t("room.images.did_crop", { name }) });
    };
    frame.addEventListener("pointerdown", (event) => {
      if (!movable()) return;
      frame.setPointerCapture(event.pointerId);
      [start, from] = [across() ? event.clientX : event.clientY, this.image.crop];
      at = from;
      frame.focus({ preventScroll: true });
    });
    frame.addEventListener("pointermove", (event) => {
      if (!frame.hasPointerCapture(event.pointerId)) return;
      const length = (across() ? this.look.clientWidth : this.look.clientHeight) * Math.max(...this.#overhang());
      move(from + ((across() ? event.clientX : event.clientY) - start) / length);
    });
    frame.addEventListener("pointerup", (event) => {
      if (!frame.hasPointerCapture(event.pointerId)) return;
      frame.releasePointerCapture(event.pointerId);
      keep();
    });
    frame.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -STEP, ArrowUp: -STEP, ArrowRight: STEP, ArrowDown: STEP, Home: -1, End: 1 };
      const by = /** @type {Record<string, number>} */ (steps)[event.key];
      if (!by || !movable()) return;
      event.preventDefault();
      move(this.image.crop + by);
      keep();
      this.image.crop = at; // the next key counts from here, before the host has answered
    });
  }

  // --- tags ---

  /** The parts between commas as buttons, to be moved by dragging and by Shift and arrow keys. */
  #tag() {
    const lines = this.caption.value.split("\n");
    const rows = lines.map((line, i) => [i, line.split(",").map((tag) => tag.trim()).filter(Boolean)]);
    const several = /** @type {[number, string[]][]} */ (rows).filter(([, tags]) => tags.length > 1);
    if (this.caption.readOnly) return fill(this.tags);
    const key = JSON.stringify(several);
    if (this.tags.dataset.of === key) return;
    this.tags.dataset.of = key;
    fill(this.tags, several.map(([line, tags]) => this.#row(line, tags)));
  }

  #untag() {
    delete this.tags.dataset.of;
    fill(this.tags);
  }

  /** @param {number} line @param {string[]} tags */
  #row(line, tags) {
    const row = h("div.ck-group", { role: "group", "aria-label": t("room.images.tags") });
    /** @param {number} from @param {number} to */
    const move = (from, to) => {
      if (from === to || to < 0 || to >= tags.length) return;
      const moved = [...tags];
      moved.splice(to, 0, ...moved.splice(from, 1));
      const lines = this.caption.value.split("\n");
      lines[line] = moved.join(", ");
      this.caption.value = lines.join("\n");
      this.write();
      this.#tag();
      /** @type {NodeListOf<HTMLElement>} */ (this.tags.querySelectorAll(`[data-line="${line}"]`))[to]?.focus();
    };
    const buttons = tags.map((tag, i) => h("button.ck-tag-part", { draggable: true, "data-line": line, title: t("room.images.tag_tip") }, tag));
    buttons.forEach((button, i) => {
      button.addEventListener("dragstart", (event) => event.dataTransfer?.setData("text/x-chromakit-tag", `${line} ${i}`));
      button.addEventListener("dragover", (event) => event.preventDefault());
      button.addEventListener("drop", (event) => {
        const [other, from] = (event.dataTransfer?.getData("text/x-chromakit-tag") ?? "").split(" ").map(Number);
        event.preventDefault();
        event.stopPropagation();
        if (other === line && Number.isInteger(from)) move(from, i);
      });
      button.addEventListener("keydown", (event) => {
        const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!by) return;
        event.preventDefault();
        if (event.shiftKey) move(i, i + by);
        else buttons[i + by]?.focus();
      });
    });
    row.append(...buttons);
    return row;
  }
}
