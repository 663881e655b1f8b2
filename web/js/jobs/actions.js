// What one can do with a job, as a row of buttons that follow its state.
import { app } from "../../../../scripts/app.js";
import { h, say } from "../lib/dom.js";
import { reason } from "../lib/http.js";
import { t } from "../lib/words.js";
import { openGraph } from "./graphs.js";
import { ACTIVE, act, remove } from "./store.js";

const DEFAULT_MORE = 500;
const WAITS = ["stopped", "failed", "interrupted"];

/**
 * A button that is off while its work goes on, with the words `name` and `<name>_tip` of a table; `over` is called afterwards.
 * @param {string} table @param {string} name @param {() => Promise<unknown>} work
 * @param {(text: string) => void} complain @param {() => void} over
 */
export function doing(table, name, work, complain, over) {
  const onclick = async () => {
    made.disabled = true;
    complain("");
    await work().catch((error) => complain(reason(error)));
    made.disabled = false;
    over();
  };
  const made = h("button", { "data-action": name, title: t(`${table}.${name}_tip`), onclick }, t(`${table}.${name}`));
  return made;
}

/** The buttons. `complain(text)` shows what the host refused; an empty text takes it away. */
export class Actions {
  /** @param {Job} job @param {(text: string) => void} complain */
  constructor(job, complain) {
    this.job = job;
    this.complain = complain;
    const to = (/** @type {string} */ action) => act(this.job.id, action);
    this.buttons = {
      pause: this.#button("pause", () => to(this.job.state === "paused" ? "resume" : "pause")),
      stop: this.#button("stop", () => to("stop")),
      sample: this.#button("sample", () => to("sample")),
      save: this.#button("save", () => to("save")),
      resume: this.#button("resume", () => to("resume")),
      extend: this.#button("extend", () => this.#extend()),
      use: this.#button("use", () => openGraph(this.job, "use")),
      again: this.#button("again", () => openGraph(this.job, "again")),
      delete: this.#button("delete", () => this.#delete()),
    };
    const { extend, use, again, delete: erase, ...steering } = this.buttons;
    this.more = h("input", { type: "number", min: 1, max: 1000000, step: 50, value: DEFAULT_MORE, "aria-label": t("action.more") });
    this.extending = h("span.ck-group", extend, this.more);
    erase.classList.add("ck-danger");
    this.element = h("div.ck-actions", Object.values(steering), this.extending, use, again, erase);
    this.show(job);
  }

  /** @param {Job} job */
  show(job) {
    this.job = job;
    const [active, waits] = [ACTIVE.has(job.state), WAITS.includes(job.state)];
    const here = active && !job.elsewhere;
    /** @type {Record<string, boolean>} */
    const shown = {
      pause: here, stop: here, sample: here, save: here, resume: waits, extend: !active,
      use: Boolean(job.lora_name || job.model_name), again: true, delete: !active,
    };
    for (const [name, button] of Object.entries(this.buttons)) button.hidden = !shown[name];
    this.extending.hidden = active;
    const steerable = ["running", "paused"].includes(job.state);
    this.buttons.sample.disabled = !steerable || job.config?.previews?.prompts?.length === 0;
    this.buttons.save.disabled = !steerable;
    say(this.buttons.pause, t(job.state === "paused" ? "action.resume" : "action.pause"));
  }

  /** @param {string} name @param {() => Promise<unknown>} work */
  #button(name, work) {
    return doing("action", name, work, this.complain, () => this.show(this.job));
  }

  /** A schedule that depends on the number of steps is not what it was; the host says so, and the user decides. */
  async #extend() {
    const steps = Math.round(Number(this.more.value));
    try {
      await act(this.job.id, "extend", { steps, force: false });
    } catch (error) {
      const why = reason(error);
      const message = `${why}\n\n${t("action.force_question")}`;
      const decide = { title: t("action.force_title"), message, type: "default" };
      if (!/force/.test(why) || !(await app.extensionManager.dialog.confirm(decide))) throw error;
      await act(this.job.id, "extend", { steps, force: true });
    }
  }

  async #delete() {
    const question = { title: t("action.delete_title", { name: this.job.name }), message: t("action.delete_question"), type: "delete" };
    if (await app.extensionManager.dialog.confirm({ ...question, itemList: [this.job.id] })) await remove(this.job.id);
  }
}
