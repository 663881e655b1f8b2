// Step "Aim": what the LoRA is to learn. A recipe gives the numbers and says where each comes from; what it needs here is
// shown before anything runs.
import { api } from "../../../../scripts/api.js";
import { debounced, fill, h, say } from "../lib/dom.js";
import { duration, lines } from "../lib/format.js";
import { address, askJson, get, newest, post, reason } from "../lib/http.js";
import { t } from "../lib/words.js";
import { all, reload } from "../jobs/store.js";
import { advice } from "../widgets/plan.js";

export const title = "room.aim.title";

const WAIT = 300;
const [PREVIEWS, VALIDATIONS] = [8, 10]; // at least so many in a job, however short
const NUMBERS = /** @type {const} */ ({
  steps: { path: "steps", min: 1, max: 1000000, step: 50 },
  rank: { path: "lora.rank", min: 1, max: 512, step: 4 },
  learning_rate: { path: "learning_rate", min: 1e-7, max: 1, step: "any" },
});

/** @typedef {keyof typeof NUMBERS} Numeric */
/** @typedef {{ [name: string]: Json | Options }} Options */

/** @param {TrainingRoom} room @returns {Step} */
export const build = (room) => new Aim(room);

/** @param {Json | undefined} value @returns {value is { [name: string]: Json }} */
const isTable = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/**
 * What stands at a dotted name in nested options.
 * @param {Json} options
 * @param {string} path
 */
function at(options, path) {
  /** @type {Json | undefined} */
  let found = options;
  for (const part of path.split(".")) found = isTable(found) ? found[part] : undefined;
  return found;
}

