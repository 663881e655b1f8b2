// Files on their way into a data set folder, through ComfyUI's own upload; captions through ours, once their images are
// there. Every file that does not arrive is named with the reason.
import { InTurn, answered, ask, reason } from "../lib/http.js";
import { t } from "../lib/words.js";

const AT_ONCE = 3;

/** @param {string} name */
const ending = (name) => (/\.[^./]+$/.exec(name)?.[0] ?? "").toLowerCase();
/** @param {string} name */
const stem = (name) => name.replace(/\.[^./]+$/, "");

/** One batch after another, counted together until all have arrived. `arrived()` is called after each file. */
export class Uploads {
  /** @param {() => void} arrived */
  constructor(arrived) {
    this.arrived = arrived;
    /** @type {Folder | null} where the last batch goes, or went */
    this.folder = null;
    this.stop = new AbortController();
    this.turn = new InTurn();
    this.count = 0;
    this.finished = 0;
    this.bytes = 0;
    this.sent = 0;
    /** @type {{ name: string, why: string }[]} */
    this.failures = [];
  }

  get going() {
    return this.turn.pending > 0;
  }

  cancel() {
    this.stop.abort();
  }

  /**
   * Send files into a folder, and write the captions among them.
   * @param {Folder} folder
   * @param {Given[]} given
   * @param {string[]} endings of images that are read
   */
  add(folder, given, endings) {
    if (!this.going) Object.assign(this, { folder, count: 0, finished: 0, bytes: 0, sent: 0, failures: [] });
    if (this.stop.signal.aborted) this.stop = new AbortController();
    const { signal } = this.stop;
    const images = given.filter(({ file }) => endings.includes(ending(file.name)));
    const texts = given.filter(({ file }) => ending(file.name) === ".txt");
    const others = given.filter((one) => !images.includes(one) && !texts.includes(one));
    this.failures.push(...others.map(({ file }) => ({ name: file.name, why: t("room.images.no_image") })));
    this.count += images.length;
    this.bytes += images.reduce((sum, { file }) => sum + file.size, 0);
    const sent = this.turn.next(() => this.#batch(folder, images, texts, signal));
    this.arrived();
    return sent.finally(this.arrived);
  }

  /** @param {Folder} folder @param {Given[]} images @param {Given[]} texts @param {AbortSignal} signal */
  async #batch(folder, images, texts, signal) {
    this.folder = folder;
    /** @type {Map<string, string>} names as they are here, without ending → as they are there */
    const names = new Map();
    const waiting = [...images];
    const worker = async () => {
      for (let next = waiting.shift(); next; next = waiting.shift()) await this.#send(folder, next, names, signal);
    };
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
    await folder.load(); // the images that captions may be for
    if (!signal.aborted) await this.#write(folder, texts, names);
  }

  /** @param {Folder} folder @param {Given} given @param {Map<string, string>} names @param {AbortSignal} signal */
  async #send(folder, { file, place }, names, signal) {
    try {
      signal.throwIfAborted();
      const body = new FormData();
      body.append("image", file, file.name);
      body.append("subfolder", [folder.name, place].filter(Boolean).join("/"));
      body.append("type", "input");
      const answer = await ask("/upload/image", { method: "POST", body, signal });
      if (!answer.ok) throw new Error(t(answer.status === 413 ? "room.images.too_large" : "room.images.refused", { status: answer.status }));
      const { name } = await answered(answer);
      const within = (/** @type {string} */ each) => (place ? `${place}/${each}` : each);
      names.set(stem(within(file.name)), within(name));
    } catch (error) {
      this.failures.push({ name: file.name, why: signal.aborted ? t("room.images.cancelled") : reason(error) });
    }
    this.finished += 1;
    this.sent += file.size;
    this.arrived();
  }

  /** @param {Folder} folder @param {Given[]} texts @param {Map<string, string>} names */
  async #write(folder, texts, names) {
    const there = new Map(folder.images.map(({ name }) => [stem(name), name]));
    /** @type {Record<string, string>} */
    const captions = {};
    for (const { file, place } of texts) {
      const key = stem(place ? `${place}/${file.name}` : file.name);
      const name = names.get(key) ?? there.get(key);
      try {
        if (!name) throw new Error(t("room.images.no_such_image"));
        captions[name] = await file.text();
      } catch (error) {
        this.failures.push({ name: file.name, why: reason(error) });
      }
    }
    await folder.write(captions, t("room.images.did_upload"));
    await folder.load();
  }
}

/**
 * What was dropped, with the files of dropped folders: these folders' own sub-folders stay.
 * @param {DataTransfer} data
 */
export async function droppedFiles(data) {
  const entries = [...data.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry != null);
  if (!entries.length) return [...data.files].map((file) => ({ file, place: "" }));
  /** @type {Given[]} */
  const found = [];
  /** @param {FileSystemEntry} entry @param {string} place */
  const walk = async (entry, place) => {
    if (entry instanceof FileSystemFileEntry || entry.isFile) {
      const file = /** @type {FileSystemFileEntry} */ (entry);
      found.push({ file: await new Promise((done, fail) => file.file(done, fail)), place });
      return;
    }
    const reader = /** @type {FileSystemDirectoryEntry} */ (entry).createReader();
    for (;;) {
      /** @type {FileSystemEntry[]} */
      const some = await new Promise((done, fail) => reader.readEntries(done, fail));
      if (!some.length) return;
      for (const each of some) await walk(each, each.isDirectory ? [place, each.name].filter(Boolean).join("/") : place);
    }
  };
  for (const entry of entries) await walk(entry, "");
  return found.filter(({ file }) => !file.name.startsWith("."));
}
