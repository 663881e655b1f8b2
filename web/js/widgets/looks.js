// How our nodes look in both renderers: folded widgets take no room, sockets have colours, no text stays after a run.
import { app } from "../../../../scripts/app.js";
import { api } from "../../../../scripts/api.js";
import { h } from "../lib/dom.js";
import { chain, nodeData } from "../lib/node_panel.js";
import { isLinked } from "./graph.js";

/** @type {Record<string, string>} Near those of ComfyUI's own type, where there is one. */
const COLOURS = {
  CHROMA_MODEL: "#9575cd",
  CHROMA_TEXT_ENCODER: "#d4b106",
  CHROMA_DATASET: "#4db6ac",
  CHROMA_DATASET_OPTIONS: "#80cbc4",
  CHROMA_SAMPLER_OPTIONS: "#ce93d8",
  CHROMA_TRAINING: "#a1887f",
  CHROMA_JOB: "#f06292",
};
/** Pixels that every title fits into. */
const TITLE = 240;
const ALWAYS = "Comfy.Node.AlwaysShowAdvancedWidgets";
const TEXT = "progressText";
const STAYS = "Warning:";
const RESULTS = ["ChromaInspectLora", "ChromaConvertLora", "ChromaMergeLora", "ChromaExtractLora"];
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];

/** @type {Map<PageNode, number>} our nodes in the graph, and how high each was when the prompt began */
const heights = new Map();

/** Make a node of ours look as it should; others are left alone. @param {PageNode} node */
export function dress(node) {
  if (!nodeData(node).category?.startsWith("Chroma/")) return;
  fold(node);
  const [width, height] = node.size;
  if (width < TITLE) node.setSize([TITLE, height]);
  chain(node, { onAdded: () => heights.set(node, Infinity), onRemoved: () => heights.delete(node) });
}

/**
 * The canvas, too, shows an advanced widget only when asked or linked, and no renderer leaves room for a hidden one.
 * @param {PageNode} node
 */
function fold(node) {
  const folded = (node.widgets ?? []).filter(({ options }) => /** @type {{ advanced?: boolean }} */ (options ?? {}).advanced);
  if (!folded.length) return;
  for (const widget of folded) widget.advanced = true;
  const shown = (/** @type {Widget} */ widget) =>
    !widget.hidden &&
    (!widget.advanced || Boolean(node.showAdvanced || app.extensionManager.setting.get(ALWAYS)) || isLinked(node, widget.name));
  node.isWidgetVisible = (widget) => !node.collapsed && shown(widget);
  node.getLayoutWidgets = () => (node.widgets ?? []).filter(shown);
  node.setSize([node.size[0], node.computeSize()[1]]);
}

/** Text about what a node was doing goes when the prompt has ended; a warning, or what a node found, stays until the next. */
function clear() {
  for (const [node, height] of heights) {
    const found = node.widgets?.find((widget) => /** @type {string} */ (widget.type) === TEXT);
    if (!found || String(found.value).startsWith(STAYS) || RESULTS.includes(node.comfyClass ?? "")) continue;
    const needed = node.computeSize()[1];
    node.removeWidget(found);
    const grown = Math.min(node.size[1] - height, needed - node.computeSize()[1]);
    node.setSize([node.size[0], node.size[1] - Math.max(0, grown)]);
  }
}

/** Colours for our types, wherever the palette that the page loads has none: it clears what it does not know. */
function colour() {
  const { link_type_colors } = /** @type {{ link_type_colors: Record<string, string> }} */ (
    /** @type {unknown} */ (app.canvas.constructor)
  );
  const tables = [app.canvas.default_connection_color_byType, link_type_colors];
  for (const [type, ours] of Object.entries(COLOURS)) {
    for (const table of tables) {
      let palette = "";
      Object.defineProperty(table, type, {
        get: () => palette || ours,
        set: (value) => {
          palette = value;
        },
        configurable: true,
        enumerable: true,
      });
    }
  }
  const rules = Object.entries(COLOURS).map(([type, value]) => `--color-datatype-${type}: ${value};`);
  document.head.append(h("style", `:root { ${rules.join(" ")} }`));
}

/** Once the page is there. */
export function startLooks() {
  colour();
  api.addEventListener("execution_start", () => {
    for (const node of heights.keys()) heights.set(node, node.size[1]);
  });
  for (const event of ENDS) api.addEventListener(/** @type {"execution_success"} */ (event), () => setTimeout(clear));
}
