// One job, open: how far it is, what one can do, its curves, previews, options and log.
import { h, say } from "../lib/dom.js";
import { moment } from "../lib/format.js";
import { t } from "../lib/words.js";
import { Actions } from "./actions.js";
import { Choice } from "./choice.js";
import { CurveFeed } from "./curve_feed.js";
import { Curves } from "./curves.js";
import { Log, Settings } from "./details.js";
import { Previews } from "./previews.js";
import { find, listen, watch } from "./store.js";
import { Standing } from "./words.js";

const POINTS = 1500;

/** A view that follows the store; `back()` is called to leave it. */
export class JobView {
  /** @param {Job} job @param {() => void} back */
  constructor(job, back) {
    const { id } = job;
    this.id = id;
    this.standing = new Standing();
    const { chip, bar, numbers, cost, message, warnings } = this.standing;
    this.refusal = h("div.ck-error", { role: "alert" });
    this.facts = h("div.ck-faint");
    this.actions = new Actions(job, (text) => say(this.refusal, text));
    this.curves = new Curves();
    this.choice = new Choice(job, (text) => say(this.refusal, text));
    this.previews = new Previews();
    this.settings = new Settings();
    this.log = new Log(id);
    const leave = h("button.ck-back", { onclick: back }, t("job.back"));
    const title = h("h2.ck-clip", { title: id }, job.name);
    this.element = h(
      "div.ck-job",
      { "data-job": id },
      h("div.ck-row", leave, chip),
      title,
      bar,
      numbers,
      cost,
      message,
      this.actions.element,
      this.refusal,
      this.facts,
      warnings,
      this.curves.element,
      this.choice.element,
      h("h3", t("previews.title")),
      this.previews.element,
      this.settings.element,
      this.log.element,
    );
    this.feed = new CurveFeed(id, POINTS, (curve) => {
      this.curves.show(curve);
      this.choice.judge(curve.verdict);
    });
    /** @type {JobState | null} */
    this.state = null;
    /** @type {Job["checkpoint"]} */
    this.checkpoint = undefined;
    const endings = [watch(id), listen((changed) => this.#changed(changed, back))];
    this.leave = () => endings.forEach((end) => end());
    this.#show(job);
  }

  destroy() {
    this.leave();
    this.feed.stop();
    this.curves.destroy();
  }

  /** @param {string | null} id @param {() => void} back */
  #changed(id, back) {
    if (id && id !== this.id) return;
    const job = find(this.id);
    if (!job) return back(); // deleted, here or in another page
    this.#show(job);
    this.feed.refresh();
    if (job.state !== this.state || job.checkpoint !== this.checkpoint) this.log.refresh();
    this.state = job.state;
    this.checkpoint = job.checkpoint;
  }

  /** @param {Job} job */
  #show(job) {
    this.standing.show(job);
    this.actions.show(job);
    const file = job.lora_name || job.model_name;
    const facts = [file && t("job.file", { file }), heldout(job), t("job.created", { when: moment(job.created) })];
    say(this.facts, facts.filter(Boolean).join(" · "));
    this.choice.show(job);
    this.previews.show(job);
    this.settings.show(job);
  }
}

/** @param {Job} job */
function heldout({ heldout_loss: loss, heldout_loss_base: base }) {
  if (loss == null || base == null) return "";
  const change = 100 * (loss / base - 1);
  return t("job.heldout", { loss: loss.toFixed(4), change: `${change > 0 ? "+" : ""}${change.toFixed(1)}` });
}
