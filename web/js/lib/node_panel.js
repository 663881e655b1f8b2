// What of ours stands on a node: an element as a widget that is never saved, and the node's life around it.

const OPERATING = ["Enter", " ", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"];

/**
 * Put `element` on a node, `height` pixels high (a number, or a function that gives one), the margin around it included.
 *
 * It works in both renderers of nodes: on the canvas the widget keeps that height, as a Vue component the element does.
 *
 * @param {PageNode} node
 * @param {string} name
 * @param {HTMLElement} element
 * @param {number | (() => number)} height
 * @returns {Place}
 */
export function addPanel(node, name, element, height) {
  const pixels = typeof height === "function" ? height : () => height;
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: pixels,
    getMaxHeight: pixels,
  });
  widget.serialize = false;
  // What works a button, a disclosure or a plot is not meant for the page's own shortcuts; Ctrl+Enter is.
  element.addEventListener("keydown", (event) => {
    if (OPERATING.includes(event.key) && !event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
  let last = 0;
  const settled = () => {
    last = pixels();
    const room = `${Math.max(0, last - 2 * (widget.margin ?? 10))}px`;
    element.style.setProperty("min-height", room);
    element.style.setProperty("max-height", room);
  };
  // A node is measured before it has our panel, and a saved graph may be older than it.
  const makeRoom = () => {
    const [width, height] = node.size;
    const needed = node.computeSize()[1];
    if (height < needed) node.setSize([width, needed]);
  };
  settled();
  setTimeout(makeRoom);
  chain(node, { onConfigure: () => setTimeout(makeRoom) });
  return {
    widget,
    /** After a change of height: take the room, or give it back; what the user made larger stays larger. */
    resized() {
      const before = last;
      settled();
      const [width, now] = node.size;
      node.setSize([width, Math.max(node.computeSize()[1], now + last - before)]);
      node.setDirtyCanvas?.(true, true);
    },
    /** After a change of height that the node's size has in it already, as a saved one does. */
    settled,
  };
}

/**
 * Call what is given in `hooks` after the node's own method of that name.
 * @param {PageNode} node
 * @param {NodeHooks} hooks
 */
export function chain(node, hooks) {
  const methods = /** @type {Record<string, Function | undefined>} */ (/** @type {unknown} */ (node));
  for (const [name, work] of Object.entries(hooks)) {
    const before = methods[name];
    /** @this {PageNode} @param {unknown[]} values */
    methods[name] = function (...values) {
      const result = before?.apply(this, values);
      work.apply(this, values);
      return result;
    };
  }
}

/** What a node's class knows of its inputs. @param {GraphNode} node @returns {NodeData} */
export const nodeData = (node) => /** @type {{ nodeData?: NodeData }} */ (/** @type {unknown} */ (node.constructor)).nodeData ?? {};

/**
 * The values of a node's widgets by name; those of inputs that are linked are left out.
 * @param {GraphNode} node
 * @returns {WidgetValues}
 */
export function widgetValues(node) {
  const linked = new Set((node.inputs ?? []).filter((input) => input.link != null).map((input) => input.name));
  const ours = (node.widgets ?? []).filter((widget) => widget.serialize !== false && !linked.has(widget.name));
  return Object.fromEntries(ours.map((widget) => [widget.name, widget.value]));
}

/**
 * Call `changed` after a widget of the node got another value, a link came or went, or the node was configured.
 * @param {PageNode} node
 * @param {() => void} changed
 */
export function onWidgets(node, changed) {
  for (const widget of node.widgets ?? []) {
    const { callback } = widget;
    widget.callback = function (...values) {
      const result = callback?.apply(this, values);
      changed();
      return result;
    };
  }
  chain(node, { onConfigure: changed, onConnectionsChange: changed });
}
