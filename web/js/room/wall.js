// A wall of images, rows down and prompts across: walked by keys, and each image enlarged over another of its column.
import { fill, h, say } from "../lib/dom.js";
import { t } from "../lib/words.js";
import { Slider } from "../jobs/previews.js";

/** Pixels of a small image's longer side. */
export const SMALL = 256;
export const LARGE = 1024;
const PAGE = 4; // rows that Page Up and Page Down go

/** @typedef {(cell: WallCell, event: KeyboardEvent) => boolean} OnKey what else a key does with an image; true: it did */

/** The wall. It shows new images without being built anew: what has the focus keeps it. */
export class Wall {
  /**
   * @param {string} label
   * @param {{ chosen?: (cell: WallCell) => void, key?: OnKey, click?: "open" | "choose" }} [options]
   */
  constructor(label, { chosen = () => {}, key = () => false, click = "open" } = {}) {
    this.chosen = chosen;
    this.key = key;
    this.click = click;
    /** @type {WallRow[]} */
    this.rows = [];
    /** @type {Map<string, { element: HTMLElement, head: HTMLElement, mark: HTMLElement, cells: Map<number, Tile> }>} */
    this.shown = new Map();
    this.columns = "";
    /** @type {string | null} */
    this.current = null; // the key of the image that the Tab key comes to
    this.heads = h("div.ck-wall-heads", { role: "row" });
    this.element = h("div.ck-wall", { role: "grid", "aria-label": label }, this.heads);
    this.element.addEventListener("keydown", (event) => this.#key(event));
    this.large = new Enlarged(this);
  }

  /** @param {string[]} columns what each prompt says @param {WallRow[]} rows */
  show(columns, rows) {
    const atEnd = this.element.scrollTop > 0 && this.element.scrollTop + this.element.clientHeight >= this.element.scrollHeight - 8;
    this.rows = rows;
    if (this.columns !== columns.join("\n")) {
      this.columns = columns.join("\n");
      const head = (/** @type {string} */ text) => h("div", { role: "columnheader", title: text }, h("span", text));
      fill(this.heads, h("div.ck-wall-corner", { role: "columnheader" }, t("wall.step")), columns.map(head));
      this.element.style.setProperty("--ck-columns", String(columns.length));
    }
    const wanted = new Set(rows.map((row) => row.key));
    for (const [key, { element }] of this.shown) if (!wanted.has(key)) element.remove(), this.shown.delete(key);
    /** @type {HTMLElement} */
    let before = this.heads;
    for (const row of rows) {
      const element = this.#row(row, columns.length);
      if (before.nextElementSibling !== element) before.after(element);
      before = element;
    }
    if (!this.#place(this.current)) this.#choose(rows.flatMap((row) => row.cells).find((cell) => cell) ?? null);
    if (atEnd) this.element.scrollTop = this.element.scrollHeight;
  }

  /** @param {WallRow} row @param {number} columns */
  #row(row, columns) {
    let shown = this.shown.get(row.key);
    if (!shown) {
      const [head, mark] = [h("span"), h("span.ck-faint")];
      const element = h("div", { role: "row", "data-row": row.key }, h("div", { role: "rowheader" }, head, mark));
      shown = { element, head, mark, cells: new Map() };
      this.shown.set(row.key, shown);
    }
    say(shown.head, row.label);
    say(shown.mark, row.mark ?? "");
    shown.element.classList.toggle("ck-wall-best", Boolean(row.best));
    for (let i = 0; i < columns; i++) {
      let tile = shown.cells.get(i);
      if (!tile) {
        tile = new Tile((cell, twice) => this.#clicked(cell, twice));
        shown.cells.set(i, tile);
        shown.element.append(tile.element);
      }
      tile.show(row.cells[i] ?? null);
    }
    for (const [i, tile] of shown.cells) if (i >= columns) tile.element.remove(), shown.cells.delete(i);
    return shown.element;
  }

  /** @param {WallCell} cell @param {boolean} twice */
  #clicked(cell, twice) {
    this.focus(cell.key);
    if (twice || this.click === "open") this.large.open(cell);
  }

  /**
   * Where an image is: its row and column.
   * @param {string | null} key
   * @returns {[number, number] | null}
   */
  #place(key) {
    for (const [i, row] of this.rows.entries()) {
      const column = row.cells.findIndex((cell) => cell?.key === key);
      if (key && column >= 0) return [i, column];
    }
    return null;
  }

