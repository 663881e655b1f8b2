// What the host's page gets from ChromaKit: the tab of jobs, the training room, the panel on Chroma Train LoRA, settings, notices.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { linkStyles, mendImages } from "./lib/dom.js";
import { loadWords } from "./lib/words.js";
import { startHalfNotices, startNotices } from "./jobs/notices.js";
import { start } from "./jobs/store.js";
import { openJobs, tab } from "./jobs/tab.js";
import { openRoom } from "./room/room.js";
import { settings, startSettings, wantsNotices } from "./settings.js";
import { attachTrain } from "./widgets/train.js";

app.registerExtension({
  name: "ChromaKit",
  settings: settings(),
  commands: [
    { id: "Chroma.OpenJobs", label: "Chroma: training jobs", icon: "pi pi-chart-line", function: () => openJobs() },
    { id: "Chroma.OpenRoom", label: "Chroma: open the training room", icon: "pi pi-images", function: () => openRoom() },
  ],
  async init() {
    linkStyles();
    start(); // the page need not wait for the list of jobs
    await loadWords();
  },
  async setup() {
    app.extensionManager.registerSidebarTab(tab());
    startNotices(wantsNotices);
    startHalfNotices();
    api.addEventListener("reconnected", mendImages()); // to a host that was away
    await startSettings();
  },
  nodeCreated(node) {
    if (node.comfyClass === "ChromaTrainLora") attachTrain(node);
  },
});
