// A job's curve, fetched whole once and then only what is new, at most once a second.
import { throttled } from "../lib/dom.js";
import { get } from "../lib/http.js";

const MILLISECONDS = 1000;

/** Steps by name, held-out losses, notes; `changed` is called after they grew or were replaced. */
export class CurveFeed {
  constructor(id, points, changed) {
    this.id = id;
    this.points = points;
    this.changed = changed;
    this.curve = null;
    this.stopped = false;
    this.busy = false;
    this.refresh = throttled(() => this.#fetch(), MILLISECONDS);
    this.refresh();
  }

  stop() {
    this.stopped = true;
  }

  async #fetch() {
    if (this.stopped) return;
    if (this.busy) return this.refresh(); // a slow answer: what it brings decides what is asked for next
    this.busy = true;
    try {
      await this.#ask();
    } finally {
      this.busy = false;
    }
  }

  async #ask() {
    const { curve, points } = this;
    // What was added is not thinned; from twice the points on, have all of it thinned anew.
    const goesOn = curve && curve.step.length < 2 * points;
    const after = goesOn ? `&after=${curve.step.at(-1) ?? 0}&token=${curve.token}` : "";
    const path = `jobs/${encodeURIComponent(this.id)}/curve?points=${points}${after}`;
    const found = await get(path).catch(() => null); // the job is gone, or the host is; the store notices
    if (!found || this.stopped) return;
    this.curve = found.continued ? this.#grown(curve, found) : found;
    this.changed(this.curve);
  }

  #grown(curve, found) {
    const grown = { ...found };
    for (const [name, column] of Object.entries(curve)) {
      if (Array.isArray(column) && name !== "sigmas") grown[name] = [...column, ...found[name]];
    }
    for (const name of ["heldout", "notes"]) grown[name] = unique(grown[name]);
    return grown;
  }
}

function unique(entries) {
  return [...new Map(entries.map((entry) => [JSON.stringify(entry), entry])).values()];
}
