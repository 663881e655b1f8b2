// The list of jobs by state, and the choice of those whose curves are laid over one another.
import { app } from "../../../../scripts/app.js";
import { fill, h, say } from "../lib/dom.js";
import { moment } from "../lib/format.js";
import { reason } from "../lib/http.js";
import { t } from "../lib/words.js";
import { Comparison } from "./comparison.js";
import { openTemplate } from "./graphs.js";
import { notify } from "./notices.js";
import { ACTIVE, all, find, listen, problem, reload, unreadable } from "./store.js";
import { progressWords, share, showState } from "./words.js";

/** @type {[string, (job: Job) => boolean][]} */
const GROUPS = [
  ["at_work", (job) => ACTIVE.has(job.state)],
  ["unfinished", (job) => ["failed", "interrupted"].includes(job.state)],
  ["ended", () => true],
];

/** Where one may begin, in the order in which one would. */
const TEMPLATES = { first_picture: "Chroma basics 1, first image", first_lora: "Chroma basics 2, first LoRA" };

/** A list that follows the store. `open(id)` is called for the job that is chosen. */
export class JobList {
  /** @param {(id: string) => void} open */
  constructor(open) {
    this.open = open;
    /** @type {Map<string, Row>} */
    this.rows = new Map();
    /** @type {Set<string>} */
    this.chosen = new Set();
    this.groups = h("div");
    this.unreadable = h("section");
    this.empty = this.#emptyNote();
    this.trouble = h("div.ck-error", { role: "alert" });
    this.comparison = new Comparison();
    this.element = h("div.ck-list", this.trouble, this.comparison.element, this.groups, this.unreadable, this.empty);
    this.unlisten = listen((id) => this.#changed(id));
    this.#order();
  }

  destroy() {
    this.unlisten();
    this.comparison.destroy();
  }

  /** The first steps, for who has trained nothing yet. */
  #emptyNote() {
    /** @param {string} name */
    const begin = (name) => () => openTemplate(name).catch((error) => notify("error", reason(error)));
    const browse = () => app.extensionManager.command.execute("Comfy.BrowseTemplates");
    /** @param {string} label @param {() => void} work */
    const button = (label, work) => h("button", { onclick: work }, label);
    const steps = Object.entries(TEMPLATES).map(([key, name]) => button(t(`list.${key}`), begin(name)));
    return h("div.ck-empty", h("p", t("list.empty")), steps, button(t("list.templates"), browse));
  }

  /** @param {string | null} id */
  #changed(id) {
    const row = id && this.rows.get(id);
    const job = id && find(id);
    if (!row || !job || row.place !== placeOf(job)) return this.#order();
    row.show(job);
  }

  /** Put the rows into their groups anew. */
  #order() {
    const list = all();
    const ids = new Set(list.map((job) => job.id));
    for (const id of this.rows.keys()) {
      if (ids.has(id)) continue;
      this.rows.delete(id);
      this.chosen.delete(id);
    }
    fill(
      this.groups,
      GROUPS.map(([name]) => {
        const jobs = list.filter((job) => groupOf(job) === name);
        if (name === "at_work") jobs.reverse().sort((a, b) => Number(a.state === "queued") - Number(b.state === "queued"));
        if (!jobs.length) return null;
        const items = jobs.map((job) => this.#row(job).element);
        const title = h("h3", t(`list.${name}`), " ", h("span.ck-faint", String(jobs.length)));
        return h("section", title, h("ul", items));
      }),
    );
    const left = unreadable();
    this.unreadable.hidden = !left.length;
    const items = left.flatMap(({ id, error }) => [h("dt.ck-strong", id), h("dd", error)]);
    fill(this.unreadable, h("h3", t("list.unreadable")), h("dl", items));
    this.empty.hidden = list.length > 0 || Boolean(problem());
    fill(this.trouble, problem() && t("list.trouble", { problem: problem() }));
    if (problem()) this.trouble.append(" ", h("button", { onclick: reload }, t("list.again")));
    this.comparison.show([...this.chosen]);
  }

  /** @param {Job} job */
  #row(job) {
    let row = this.rows.get(job.id);
    if (!row) {
      row = new Row(job, () => this.open(job.id), (on) => this.#choose(job.id, on));
      this.rows.set(job.id, row);
    }
    row.show(job);
    return row;
  }

  /** @param {string} id @param {boolean} on */
  #choose(id, on) {
    if (on) this.chosen.add(id);
    else this.chosen.delete(id);
    this.comparison.show([...this.chosen]);
  }
}

/** @param {Job} job */
const placeOf = (job) => (job.state === "queued" ? "queued" : groupOf(job));
/** @param {Job} job */
const groupOf = (job) => GROUPS.find(([, fits]) => fits(job))?.[0];

class Row {
  /** @param {Job} job @param {() => void} open @param {(on: boolean) => void} choose */
  constructor(job, open, choose) {
    this.chip = h("span.ck-chip");
    this.name = h("span.ck-strong.ck-clip");
    this.numbers = h("span.ck-faint.ck-clip");
    this.when = h("span.ck-faint");
    this.bar = h("progress", { max: 1, "aria-label": t("job.progress") });
    const choice = h("input", {
      type: "checkbox",
      title: t("list.compare"),
      "aria-label": t("list.compare_named", { name: job.name }),
      onchange: () => choose(choice.checked),
    });
    const head = h("span.ck-row", this.name, this.chip);
    const foot = h("span.ck-row", this.numbers, this.when);
    const button = h("button.ck-open", { onclick: open, title: job.id }, head, this.bar, foot);
    this.element = h("li", { "data-job": job.id }, choice, button);
  }

  /** @param {Job} job */
  show(job) {
    this.place = placeOf(job);
    showState(this.chip, job);
    say(this.name, job.name);
    say(this.numbers, job.state === "failed" || job.state === "interrupted" ? job.message : progressWords(job));
    this.numbers.title = job.message || "";
    this.bar.value = share(job);
    this.bar.hidden = !ACTIVE.has(job.state);
    say(this.when, ACTIVE.has(job.state) ? "" : moment(job.updated));
  }
}
