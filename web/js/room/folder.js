// A data set folder in the room: what the host says is in it, and changes of it, each of which the host can undo.
import { throttled } from "../lib/dom.js";
import { InTurn, address, get, post } from "../lib/http.js";
import { learn } from "../lib/words.js";

const MILLISECONDS = 700;

/** @returns {Promise<FolderList>} */
export const listFolders = () => get("datasets");

/** A caption as the host keeps it. @param {string} text */
export function plain(text) {
  const found = text.replace(/\r\n?/g, "\n").replace(/^\n+|\n+$/g, "");
  return found.trim() ? found : "";
}

/**
 * Where a small image of a folder is.
 * @param {Folder} folder
 * @param {string} name
 * @param {number} side
 * @param {string} version
 */
export const sourceOf = (folder, name, side, version) =>
  address(`datasets/thumbnail?${new URLSearchParams({ folder: folder.name, name, side: String(side), v: version })}`);

/** What an image's mask is called. @param {string} name */
export const maskOf = (name) => name.replace(/\.[^./]+$/, "-masklabel.png");

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
    this.turn = new InTurn();
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
      const counts = this.turn.look();
      try {
        const found = await post("datasets/images", { folder: this.name, trigger, size });
        if (!counts()) {
          this.again = true;
          await this.turn.queue;
          continue;
        }
        learn(found.codes);
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
    return this.turn.next(async () => {
      const now = new Map(this.images.map(({ name, caption }) => [name, caption]));
      const news = Object.entries(texts).map(([name, text]) => [name, plain(text)]).filter(([name, text]) => now.get(name) !== text);
      if (!news.length) return true;
      const captions = /** @type {Record<string, string>} */ (Object.fromEntries(news));
      const seen = Object.fromEntries(Object.keys(captions).map((name) => [name, now.get(name) ?? ""]));
      if (!(await this.#tried("captions", { captions, seen, label }))) return false;
      for (const image of this.images) if (image.name in captions) image.caption = captions[image.name];
      this.changed();
      return true;
    });
  }

  /**
   * Another change, by the name and body of its route.
   * @param {"crops" | "remove" | "restore" | "convert" | "mask" | "undo" | "redo"} action
   * @param {object} [body]
   */
  change(action, body = {}) {
    return this.turn.next(() => this.#tried(action, body));
  }

  /** @param {string} action @param {object} body */
  async #tried(action, body) {
    try {
      await post(`datasets/${action}`, { folder: this.name, ...body });
      return true;
    } catch (error) {
      this.failed(error);
      return false;
    } finally {
      this.touch();
    }
  }
}