class Aim {
  /** @param {TrainingRoom} room */
  constructor(room) {
    this.room = room;
    /** @type {RecipeList | null} */
    this.list = null;
    /** @type {PlanLook | null} */
    this.plan = null;
    /** @type {FolderLook | null} */
    this.found = null;
    this.told = ""; // what it needs, in words
    this.trouble = ""; // why the folder could not be looked into
    this.newest = { plan: newest(), found: newest() };
    this.cards = h("div.ck-aims", { role: "radiogroup", "aria-label": t("room.aim.question") });
    this.trigger = h("input", { type: "text", "data-field": "trigger", oninput: debounced(() => room.choose({ trigger: this.trigger.value.trim() }), WAIT) });
    const soon = debounced(() => this.#costs(), WAIT);
    const number = (/** @type {Numeric} */ key) => {
      const { min, max, step } = NUMBERS[key];
      return h("input", { type: "number", min: String(min), max: String(max), step: String(step), oninput: soon });
    };
    this.numbers = { steps: number("steps"), rank: number("rank"), learning_rate: number("learning_rate") };
    this.name = h("input", { type: "text" });
    this.word = h("input", { type: "text" });
    this.prompts = h("textarea", { rows: 4 });
    this.flavour = h("select", { onchange: () => this.#ask() });
    /** @type {Record<string, HTMLInputElement | HTMLTextAreaElement | HTMLSelectElement>} what is typed over the recipe */
    this.fields = { name: this.name, class_word: this.word, flavour: this.flavour, ...this.numbers, prompts: this.prompts };
    for (const [key, control] of Object.entries(this.fields)) {
      control.dataset.field = key;
      control.addEventListener("input", () => room.choose({ typed: { ...room.view.typed, [key]: control.value } }));
    }
    this.advised = h("p.ck-faint");
    this.needs = h("ul.ck-needs", { "aria-live": "polite" });
    this.costs = h("ul.ck-costs", { "aria-live": "polite" });
    this.sources = h("tbody");
    this.measured = h("p.ck-faint");
    this.refusal = h("div.ck-error", { role: "alert" });
    this.start = h("button.ck-primary", { "data-action": "start", onclick: () => this.#start() }, t("room.aim.start"));
    const labelled = (/** @type {string} */ key, /** @type {HTMLElement} */ control) =>
      h("label", { title: t(`room.aim.${key}_tip`) }, h("span", t(`room.aim.${key}`)), control);
    const why = h("details", h("summary", t("room.aim.why")), this.measured, h("table.ck-reasons", this.sources));
    this.form = h(
      "div.ck-form",
      labelled("name", this.name),
      labelled("trigger", this.trigger),
      labelled("class_word", this.word),
      labelled("flavour", this.flavour),
      Object.entries(this.numbers).map(([key, control]) => labelled(key, control)),
      labelled("prompts", this.prompts),
    );
    this.element = h(
      "div.ck-aim",
      h("h2", t("room.aim.question")),
      this.cards,
      this.advised,
      this.form,
      h("h3", t("room.aim.before")),
      this.costs,
      this.needs,
      h("div.ck-group", this.start, h("span.ck-faint", t("room.aim.start_tip"))),
      this.refusal,
      why,
    );
    this.unfollow = room.onChoice((changed) => this.#chosen(changed));
    /** @type {Promise<void> | null} */
    this.beginning = null;
  }

  /** Look anew, also for what could not be had before. */
  refresh() {
    if (!this.list) this.beginning ??= this.#begin().finally(() => (this.beginning = null));
    else if (!this.plan) this.#ask();
    this.#look();
    this.#costs();
  }

  destroy() {
    this.unfollow();
  }

  async #begin() {
    try {
      /** @type {[RecipeList, any]} */
      const [list, nodes] = await Promise.all([get("recipes"), askJson("/object_info/ChromaLoadModel")]);
      this.list = list;
      this.#offer(nodes.ChromaLoadModel.input.required.flavour);
    } catch (error) {
      return this.room.failed(error);
    }
    this.#draw();
    this.#fill();
  }

  get recipe() {
    return this.list?.recipes.find(({ name }) => name === this.room.view.aim) ?? this.list?.recipes[0];
  }

  /** The flavours that Chroma Load Model has. @param {[string[] | string, { options?: string[] }?]} input */
  #offer([kind, more]) {
    const names = Array.isArray(kind) ? kind : (more?.options ?? []);
    fill(this.flavour, names.map((name) => h("option", { value: name }, name)));
  }

  /** @param {Partial<RoomView>} changed */
  #chosen(changed) {
    if ("aim" in changed) {
      this.#draw();
      this.#fill();
    }
    if ("folder" in changed) {
      this.found = null;
      this.trouble = "";
      const { name, ...typed } = this.room.view.typed;
      this.room.choose({ typed });
    }
    if ("trigger" in changed && this.trigger.value.trim() !== changed.trigger) this.trigger.value = changed.trigger ?? "";
    if (this.room.view.step === "aim" && ["folder", "trigger", "size"].some((name) => name in changed)) this.refresh();
  }

  // --- the four aims ---

  #draw() {
    const chosen = this.recipe?.name;
    const focused = this.cards.contains(document.activeElement);
    const recipes = this.list?.recipes ?? [];
    fill(this.cards, recipes.map(({ name, images }, i) => {
      const on = name === chosen;
      const card = h(
        "button",
        { role: "radio", "aria-checked": String(on), tabIndex: on ? 0 : -1, "data-aim": name, onclick: () => this.#aim(name) },
        h("b", t(`room.aim.${name}.title`)),
        h("span", t(`room.aim.${name}.about`)),
        h("span.ck-faint", t("room.aim.images", { from: images[0], to: images[1] })),
      );
      card.addEventListener("keydown", (event) => {
        const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
        if (!by) return;
        event.preventDefault();
        this.#aim(recipes[(i + by + recipes.length) % recipes.length].name);
      });
      return card;
    }));
    if (focused) /** @type {HTMLElement | null} */ (this.cards.querySelector("[aria-checked=true]"))?.focus();
  }

  /** @param {string} aim */
  #aim(aim) {
    if (aim !== this.room.view.aim) this.room.choose({ aim, typed: {} });
  }

  /** The recipe's numbers and words, and what was typed over them. */
  #fill() {
    const { recipe, list } = this;
    if (!recipe || !list) return;
    const { options } = recipe;
    for (const [key, { path }] of Object.entries(NUMBERS)) this.numbers[/** @type {Numeric} */ (key)].value = String(at(options, path) ?? "");
    const prompts = at(options, "previews.prompts");
    this.prompts.value = Array.isArray(prompts) ? prompts.join("\n") : "";
    const word = at(options, "preserve.class_word");
    this.word.value = String(word ?? "");
    if (this.word.parentElement) this.word.parentElement.hidden = word == null;
    this.trigger.value = this.room.view.trigger;
    this.flavour.value = String(at(options, "model.flavour") ?? this.flavour.value);
    for (const [key, text] of Object.entries(this.room.view.typed)) if (Object.hasOwn(this.fields, key)) this.fields[key].value = text;
    say(this.advised, t(`room.aim.${recipe.name}.captions`));
    say(this.measured, list.measured);
    fill(this.sources, Object.entries(recipe.options_from).map(([path, names]) =>
      h("tr", h("th", { scope: "row" }, h("code", path)), h("td", shown(at(options, path))), h("td", names.map((name) => this.#source(name))))));
    this.#name();
    this.#look();
    this.#costs();
    this.#ask();
  }

  /** @param {string} name */
  #source(name) {
    const { words, address: place } = this.list?.sources[name] ?? { words: name, address: "" };
    const href = place.startsWith("http") ? place : address(`docs/${place}`);
    return h("div", place ? h("a", { href, target: "_blank", rel: "noopener" }, words) : words);
  }

  #name() {
    const { folder } = this.room.view;
    this.name.value = this.room.view.typed.name || [folder.split("/").at(-1), this.recipe?.name].filter(Boolean).join("-").replaceAll(" ", "-");
  }

  // --- what it needs ---

  /** What is in the folder now. */
  async #look() {
    const { folder, trigger, size } = this.room.view;
    this.#name();
    this.#complain();
    try {
      const found = await this.newest.found(folder ? post("datasets/images", { folder, trigger, size }) : null);
      if (found === undefined) return;
      this.found = found;
      this.trouble = "";
    } catch (error) {
      this.found = null;
      this.trouble = t("room.aim.not_looked", { folder, why: reason(error) });
    }
    this.#complain();
  }

  /** What is still to be done before it makes sense to start, each with the way there. */
  #complain() {
    const { folder, trigger } = this.room.view;
    const used = this.found?.images.filter((image) => !image.skipped).length ?? 0;
    const skipped = (this.found?.images.length ?? 0) - used;
    const [least, most] = this.recipe?.images ?? [1, Infinity];
    const texts = [
      !folder && t("room.aim.no_folder"),
      folder && this.found && !used && t("room.aim.no_images", { folder }),
      folder && !trigger && t("room.aim.no_trigger"),
      used > 0 && used < least && t("room.aim.few", { used, least }),
      used > most && t("room.aim.many", { used, most }),
      skipped > 0 && t("room.aim.skipped", { skipped }),
      this.trouble,
    ].filter((text) => text !== false && text !== "");
    this.start.disabled = !used;
    if (texts.join() === this.told) return; // built anew, it would be read out again, and lose the focus
    this.told = texts.join();
    const back = h("button", { onclick: () => this.room.go("images") }, t("room.aim.to_images"));
    const again = h("button", { onclick: () => this.refresh() }, t("room.images.again"));
    fill(this.needs, texts.map((text, i) => h("li.ck-warning", text, " ", i === texts.length - 1 && (this.trouble ? again : back))));
  }

  /** The memory plan of this machine for the chosen model. */
  async #ask() {
    const flavour = this.flavour.value;
    if (!flavour) return;
    try {
      const plan = await this.newest.plan(post("plan/rows", { flavour, size: this.room.view.size }));
      if (plan === undefined) return;
      this.plan = plan;
    } catch (error) {
      this.plan = null;
      this.room.failed(error);
    }
    this.#costs();
  }

  /** Memory from the plan, time from what was trained here before. */
  #costs() {
    const choice = this.#choice();
    const flavour = this.flavour.value;
    const alike = all().find((job) => job.flavour === flavour && job.step_seconds);
    const steps = Number(this.numbers.steps.value);
    const time = alike
      ? t("room.aim.time", { time: duration(steps * (alike.step_seconds ?? 0)), steps, each: duration(alike.step_seconds), name: alike.name })
      : t("room.aim.no_time", { flavour });
    fill(
      this.costs,
      this.plan && choice && h("li", { class: choice.fits ? "" : "ck-warning" }, t("room.aim.device", { device: this.plan.device_name }), " ", advice(this.plan, choice)),
      flavour && h("li", time),
    );
  }

