// What the graph says about a node: its neighbours over links, and values of widgets that no link replaces.

import { nodeData, widgetValues } from "../lib/node_panel.js";

const SETTINGS = [
  "ChromaTrainingSettings", "ChromaOptimizerSettings", "ChromaNoiseSettings", "ChromaPreviewSettings",
  "ChromaSavingSettings", "ChromaAdapterSettings", "ChromaSpeedSettings",
];
const THROUGH = ["Reroute", "ChromaApplyLora", "ChromaCombineDatasets", ...SETTINGS];

/** @param {GraphNode["graph"]} graph @param {number | null | undefined} id */
const linkOf = (graph, id) => graph?.getLink(id);

/** @param {GraphNode} node */
const isThrough = (node) => THROUGH.includes(node.comfyClass ?? node.type);

/**
 * The node and output that an input comes from; null when nothing is linked there. Reroutes are looked through.
 * @param {GraphNode | null | undefined} node
 * @param {string} name
 * @returns {{ node: GraphNode, output: string | undefined } | null}
 */
export function sourceOf(node, name) {
  const input = node?.inputs?.find((each) => each.name === name);
  if (input?.link == null) return null;
  const link = linkOf(node?.graph ?? null, input.link);
  const from = node?.graph?.getNodeById(link?.origin_id);
  if (!link || !from) return null;
  if (!isThrough(from)) return { node: from, output: from.outputs?.[link.origin_slot]?.name };
  const onward = from.inputs?.find((each) => each.link != null && each.type === input.type) ?? from.inputs?.[0];
  return onward ? sourceOf(from, onward.name) : null;
}

/**
 * Nodes of a class that the outputs of a node lead to, also over a Reroute or a combined data set.
 * @param {GraphNode | null} node
 * @param {string} comfyClass
 * @param {Set<GraphNode>} seen
 * @returns {GraphNode[]}
 */
export function targetsOf(node, comfyClass, seen = new Set()) {
  if (!node || seen.has(node)) return [];
  seen.add(node);
  const links = (node.outputs ?? []).flatMap((output) => output.links ?? []).map((id) => linkOf(node.graph, id));
  const next = links.map((link) => node.graph?.getNodeById(link?.target_id)).filter((each) => each != null);
  const found = next.filter((each) => each.comfyClass === comfyClass);
  const further = next.filter(isThrough);
  return [...found, ...further.flatMap((each) => targetsOf(each, comfyClass, seen))];
}

/**
 * A widget's value, or undefined when a link replaces it or there is none.
 * @param {GraphNode | undefined} node
 * @param {string} name
 */
export function valueOf(node, name) {
  if (isLinked(node, name)) return undefined;
  return node?.widgets?.find((widget) => widget.name === name)?.value;
}

/**
 * What the companion nodes that are linked to an input set: values that are not at their default.
 * @param {GraphNode} node
 * @param {string} name of the input
 * @returns {WidgetValues}
 */
export function companionValues(node, name) {
  const input = node.inputs?.find((each) => each.name === name);
  const from = node.graph?.getNodeById(linkOf(node.graph, input?.link)?.origin_id);
  if (!from) return {};
  const { input: kinds } = nodeData(from);
  /** @type {Record<string, [unknown, { default?: unknown }?]>} */
  const inputs = { ...kinds?.required, ...kinds?.optional };
  const changed = Object.entries(widgetValues(from)).filter(([key, value]) => inputs[key] && inputs[key][1]?.default !== value);
  return { ...companionValues(from, name), ...Object.fromEntries(changed) };
}

/**
 * Whether a link gives the value of that input.
 * @param {GraphNode | undefined} node
 * @param {string} name
 */
export function isLinked(node, name) {
  return (node?.inputs ?? []).some((input) => input.name === name && input.link != null);
}

/**
 * Give widgets of a node new values, as a user would.
 * @param {GraphNode} node
 * @param {WidgetValues} values
 */
export function setWidgets(node, values) {
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets?.find((each) => each.name === name);
    if (!widget || widget.value === value) continue;
    widget.value = value;
    widget.callback?.(value);
  }
  node.setDirtyCanvas?.(true, true);
}
