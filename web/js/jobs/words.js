// A job in words: its state, how far it is, what it needs.
import { fill, h, say } from "../lib/dom.js";
import { bytes, duration, loss } from "../lib/format.js";
import { address } from "../lib/http.js";
import { t, told } from "../lib/words.js";
import { manners } from "./prompts.js";
import { ACTIVE, all } from "./store.js";

/** "running", "running, yielding to the queue", "running, in another process", … @param {Job} job */
function stateWords(job) {
  const state = t(`state.${job.state}`);
  if (job.elsewhere) return t("state.elsewhere", { state });
  if (job.yielded) return t("state.yielding", { state });
  return job.waits_for === "memory" ? t("state.memory", { state }) : state;
}

/**
 * Bring a label up to date.
 * @param {HTMLElement} chip
 * @param {Job} job
 */
export function showState(chip, job) {
  chip.dataset.state = job.yielded ? "yielding" : job.state;
  say(chip, stateWords(job));
}

/** "120 / 600 · loss 0.3120 · 2 min 5 s left" @param {Job} job */
export function progressWords(job) {
  const parts = [`${job.step} / ${job.steps}`];
  const value = job.loss_smooth ?? job.loss;
  if (value != null) parts.push(t("job.loss", { loss: loss(value) }));
  if (job.state === "running" && job.eta_seconds != null) parts.push(t("job.left", { time: duration(job.eta_seconds) }));
  return parts.join(" · ");
}

/** "0.52 s a step · 1.04 GiB": what a step takes, and memory in use. @param {Job} job */
function costWords(job) {
  const parts = [];
  if (job.step_seconds != null) parts.push(t("job.a_step", { time: duration(job.step_seconds) }));
  if (job.memory?.device != null) {
    const peak = job.memory.device_peak;
    parts.push(t(peak ? "job.on_device_peak" : "job.on_device", { now: bytes(job.memory.device), peak: bytes(peak) }));
  } else if (job.memory) parts.push(t("job.in_process", { now: bytes(job.memory.process) }));
  if (job.train_seconds && !ACTIVE.has(job.state)) parts.push(t("job.trained_for", { time: duration(job.train_seconds) }));
  return parts.join(" · ");
}

/** From 0 to 1. @param {Job} job */
export const share = (job) => (job.steps ? job.step / job.steps : 0);

/** What prompts do while a job is at work, where they do not simply run; else empty. */
export function mannersWords() {
  const { choice, held } = manners();
  const atWork = all().some((job) => ACTIVE.has(job.state) && job.state !== "paused");
  return !atWork || choice == null || choice === "yield" ? "" : t(held ? "tab.held" : `tab.${choice}`, { held });
}

/** A link to a page of the pack's documents. @param {string} page */
export const help = (page) =>
  h("a.ck-help", { href: address(`docs/${page}.md`), target: "_blank", rel: "noopener", title: t("room.help_tip") }, t("room.help"));

/** How a job stands: elements to be placed, which follow `show(job)`. */
export class Standing {
  chip = h("span.ck-chip");
  bar = h("progress", { max: 1, "aria-label": t("job.progress") });
  numbers = h("div.ck-strong");
  cost = h("div.ck-faint");
  message = h("div.ck-message", { role: "status" });
  warnings = h("ul.ck-warnings");

  /** @param {Job} job */
  show(job) {
    showState(this.chip, job);
    this.bar.value = share(job);
    this.bar.hidden = !ACTIVE.has(job.state);
    say(this.numbers, progressWords(job));
    say(this.cost, costWords(job));
    say(this.message, job.message || "");
    this.message.classList.toggle("ck-error", job.state === "failed");
    fill(this.warnings, (job.warnings ?? []).map((warning) => h("li.ck-warning", told(warning))));
  }
}
