// A job's curve, fetched whole once and then only what is new, at most once a second.
import { throttled } from "../lib/dom.js";
import { get, ofJob } from "../lib/http.js";

const MILLISECONDS = 1000;
const AGAIN_MILLISECONDS = 5000;
const COLUMNS = /** @type {const} */ (["loss", "loss_smooth", "lr", "grad_norm", "sigma", "seconds"]);

/** Steps by name, held-out losses, notes; `changed` is called after they grew or were replaced. */
export class CurveFeed {
  /** @param {string} id @param {number} points @param {(curve: Curve) => void} changed */
  constructor(id, points, changed) {
    this.id = id;
    this.points = points;
    this.changed = changed;
    /** @type {Curve | null} */
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
    const asked = /** @type {Promise<Curve>} */ (get(ofJob(this.id, `curve?points=${points}${after}`)));
    const found = await asked.catch(() => null); // the job is gone, or the host is: the store says so
    if (this.stopped) return;
    if (!found) return void setTimeout(this.refresh, AGAIN_MILLISECONDS); // of a job that has ended no word will come
    this.curve = found.continued && curve ? grown(curve, found) : found;
    this.changed(this.curve);
  }
}

/**
 * The held-out losses over their steps.
 * @param {Curve} curve
 * @returns {Table}
 */
export const measured = ({ heldout }) => [heldout.map((entry) => entry.step), heldout.map((entry) => entry.loss)];

/** @param {Curve} curve @param {Curve} found @returns {Curve} */
function grown(curve, found) {
  const steps = [...curve.step, ...found.step];
  const columns = COLUMNS.map((name) => [name, [...curve[name], ...found[name]]]);
  const heldout = unique([...curve.heldout, ...found.heldout]);
  const notes = unique([...curve.notes, ...found.notes]);
  return { ...found, ...Object.fromEntries(columns), step: steps, heldout, notes };
}

/** @template T @param {T[]} entries */
function unique(entries) {
  return [...new Map(entries.map((entry) => [JSON.stringify(entry), entry])).values()];
}
