// The live panels of the nodes, and the setting that switches them off.
import { app } from "../../../../scripts/app.js";
import { api } from "../../../../scripts/api.js";
import { linkStyles } from "../lib/dom.js";
import { loadWords } from "../lib/words.js";
import { Dataset } from "./dataset.js";
import { Density } from "./density.js";
import { SETTING, askAll, showAll, touchAll } from "./live_panel.js";
import { dress, startLooks } from "./looks.js";
import { Plan } from "./plan.js";
import { Sigmas } from "./sigmas.js";

/** @type {Record<string, new (node: PageNode) => unknown>} */
const PANELS = {
  ChromaDataset: Dataset,
  ChromaLoadModel: Plan,
  ChromaNoiseSettings: Density,
  ChromaTailSigmas: Sigmas,
  ChromaTrainingSettings: Density,
};

app.registerExtension({
  name: "ChromaKit.Widgets",
  settings: [
    {
      id: SETTING,
      name: "Show live panels on nodes",
      tooltip: "Contact sheet, plots and memory plan on the nodes, before anything runs.",
      type: "boolean",
      defaultValue: true,
      category: ["Chroma", "Nodes", "Panels"],
      onChange: (on) => showAll(Boolean(on)),
    },
  ],
  async init() {
    linkStyles();
    await loadWords();
    // Links, undo and values that other code sets: what a widget's own callback does not tell.
    api.addEventListener("graphChanged", touchAll);
    api.addEventListener("reconnected", askAll);
  },
  async setup() {
    startLooks();
  },
  nodeCreated(node) {
    dress(node);
    const Panel = PANELS[node.comfyClass ?? ""];
    if (Panel) new Panel(node);
  },
});
