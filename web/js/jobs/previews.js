// The previews of a job: for each prompt a strip through time, and two of them under a slider.
import { fill, h, say } from "../lib/dom.js";
import { address, ofJob } from "../lib/http.js";
import { t } from "../lib/words.js";

const THUMBNAIL = 160;
const LARGE = 1024;

/**
 * step-000100-0.png → {number, name, step, prompt}; null for a name of another kind.
 * @param {string} name
 * @param {number} number
 * @returns {Sample | null}
 */
function parsed(name, number) {
  const found = /^step-(\d+)-(\d+)\.png$/.exec(name);
  return found && { number, name, step: Number(found[1]), prompt: Number(found[2]) };
}

/** The previews that a job has, in order. @param {Job} job */
export const samplesOf = (job) => (job.samples ?? []).map(parsed).filter((sample) => sample != null);

/**
 * Where an image of a preview is, as it is or with a longer side of so many pixels.
 * @param {Job} job
 * @param {Pick<Sample, "number" | "name">} sample
 * @param {number} [side]
 */
export function sourceOf(job, sample, side) {
  const query = new URLSearchParams({ ...(side ? { side: String(side) } : {}), v: `${sample.name} ${job.created}` });
  return address(ofJob(job.id, `samples/${sample.number}?${query}`));
}

/** A small image of what a job made at a step, if it made one. @param {Job} job @param {number} step */
export function thumbnail(job, step) {
  const sample = samplesOf(job).find((each) => each.step === step);
  return sample && h("img", { src: sourceOf(job, sample, THUMBNAIL), loading: "lazy", alt: "", width: 48, height: 48 });
}

/**
 * What a preview prompt says, with the trigger word in it.
 * @param {Job} job
 * @param {number} index
 */
export function promptText(job, index) {
  const entry = job.config?.previews?.prompts?.[index];
  const text = typeof entry === "string" ? entry : (entry?.prompt ?? "");
  return text.replaceAll("[trigger]", job.config?.dataset?.trigger ?? "[trigger]");
}

/** All strips of one job. */
export class Previews {
  constructor() {
    /** @type {Map<number, Strip>} */
    this.strips = new Map();
    this.names = "";
    this.note = h("div.ck-faint");
    this.element = h("section.ck-previews", this.note);
  }

  /** @param {Job} job */
  show(job) {
    if (!job.samples) return;
    const names = job.samples.join("\n");
    say(this.note, names ? "" : t(job.config?.previews?.prompts?.length ? "previews.none_yet" : "previews.no_prompt"));
    if (names === this.names) return;
    this.names = names;
    const byPrompt = grouped(samplesOf(job));
    for (const [index, samples] of [...byPrompt].sort(([a], [b]) => a - b)) {
      const strip = this.strips.get(index) ?? new Strip(job);
      if (!this.strips.has(index)) this.element.append(strip.element);
      this.strips.set(index, strip);
      strip.show(samples, promptText(job, index));
    }
  }
}

/** @param {Sample[]} samples */
function grouped(samples) {
  /** @type {Map<number, Sample[]>} */
  const found = new Map();
  for (const sample of samples) found.set(sample.prompt, [...(found.get(sample.prompt) ?? []), sample]);
  return found;
}

class Strip {
  /** @param {Job} job */
  constructor(job) {
    this.job = job;
    /** @type {Sample[]} */
    this.samples = [];
    /** @type {Sample | undefined} */
    this.before = undefined;
    /** @type {Sample | undefined} */
    this.after = undefined;
    this.pinned = false;
    this.prompt = h("div.ck-strong");
    this.row = h("div.ck-strip", { role: "listbox", "aria-label": t("previews.strip") });
    this.slider = new Slider();
    this.choice = h("select", { "aria-label": t("previews.before"), onchange: () => this.#choose(Number(this.choice.value)) });
    this.head = h("label.ck-faint", t("previews.compare_with"), " ", this.choice);
    this.element = h("div.ck-prompt", this.prompt, this.row, this.slider.element, this.head);
  }

  /** @param {Sample[]} samples @param {string} prompt */
  show(samples, prompt) {
    say(this.prompt, prompt);
    const atEnd = this.row.scrollLeft + this.row.clientWidth >= this.row.scrollWidth - 8;
    this.samples = samples;
    fill(
      this.choice,
      samples.map((sample) => h("option", { value: sample.step, selected: sample.step === this.before?.step }, t("previews.step", sample))),
    );
    this.before = samples.find((sample) => sample.step === this.before?.step) ?? samples[0];
    const chosen = this.pinned && samples.find((sample) => sample.step === this.after?.step);
    this.after = chosen || samples.at(-1);
    fill(this.row, samples.map((sample) => this.#thumbnail(sample)));
    this.#compare();
    this.head.hidden = samples.length < 2;
    if (atEnd) this.row.scrollLeft = this.row.scrollWidth;
  }

  /** @param {Sample} sample */
  #thumbnail(sample) {
    const source = sourceOf(this.job, sample, THUMBNAIL);
    const image = h("img", { src: source, loading: "lazy", alt: t("previews.step", sample), width: 72, height: 72 });
    return h(
      "button",
      {
        role: "option",
        "aria-selected": sample === this.after,
        "data-step": sample.step,
        title: t("previews.show_step", sample),
        onclick: () => {
          this.after = sample;
          this.pinned = sample !== this.samples.at(-1);
          for (const one of this.row.children) {
            one.setAttribute("aria-selected", String(one.getAttribute("data-step") === String(sample.step)));
          }
          this.#compare();
        },
      },
      image,
      h("span", String(sample.step)),
    );
  }

  /** @param {number} step */
  #choose(step) {
    this.before = this.samples.find((sample) => sample.step === step) ?? this.samples[0];
    this.#compare();
  }

  #compare() {
    if (this.before && this.after) this.slider.show(this.#large(this.before), this.#large(this.after));
  }

  /** @param {Sample} sample */
  #large(sample) {
    return { source: sourceOf(this.job, sample, LARGE), whole: sourceOf(this.job, sample), label: t("previews.step", sample) };
  }
}

/** Two images, one over the other, and a handle that uncovers the lower one. */
export class Slider {
  constructor() {
    this.left = h("img.ck-left");
    this.right = h("img.ck-right");
    this.labels = [h("span.ck-tag"), h("span.ck-tag.ck-tag-right")];
    this.range = h("input", {
      type: "range", min: 0, max: 100, step: 1, value: 50,
      "aria-label": t("previews.slider"),
      oninput: () => this.#uncover(),
    });
    this.edge = h("span.ck-edge");
    this.link = h("a.ck-faint", { target: "_blank", rel: "noopener" }, t("previews.full_size"));
    this.frame = h("div.ck-frame", this.right, this.left, this.edge, ...this.labels, this.range);
    this.element = h("figure.ck-slider", this.frame, this.link);
    this.#uncover();
  }

  /** @param {Shown} before @param {Shown} after */
  show(before, after) {
    showImage(this.left, before);
    showImage(this.right, after);
    this.link.href = after.whole;
    this.frame.classList.toggle("ck-single", before.source === after.source);
    say(this.labels[0], before.label);
    say(this.labels[1], after.label);
  }

  #uncover() {
    this.frame.style.setProperty("--ck-share", `${this.range.value}%`);
  }
}

/** @param {HTMLImageElement} image @param {Shown} shown */
function showImage(image, shown) {
  if (image.getAttribute("src") !== shown.source) image.src = shown.source;
  image.alt = shown.label;
}
