// New graphs in the window: from a job, or one of the pack's templates.
import { app } from "../../../../scripts/app.js";
import { api } from "../../../../scripts/api.js";
import { get, ofJob } from "../lib/http.js";
import { t } from "../lib/words.js";
import { notify } from "./notices.js";

const [COLUMN_GAP, ROW_GAP] = [60, 60]; // pixels; a row's has the title in it

/**
 * Open the graph that starts this job (`again`), or generates with its result (`use`) or an image of its grid (`path`,
 * below the job). Throws Error with the host's words.
 * @param {Job} job
 * @param {"again" | "use"} kind
 * @param {string} path
 */
export async function openGraph(job, kind, path = `graph/${kind}`) {
  const found = /** @type {JobGraph} */ (await get(ofJob(job.id, path)));
  const { prompt, missing, folded } = found;
  for (const { class_type: type, inputs } of Object.values(prompt)) {
    if (type === "ChromaTextEncode" && typeof inputs.text === "string") inputs.text = literally(inputs.text);
  }
  await app.refreshComboInNodes(); // a LoRA or folder that is younger than the page
  await app.loadApiJson(prompt, t(`graph.${kind}_title`, { name: job.name }));
  keepSeeds();
  await drawn(); // the panels have taken their room on the nodes
  layOut(new Set(folded));
  await drawn(); // bounds of nodes are those of the last drawing
  app.canvas.deselectAll(); // a selection is what the view would be fitted to
  await app.extensionManager.command.execute("Comfy.Canvas.FitView");
  if (missing.length) notify("warn", t("graph.missing"), missing.join("\n"));
}

/**
 * A prompt whose {words|in braces} and comments the page sends as they stand, instead of drawing and dropping some.
 * @param {string} text
 */
const literally = (text) => text.replace(/[{}]/g, "\\$&").replace(/\/([/*])/g, "/{$1}");

/**
 * Nodes in columns, each no further left than what is linked to it; those of the ids in `folded` closed. Columns go under
 * their neighbours as long as the whole is then shown larger.
 * (The page's own arrangement puts tall nodes under one another as if they were open, and so out of sight.)
 * @param {Set<string>} folded
 */
function layOut(folded) {
  /** @type {Map<GraphNode, number>} */
  const depths = new Map();
  /** @type {(node: GraphNode) => number} */
  const depth = (node) => {
    const known = depths.get(node);
    if (known !== undefined) return known;
    depths.set(node, 0); // ends a circle, which no prompt has
    const before = (node.inputs ?? []).map((_, slot) => node.getInputNode(slot)).filter((each) => each != null);
    const found = before.length ? 1 + Math.max(...before.map(depth)) : 0;
    depths.set(node, found);
    return found;
  };
  /** @type {GraphNode[][]} */
  let columns = [];
  for (const node of app.graph.nodes) {
    if (folded.has(String(node.id)) && !node.flags.collapsed) node.collapse();
    (columns[depth(node)] ??= []).push(node);
  }
  const heightOf = (/** @type {GraphNode} */ node) => (node.flags.collapsed ? 0 : node.size[1]) + ROW_GAP;
  const widthOf = (/** @type {GraphNode[]} */ column) => Math.max(...column.map((node) => node.size[0])) + COLUMN_GAP;
  const sum = (/** @type {number[]} */ numbers) => numbers.reduce((all, each) => all + each, 0);
  const { clientWidth, clientHeight } = app.canvas.canvas;
  const scale = (/** @type {GraphNode[][]} */ all) =>
    Math.min(clientWidth / sum(all.map(widthOf)), clientHeight / Math.max(...all.map((column) => sum(column.map(heightOf)))));
  for (;;) {
    const joined = columns.slice(1).map((_, i) => [...columns.slice(0, i), columns.slice(i, i + 2).flat(), ...columns.slice(i + 2)]);
    const best = joined.sort((a, b) => scale(b) - scale(a))[0];
    if (!best || scale(best) <= scale(columns)) break;
    columns = best;
  }
  let left = 0;
  for (const column of columns) {
    let top = 0;
    for (const node of column) {
      node.pos = [left, top];
      top += heightOf(node);
    }
    left += widthOf(column);
  }
}

const drawn = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));

/** Open a template of ours by its name. Throws Error when the host does not give it. @param {string} name */
export async function openTemplate(name) {
  const pack = new URL("../../", import.meta.url).pathname.split("/").at(-2); // users name its folder as they like
  const answer = await api.fetchApi(`/workflow_templates/${pack}/${name}.json`);
  if (!answer.ok) throw new Error(t("graph.no_template", { name }));
  await app.loadGraphData(await answer.json(), true, true, name);
}

/** A fresh seed widget draws a new number after each run; what a job had is to be the same every time. */
function keepSeeds() {
  for (const node of app.graph.nodes ?? []) {
    for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
  }
}
