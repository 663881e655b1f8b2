// Captions by any node that makes a text of an image, or by the graph that is open in ComfyUI, through its own queue: only
// for images that have none.
import { app } from "../../../../scripts/app.js";
import { fill, h, say } from "../lib/dom.js";
import { get, post } from "../lib/http.js";
import { t } from "../lib/words.js";

const GRAPH = "\n"; // no node's name
const MILLISECONDS = 1000;

/** Behind a disclosure; `show()` after the folder changed. */
export class CaptionAll {
  /** @param {TrainingRoom} room @param {() => Folder} folder gives the one that is shown */
  constructor(room, folder) {
    this.room = room;
    this.folder = folder;
    this.followed = ""; // the folder whose captions are being made
    this.last = ""; // the one whose captions were made last
    this.choice = h("select", { "aria-label": t("room.caption_all.by") });
    this.none = h("p.ck-faint", { hidden: true }, t("room.caption_all.none"));
    this.start = h("button", { "data-action": "caption_all", onclick: () => this.#start() });
    this.stop = h("button", { hidden: true, onclick: () => this.#ask("caption/stop") }, t("room.choose.stop"));
    this.state = h("span.ck-faint", { role: "status" });
    this.failed = h("ul.ck-error");
    const row = h("div.ck-group", this.choice, this.start, this.stop, this.state);
    this.element = h("details", { ontoggle: () => this.#offer() }, h("summary", t("room.caption_all.title")), row, this.none, this.failed);
  }

  show() {
    const { found, images, name } = this.folder();
    const count = images.filter((image) => image.size && image.caption === "").length;
    this.element.hidden = !found?.own || (!count && this.last !== name);
    say(this.start, t("room.caption_all.start", { count }));
    this.start.disabled = !count || this.followed === name;
    if (this.followed !== name) this.stop.hidden = true;
  }

  /** The nodes that ComfyUI has now. */
  async #offer() {
    if (!this.element.open) return;
    try {
      const { nodes } = /** @type {Captioners} */ (await get("datasets/captioners"));
      this.none.hidden = nodes.length > 0;
      const offered = [...nodes, { node: GRAPH, title: t("room.caption_all.graph") }];
      fill(this.choice, offered.map(({ node, title }) => h("option", { value: node }, title)));
    } catch (error) {
      this.room.failed(error);
    }
  }

  async #start() {
    const own = this.choice.value === GRAPH && { graph: (await app.graphToPrompt()).output };
    await this.#ask("caption", { ...(own || { node: this.choice.value }), label: t("room.caption_all.did") });
  }

  /** @param {string} action @param {object} [body] */
  async #ask(action, body = {}) {
    const { name } = this.folder();
    try {
      this.#told(name, await post(`datasets/${action}`, { folder: name, ...body }));
    } catch (error) {
      this.room.failed(error);
    }
  }

  /** @param {string} name @param {CaptionProgress} progress */
  #told(name, { waiting, written, failed }) {
    const before = this.followed;
    this.followed = waiting ? name : "";
    this.last = name;
    if (waiting && !before) this.#follow();
    say(this.state, t(waiting ? "room.caption_all.waiting" : "room.caption_all.over", { waiting, written }));
    this.stop.hidden = !waiting;
    fill(this.failed, failed.map(({ name: image, error }) => h("li", `${image}: ${error}`)));
    this.folder().touch();
    this.show();
  }

  async #follow() {
    while (this.followed) {
      await new Promise((done) => setTimeout(done, MILLISECONDS));
      const name = this.followed;
      if (name) await get(`datasets/caption?${new URLSearchParams({ folder: name })}`).then((found) => this.#told(name, found)).catch(() => {});
    }
  }
}
