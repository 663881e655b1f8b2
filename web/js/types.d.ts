// Types of what web/js works with: the host's page, a node, and the JSON that our routes answer. For the type checker
// alone; nothing here reaches a browser.

type Page = typeof import("@comfyorg/comfyui-frontend-types");
type ComfyApp = InstanceType<Page["ComfyApp"]>;
type ComfyApi = InstanceType<Page["ComfyApi"]>;
type ComfyExtension = import("@comfyorg/comfyui-frontend-types").ComfyExtension;
type ExtensionManager = import("@comfyorg/comfyui-frontend-types").ExtensionManager;

// --- the host ---------------------------------------------------------------------------------------------------------

/** What the published types leave out: settings and events with names of our own, the sidebar. */
interface Setting {
  id: string;
  name: string;
  type: "boolean" | "combo";
  defaultValue: unknown;
  tooltip?: string;
  category?: string[];
  options?: string[];
  onChange?(value: unknown): void;
}

interface Extension {
  name: string;
  settings?: Setting[];
  commands?: ComfyExtension["commands"];
  init?(): Promise<void>;
  setup?(): Promise<void>;
  nodeCreated?(node: PageNode): void;
}

interface Sidebar {
  activeSidebarTab: { id: string } | null;
  toggleSidebarTab(id: string): void;
}

type HostApp = Omit<ComfyApp, "registerExtension" | "extensionManager" | "ui"> & {
  registerExtension(extension: Extension): void;
  extensionManager: ExtensionManager & { sidebarTab: Sidebar };
  ui?: { settings?: { getSettingValue?(id: string): unknown } };
};

type HostApi = ComfyApi & {
  addEventListener(type: "chromakit.job", listener: (event: CustomEvent<Job>) => void): void;
  addEventListener(type: "chromakit.prompt_half", listener: (event: CustomEvent<Half>) => void): void;
  addEventListener(type: "chromakit.job.deleted", listener: (event: CustomEvent<{ id: string }>) => void): void;
  addEventListener(type: "chromakit.settings", listener: (event: CustomEvent<HostSettings>) => void): void;
};

declare module "*/scripts/app.js" {
  export const app: HostApp;
}

declare module "*/scripts/api.js" {
  export const api: HostApi;
}

type Severity = "success" | "info" | "warn" | "error";

// --- nodes ------------------------------------------------------------------------------------------------------------

type GraphNode = Parameters<NonNullable<ComfyExtension["nodeCreated"]>>[0];
type Widget = NonNullable<GraphNode["widgets"]>[number];
type WidgetValue = Widget["value"];
type WidgetValues = Record<string, WidgetValue>;

interface PanelOptions {
  serialize: boolean;
  hideOnZoom: boolean;
  getMinHeight(): number;
  getMaxHeight(): number;
}

/** A node as extensions get it. */
type PageNode = GraphNode & {
  addDOMWidget(name: string, type: string, element: HTMLElement, options: PanelOptions): Widget & { margin?: number };
};

/** What a node's class knows of its inputs. */
interface NodeData {
  category?: string;
  input?: { required?: object; optional?: object };
}

/** What we do after a node's own method of that name. */
interface NodeHooks {
  onAdded?(): void;
  onConfigure?(): void;
  onConnectionsChange?(): void;
  onExecuted?(output?: { chromakit_job?: string[] }): void;
  onRemoved?(): void;
}

/** A panel's place on its node; see lib/node_panel.js. */
interface Place {
  widget: Widget;
  resized(): void;
  settled(): void;
}

// --- elements and charts ----------------------------------------------------------------------------------------------

type Child = Node | string | null | undefined | false;
type Children = Child | Child[];
/** Properties, attributes and, as `style`, CSS properties of an element. */
type Properties<K extends keyof HTMLElementTagNameMap> = {
  [P in Exclude<keyof HTMLElementTagNameMap[K], "style">]?: HTMLElementTagNameMap[K][P] extends string ? string | number | null : HTMLElementTagNameMap[K][P] | null;
} & { [attribute: `${string}-${string}`]: unknown; class?: string; style?: Record<string, string> };
type Parts<K extends keyof HTMLElementTagNameMap> = [Properties<K>, ...Children[]] | Children[];

/** A preview of a job: the how-many-th, its file, training step and the number of its prompt. */
type Sample = { number: number; name: string; step: number; prompt: number };

/** An image under the slider: its address as shown and as a whole. */
interface Shown {
  source: string;
  whole: string;
  label: string;
}

/** Texts in tables by name. */
interface Words {
  [key: string]: Words | string;
}

type Column = (number | null)[];
/** Columns of equal length, the first of which is the step. */
type Table = [number[], ...Column[]];
type Point = [number, number];