  #choice() {
    return this.plan?.recommended.find(({ purpose }) => purpose === "training");
  }

  // --- the start ---

  /** The job as `POST /chromakit/jobs` takes it: the recipe with what was typed over it. */
  #job() {
    const options = structuredClone(this.recipe?.options ?? {});
    const table = (/** @type {string} */ name) => (isTable(options[name]) ? options[name] : {});
    const { folder, trigger, size } = this.room.view;
    const choice = this.#choice();
    const steps = Number(this.numbers.steps.value);
    const often = (/** @type {string} */ path, /** @type {number} */ times) => Math.min(Number(at(options, path) ?? 0) || steps, Math.max(1, Math.round(steps / times)));
    const masked = this.found?.images.some((image) => image.mask);
    const word = at(options, "preserve.class_word") != null && { class_word: this.word.value.trim() };
    return {
      ...options,
      name: this.name.value.trim(),
      steps,
      validate_every: often("validate_every", VALIDATIONS),
      learning_rate: Number(this.numbers.learning_rate.value),
      model: {
        ...table("model"),
        flavour: this.flavour.value,
        ...(choice && { precision: choice.precision, text_precision: choice.text_precision, offload: choice.offload }),
        ...(choice?.offload === "block" && { resident_blocks: choice.resident_blocks }),
      },
      lora: { ...table("lora"), rank: Number(this.numbers.rank.value) },
      dataset: { ...table("dataset"), folder, trigger: this.trigger.value.trim() || trigger, ...(size && { resolution: size }), ...(masked && { masks: "files" }) },
      previews: { ...table("previews"), every: often("previews.every", PREVIEWS), prompts: lines(this.prompts.value) },
      ...("preserve" in options && { preserve: { ...table("preserve"), ...word } }),
    };
  }

  async #start() {
    say(this.refusal, "");
    this.start.disabled = true;
    try {
      const { id } = /** @type {Job} */ (await post("jobs", this.#job()));
      await reload();
      this.room.choose({ job: id });
      this.room.go("watch");
    } catch (error) {
      say(this.refusal, reason(error));
    } finally {
      this.#complain();
      if (document.activeElement === document.body) this.start.focus();
    }
  }
}

/** @param {Json | undefined} value */
const shown = (value) => (Array.isArray(value) ? value.join("; ") : String(value ?? ""));
