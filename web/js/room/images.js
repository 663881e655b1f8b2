// Step "Images": a folder of images to learn from. They come in here, are captioned here, and what is wrong with them is
// said and mended here.
import { fill, h, say } from "../lib/dom.js";
import { t, told } from "../lib/words.js";
import { notify } from "../jobs/notices.js";
import { Bar } from "./bar.js";
import { CaptionAll } from "./caption_all.js";
import { Card } from "./card.js";
import { Folder, listFolders } from "./folder.js";
import { Replacing, replaced } from "./replacing.js";
import { Uploads, droppedFiles } from "./uploads.js";

const NEAR = "300px"; // above and below the page, where small images are fetched already

export const title = "room.images.title";

/** @param {TrainingRoom} room @returns {Step} */
export const build = (room) => new Images(room);

class Images {
  /** @param {TrainingRoom} room */
  constructor(room) {
    this.room = room;
    this.folder = this.#enter();
    this.uploads = new Uploads(() => this.showUploads());
    this.gone = false;
    /** @type {FolderList} */
    this.list = { folders: [], endings: [], known: [], sizes: [] };
    /** @type {Given[]} what was dropped before there was a folder for it */
    this.held = [];
    this.begun = Promise.resolve();
    /** @type {Map<string, Card>} */
    this.cards = new Map();
    this.grid = h("ul.ck-gallery", { "aria-label": t("room.images.grid") });
    /** @type {IntersectionObserver | undefined} */
    this.view = undefined; // which cards are in it
    this.counts = h("span.ck-strong", { role: "status" });
    this.only = h("button", { "data-action": "only", onclick: () => this.#only(!this.grid.classList.contains("ck-only")) });
    this.check = h("div.ck-checks");
    this.warnings = h("ul");
    this.warned = h("details.ck-warnings", h("summary.ck-warning"), this.warnings);
    this.aside = h("details.ck-aside", h("summary"), h("ul"));
    this.progress = h("div.ck-uploads");
    this.empty = h("p.ck-empty");
    this.replacing = new Replacing(() => this.folder);
    this.captioning = new CaptionAll(room, () => this.folder);
    this.bar = new Bar(room, {
      add: (files) => this.#send(files.map((file) => ({ file, place: "" }))),
      undo: () => this.folder.change("undo"),
      redo: () => this.folder.change("redo"),
      again: () => this.folder.load(),
    });
    this.element = h(
      "div.ck-images",
      this.bar.element,
      this.progress,
      h("div.ck-summary", h("div.ck-group", this.counts, this.only), this.check, this.warned, this.captioning.element, this.replacing.element, this.aside),
      this.empty,
      this.grid,
    );
    this.#drops();
    this.element.addEventListener("keydown", (event) => this.#key(event));
    this.unfollow = room.onChoice((changed) => this.#chosen(changed));
  }

  refresh() {
    this.begun = this.#begin();
    this.folder.touch();
  }

  /** What is on its way still arrives. */
  destroy() {
    this.unfollow();
    this.gone = true;
  }

  #enter() {
    /** @type {Folder} */
    const folder = new Folder(
      this.room.view.folder,
      this.room,
      () => folder === this.folder && this.show(),
      (error) => this.room.failed(error),
    );
    return folder;
  }

  async #begin() {
    try {
      this.list = await listFolders();
    } catch (error) {
      this.room.failed(error);
    }
    this.bar.offer(this.list);
    this.show();
  }

  /** @param {Partial<RoomView>} changed */
  #chosen(changed) {
    if ("folder" in changed) {
      this.folder = this.#enter();
      for (const card of this.cards.values()) card.element.remove();
      this.cards.clear();
      this.bar.offer(this.list, false);
      this.show();
      this.room.notice("");
      const held = this.held.splice(0);
      if (held.length) this.#send(held);
    }
    if ("folder" in changed || "trigger" in changed || "size" in changed) this.folder.touch();
    this.bar.follow(changed);
  }

  // --- files that come in ---

  #drops() {
    this.element.addEventListener("dragover", (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      this.element.classList.add("ck-over");
    });
    this.element.addEventListener("dragleave", (event) => {
      if (!(event.relatedTarget instanceof Node && this.element.contains(event.relatedTarget))) this.element.classList.remove("ck-over");
    });
    this.element.addEventListener("drop", async (event) => {
      this.element.classList.remove("ck-over");
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      this.#send(await droppedFiles(event.dataTransfer));
    });
  }

