// The previews of a job: for each prompt a strip through time, and two of them under a slider.
import { fill, h, say } from "../lib/dom.js";
import { address } from "../lib/http.js";
import { t } from "../lib/words.js";

const [THUMBNAIL, LARGE] = [160, 1024];

/** step-000100-0.png → {number, name, step, prompt}; null for a name of another kind. */
function parsed(name, number) {
  const found = /^step-(\d+)-(\d+)\.png$/.exec(name);
  return found && { number, name, step: Number(found[1]), prompt: Number(found[2]) };
}

/** What a preview prompt says, with the trigger word in it. */
function promptText(job, index) {
  const entry = job.config?.previews?.prompts?.[index];
  const text = typeof entry === "string" ? entry : (entry?.prompt ?? "");
  return text.replaceAll("[trigger]", job.config?.dataset?.trigger ?? "[trigger]");
}

/** All strips of one job. */
export class Previews {
  constructor() {
    this.strips = new Map();
    this.names = "";
    this.note = h("div", { class: "ck-faint" });
    this.element = h("section", { class: "ck-previews" }, this.note);
  }

  show(job) {
    if (!job.samples) return;
    const names = job.samples.join("\n");
    say(this.note, names ? "" : t(job.config?.previews?.prompts?.length ? "previews.none_yet" : "previews.no_prompt"));
    if (names === this.names) return;
    this.names = names;
    const byPrompt = grouped(job.samples.map(parsed).filter(Boolean));
    for (const [index, samples] of [...byPrompt].sort(([a], [b]) => a - b)) {
      if (!this.strips.has(index)) {
        this.strips.set(index, new Strip(job));
        this.element.append(this.strips.get(index).element);
      }
      this.strips.get(index).show(samples, promptText(job, index));
    }
  }
}

function grouped(samples) {
  const found = new Map();
  for (const sample of samples) found.set(sample.prompt, [...(found.get(sample.prompt) ?? []), sample]);
  return found;
}

class Strip {
  constructor(job) {
    this.job = job;
    this.samples = [];
    this.before = null;
    this.after = null;
    this.pinned = false;
    this.prompt = h("div", { class: "ck-strong" });
    this.row = h("div", { class: "ck-strip", role: "listbox", "aria-label": t("previews.strip") });
    this.slider = new Slider();
    this.choice = h("select", { "aria-label": t("previews.before"), onchange: () => this.#choose(Number(this.choice.value)) });
    const head = h("label", { class: "ck-faint" }, t("previews.compare_with"), " ", this.choice);
    this.element = h("div", { class: "ck-prompt" }, this.prompt, this.row, this.slider.element, head);
  }

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
    this.choice.parentElement.hidden = samples.length < 2;
    if (atEnd) this.row.scrollLeft = this.row.scrollWidth;
  }

  #thumbnail(sample) {
    const source = this.#source(sample, THUMBNAIL);
    const image = h("img", { src: source, loading: "lazy", alt: t("previews.step", sample), width: 72, height: 72 });
    return h(
      "button",
      {
        type: "button",
        role: "option",
        "aria-selected": sample === this.after,
        "data-step": sample.step,
        title: t("previews.show_step", sample),
        onclick: () => {
          this.after = sample;
          this.pinned = sample !== this.samples.at(-1);
          for (const one of this.row.children) one.setAttribute("aria-selected", one.dataset.step === String(sample.step));
          this.#compare();
        },
      },
      image,
      h("span", {}, String(sample.step)),
    );
  }

  #choose(step) {
    this.before = this.samples.find((sample) => sample.step === step) ?? this.samples[0];
    this.#compare();
  }

  #compare() {
    this.slider.show(
      { ...this.before, source: this.#source(this.before, LARGE), whole: this.#source(this.before) },
      { ...this.after, source: this.#source(this.after, LARGE), whole: this.#source(this.after) },
    );
  }

  #source(sample, side) {
    const query = new URLSearchParams({ ...(side ? { side } : {}), v: `${sample.name} ${this.job.created}` });
    return address(`jobs/${encodeURIComponent(this.job.id)}/samples/${sample.number}?${query}`);
  }
}

/** Two pictures, one over the other, and a handle that uncovers the lower one. */
class Slider {
  constructor() {
    this.left = h("img", { class: "ck-left" });
    this.right = h("img", { class: "ck-right" });
    this.labels = [h("span", { class: "ck-tag" }), h("span", { class: "ck-tag ck-tag-right" })];
    this.range = h("input", {
      type: "range", min: 0, max: 100, step: 1, value: 50,
      "aria-label": t("previews.slider"),
      oninput: () => this.#uncover(),
    }); // prettier-ignore
    this.edge = h("span", { class: "ck-edge" });
    this.link = h("a", { target: "_blank", rel: "noopener", class: "ck-faint" }, t("previews.full_size"));
    this.frame = h("div", { class: "ck-frame" }, this.right, this.left, this.edge, ...this.labels, this.range);
    this.element = h("figure", { class: "ck-slider" }, this.frame, this.link);
    this.#uncover();
  }

  show(before, after) {
    for (const [image, sample] of [[this.left, before], [this.right, after]]) {
      if (image.getAttribute("src") !== sample.source) image.src = sample.source;
      image.alt = t("previews.step", sample);
    }
    this.link.href = after.whole;
    this.frame.classList.toggle("ck-single", before.source === after.source);
    say(this.labels[0], t("previews.step", before));
    say(this.labels[1], t("previews.step", after));
  }

  #uncover() {
    this.frame.style.setProperty("--ck-share", `${this.range.value}%`);
  }
}
