// The panel on Chroma Train LoRA: state, bar, curve, the last preview, pause and stop. It shows what the store knows about
// the job that the node started, and holds no truth of its own.
import { fill, h, say, svg } from "../lib/dom.js";
import { reason } from "../lib/http.js";
import { addPanel, chain } from "../lib/node_panel.js";
import { t, told } from "../lib/words.js";
import { CurveFeed } from "../jobs/curve_feed.js";
import { ACTIVE, act, find, listen, watch } from "../jobs/store.js";
import { sourceOf } from "../jobs/previews.js";
import { openJobs } from "../jobs/tab.js";
import { progressWords, share, showState } from "../jobs/words.js";

const HEIGHT = 148; // pixels
const POINTS = 200;
const SIDE = 256;
const [SPARK_WIDTH, SPARK_HEIGHT, EDGE] = [200, 60, 3];

class Panel {
  /** @param {PageNode} node */
  constructor(node) {
    this.node = node;
    /** @type {(() => void) | undefined} */
    this.unlisten = undefined;
    /** @type {(() => void) | undefined} */
    this.unwatch = undefined;
    /** @type {CurveFeed | undefined} */
    this.feed = undefined;
    /** @type {string | undefined} */
    this.following = undefined;
    this.chip = h("span.ck-chip");
    this.numbers = h("span.ck-clip");
    this.bar = h("progress", { max: 1, value: 0, "aria-label": t("job.progress") });
    this.curve = svg("svg", { class: "ck-spark", role: "img", "aria-label": t("curves.chart") });
    this.sample = h("img.ck-last", { alt: t("train.last_preview"), hidden: true });
    this.note = h("span.ck-faint.ck-clip");
    this.pause = this.#button(() => (this.job?.state === "paused" ? "resume" : "pause"));
    this.stop = this.#button(() => "stop");
    this.stop.title = t("action.stop_tip");
    this.open = h("button", { title: t("train.open_tip"), onclick: () => openJobs(this.id) }, t("train.open"));
    this.element = h(
      "div.chromakit.ck-node.chromakit-train",
      h("div.ck-row.ck-fixed", this.chip, this.numbers),
      this.bar,
      h("div.ck-look", this.curve, this.sample),
      h("div.ck-row.ck-fixed", this.note, h("span.ck-group.ck-fixed", this.pause, this.stop, this.open)),
    );
    this.#show();
  }

  /** Live from now on. Not before the node is in a graph: the page also makes nodes that it only shows. */
  begin() {
    this.unlisten ??= listen((id) => (!id || id === this.id) && this.#show());
    this.follow();
  }

  /** @param {() => string} action */
  #button(action) {
    const made = h("button");
    made.addEventListener("click", async () => {
      try {
        if (this.id) await act(this.id, action());
      } catch (error) {
        this.#tell(reason(error));
      }
    });
    return made;
  }

  get id() {
    return /** @type {string | undefined} */ (this.node.properties?.chromakitJob);
  }

  get job() {
    return this.id ? find(this.id) : undefined;
  }

  /**
   * Remember the job that the node started, in the node, so that a saved or reloaded graph finds it.
   * @param {string} id
   */
  start(id) {
    this.node.properties ??= {};
    this.node.properties.chromakitJob = id;
    this.follow();
  }

  /** Follow the job that the node remembers. */
  follow() {
    if (this.following !== this.id) {
      this.unwatch?.();
      this.feed?.stop();
      this.following = this.id;
      this.unwatch = this.id ? watch(this.id) : undefined;
      this.feed = this.id ? new CurveFeed(this.id, POINTS, (curve) => this.#draw(curve)) : undefined;
      fill(this.curve);
      this.sample.hidden = true;
    }
    this.#show();
  }

  /** Out of the graph; an undo may bring it back. */
  end() {
    this.unlisten?.();
    this.unwatch?.();
    this.feed?.stop();
    this.unlisten = this.unwatch = this.feed = this.following = undefined;
  }

  /** @param {string} text */
  #tell(text) {
    say(this.note, text);
    this.note.title = text;
  }

