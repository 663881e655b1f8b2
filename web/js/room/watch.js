// Step "Watch": the jobs; and of the one that is chosen how far it is, its previews as a wall, the verdict, its curves.
import { api } from "../../../../scripts/api.js";
import { fill, h, say } from "../lib/dom.js";
import { askJson } from "../lib/http.js";
import { t } from "../lib/words.js";
import { Actions } from "../jobs/actions.js";
import { Choice } from "../jobs/choice.js";
import { CurveFeed } from "../jobs/curve_feed.js";
import { Curves } from "../jobs/curves.js";
import { Log } from "../jobs/details.js";
import { JobList } from "../jobs/list.js";
import { promptText, samplesOf, sourceOf } from "../jobs/previews.js";
import { onManners } from "../jobs/prompts.js";
import { find, listen, watch } from "../jobs/store.js";
import { Standing, mannersWords } from "../jobs/words.js";
import { LARGE, SMALL, Wall } from "./wall.js";

const POINTS = 1500;

export const title = "room.watch.title";

/** @param {TrainingRoom} room @returns {Step} */
export const build = (room) =>
  ofChosenJob(room, h("div.ck-watch"), (job) => (job ? new Watched(job, room) : new JobList((id) => room.choose({ job: id }))));

/**
 * A step that shows the job which is chosen in the room, or what there is to see without one.
 * @param {TrainingRoom} room
 * @param {HTMLElement} element
 * @param {(job: Job | undefined) => Required<Pick<Step, "element" | "destroy">> & Step} make
 * @returns {Step}
 */
export function ofChosenJob(room, element, make) {
  let job = find(room.view.job);
  let shown = make(job);
  const show = () => {
    shown.destroy();
    job = find(room.view.job);
    shown = make(job);
    fill(element, shown.element);
  };
  // A job that is not known yet (the page has just been opened), or no longer there.
  const changed = () => Boolean(job) !== Boolean(find(room.view.job)) && show();
  const ends = [room.onChoice((news) => "job" in news && show()), listen(changed)];
  fill(element, shown.element);
  return {
    element,
    refresh: () => shown.refresh?.(),
    destroy() {
      for (const end of ends) end();
      shown.destroy();
    },
  };
}

/** One job. */
class Watched {
  /** @param {Job} job @param {TrainingRoom} room */
  constructor(job, room) {
    this.id = job.id;
    const complain = (/** @type {string} */ text) => room.notice(text, "error");
    this.standing = new Standing();
    const { chip, bar, numbers, cost, message, warnings } = this.standing;
    this.queue = h("span.ck-faint", { role: "status" });
    this.actions = new Actions(job, complain);
    this.wall = new Wall(t("room.watch.wall", { name: job.name }));
    this.wall.element.hidden = true;
    this.note = h("p.ck-faint");
    this.choice = new Choice(job, complain);
    this.curves = new Curves();
    /** @type {CurveFeed | null} */
    this.feed = null;
    this.charts = h("details", { ontoggle: () => this.#openCurves() }, h("summary", t("room.watch.curves")), this.curves.element);
    this.log = new Log(job.id);
    this.names = "";
    /** @type {number | null} */
    this.waiting = null; // prompts in ComfyUI's queue
    const leave = h("button.ck-back", { onclick: () => room.choose({ job: "" }) }, t("job.back"));
    this.further = h("button", { "data-action": "choose", onclick: () => room.go("choose") }, t("room.watch.choose"));
    this.element = h(
      "div.ck-watched",
      { "data-job": job.id },
      h("div.ck-row.ck-watch-head", leave, h("h2.ck-clip", { title: job.id }, job.name), chip, numbers, cost, this.queue),
      bar,
      message,
      this.actions.element,
      warnings,
      this.note,
      this.wall.element,
      h("div.ck-watch-foot", this.choice.element, this.further),
      this.charts,
      this.log.element,
    );
    const counted = (/** @type {CustomEvent} */ { detail }) => this.#queued(detail?.exec_info?.queue_remaining);
    api.addEventListener("status", counted);
    this.ends = [
      watch(job.id),
      listen((id) => (!id || id === this.id) && this.#changed()),
      onManners(() => this.#queued(this.waiting)),
      () => api.removeEventListener("status", counted),
    ];
    askJson("/prompt").then((found) => this.#queued(found?.exec_info?.queue_remaining)).catch(() => {});
    this.#show(job);
  }

  destroy() {
    for (const end of this.ends) end();
    this.feed?.stop();
    this.curves.destroy();
  }

  #changed() {
    const job = find(this.id);
    if (!job) return;
    this.#show(job);
    this.feed?.refresh();
  }

  #openCurves() {
    this.feed ??= new CurveFeed(this.id, POINTS, (curve) => this.curves.show(curve));
  }

  /** @param {number | null | undefined} waiting */
  #queued(waiting) {
    if (waiting != null) this.waiting = waiting;
    const queue = this.waiting ? t("room.watch.queue", { count: this.waiting }) : "";
    say(this.queue, [queue, mannersWords()].filter(Boolean).join(" · "));
  }

  /** @param {Job} job */
  #show(job) {
    this.standing.show(job);
    this.actions.show(job);
    this.choice.show(job);
    this.choice.judge(job.verdict ?? null);
    this.further.hidden = !job.kept?.length;
    this.#showWall(job);
    this.#queued(null);
  }

  /** @param {Job} job */
  #showWall(job) {
    if (!job.samples) return;
    const none = t(job.config?.previews?.prompts?.length ? "previews.none_yet" : "previews.no_prompt");
    say(this.note, job.samples.length ? "" : none);
    this.note.hidden = job.samples.length > 0;
    this.wall.element.hidden = !this.note.hidden;
    const names = JSON.stringify([job.samples, job.best_step, job.kept]);
    if (names === this.names) return;
    this.names = names;
    const samples = samplesOf(job);
    const columns = [...new Set(samples.map((sample) => sample.prompt))].sort((a, b) => a - b);
    /** @type {Map<number, WallRow>} */
    const rows = new Map();
    for (const sample of samples) {
      const { step } = sample;
      const label = step === 0 && !job.config?.lora?.start_from ? t("room.watch.base") : t("previews.step", { step });
      const used = job.kept?.some((one) => one.step === step && one.used);
      const mark = [step === job.best_step && t("kept.best"), used && t("room.watch.used")].filter(Boolean).join(", ");
      const row = rows.get(step) ?? { key: String(step), label, mark, best: step === job.best_step, cells: columns.map(() => null) };
      rows.set(step, row);
      row.cells[columns.indexOf(sample.prompt)] = {
        key: sample.name,
        label: `${label}, ${promptText(job, sample.prompt)}`,
        row: label,
        small: sourceOf(job, sample, SMALL),
        source: sourceOf(job, sample, LARGE),
        whole: sourceOf(job, sample),
      };
    }
    const ordered = [...rows.values()].sort((a, b) => Number(a.key) - Number(b.key));
    this.wall.show(columns.map((column) => promptText(job, column)), ordered);
    this.wall.large.refresh();
  }
}
