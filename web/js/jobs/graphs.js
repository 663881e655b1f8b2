// New graphs in the window: from a job, or one of the pack's templates.
import { app } from "../../../../scripts/app.js";
import { answered, ask, get, ofJob } from "../lib/http.js";
import { t } from "../lib/words.js";
import { notify } from "./notices.js";

const [COLUMN_GAP, ROW_GAP, TITLE] = [60, 60, 30]; // pixels; a row's gap has the title in it
const [EDGE, BUTTONS] = [20, 60]; // pixels around the graph, and where the page's own buttons lie over it
const [GROWING, IMAGE] = [/^ChromaDataset$|Sampler(?:Custom)?(?:Advanced)?$|^SaveImage$|Status$/, 250]; // nodes that show images, so many pixels high, later
const READABLE = 0.6; // below it the classic renderer writes no text

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
  layOut(new Set(folded), inSight());
  if (missing.length) notify("warn", t("graph.missing"), missing.join("\n"));
}

/**
 * A prompt whose {words|in braces} and comments the page sends as they stand, instead of drawing and dropping some.
 * @param {string} text
 */
const literally = (text) => text.replace(/[{}]/g, "\\$&").replace(/\/([/*])/g, "/{$1}");

/**
 * Nodes in columns, each no further left than what is linked to it; those of the ids in `folded` closed, at the top. Columns
 * go under their neighbours or are parted as long as the whole is then shown larger; it is shown in `view`, and no smaller
 * than can be read.
 * (The page's own arrangement puts tall nodes under one another as if they were open, and so out of sight.)
 * @param {Set<string>} folded
 * @param {ReturnType<typeof inSight>} view
 */
function layOut(folded, view) {
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
  /** @type {{ node: GraphNode, width: number, height: number }[][]} with the room for what comes onto the node later */
  let columns = [];
  const closed = (/** @type {GraphNode} */ node) => folded.has(String(node.id));
  for (const node of [...app.graph.nodes].sort((a, b) => Number(closed(b)) - Number(closed(a)))) {
    if (closed(node) && !node.flags.collapsed) node.collapse();
    const [width, height] = sizeOf(node);
    const open = node.flags.collapsed ? 0 : height + (GROWING.test(node.type) ? IMAGE : 0);
    (columns[depth(node)] ??= []).push({ node, width, height: open + ROW_GAP });
  }
  const sum = (/** @type {number[]} */ numbers) => numbers.reduce((all, each) => all + each, 0);
  const widthOf = (/** @type {typeof columns[0]} */ column) => Math.max(...column.map(({ width }) => width)) + COLUMN_GAP;
  const heightOf = (/** @type {typeof columns[0]} */ column) => sum(column.map(({ height }) => height));
  const scale = (/** @type {typeof columns} */ all) => Math.min(view.width / sum(all.map(widthOf)), view.height / Math.max(...all.map(heightOf)));
  for (;;) {
    const joined = columns.slice(1).map((_, i) => columns.toSpliced(i, 2, columns.slice(i, i + 2).flat()));
    const parted = columns.flatMap((column, i) => column.slice(1).map((_, at) => columns.toSpliced(i, 1, column.slice(0, at + 1), column.slice(at + 1))));
    const best = [...joined, ...parted].sort((a, b) => scale(b) - scale(a))[0];
    if (!best || scale(best) <= scale(columns)) break;
    columns = best;
  }
  let left = 0;
  for (const column of columns) {
    let top = 0;
    for (const { node, height } of column) {
      node.pos = [left, top];
      top += height;
    }
    left += widthOf(column);
  }
  const { ds } = app.canvas;
  ds.scale = Math.min(1, Math.max(READABLE, scale(columns)));
  ds.offset = [view.left / ds.scale, view.top / ds.scale + TITLE];
  app.canvas.setDirty(true, true);
}

/** A node's width, and its height below the title; the newer renderer's own element may be larger. @param {GraphNode} node */
function sizeOf({ id, size: [width, height] }) {
  const element = document.querySelector(`[data-node-id="${id}"]`);
  if (!(element instanceof HTMLElement)) return [width, height];
  return [Math.max(width, element.offsetWidth), Math.max(height, element.offsetHeight - TITLE)];
}

/** Where a graph can be seen: between the page's panels, below its buttons; in pixels of the canvas. */
function inSight() {
  const { canvas } = app.canvas;
  const { left, top } = canvas.getBoundingClientRect();
  const seen = (document.querySelector(".graph-canvas-panel") ?? canvas).getBoundingClientRect();
  return { left: seen.left - left + EDGE, top: seen.top - top + BUTTONS, width: seen.width - 2 * EDGE, height: seen.height - BUTTONS - EDGE };
}

const drawn = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));

/** Open a template of ours by its name. Throws Error when the host does not give it. @param {string} name */
export async function openTemplate(name) {
  const pack = new URL("../../", import.meta.url).pathname.split("/").at(-2); // users name its folder as they like
  const answer = await ask(`/workflow_templates/${pack}/${name}.json`);
  if (!answer.ok) throw new Error(t("graph.no_template", { name }));
  await app.loadGraphData(await answered(answer), true, true, name);
}

/** A fresh seed widget draws a new number after each run; what a job had is to be the same every time. */
function keepSeeds() {
  for (const node of app.graph.nodes ?? []) {
    for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
  }
}
