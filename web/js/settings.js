// Settings → Chroma. What prompts do while a job trains is the host's choice, the same for every page: it is kept there,
// and only shown here as a setting.
import { app } from "../../../scripts/app.js";
import { reason } from "./lib/http.js";
import { t } from "./lib/words.js";
import { notify } from "./jobs/notices.js";
import { choose, manners, onManners, startManners } from "./jobs/prompts.js";

const PROMPTS = "Chroma.Training.Prompts";
const NOTICES = "Chroma.Training.Notices";

/** What `registerExtension` takes. @returns {Setting[]} */
export function settings() {
  return [
    {
      id: PROMPTS,
      category: ["Chroma", "Training", "Prompts"],
      name: "Prompts that are queued while a job trains",
      tooltip: "One setting for this ComfyUI server, shared by all browser windows.",
      type: "combo",
      options: ["yield", "finish", "refuse"],
      defaultValue: "yield",
      onChange: changed,
    },
    {
      id: NOTICES,
      category: ["Chroma", "Training", "Notices"],
      name: "Notify when a training job ends",
      type: "boolean",
      defaultValue: true,
    },
  ];
}

/** Whether the user wants a notice when a job ends. */
export const wantsNotices = () => app.extensionManager.setting.get(NOTICES) !== false;

const show = () => app.extensionManager.setting.set(PROMPTS, manners().choice);

/** Show the host's choice, now and when another page or a program changes it. */
export async function startSettings() {
  onManners(show);
  await startManners();
}

/** @param {unknown} value */
async function changed(value) {
  const { choice } = manners();
  if (choice == null || value === choice) return; // the page is only finding out
  try {
    await choose(value);
  } catch (error) {
    notify("error", t("settings.refused"), reason(error));
    await show();
  }
}
