// Settings → Chroma. What happens to prompts while a job trains is the host's choice, the same for every page: it is kept
// there, and shown here as a setting.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { get, post } from "./lib/http.js";
import { t } from "./lib/words.js";
import { notify } from "./jobs/notices.js";

const PROMPTS = "Chroma.Training.Prompts";
const NOTICES = "Chroma.Training.Notices";
const CHANGED = "chromakit.settings";

let hosts = null; // what the host has; null: not known yet

/** What `registerExtension` takes. */
export function settings() {
  return [
    {
      id: PROMPTS,
      category: ["Chroma", "Training", "Prompts"],
      name: "Prompts that are queued while a job trains",
      tooltip: "yield: they run at once, and training waits. finish: they wait for the job. refuse: they are turned away.",
      type: "combo",
      options: ["yield", "finish", "refuse"],
      defaultValue: "yield",
      onChange: choose,
    },
    {
      id: NOTICES,
      category: ["Chroma", "Training", "Notices"],
      name: "Say when a training job ends",
      type: "boolean",
      defaultValue: true,
    },
  ];
}

/** Whether the user wants a notice when a job ends. */
export const wantsNotices = () => app.extensionManager.setting.get(NOTICES) !== false;

/** Show the host's choice, now and when another page or a program changes it. */
export async function startSettings() {
  api.addEventListener(CHANGED, ({ detail }) => showHosts(detail));
  api.addEventListener("reconnected", load);
  await load();
}

async function load() {
  try {
    await showHosts(await get("settings"));
  } catch (error) {
    console.warn("ChromaKit: the host's settings could not be read:", error);
  }
}

async function showHosts(value) {
  hosts = value.prompts_while_training;
  if (app.extensionManager.setting.get(PROMPTS) !== hosts) await app.extensionManager.setting.set(PROMPTS, hosts);
}

async function choose(value) {
  if (hosts == null || value === hosts) return; // the page is only finding out
  const before = hosts;
  hosts = value;
  try {
    await post("settings", { prompts_while_training: value });
  } catch (error) {
    hosts = before;
    notify("error", t("settings.refused"), error.message);
    await app.extensionManager.setting.set(PROMPTS, before);
  }
}
