// A small panel on Chroma Train LoRA: state, step, loss, a bar, pause and stop. It shows what the host says about the
// job (GET when the page loads, broadcasts afterwards) and holds no truth of its own.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const NODE = "ChromaTrainLora";
const EVENT = "chromakit.job";
const ACTIVE = ["queued", "preparing", "running", "paused"];
const STYLE = {
  panel: "display:flex;flex-direction:column;gap:4px;padding:4px 6px;box-sizing:border-box;overflow:hidden;" +
    "font:12px/1.4 sans-serif;color:var(--input-text);background:var(--comfy-input-bg);" +
    "border:1px solid var(--border-color);border-radius:4px",
  row: "display:flex;gap:6px;align-items:center;justify-content:space-between",
  bar: "width:100%;height:8px;accent-color:var(--p-primary-color,var(--input-text))",
  note: "color:var(--descrip-text);white-space:nowrap;overflow:hidden;text-overflow:ellipsis",
  button: "font:inherit;color:inherit;background:var(--comfy-menu-bg);border:1px solid var(--border-color);" +
    "border-radius:4px;padding:1px 8px;cursor:pointer",
};

/** The panels on the open graph. */
const panels = new Set();

function element(tag, style, properties = {}) {
  const made = document.createElement(tag);
  made.style.cssText = style;
  return Object.assign(made, properties);
}

function duration(seconds) {
  if (seconds == null) return "";
  const minutes = Math.floor(seconds / 60);
  return minutes >= 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : minutes ? `${minutes} min` : `${Math.ceil(seconds)} s`;
}

async function ask(job, action) {
  const path = `/chromakit/jobs/${encodeURIComponent(job)}${action ? `/${action}` : ""}`;
  const options = action
    ? { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" }
    : {};
  const answer = await api.fetchApi(path, options);
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error ?? answer.statusText);
  return value;
}

class Panel {
  constructor(node) {
    this.node = node;
    this.root = element("div", STYLE.panel, { className: "chromakit-train" });
    this.state = element("span", "font-weight:600");
    this.numbers = element("span", "");
    this.bar = element("progress", STYLE.bar, { max: 1, value: 0 });
    this.bar.setAttribute("aria-label", "training progress");
    this.note = element("div", STYLE.note);
    this.pause = this.button("pause", () => (this.status?.state === "paused" ? "resume" : "pause"));
    this.stop = this.button("stop", () => "stop");
    this.stop.title = "Stop and keep what was learnt";
    const head = element("div", STYLE.row);
    head.append(this.state, this.numbers);
    const foot = element("div", STYLE.row);
    const buttons = element("span", "display:flex;gap:4px;flex:none");
    buttons.append(this.pause, this.stop);
    foot.append(this.note, buttons);
    this.root.append(head, this.bar, foot);
    this.show(null);
  }

  button(label, action) {
    const made = element("button", STYLE.button, { type: "button", textContent: label });
    made.addEventListener("click", async () => {
      try {
        this.show(await ask(this.job, action()));
      } catch (error) {
        this.tell(error.message);
      }
    });
    return made;
  }

  get job() {
    return this.node.properties?.chromakitJob;
  }

  /** Remember the job that the node started, in the node, so that a saved or reloaded graph finds it. */
  follow(job) {
    this.node.properties ??= {};
    this.node.properties.chromakitJob = job;
    this.load();
  }

  async load() {
    if (!this.job) return;
    try {
      this.show(await ask(this.job));
    } catch {
      this.show(null); // a graph from another machine
    }
  }

  tell(text) {
    this.note.textContent = text;
    this.note.title = text;
  }

  show(status) {
    // The answer to a button may arrive after a broadcast that is newer than it.
    if (status && status.id === this.status?.id && status.updated < this.status.updated) return;
    this.status = status;
    const active = ACTIVE.includes(status?.state);
    this.pause.disabled = this.stop.disabled = !active;
    this.pause.textContent = status?.state === "paused" ? "resume" : "pause";
    if (!status) {
      this.state.textContent = "no job yet";
      this.numbers.textContent = "";
      this.bar.value = 0;
      this.tell("Queue to start training in the background.");
      return;
    }
    const loss = status.loss_smooth ?? status.loss;
    this.state.textContent = status.yielded ? `${status.state}, yielding` : status.state;
    this.numbers.textContent = `${status.step} / ${status.steps}${loss == null ? "" : ` · loss ${loss.toFixed(4)}`}`;
    this.bar.value = status.steps ? status.step / status.steps : 0;
    const left = status.state === "running" && status.eta_seconds != null ? `${duration(status.eta_seconds)} left` : "";
    this.tell(status.message || left || status.lora_name || status.model_name || status.warnings?.[0] || "");
  }
}

/** Jobs that were seen at work in this page; when one of them ends, the lists of LoRA and model files are stale. */
const seenActive = new Set();

function heard(status) {
  for (const panel of panels) if (panel.job === status.id) panel.show(status);
  if (ACTIVE.includes(status.state)) {
    seenActive.add(status.id);
  } else if (seenActive.delete(status.id) && (status.lora_name || status.model_name)) {
    app.refreshComboInNodes();
  }
}

function attach(node) {
  const panel = new Panel(node);
  const widget = node.addDOMWidget("chromakit_status", "chromakit_status", panel.root, {
    serialize: false,
    getMinHeight: () => 78,
    getMaxHeight: () => 78,
  });
  widget.serialize = false;
  panels.add(panel);
  const { onExecuted, onRemoved, onConfigure } = node;
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments);
    if (output?.chromakit_job?.[0]) panel.follow(output.chromakit_job[0]);
  };
  node.onConfigure = function () {
    onConfigure?.apply(this, arguments);
    panel.load();
  };
  node.onRemoved = function () {
    onRemoved?.apply(this, arguments);
    panels.delete(panel);
  };
}

app.registerExtension({
  name: "ChromaKit.TrainWidget",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => heard(detail));
  },
  nodeCreated(node) {
    if (node.comfyClass === NODE) attach(node);
  },
});