  /** @param {Curve} curve */
  #draw(curve) {
    drawSpark(this.curve, curve.step, [
      { values: curve.loss, colour: "var(--ck-accent)", width: 1, opacity: 0.35 },
      { values: curve.loss_smooth, colour: "var(--ck-accent)", width: 2 },
    ]);
  }

  #show() {
    const job = this.job;
    const active = job !== undefined && ACTIVE.has(job.state) && !job.elsewhere;
    this.pause.disabled = this.stop.disabled = !active;
    this.open.disabled = !job;
    say(this.pause, t(job?.state === "paused" ? "action.resume" : "action.pause"));
    say(this.stop, t("action.stop_short"));
    this.bar.value = job ? share(job) : 0;
    if (!job) {
      this.chip.dataset.state = "none";
      say(this.chip, t("train.no_job"));
      say(this.numbers, "");
      return this.#tell(t("train.queue_to_start"));
    }
    showState(this.chip, job);
    say(this.numbers, progressWords(job));
    this.numbers.title = progressWords(job);
    this.#tell(job.message || job.lora_name || job.model_name || told(job.warnings?.[0] ?? ""));
    this.note.classList.toggle("ck-error", job.state === "failed");
    const samples = job.samples ?? [];
    const last = firstOfLast(samples);
    this.sample.hidden = last < 0;
    if (last >= 0) {
      const source = sourceOf(job, { number: last, name: samples[last] }, SIDE);
      if (this.sample.getAttribute("src") !== source) this.sample.src = source;
    }
    this.feed?.refresh();
  }
}

/**
 * The number of the first prompt's preview of the last step that has any; -1 without previews.
 * @param {string[]} samples
 */
function firstOfLast(samples) {
  const step = samples.at(-1)?.replace(/-\d+\.png$/, "-") ?? "";
  return samples.findIndex((name) => name.startsWith(step));
}

/** Put the panel on a node. @param {PageNode} node */
export function attachTrain(node) {
  const panel = new Panel(node);
  addPanel(node, "chromakit_status", panel.element, HEIGHT);
  chain(node, {
    onExecuted(output) {
      if (output?.chromakit_job?.[0]) panel.start(output.chromakit_job[0]);
    },
    onAdded: () => panel.begin(),
    onConfigure: () => panel.unlisten && panel.follow(),
    onRemoved: () => panel.end(),
  });
}

/**
 * Draw a curve small enough for a node: lines over one another into an SVG element that scales with it, `lines` as
 * `{values, colour, width, opacity}`; null values are gaps that are bridged. The vertical range is that of the middle 96 %
 * of all values, so that one spike does not flatten the rest.
 * @param {Element} element
 * @param {number[]} x
 * @param {SparkLine[]} lines
 */
function drawSpark(element, x, lines) {
  const sorted = lines.flatMap((line) => line.values).filter(isNumber).sort((a, b) => a - b);
  element.setAttribute("viewBox", `0 0 ${SPARK_WIDTH} ${SPARK_HEIGHT}`);
  element.setAttribute("preserveAspectRatio", "none");
  if (x.length < 2 || !sorted.length) return element.replaceChildren();
  const low = sorted[Math.floor(0.02 * (sorted.length - 1))];
  const high = Math.max(sorted[Math.ceil(0.98 * (sorted.length - 1))], low + 1e-9);
  const [first, last] = [x[0], x[x.length - 1]];
  /** @param {number} step @param {number} value */
  const place = (step, value) => {
    const right = ((step - first) / (last - first || 1)) * SPARK_WIDTH;
    const up = Math.min(1, Math.max(0, (value - low) / (high - low)));
    return `${right.toFixed(1)},${(EDGE + (1 - up) * (SPARK_HEIGHT - 2 * EDGE)).toFixed(1)}`;
  };
  element.replaceChildren(
    ...lines.map(({ values, colour, width = 1.5, opacity = 1 }) =>
      svg("polyline", {
        points: x.flatMap((step, i) => (isNumber(values[i]) ? [place(step, values[i])] : [])).join(" "),
        fill: "none",
        "stroke-width": width,
        "vector-effect": "non-scaling-stroke",
        style: `stroke:${colour};opacity:${opacity}`,
      }),
    ),
  );
}

/** @param {number | null} value @returns {value is number} */
function isNumber(value) {
  return Number.isFinite(value);
}
