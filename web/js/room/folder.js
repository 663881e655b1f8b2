// @ts-check
// A data set folder in the room: what the host says is in it, and the changes made here, each of which can be undone.
import { throttled } from "../lib/dom.js";
import { get, post } from "../lib/http.js";

/** @typedef {{ label: string, forth(): Promise<unknown>, back(): Promise<unknown> }} Change */

const MILLISECONDS = 700;

/** @returns {Promise<FolderList>} */
export const listFolders = () => get("datasets");

/**
 * A caption as the host keeps it.
 * @param {string} text
 */
export function plain(text) {
  const found = text.replace(/\r\n?/g, "\n").replace(/^\n+|\n+$/g, "");
  return found.trim() ? found : "";
}

/** One folder. `changed()` is called after anything in it did, `failed(error)` when the host refused. */
export class Folder {
  /** @param {string} name @param {TrainingRoom} room @param {() => void} changed @param {(error: unknown) => void} failed */
  constructor(name, room, changed, failed) {
    this.name = name;
    this.room = room;
    this.changed = changed;
    this.failed = failed;
    /** @type {FolderLook | null} */
    this.found = null;
    this.again = false;
    /** @type {Promise<void> | null} */
    this.loading = null;
    /** @type {Change[]} */
    this.done = [];
    /** @type {Change[]} */
    this.undone = [];
    /** Look again soon; many calls are one. */
    this.touch = throttled(() => this.load(), MILLISECONDS);
  }

  get images() {
    return this.found?.images ?? [];
  }

  /** Look at the folder, as it is from now on: while that is going on already, once more when it is over. */
  load() {
    this.again = Boolean(this.name);
    this.loading ??= this.#look();
    return this.loading;
  }

  async #look() {
    while (this.again) {
      this.again = false;
      const { trigger, size } = this.room.view;
      try {
        this.found = await post("datasets/images", { folder: this.name, trigger, size });
      } catch (error) {
        this.failed(error);
      }
      this.changed();
    }
    this.loading = null;
  }

  /**
   * Write captions by the images' names.
   * @param {Record<string, string>} texts
   * @param {string} label what is undone with it, in words
   */
  async write(texts, label) {
    const now = new Map(this.images.map(({ name, caption }) => [name, caption]));
    const news = Object.entries(texts).map(([name, text]) => [name, plain(text)]).filter(([name, text]) => now.get(name) !== text);
    if (!news.length) return;
    const after = /** @type {Record<string, string>} */ (Object.fromEntries(news));
    const before = Object.fromEntries(Object.keys(after).map((name) => [name, now.get(name) ?? ""]));
    await this.#do({ label, forth: () => this.#captions(after, before), back: () => this.#captions(before, after) });
  }

  /** @param {Record<string, string>} captions @param {Record<string, string>} seen */
  async #captions(captions, seen) {
    await this.#post("captions", { captions, seen });
    for (const image of this.images) if (image.name in captions) image.caption = captions[image.name];
  }

  /** @param {string} name @param {number} crop @param {string} label */
  move(name, crop, label) {
    const before = this.images.find((image) => image.name === name)?.crop ?? 0.5;
    const to = (/** @type {number} */ at) => () => this.#post("crops", { crops: { [name]: at } });
    return this.#do({ label, forth: to(crop), back: to(before) });
  }

  /**
   * Take images out of the folder; the host keeps them aside.
   * @param {string[]} names
   * @param {string} label
   */
  remove(names, label) {
    let batch = "";
    return this.#do({
      label,
      forth: async () => (batch = (await this.#post("remove", { names })).batch),
      back: () => this.#post("restore", { batch }),
    });
  }

  /** @param {string} batch */
  async restore(batch) {
    await this.#tried(() => this.#post("restore", { batch }));
  }

  /** Take back what was done last, and do it again. */
  async undo() {
    const last = this.done.at(-1);
    if (!last || !(await this.#tried(last.back))) return;
    this.done.pop();
    this.undone.push(last);
    this.changed();
  }

  async redo() {
    const last = this.undone.at(-1);
    if (!last || !(await this.#tried(last.forth))) return;
    this.undone.pop();
    this.done.push(last);
    this.changed();
  }

  /** @param {Change} change */
  async #do(change) {
    if (!(await this.#tried(change.forth))) return;
    this.done.push(change);
    this.undone = [];
    this.changed();
  }

  /** @param {() => Promise<unknown>} work */
  async #tried(work) {
    try {
      await work();
      return true;
    } catch (error) {
      this.failed(error);
      return false;
    } finally {
      this.touch();
    }
  }

  /** @param {string} action @param {object} body @returns {Promise<{ batch: string }>} */
  #post(action, body) {
    return post(`datasets/${action}`, { folder: this.name, ...body });
  }
}