  /** The image that the Tab key comes to. */
  get cell() {
    const place = this.#place(this.current);
    return place && this.rows[place[0]].cells[place[1]];
  }

  /** @param {WallCell | null} cell */
  #choose(cell) {
    this.current = cell?.key ?? null;
    for (const { cells } of this.shown.values()) {
      for (const tile of cells.values()) tile.choose(tile.cell != null && tile.cell.key === this.current);
    }
    if (cell) this.chosen(cell);
  }

  /** Go to an image. @param {string} key */
  focus(key) {
    const place = this.#place(key);
    if (!place) return;
    this.#choose(this.rows[place[0]].cells[place[1]]);
    this.shown.get(this.rows[place[0]].key)?.cells.get(place[1])?.element.focus();
  }

  /** An image and those above and below it that are there, from the top. @param {WallCell} cell */
  column(cell) {
    const place = this.#place(cell.key);
    return place ? this.rows.flatMap((row) => row.cells[place[1]] ?? []).filter((each) => each.source) : [];
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const place = this.#place(this.current);
    const cell = this.cell;
    if (!place || !cell || event.altKey || event.metaKey) return;
    const [row, column] = place;
    const [bottom, right] = [this.rows.length - 1, this.rows[row].cells.length - 1];
    /** @type {Record<string, [number, number, number, number]>} from where, and which way to look for an image */
    const ways = {
      ArrowLeft: [row, column - 1, 0, -1],
      ArrowRight: [row, column + 1, 0, 1],
      ArrowUp: [row - 1, column, -1, 0],
      ArrowDown: [row + 1, column, 1, 0],
      PageUp: [Math.max(0, row - PAGE), column, 1, 0],
      PageDown: [Math.min(bottom, row + PAGE), column, -1, 0],
      Home: event.ctrlKey ? [0, 0, 0, 1] : [row, 0, 0, 1],
      End: event.ctrlKey ? [bottom, right, 0, -1] : [row, right, 0, -1],
    };
    const way = Object.hasOwn(ways, event.key) ? ways[event.key] : null;
    if (way) this.#walk(way);
    else if (event.key === "Enter" || event.key === " ") this.large.open(cell);
    else if (event.ctrlKey || !this.key(cell, event)) return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** @param {[number, number, number, number]} way */
  #walk([row, column, down, across]) {
    while (this.rows[row] && column >= 0 && column < this.rows[row].cells.length) {
      const found = this.rows[row].cells[column];
      if (found) return this.focus(found.key);
      [row, column] = [row + down, column + across];
    }
  }
}

/** One place of the wall: an image, or what there is to say of it. */
class Tile {
  /** @param {(cell: WallCell, twice: boolean) => void} clicked */
  constructor(clicked) {
    /** @type {WallCell | null} */
    this.cell = null;
    this.image = h("img", { loading: "lazy", decoding: "async", alt: "", hidden: true });
    this.note = h("span.ck-wall-note");
    this.element = h("div", { role: "gridcell" }, this.image, this.note);
    this.element.addEventListener("click", () => this.cell && clicked(this.cell, false));
    this.element.addEventListener("dblclick", () => this.cell && clicked(this.cell, true));
  }

  /** @param {WallCell | null} cell */
  show(cell) {
    this.cell = cell;
    this.element.classList.toggle("ck-wall-none", !cell);
    if (!cell) {
      this.element.removeAttribute("data-key");
      this.element.removeAttribute("tabindex");
    } else {
      this.element.dataset.key = cell.key;
      if (!this.element.hasAttribute("tabindex")) this.element.tabIndex = -1;
    }
    const source = cell?.small ?? "";
    if ((this.image.getAttribute("src") ?? "") !== source) {
      if (source) this.image.src = source;
      else this.image.removeAttribute("src");
    }
    this.image.hidden = !source;
    this.image.alt = cell?.label ?? "";
    say(this.note, cell?.note ?? "");
    this.note.title = cell?.about ?? "";
    this.note.hidden = !cell?.note;
    if (cell && !source) this.element.setAttribute("aria-label", `${cell.label}: ${cell.note ?? ""}`);
    else this.element.removeAttribute("aria-label");
  }