interface Line {
  label: string;
  colour: string;
  width?: number;
  alpha?: number;
  dash?: number[];
  points?: boolean;
  value?(value: number): string;
}

interface SparkLine {
  values: Column;
  colour: string;
  width?: number;
  opacity?: number;
}

/** What a small chart shows: `points` are found by the pointer, `also` is drawn behind, `read(i)` is the text of point i. */
interface Drawing {
  x: Point;
  y: Point;
  points: Point[];
  also?: Point[][];
  dots?: boolean;
  kind?: "line" | "area";
  caption: string;
  read(i: number): string;
  ticks: { x: [number, string][]; y: [number, string][] };
}

// --- the training room ------------------------------------------------------------------------------------------------

type RoomStep = "images" | "aim" | "watch" | "choose";

/** What is chosen in the room: a data set folder by its name, the trigger word, the size in pixels that crops are shown
 * for (0: the model's own), what the LoRA is to learn, a job's id, what was typed over the recipe. Empty: nothing yet. */
interface RoomView {
  step: RoomStep;
  folder: string;
  trigger: string;
  size: number;
  aim: string;
  job: string;
  typed: Record<string, string>;
}

interface TrainingRoom {
  readonly view: Readonly<RoomView>;
  /** Choose something else; who listens is told what is new. */
  choose(changed: Partial<RoomView>): void;
  /** Returns what ends it. */
  onChoice(listener: (changed: Partial<RoomView>) => void): () => void;
  go(step: RoomStep): void;
  /** One line at the foot of the room; an error stays until it is closed, an empty text takes it away. */
  notice(text: string, kind?: "info" | "error"): void;
  /** The same of an error. */
  failed(error: unknown): void;
  close(): void;
}

/** A step as it is built when one first goes there; `refresh` is called each time, `destroy` when the room is closed. */
interface Step {
  element: HTMLElement;
  refresh?(): void;
  destroy?(): void;
}

/** A step's module; `title` is a key of the words. */
interface StepModule {
  title: string;
  build(room: TrainingRoom): Step;
}

type Folder = import("./room/folder.js").Folder;

/** A file, and the folder within the data set that it goes to. */
interface Given {
  file: File;
  place: string;
}

/** An image of a wall. small, source, whole: its addresses by size, empty as long as it is not there. label: what it is;
 * row: its row in words; note: what stands on it, and about: the long form of that. */
interface WallCell {
  key: string;
  label: string;
  row: string;
  small: string;
  source: string;
  whole: string;
  note?: string;
  about?: string;
}

interface WallRow {
  key: string;
  label: string;
  mark?: string;
  best?: boolean;
  cells: (WallCell | null)[];
}

// --- what our routes answer -------------------------------------------------------------------------------------------

type JobState =
  | "queued" | "preparing" | "running" | "paused" // at work
  | "completed" | "stopped" | "failed" | "interrupted"; // over

type Json = string | number | boolean | null | Json[] | { [name: string]: Json };

interface JobConfig {
  previews?: { prompts?: (string | { prompt?: string })[] };
  dataset?: { trigger?: string | null };
  lora?: { start_from?: string | null };
  [option: string]: unknown;
}

/** A job's summary; `samples`, `config`, `recipe`, `changes` and `warnings` are in its whole status only. */
interface Job {
  id: string;
  name: string;
  state: JobState;
  step: number;
  steps: number;
  created: number;
  updated: number;
  message: string;
  yielded?: boolean;
  flavour?: string;
  /** another process, which has the same folder, works on it */
  elsewhere?: boolean;
  /** "prompt", "memory" (until ComfyUI makes room), or nothing */
  waits_for?: string;
  checkpoint?: number | null;
  loss?: number | null;
  loss_smooth?: number | null;
  heldout_loss?: number | null;
  heldout_loss_base?: number | null;
  eta_seconds?: number | null;
  step_seconds?: number | null;
  train_seconds?: number | null;
  memory?: { process: number; device?: number | null; device_peak?: number | null } | null;
  lora_name?: string | null;
  model_name?: string | null;
  samples?: string[];
  config?: JobConfig;
  recipe?: Record<string, unknown>;
  changes?: { step: number; changes: Record<string, unknown> }[];
  warnings?: string[];
  best_step?: number | null;
  verdict?: Verdict | null;
  kept?: { step: number; used: string | null }[];
  held_out?: string[];
}

type VerdictKind = "early" | "learning" | "settled" | "memorises" | "hot" | "captions" | "worse" | "diverged" | "unsteady" | "falling" | "fallen" | "unclear";

/** What the metrics of a job say; `step` measured best, `at` was measured last. */
interface Verdict {
  kind: VerdictKind;
  at: number;
  step: number;
  sentence: string;
  evidence: Record<string, number>;
  command: string;
}

