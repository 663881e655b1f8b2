// A job as a new graph in the window.
import { app } from "../../../../scripts/app.js";
import { get } from "../lib/http.js";
import { t } from "../lib/words.js";
import { notify } from "./notices.js";

/** Open the graph that starts this job (`again`) or paints with its result (`use`). Throws Error with the host's words. */
export async function openGraph(job, kind) {
  const { prompt, missing } = await get(`jobs/${encodeURIComponent(job.id)}/graph/${kind}`);
  await app.refreshComboInNodes(); // a LoRA or folder that is younger than the page
  await app.loadApiJson(prompt, t(`graph.${kind}_title`, { name: job.name }));
  keepSeeds();
  await app.extensionManager.command.execute("Comfy.Canvas.FitView");
  if (missing.length) notify("warn", t("graph.missing"), missing.join("\n"));
}

/** A fresh seed widget draws a new number after each run; what a job had is to be the same every time. */
function keepSeeds() {
  for (const node of app.graph.nodes ?? []) {
    for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
  }
}