  /** @param {Given[]} given */
  async #send(given) {
    const here = this.folder;
    await this.begun;
    if (!this.list.known.length) await (this.begun = this.#begin());
    if (!this.list.known.length) return; // why was said
    const folder = here.name ? here : this.folder;
    if (!folder.name) {
      this.held.push(...given);
      this.bar.nameNew();
      return this.room.notice(t("room.images.name_it", { count: this.held.length }));
    }
    if (folder.found && !folder.found.own) return this.room.notice(t("room.images.not_own"), "error");
    return this.uploads.add(folder, given, this.list.known);
  }

  showUploads() {
    const { count, finished, bytes, sent, failures, going, folder } = this.uploads;
    if (going) folder?.touch();
    const text = t(going ? "room.images.sending" : "room.images.sent", { finished, count, folder: folder?.name });
    if (this.gone && !going && failures.length) notify("error", text, failures.map(({ name, why }) => `${name}: ${why}`).join("\n"));
    fill(
      this.progress,
      (going || finished > 0) && h("div.ck-row.ck-nowrap", h("span", { role: "status" }, text),
        going && h("progress", { max: bytes || 1, value: sent, "aria-label": text }),
        going && h("button", { "data-action": "cancel", onclick: () => this.uploads.cancel() }, t("room.images.cancel"))),
      failures.length > 0 && h("div", { role: "alert" }, h("ul.ck-error", failures.map(({ name, why }) => h("li", `${name}: ${why}`)))),
    );
  }

  // --- what is there ---

  show() {
    const { found, images } = this.folder;
    this.view ??= new IntersectionObserver(
      (entries) => entries.forEach(({ target, isIntersecting }) => target instanceof HTMLElement && this.cards.get(target.dataset.name ?? "")?.see(isIntersecting)),
      { root: this.element.parentElement, rootMargin: NEAR },
    );
    const { folder } = this.room.view;
    for (const [button, labels] of /** @type {const} */ ([[this.bar.undo, found?.done], [this.bar.redo, found?.undone]])) {
      button.disabled = !labels?.length;
      button.title = labels?.at(-1) ?? "";
    }
    const gone = new Set(this.cards.keys());
    images.forEach((image, i) => {
      gone.delete(image.name);
      const card = this.cards.get(image.name) ?? new Card(image, this.folder);
      if (this.cards.has(image.name)) card.show(image);
      else this.view?.observe(card.element);
      this.cards.set(image.name, card);
      if (this.grid.children[i] !== card.element) this.grid.insertBefore(card.element, this.grid.children[i] ?? null);
    });
    for (const name of gone) {
      this.cards.get(name)?.element.remove();
      this.cards.delete(name);
    }
    this.empty.hidden = images.length > 0 || (Boolean(folder) && !found);
    say(this.empty, t(folder ? "room.images.empty" : "room.images.begin"));
    const skipped = images.filter((image) => image.skipped).length;
    const doubtful = images.filter((image) => image.skipped || image.twin).length;
    say(this.only, t("room.images.only", { count: doubtful }));
    this.only.hidden = !doubtful;
    if (!doubtful) this.#only(false);
    const sizes = (found?.buckets ?? []).map(({ width, height, count }) => `${width}×${height}: ${count}`).join(", ");
    const counts = found && images.length ? t("room.images.counts", { images: images.length, used: images.length - skipped, skipped }) : "";
    say(this.counts, folder && !found && !this.folder.closed ? t("widgets.looking") : counts);
    this.counts.title = sizes;
    this.#checks(found);
    const warnings = found?.warnings ?? [];
    this.warned.hidden = !warnings.length;
    say(this.warned.children[0], t(warnings.length === 1 ? "widgets.dataset.warning" : "widgets.dataset.warnings", { count: warnings.length }));
    fill(this.warnings, warnings.map((text) => h("li", told(text))));
    this.#removed(found);
    this.replacing.element.hidden = !found?.own || !images.length;
    this.replacing.count();
    this.captioning.show();
    if (found?.unread) this.folder.touch();
  }