interface Measurement {
  step: number;
  loss: number;
  by_sigma?: number[] | null;
}

interface Curve {
  step: number[];
  loss: Column;
  loss_smooth: Column;
  lr: Column;
  grad_norm: Column;
  sigma: Column;
  seconds: Column;
  sigmas: number[];
  heldout: Measurement[];
  notes: { step: number; warning: string }[];
  base: Measurement | null;
  verdict: Verdict | null;
  token: string;
  continued: boolean;
}

type CellState = "none" | "queued" | "running" | "done" | "failed" | "cancelled";

interface GridCell {
  key: string;
  step: number;
  strength: number;
  prompt: number;
  rating: number;
  state: CellState;
  error?: string;
}

interface GridAverage {
  step: number;
  strength: number;
  mean: number | null;
  rated: number;
}

/** The grid of a job; `choice` null: there is none yet. */
interface GridLook {
  choice: { steps: number[]; strengths: number[]; prompts: string[] } | null;
  own_prompts: string[];
  columns: { prompt: string; width: number; height: number; seed: number }[];
  cells: GridCell[];
  rows: GridAverage[];
  best: GridAverage | null;
}

interface KeptLook {
  lora: string;
  path: string;
  strength: number;
  stayed: string[];
}

interface Half {
  prompt_id: string;
  problems: { node: string; title: string; error: string }[];
}

interface HostSettings {
  prompts_while_training: string;
  held: number;
}

interface JobGraph {
  prompt: Parameters<ComfyApp["loadApiJson"]>[0];
  missing: string[];
  folded: string[];
}

/** A sentence of the host's: which it is, and what stands in it; see chroma_core/data/remarks.py. */
interface Code {
  code: string;
  values: Record<string, string | number>;
}

interface Bucket {
  width: number;
  height: number;
  count: number;
}

interface Thumbnail {
  name: string;
  caption: string;
  notes: string[];
  image: string | null;
}

interface DatasetLook {
  pictures: number;
  captions: number;
  size: number;
  size_from: string;
  summary: string[];
  buckets: Bucket[];
  warnings: string[];
  thumbnails: Thumbnail[];
  sheet: string;
  codes: Record<string, Code>;
}

/** Nodes that make a text of an image; see nodes/routes/captioning.py. */
interface Captioners {
  nodes: { node: string; title: string }[];
}

interface CaptionProgress {
  waiting: number;
  written: number;
  failed: { name: string; error: string }[];
}

interface FolderList {
  folders: { name: string; own: boolean }[];
  endings: string[];
  known: string[];
  sizes: number[];
}

/** An image of a folder; see chroma_core/data/editing.py. */
interface FolderImage {
  name: string;
  size: Point | null;
  bucket: Point | null;
  frame: [left: number, top: number, right: number, bottom: number] | null;
  crop: number;
  caption: string | null;
  skipped: string;
  notes: string[];
  twin: string;
  version: string;
  mask: string;
  convertible: boolean;
}

interface FolderLook {
  folder: string;
  own: boolean;
  size: number;
  images: FolderImage[];
  warnings: string[];
  codes: Record<string, Code>;
  buckets: Bucket[];
  removed: { batch: string; names: string[] }[];
  unread: number;
  done: string[];
  undone: string[];
  check: { trigger: string; of: number; lacking: string[]; stands_as: { word: string; names: string[] }[] };
}

/** See chroma_core/training/config/recipes.py; `options` are nested as a job file has them, `options_from` by dotted name. */
interface Recipe {
  name: string;
  title: string;
  images: Point;
  captions: string;
  options: { [name: string]: Json };
  options_from: Record<string, string[]>;
}

interface RecipeList {
  recipes: Recipe[];
  sources: Record<string, { words: string; address: string }>;
  measured: string;
}

interface DensityLook {
  centres: number[];
  density: number[];
  plain: number[];
  size: number;
  steps: number;
  rates: Point[];
}

interface SigmasLook {
  sigmas: number[];
  width: number;
  height: number;
}

type Purpose = "sampling" | "training";

interface PlanRow {
  precision: string;
  text_precision: string;
  offload: string;
  offload_during_startup: boolean;
  resident_blocks: number;
  fits: Purpose[];
  marks: string[];
  sampling_bytes: number;
  training_bytes: number;
  host_bytes: number;
}

interface PlanChoice {
  purpose: Purpose;
  precision: string;
  text_precision: string;
  offload: string;
  resident_blocks: number;
  device_peak_bytes: number;
  host_peak_bytes: number;
  fits: boolean;
}

interface PlanLook {
  rows: PlanRow[];
  recommended: PlanChoice[];
  shared: boolean;
  device_name: string;
  size: number;
  device_budget_bytes: number;
  host_budget_bytes: number;
}
