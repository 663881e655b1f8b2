// @ts-check
// A job in words: its state, how far it is, what it needs.
import { fill, h, say } from "../lib/dom.js";
import { bytes, duration, loss } from "../lib/format.js";
import { t } from "../lib/words.js";
import { manners } from "./prompts.js";
import { ACTIVE, all } from "./store.js";

/**
 * "running", "running, yielding to the queue", "running, in another process", …
 * @param {Job} job
 */
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

/**
 * "120 / 600 · loss 0.3120 · 2 min 5 s left"
 * @param {Job} job
 */
export function progressWords(job) {
  const parts = [`${job.step} / ${job.steps}`];
  const value = job.loss_smooth ?? job.loss;
  if (value != null) parts.push(t("job.loss", { loss: loss(value) }));
  if (job.state === "running" && job.eta_seconds != null) parts.push(t("job.left", { time: duration(job.eta_seconds) }));
  return parts.join(" · ");
}

/**
 * "0.52 s a step · 1.04 GiB": what a step takes, and memory in use.
 * @param {Job} job
 */
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

/**
 * From 0 to 1.
 * @param {Job} job
 */
export const share = (job) => (job.steps ? job.step / job.steps : 0);

/** What prompts do while a job is at work, where they do not simply run; else empty. */
export function mannersWords() {
  const { choice, held } = manners();
  const atWork = all().some((job) => ACTIVE.has(job.state) && job.state !== "paused");
  return !atWork || choice == null || choice === "yield" ? "" : t(held ? "tab.held" : `tab.${choice}`, { held });
}

/**
 * Bring the elements that say how a job stands up to date.
 * @param {{ chip: HTMLElement, bar: HTMLProgressElement, numbers: HTMLElement, cost: HTMLElement, message: HTMLElement, warnings: HTMLElement }} shown
 * @param {Job} job
 */
export function showStanding(shown, job) {
  showState(shown.chip, job);
  shown.bar.value = share(job);
  shown.bar.hidden = !ACTIVE.has(job.state);
  say(shown.numbers, progressWords(job));
  say(shown.cost, costWords(job));
  say(shown.message, job.message || "");
  shown.message.classList.toggle("ck-error", job.state === "failed");
  fill(shown.warnings, (job.warnings ?? []).map((warning) => h("li", { class: "ck-warning" }, warning)));
}
