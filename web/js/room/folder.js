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
    this.closed = false; // whether it could not be looked into at all
    /** @type {Promise<void> | null} */
    this.loading = null;
    /** @type {Promise<unknown>} */
    this.queue = Promise.resolve();
    this.pending = 0; // changes that are asked for and not yet done
    this.changes = 0; // those that are
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
      const before = this.changes;
      try {
        const found = await post("datasets/images", { folder: this.name, trigger, size });
        if (this.pending || before !== this.changes) {
          // Seen from before a change that the page shows already.
          this.again = true;
          await this.queue;
          continue;
        }
        this.found = found;
        this.closed = false;
      } catch (error) {
        this.closed = !this.found;
        this.failed(error);
      }
      this.changed();
    }
    this.loading = null;
  }

  /**
   * Write captions by the images' names; false when that was refused.
   * @param {Record<string, string>} texts
   * @param {string} label what is undone with it, in words
   */
  write(texts, label) {
    return this.#next(async () => {
      const now = new Map(this.images.map(({ name, caption }) => [name, caption]));
      const news = Object.entries(texts).map(([name, text]) => [name, plain(text)]).filter(([name, text]) => now.get(name) !== text);
      if (!news.length) return true;
      const after = /** @type {Record<string, string>} */ (Object.fromEntries(news));
      const before = Object.fromEntries(Object.keys(after).map((name) => [name, now.get(name) ?? ""]));
      return this.#do({ label, forth: () => this.#captions(after, before), back: () => this.#captions(before, after) });
    });
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
    return this.#next(() => this.#do({ label, forth: to(crop), back: to(before) }));
  }

  /**
   * Take images out of the folder; the host keeps them aside.
   * @param {string[]} names
   * @param {string} label
   */
  remove(names, label) {
    let batch = "";
    const forth = async () => (batch = (await this.#post("remove", { names })).batch);
    return this.#next(() => this.#do({ label, forth, back: () => this.#post("restore", { batch }) }));
  }

  /** @param {string} batch */
  restore(batch) {
    return this.#next(() => this.#tried(() => this.#post("restore", { batch })));
  }

  /** Take back what was done last. */
  undo() {
    return this.#again(this.done, this.undone, "back");
  }

  /** Do what was taken back last. */
  redo() {
    return this.#again(this.undone, this.done, "forth");
  }

  /** @param {Change[]} from @param {Change[]} to @param {"back" | "forth"} way */
  #again(from, to, way) {
    return this.#next(async () => {
      const last = from.at(-1);
      if (!last || !(await this.#tried(last[way]))) return;
      from.pop();
      to.push(last);
      this.changed();
    });
  }

  /** @param {Change} change */
  async #do(change) {
    if (!(await this.#tried(change.forth))) return false;
    this.done.push(change);
    this.undone.length = 0;
    this.changed();
    return true;
  }

  /**
   * One change after another: each counts on what the one before has left.
   * @param {() => Promise<unknown>} work
   */
  #next(work) {
    this.pending += 1;
    this.queue = this.queue.then(work).finally(() => {
      this.pending -= 1;
      this.changes += 1;
    });
    return this.queue;
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
