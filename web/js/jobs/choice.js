// What a job's metrics say in one sentence, what one can do about it, and the LoRAs of its steps to choose from.
import { fill, h, say } from "../lib/dom.js";
import { loss, rate } from "../lib/format.js";
import { reason } from "../lib/http.js";
import { t } from "../lib/words.js";
import { thumbnail } from "./previews.js";
import { ACTIVE, act } from "./store.js";

/** Of the evidence, what is shown in percent. */
const SHARES = ["trend", "lost", "scatter", "swing", "risen", "ratio", "error"];

/** @param {number} share */
const percent = (share) => `${Math.round(100 * share)}\u00a0%`;

/** What follows from a verdict. @type {Partial<Record<VerdictKind, "extend" | "branch">>} */
const FOLLOWS = { learning: "extend", falling: "extend", hot: "branch", worse: "branch", diverged: "branch", unsteady: "branch" };

/** The verdict under the curves, and the list of kept LoRAs. `complain(text)` shows what the host refused. */
export class Choice {
  /** @param {Job} job @param {(text: string) => void} complain */
  constructor(job, complain) {
    this.job = job;
    this.complain = complain;
    /** @type {Verdict | null} */
    this.verdict = null;
    this.key = "";
    this.sentence = h("div.ck-strong", { role: "status" });
    this.evidence = h("div.ck-faint");
    this.command = h("code.ck-command");
    this.doing = h("button", { onclick: () => this.#follow() });
    this.judged = h("div.ck-verdict", this.sentence, this.evidence, h("div.ck-row", this.doing, this.command));
    this.list = h("ul.ck-kept");
    this.kept = h("details", h("summary", t("kept.title")), this.list);
    this.element = h("section", this.judged, this.kept);
    this.show(job);
  }

  /** @param {Job} job */
  show(job) {
    this.job = job;
    const kept = job.kept ?? [];
    this.kept.hidden = !kept.length;
    const key = JSON.stringify([kept, job.best_step, job.samples]);
    if (key !== this.key) {
      this.key = key;
      fill(this.list, [...kept].reverse().map((one) => this.#row(one)));
    }
    this.judge(this.verdict);
  }

  /** @param {Verdict | null} verdict */
  judge(verdict) {
    this.verdict = verdict;
    this.judged.hidden = !verdict;
    if (!verdict) return;
    const { kind, step, at, evidence, command } = verdict;
    const shares = Object.fromEntries(SHARES.map((name) => [name, percent(evidence[name])]));
    const losses = Object.fromEntries(["base", "best", "now"].map((name) => [name, loss(evidence[name])]));
    const shown = { jump: evidence.jump?.toFixed(1), learning_rate: rate(evidence.learning_rate) };
    const numbers = { ...evidence, ...shares, ...losses, ...shown, step, at };
    say(this.sentence, t(`verdict.${kind}`, numbers));
    say(this.evidence, t("base" in evidence ? "verdict.evidence" : "verdict.evidence_training", numbers));
    say(this.command, command);
    const follows = FOLLOWS[kind];
    const useless = !command || (follows && kind !== "worse" && ACTIVE.has(this.job.state));
    this.doing.hidden = useless || (this.job.kept != null && step > 0 && follows !== "extend" && !this.#keeps(step));
    say(this.doing, t(`verdict.do_${kind}`, { ...numbers, rate: rate(evidence.learning_rate / 2) }));
  }

  /** @param {number} step */
  #keeps(step) {
    return this.job.kept?.some((one) => one.step === step);
  }

  async #follow() {
    if (!this.verdict) return;
    const { kind, step, at, evidence } = this.verdict;
    if (FOLLOWS[kind] === "extend") await this.#do("extend", { steps: Math.max(1, Math.floor(at / 2)), force: false });
    else if (FOLLOWS[kind] === "branch") await this.#do("branch", { step, learning_rate: evidence.learning_rate / 2 });
    else await this.#do("use", { step });
  }

  /** @param {string} action @param {object} body */
  async #do(action, body) {
    this.complain("");
    await act(this.job.id, action, body).catch((error) => this.complain(reason(error)));
  }

  /** @param {{ step: number, used: string | null }} one */
  #row({ step, used }) {
    const marks = [step === this.job.best_step && t("kept.best"), used && t("kept.used", { file: used })].filter(Boolean);
    const button = h("button", { "data-step": step, onclick: () => this.#do("use", { step }) }, t("kept.use"));
    return h("li.ck-row", thumbnail(this.job, step), h("span", t("previews.step", { step })), h("span.ck-faint", marks.join(" · ")), button);
  }
}
