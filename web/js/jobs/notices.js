// What is said when a job ends, or when only a part of a graph runs, wherever in the page one is.
import { api } from "../../../../scripts/api.js";
import { app } from "../../../../scripts/app.js";
import { t } from "../lib/words.js";
import { onEnd } from "./store.js";

/** @type {Record<string, Severity>} */
const SEVERITY = { completed: "success", stopped: "info", failed: "error", interrupted: "warn" };
const MILLISECONDS = 8000;

/**
 * Show a message at the edge of the page; an error stays until it is closed.
 * @param {Severity} severity
 * @param {string} summary
 * @param {string} detail
 */
export function notify(severity, summary, detail = "") {
  const life = severity === "error" ? undefined : MILLISECONDS;
  app.extensionManager.toast.add({ severity, summary, detail, life });
}

const HALF = "chromakit.prompt_half";

/**
 * From now on: a notice for a graph of which ComfyUI leaves a part out, as it says so nowhere but in the nodes' colour.
 */
export function startHalfNotices() {
  api.addEventListener(HALF, ({ detail }) => {
    const lines = detail.problems.map((each) => `${each.title}: ${each.error}`);
    notify("error", t("notice.half"), lines.join("\n"));
  });
}

/**
 * From now on: a notice for each job that ends (if the user wants them), and lists of files with the new one in them.
 * @param {() => boolean} wanted
 */
export function startNotices(wanted) {
  onEnd((job) => {
    const file = job.lora_name || job.model_name;
    if (file) app.refreshComboInNodes();
    if (!wanted()) return;
    const detail = job.message || (file ? t("notice.file", { file }) : "");
    notify(SEVERITY[job.state] ?? "info", t(`notice.${job.state}`, { name: job.name }), detail);
  });
}
