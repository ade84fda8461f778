// One image, dropped or chosen, and what all tasks, or one, say of it.

import { byId, count, html, meter, milliseconds, percent } from "./dom.js";
import { call } from "./server.js";

const TOP_K = 5;
const PANEL = "panel";
const STAGES = { decode_ms: "reading the image", queue_ms: "waiting for a batch", infer_ms: "the engine" };

/** The form that sends an image. */
export class Trial {
  constructor() {
    this.file = null;
    this.turn = 0;
    this.known = "";
    const drop = byId("drop");
    byId("trial").addEventListener("submit", (event) => event.preventDefault());
    byId("trial-task").addEventListener("change", () => this.ask());
    byId("trial-file").addEventListener("change", (event) => this.take(event.target.files[0]));
    for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, (event) => this.hover(event, true));
    drop.addEventListener("dragleave", (event) => this.hover(event, false));
    drop.addEventListener("drop", (event) => {
      this.hover(event, false);
      this.take(event.dataTransfer.files[0]);
    });
    // An image that misses the field must not take the page's place.
    for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());
  }

  /** Offers the names of tasks; all are asked until one is chosen. */
  offer(names) {
    const all = names.join("\n");
    if (all === this.known) return;
    this.known = all;
    byId("trial-tasks").replaceChildren(...names.map((name) => html("option", { value: name })));
  }

  /** Chooses a task. */
  pick(name) {
    byId("trial-task").value = name;
    byId("trial").scrollIntoView({ block: "center" });
    byId("trial-file").focus({ preventScroll: true });
    this.ask();
  }

  hover(event, over) {
    event.preventDefault();
    byId("drop").classList.toggle("over", over);
  }

  take(file) {
    if (!file) return;
    this.file = file;
    const image = byId("trial-image");
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(file);
    image.alt = file.name;
    image.hidden = false;
    // What the browser cannot show is sent all the same: the server says what it thinks of it.
    image.onerror = () => this.name(file.name);
    image.onload = () => this.name(null);
    this.ask();
  }

  name(text) {
    byId("trial-image").hidden = text !== null;
    byId("drop-text").hidden = text === null;
    byId("drop-text").textContent = text;
  }

  /** Sends the image; an answer that comes after a later question is not shown. */
  async ask() {
    const task = byId("trial-task").value.trim();
    if (!this.file) return;
    const turn = ++this.turn;
    this.show(html("p", { class: "hint" }, `Asking ${task || "all tasks"} …`));
    const began = performance.now();
    let shown;
    try {
      const data = await base64(this.file);
      const { body } = await call(`v2/models/${encodeURIComponent(task || PANEL)}/infer`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({
          inputs: [{ name: "image", datatype: "BYTES", shape: [1], data: [data] }],
          outputs: ["label", "score", ...(task ? [] : ["task"])].map((name) => ({ name })),
          parameters: { top_k: task ? TOP_K : 1 },
        }),
      });
      shown = (task ? scores : panel)(body, performance.now() - began);
    } catch (problem) {
      const text = problem instanceof TypeError ? "The server does not answer." : problem.message;
      shown = [html("p", { class: "problem", role: "alert" }, text)];
    }
    if (turn === this.turn) this.show(...shown);
  }

  show(...parts) {
    byId("trial-answer").replaceChildren(...parts);
  }
}

const output = (answer, name) => answer.outputs.find((tensor) => tensor.name === name).data.flat(2);

const score = (share, ...label) =>
  html("li", {}, html("span", { class: "label" }, ...label), html("span", { class: "share" }, percent(share)), meter(share));

/** The likeliest label of each task, and the stage that took longest. */
function panel(answer, ms) {
  const [tasks, labels, shares] = ["task", "label", "score"].map((name) => output(answer, name));
  const rows = tasks.map((task, index) => score(shares[index], html("span", { class: "task" }, task), labels[index]));
  const known = Object.entries(STAGES).map(([key, name]) => [name, answer.parameters[key]]);
  const [slowest, took] = [["the way there and back", ms - known.reduce((sum, [, part]) => sum + part, 0)], ...known]
    .reduce((most, one) => (one[1] > most[1] ? one : most));
  return [
    html("ul", { class: "scores panel-scores", "aria-label": "Likeliest label of each task" }, ...rows),
    html("p", { class: "hint" }, `${count(tasks.length)} tasks, ${milliseconds(ms)}; slowest part: ${slowest}, ${milliseconds(took)}`),
  ];
}

function scores(answer, ms) {
  const shares = output(answer, "score");
  const rows = output(answer, "label").map((label, index) => score(shares[index], label));
  const digest = answer.parameters?.task_version;
  const version = answer.model_version ? `, version ${answer.model_version}${digest ? ` (${digest})` : ""}` : "";
  return [
    html("ol", { class: "scores", "aria-label": "Likeliest labels" }, ...rows),
    html("p", { class: "hint" }, `${answer.model_name}${version}, ${Math.round(ms)} ms there and back`),
  ];
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read: ${reader.error.message}`));
    reader.readAsDataURL(file);
  });
}
