// Step "Choose": kept steps × strengths × prompts as a grid that ComfyUI's queue makes; rated, kept, opened, published.
import { api } from "../../../../scripts/api.js";
import { app } from "../../../../scripts/app.js";
import { fill, h, say, throttled } from "../lib/dom.js";
import { lines } from "../lib/format.js";
import { InTurn, address, get, ofJob, post } from "../lib/http.js";
import { t } from "../lib/words.js";
import { doing } from "../jobs/actions.js";
import { openGraph } from "../jobs/graphs.js";
import { thumbnail } from "../jobs/previews.js";
import { find, listen, watch } from "../jobs/store.js";
import { LARGE, SMALL, Wall } from "./wall.js";
import { ofChosenJob } from "./watch.js";

const STRENGTHS = "0.7, 1, 1.3";
const STARS = [1, 2, 3, 4, 5];
const MILLISECONDS = 1000;
const WAITS = ["queued", "running"];

export const title = "room.choose.title";

const none = () => ({ element: h("p", t("room.choose.no_job")), destroy() {} });

/** @param {TrainingRoom} room @returns {Step} */
export const build = (room) => ofChosenJob(room, h("div.ck-choose"), (job) => (job ? new Chooser(job, room) : none()));

/** The form, the grid, and what one does with the image that is chosen in it. */
class Chooser {
  /** @param {Job} job @param {TrainingRoom} room */
  constructor(job, room) {
    this.id = job.id;
    this.room = room;
    /** @type {GridLook | null} */
    this.grid = null;
    /** @type {WallCell | null} */
    this.cell = null;
    this.keptKey = "";
    this.turn = new InTurn();
    this.refresh = throttled(() => this.#load(), MILLISECONDS);
    this.steps = h("div.ck-choose-steps", { role: "group", "aria-label": t("room.choose.steps") });
    this.strengths = h("input", { type: "text", value: STRENGTHS, oninput: () => this.#count() });
    this.prompts = h("textarea", { rows: 3, oninput: () => this.#count() });
    this.make = this.#button("make", () => this.#make());
    this.stop = this.#button("stop", () => this.#send("grid/stop", {}));
    this.progress = h("span.ck-faint", { role: "status" });
    this.fault = h("div.ck-error", { role: "alert" });
    this.wall = new Wall(t("room.choose.grid"), {
      click: "choose",
      chosen: (cell) => this.#chosen(cell),
      key: (cell, event) => this.#key(cell, event),
    });
    this.best = h("span.ck-strong", { role: "status" });
    this.what = h("span.ck-strong");
    this.stars = STARS.map((star) =>
      h("button", { "aria-label": t("room.choose.star", { star }), onclick: () => this.cell && this.#rate(this.cell, star) }, "★"),
    );
    this.keep = this.#button("keep", () => this.#keep());
    this.open = this.#button("open", () => this.#open("graph"));
    this.stock = this.#button("stock", () => this.#open("stock"));
    this.publish = this.#button("publish", () => this.#publish());
    const rating = h("div.ck-stars", { role: "group", "aria-label": t("room.choose.rating") }, this.stars);
    this.doing = h("div.ck-row.ck-choose-doing", this.what, rating, h("div.ck-group", this.keep, this.open, this.stock, this.publish));
    const field = (/** @type {string} */ name, /** @type {HTMLElement} */ input) => h("label", t(`room.choose.${name}`), input);
    this.form = h(
      "details.ck-choose-form",
      { open: true },
      h("summary", t("room.choose.form", { name: job.name })),
      h("div", t("room.choose.steps"), this.steps),
      field("strengths", this.strengths),
      field("prompts", this.prompts),
    );
    this.element = h(
      "div.ck-chooser",
      { "data-job": job.id },
      this.form,
      h("div.ck-row", h("div.ck-group", this.make, this.stop, this.progress), this.best),
      this.fault,
      this.wall.element,
      this.doing,
      h("p.ck-faint", t("room.choose.keys")),
    );
    // The queue became longer or shorter; and while it works at the grid, ask.
    const turned = () => this.#waits() && this.refresh();
    api.addEventListener("status", turned);
    const timer = setInterval(turned, 2 * MILLISECONDS);
    this.ends = [
      watch(job.id),
      listen((id) => (!id || id === this.id) && this.#showSteps()),
      () => api.removeEventListener("status", turned),
      () => clearInterval(timer),
    ];
    this.stopped = false;
    this.#showSteps();
    this.#show(null);
    this.refresh();
  }

  destroy() {
    this.stopped = true;
    for (const end of this.ends) end();
  }

  #waits() {
    return this.grid?.cells.some(({ state }) => WAITS.includes(state)) ?? false;
  }

  /** @param {string} name @param {() => Promise<unknown>} work */
  #button(name, work) {
    return doing("room.choose", name, work, (text) => this.room.notice(text, "error"), () => this.#show(this.grid));
  }

  async #load() {
    if (this.stopped) return;
    const counts = this.turn.look();
    try {
      const grid = /** @type {GridLook} */ (await get(ofJob(this.id, "grid")));
      if (counts()) this.#show(grid);
      else this.refresh();
    } catch (error) {
      this.room.failed(error);
    }
  }

  /**
   * Ask for something that the host answers with the grid.
   * @param {string} end
   * @param {object} body
   */
  #send(end, body) {
    return this.turn.next(async () => this.#show(await post(ofJob(this.id, end), body)));
  }

  // --- the form -------------------------------------------------------------------------------------------------------

  #showSteps() {
    const job = find(this.id);
    if (!job?.kept) return;
    const key = JSON.stringify([job.kept, job.best_step, job.samples]);
    if (key === this.keptKey) return;
    const chosen = this.keptKey ? this.#chosenSteps() : (this.grid?.choice?.steps ?? [job.best_step, job.kept.at(-1)?.step]);
    this.keptKey = key;
    fill(
      this.steps,
      [...job.kept].reverse().map(({ step }) => {
        const box = h("input", { type: "checkbox", value: step, checked: chosen.includes(step), onchange: () => this.#count() });
        const best = step === job.best_step && h("span.ck-faint", t("kept.best"));
        return h("label", box, thumbnail(job, step), t("previews.step", { step }), best);
      }),
    );
    if (!job.kept.length) fill(this.steps, h("span.ck-faint", t("room.choose.none_kept")));
    this.#count();
  }

  #chosenSteps() {
    const boxes = /** @type {NodeListOf<HTMLInputElement>} */ (this.steps.querySelectorAll("input:checked"));
    return [...boxes].map((box) => Number(box.value)).sort((a, b) => a - b);
  }

  /** What the form asks for; a strength that is no number is NaN. */
  #asked() {
    const strengths = this.strengths.value.split(/[\s,;]+/).filter(Boolean).map(Number);
    const prompts = lines(this.prompts.value);
    return { steps: this.#chosenSteps(), strengths, prompts };
  }

  #count() {
    const { steps, strengths, prompts } = this.#asked();
    const count = steps.length * strengths.length * prompts.length;
    say(this.make, t("room.choose.make", { count }));
    this.make.disabled = !count;
  }

  async #make() {
    const asked = this.#asked();
    const wrong = this.strengths.value.split(/[\s,;]+/).find((word) => word && !Number.isFinite(Number(word)));
    if (wrong) throw new Error(t("room.choose.no_number", { wrong }));
    await this.#send("grid", asked);
    this.form.open = false;
    if (this.wall.cell) this.wall.focus(this.wall.cell.key);
  }

  // --- the grid -------------------------------------------------------------------------------------------------------

  /** @param {GridLook | null} grid */
  #show(grid) {
    if (this.stopped) return;
    if (grid && !this.grid) this.#fillForm(grid);
    this.grid = grid;
    const cells = grid?.cells ?? [];
    const rows = (grid?.rows ?? []).map((row) => this.#row(row));
    this.wall.element.hidden = this.doing.hidden = !rows.length;
    this.wall.show((grid?.columns ?? []).map(({ prompt }) => prompt), rows);
    this.wall.large.refresh();
    const done = cells.filter(({ state }) => state === "done").length;
    say(this.progress, done < cells.length ? t("room.choose.progress", { done, count: cells.length }) : "");
    this.stop.hidden = !this.#waits();
    say(this.fault, cells.find(({ error }) => error)?.error ?? "");
    const best = grid?.best;
    say(this.best, best ? t("room.choose.best", { ...best, mean: best.mean?.toFixed(1) }) : "");
    this.#chosen(this.wall.cell);
    this.#count();
  }

  /** @param {GridLook} grid */
  #fillForm(grid) {
    if (grid.choice) {
      this.strengths.value = grid.choice.strengths.join(", ");
      this.form.open = false;
      for (const box of /** @type {NodeListOf<HTMLInputElement>} */ (this.steps.querySelectorAll("input"))) {
        box.checked = grid.choice.steps.includes(Number(box.value));
      }
    }
    const prompts = grid.choice?.prompts.length ? grid.choice.prompts : grid.own_prompts;
    if (!this.prompts.value) this.prompts.value = prompts.join("\n");
  }

  /** @param {GridAverage} row @returns {WallRow} */
  #row({ step, strength, mean, rated }) {
    const label = t("room.choose.row", { step, strength });
    const best = this.grid?.best;
    return {
      key: `${step} ${strength}`,
      label,
      mark: mean == null ? "" : t("room.choose.mean", { mean: mean.toFixed(1), rated }),
      best: best != null && best.step === step && best.strength === strength,
      cells: (this.grid?.cells ?? []).filter((cell) => cell.step === step && cell.strength === strength).map((cell) => this.#wallCell(cell, label)),
    };
  }

  /** @param {GridCell} cell @param {string} row @returns {WallCell} */
  #wallCell({ key, prompt, rating, state, error }, row) {
    const at = (/** @type {number} */ side) => address(ofJob(this.id, `grid/${key}?${side ? `side=${side}&` : ""}v=1`));
    const done = state === "done";
    return {
      key,
      label: `${row}, ${this.grid?.columns[prompt]?.prompt ?? ""}`,
      row,
      small: done ? at(SMALL) : "",
      source: done ? at(LARGE) : "",
      whole: done ? at(0) : "",
      note: done ? "★".repeat(rating) : t(`room.choose.state_${state}`),
      about: error ?? (rating ? t("room.choose.star", { star: rating }) : ""),
    };
  }

  // --- the image that is chosen ---------------------------------------------------------------------------------------

  /** @param {WallCell | null} cell */
  #chosen(cell) {
    this.cell = cell;
    const ready = Boolean(cell?.source);
    say(this.what, cell?.label ?? "");
    for (const button of [this.keep, this.open, this.stock, this.publish, ...this.stars]) button.disabled = !ready;
    const rating = this.grid?.cells.find(({ key }) => key === cell?.key)?.rating ?? 0;
    this.stars.forEach((star, i) => star.setAttribute("aria-pressed", String(i < rating)));
  }

  /** @param {WallCell} cell @param {KeyboardEvent} event */
  #key(cell, event) {
    if (!/^[0-5]$/.test(event.key) || !cell.source) return false;
    this.#rate(cell, Number(event.key));
    return true;
  }

  /** @param {WallCell} cell @param {number} rating */
  async #rate(cell, rating) {
    await this.#send("rate", { key: cell.key, rating }).catch((error) => this.room.failed(error));
  }

  async #keep() {
    if (!this.cell) return;
    const found = /** @type {KeptLook} */ (await post(ofJob(this.id, "keep"), { key: this.cell.key }));
    const stayed = found.stayed.length ? ` ${t("room.choose.stayed", { files: found.stayed.join(", ") })}` : "";
    this.room.notice(`${t("room.choose.kept", { ...found })}${stayed}`);
    await app.refreshComboInNodes();
  }

  /** @param {"graph" | "stock"} which */
  async #open(which) {
    const job = find(this.id);
    if (!this.cell || !job) return;
    await openGraph(job, "use", `grid/${this.cell.key}/${which}`);
    this.room.close();
  }

  async #publish() {
    if (!this.cell) return;
    const found = /** @type {{ folder: string, images: number }} */ (await post(ofJob(this.id, "publish"), { key: this.cell.key }));
    this.room.notice(t("room.choose.published", found));
  }
}