  /** @param {boolean} chosen */
  choose(chosen) {
    if (!this.cell) return;
    this.element.tabIndex = chosen ? 0 : -1;
    this.element.setAttribute("aria-selected", String(chosen));
  }
}

/** An image at its full size over the one above it in its column, or over any other of the column. */
class Enlarged {
  /** @param {Wall} wall */
  constructor(wall) {
    this.wall = wall;
    /** @type {WallCell | null} */
    this.cell = null;
    /** @type {string | null} */
    this.pinned = null; // the key of the image on the left, where one was chosen
    this.slider = new Slider();
    this.title = h("h2", { id: "ck-large-title" });
    this.note = h("span.ck-strong", { role: "status" });
    this.left = h("select", { onchange: () => { this.pinned = this.left.value; this.#show(); } });
    this.up = h("button", { title: t("wall.up_tip"), onclick: () => this.#go(-1) }, t("wall.up"));
    this.down = h("button", { title: t("wall.down_tip"), onclick: () => this.#go(1) }, t("wall.down"));
    const close = h("button", { onclick: () => this.#close() }, t("wall.close"));
    this.choice = h("label.ck-group", t("previews.compare_with"), this.left);
    this.element = h(
      "dialog.ck-large",
      { "aria-labelledby": "ck-large-title" },
      h("div.ck-row", this.title, this.note, close),
      this.slider.element,
      h("div.ck-row", this.choice, h("div.ck-group", this.up, this.down)),
    );
    this.element.addEventListener("keydown", (event) => this.#key(event));
    this.element.addEventListener("click", (event) => event.target === this.element && this.#close());
    this.element.addEventListener("close", () => this.#close()); // by the browser's own ways
  }

  /** The focus is at the image that was shown last before another key can come. */
  #close() {
    if (!this.element.isConnected) return;
    this.element.close();
    this.element.remove();
    if (this.cell) this.wall.focus(this.cell.key);
  }

  /** @param {WallCell} cell */
  open(cell) {
    if (!cell.source) return;
    this.cell = cell;
    this.pinned = null;
    if (!this.element.isConnected) this.wall.element.after(this.element);
    if (!this.element.open) this.element.showModal();
    this.#show();
    this.slider.range.focus();
  }

  /** Show the image anew, e.g. after it was rated. */
  refresh() {
    const now = this.element.open && this.cell && this.wall.column(this.cell).find((one) => one.key === this.cell?.key);
    if (now) {
      this.cell = now;
      this.#show();
    }
  }

  #show() {
    if (!this.cell) return;
    const column = this.wall.column(this.cell);
    const place = column.findIndex((one) => one.key === this.cell?.key);
    const others = column.filter((one) => one.key !== this.cell?.key);
    const left = others.find((one) => one.key === this.pinned) ?? column[place - 1] ?? column[place + 1] ?? this.cell;
    say(this.title, this.cell.label);
    say(this.note, this.cell.note ?? "");
    fill(this.left, others.map((one) => h("option", { value: one.key, selected: one.key === left.key }, one.row)));
    this.choice.hidden = !others.length;
    [this.up.disabled, this.down.disabled] = [place <= 0, place === column.length - 1];
    this.slider.show(shownOf(left), shownOf(this.cell));
  }

  /** @param {number} by */
  #go(by) {
    if (!this.cell) return;
    const column = this.wall.column(this.cell);
    const next = column[column.findIndex((one) => one.key === this.cell?.key) + by];
    if (!next) return;
    this.cell = next;
    this.#show();
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    event.stopPropagation();
    if (event.key === "Escape") this.#close();
    else if (event.key === "PageUp" || event.key === "PageDown") this.#go(event.key === "PageUp" ? -1 : 1);
    else if (event.ctrlKey || event.altKey || event.metaKey || !this.cell || !this.wall.key(this.cell, event)) return;
    event.preventDefault();
  }
}

/** @param {WallCell} cell */
const shownOf = ({ source, whole, row }) => ({ source, whole, label: row });
