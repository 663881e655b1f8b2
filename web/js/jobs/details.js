// What one rarely looks at: the options and the recipe of a job, and its log.
import { fill, h, say } from "../lib/dom.js";
import { get, ofJob, reason } from "../lib/http.js";
import { t } from "../lib/words.js";

const LOG_LINES = 200;

/**
 * {a: {b: 1}} → [["a.b", "1"]], without what is empty.
 * @param {object | undefined} values
 * @param {string} prefix
 * @returns {[string, string][]}
 */
function flat(values, prefix = "") {
  return Object.entries(values ?? {}).flatMap(([name, value]) => {
    if (value == null || value === "" || (Array.isArray(value) && !value.length)) return [];
    if (typeof value === "object" && !Array.isArray(value)) return flat(value, `${prefix}${name}.`);
    return [[`${prefix}${name}`, typeof value === "object" ? JSON.stringify(value) : String(value)]];
  });
}

/** @param {object | undefined} values */
function table(values) {
  return h("dl", flat(values).flatMap(([name, value]) => [h("dt", name), h("dd", value)]));
}

/** Options and recipe, filled in when they are opened. */
export class Settings {
  constructor() {
    this.key = "";
    this.optionsBody = h("div");
    this.recipeBody = h("div");
    this.options = h("details", h("summary", t("details.options")), this.optionsBody);
    this.recipe = h("details", h("summary", t("details.recipe")), this.recipeBody);
    this.element = h("section.ck-settings", this.recipe, this.options);
  }

  /** @param {Job} job */
  show(job) {
    const key = JSON.stringify([job.config, job.recipe, job.changes]);
    if (!job.config || key === this.key) return;
    this.key = key;
    fill(this.optionsBody, table(job.config));
    const changes = (job.changes ?? []).map((change) => h("p", t("details.changed", { step: change.step }), table(change.changes)));
    fill(this.recipeBody, table(job.recipe), changes);
  }
}

/** The last lines of the log, fetched while they are open. */
export class Log {
  /** @param {string} id */
  constructor(id) {
    this.id = id;
    this.lines = h("pre", { tabIndex: 0 });
    this.element = h("details.ck-log", { ontoggle: () => this.refresh() }, h("summary", t("details.log")), this.lines);
  }

  async refresh() {
    if (!this.element.open) return;
    try {
      const lines = /** @type {string[]} */ (await get(ofJob(this.id, `log?lines=${LOG_LINES}`)));
      const atEnd = this.lines.scrollTop + this.lines.clientHeight >= this.lines.scrollHeight - 8;
      say(this.lines, lines.join("\n") || t("details.log_empty"));
      if (atEnd) this.lines.scrollTop = this.lines.scrollHeight;
    } catch (error) {
      say(this.lines, reason(error));
    }
  }
}