  /** Show what needs mending alone. @param {boolean} on */
  #only(on) {
    this.grid.classList.toggle("ck-only", on);
    this.only.setAttribute("aria-pressed", String(on));
  }

  /** The trigger word in sentences, each with what mends it. @param {FolderLook | null} found */
  #checks(found) {
    if (!found?.check.trigger || !found.check.of) return fill(this.check);
    const { own } = found;
    const { trigger, of, lacking, stands_as } = found.check;
    const names = (/** @type {string[]} */ list) => list.slice(0, 5).join(", ") + (list.length > 5 ? ", …" : "");
    const row = (/** @type {string} */ text, /** @type {string[]} */ list, /** @type {string} */ label, /** @type {(text: string) => string} */ mend) =>
      h("div.ck-group", { title: names(list) },
        h("span.ck-warning", text),
        own && h("button", { "data-mend": "trigger", onclick: () => this.#mend(list, mend, label) }, label));
    const others = new Set(stands_as.flatMap((each) => each.names));
    const rest = lacking.filter((name) => !others.has(name));
    const fronted = (/** @type {string} */ line) => (line.toLowerCase().includes(trigger.toLowerCase()) ? line : `${trigger} ${line}`);
    fill(
      this.check,
      h("div", { class: lacking.length ? "ck-warning" : "ck-good" }, t(lacking.length ? "room.images.lacking" : "room.images.none_lack", { count: lacking.length, of, trigger })),
      stands_as.map(({ word, names: list }) =>
        row(t(list.length === 1 ? "room.images.stands_once" : "room.images.stands_as", { trigger, word, count: list.length }), list, t("room.images.put_right", { trigger, word }),
          (text) => replaced(text, word, trigger, true))),
      rest.length > 0 && own &&
        row(t("room.images.put_front_why", { trigger }), rest, t("room.images.put_front", { trigger, count: rest.length }),
          (text) => text.split("\n").map((line) => (line.trim() ? fronted(line) : line)).join("\n")),
    );
  }

  /** @param {string[]} names @param {(text: string) => string} work @param {string} label */
  #mend(names, work, label) {
    const texts = this.folder.images.filter(({ name }) => names.includes(name)).map(({ name, caption }) => [name, work(caption ?? "")]);
    return this.folder.write(Object.fromEntries(texts), label);
  }

  /** @param {FolderLook | null} found */
  #removed(found) {
    const removed = found?.removed ?? [];
    const [summary, list] = this.aside.children;
    this.aside.hidden = !removed.length;
    say(summary, t("room.images.removed", { count: removed.reduce((sum, { names }) => sum + names.length, 0) }));
    fill(list, removed.map(({ batch, names }) =>
      h("li.ck-group", names.join(", "), h("button", { "data-batch": batch, onclick: () => this.folder.change("restore", { batch, label: t("room.images.did_restore") }) }, t("room.images.restore")))));
  }

  /**
   * Alt+Z and Alt+Shift+Z: Ctrl+Z is the page's own, and belongs to a text that is being typed.
   * @param {KeyboardEvent} event
   */
  #key(event) {
    if (!event.altKey || event.code !== "KeyZ") return;
    event.preventDefault();
    this.folder.change(event.shiftKey ? "redo" : "undo");
  }
}
