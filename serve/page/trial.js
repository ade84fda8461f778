// One image, dropped or chosen, and what a task says of it.

import { byId, html, meter, percent } from "./dom.js";
import { call } from "./server.js";

const TOP_K = 5;

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

  /** Offers the names of tasks; the first is chosen if none is yet. */
  offer(names) {
    const all = names.join("\n");
    if (all === this.known) return;
    this.known = all;
    byId("trial-tasks").replaceChildren(...names.map((name) => html("option", { value: name })));
    byId("trial-task").value ||= names[0] ?? "";
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
    if (!this.file || !task) return;
    const turn = ++this.turn;
    this.show(html("p", { class: "hint" }, `Asking ${task} …`));
    const began = performance.now();
    let shown;
    try {
      const data = await base64(this.file);
      const { body } = await call(`v2/models/${encodeURIComponent(task)}/infer`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({
          inputs: [{ name: "image", datatype: "BYTES", shape: [1], data: [data] }],
          outputs: [{ name: "label" }, { name: "score" }],
          parameters: { top_k: TOP_K },
        }),
      });
      shown = scores(body, performance.now() - began);
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

function scores(answer, ms) {
  const output = (name) => answer.outputs.find((tensor) => tensor.name === name).data.flat(2);
  const shares = output("score");
  const rows = output("label").map((label, index) =>
    html(
      "li",
      {},
      html("span", { class: "label" }, label),
      html("span", { class: "share" }, percent(shares[index])),
      meter(shares[index]),
    ),
  );
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
