// The table of tasks: thousands of them, of which a page at a time is drawn.

import { NOTHING, byId, chip, count, duration, html, milliseconds } from "./dom.js";

const PAGE = 50;
const TONES = { READY: "good", LOADING: "warn", UNAVAILABLE: "bad" };

const FILTERS = {
  all: () => true,
  ready: (task) => task.state === "READY",
  resident: (task) => task.resident,
  unready: (task) => task.state !== "READY",
  failing: (task) => task.errors > 0,
};

/** Columns: what to sort by, and what to show. A `value` that is null comes last. */
const COLUMNS = [
  { title: "Task", value: (task) => task.name },
  { title: "State", value: (task) => task.state, fill: showState },
  { title: "Resident", value: (task) => (task.resident ? 0 : 1), show: (task) => (task.resident ? "yes" : "no") },
  { title: "Version", value: (task) => Number(task.version) || null, number: true, hint: (task) => task.task_version },
  { title: "Labels", value: (task) => task.num_classes, number: true, show: (task) => count(task.num_classes), hint: labelsOf },
  { title: "Requests", value: (task) => task.requests, number: true, show: (task) => count(task.requests) },
  { title: "Errors", value: (task) => task.errors, number: true, show: (task) => count(task.errors), failing: (task) => task.errors > 0 },
  { title: "p50", value: (task) => task.p50_ms, number: true, show: (task) => milliseconds(task.p50_ms) },
  { title: "p95", value: (task) => task.p95_ms, number: true, show: (task) => milliseconds(task.p95_ms) },
  { title: "Last used", value: (task) => task.last_used, number: true, show: (task, now) => since(task.last_used, now) },
];

const since = (time, now) => (time === null ? NOTHING : `${duration(now - time)} ago`);

function showState(cell, task) {
  const reason = task.reason ? [html("span", { class: "reason" }, task.reason)] : [];
  cell.replaceChildren(chip(task.state.toLowerCase(), TONES[task.state] ?? ""), ...reason);
}

function labelsOf(task) {
  const more = task.num_classes - task.labels.length;
  return task.labels.join(", ") + (more > 0 ? `, and ${count(more)} more` : "");
}

function compared(one, other) {
  if (one === null || other === null) return (one === null) - (other === null);
  return typeof one === "string" ? one.localeCompare(other, "en", { numeric: true }) : one - other;
}

/** Shows tasks; `onPick` is told the name of one that is clicked. */
export class TaskTable {
  constructor(onPick) {
    Object.assign(this, { onPick, tasks: null, now: 0, page: 0, sorted: 0, direction: 1, rows: [] });
    const table = byId("task-table");
    this.body = table.tBodies[0];
    this.heads = COLUMNS.map((column, index) => this.head(column, index));
    table.tHead.rows[0].append(...this.heads);
    byId("search").addEventListener("input", () => this.turn(0));
    byId("filter").addEventListener("change", () => this.turn(0));
    byId("back").addEventListener("click", () => this.turn(this.page - 1));
    byId("onward").addEventListener("click", () => this.turn(this.page + 1));
  }

  /** Shows other figures; `now` is the server's clock. */
  update(tasks, now) {
    this.tasks = tasks.map((task) => ({ ...task, text: `${task.name} ${task.task_version ?? ""} ${task.labels.join(" ")}`.toLowerCase() }));
    this.now = now;
    this.draw();
  }

  turn(page) {
    this.page = page;
    this.draw();
  }

  head(column, index) {
    const button = html("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      // Figures are most often looked at from the largest on.
      const first = column.number ? -1 : 1;
      this.direction = this.sorted === index ? -this.direction : first;
      this.sorted = index;
      this.turn(0);
    });
    return html("th", { scope: "col", class: column.number ? "number" : "" }, button);
  }

  chosen() {
    const words = byId("search").value.toLowerCase().split(/\s+/);
    const wanted = FILTERS[byId("filter").value];
    const { value } = COLUMNS[this.sorted];
    return this.tasks
      .filter((task) => wanted(task) && words.every((word) => task.text.includes(word)))
      .sort((one, other) => {
        const empty = (value(one) === null) !== (value(other) === null);
        return compared(value(one), value(other)) * (empty ? 1 : this.direction) || compared(one.name, other.name);
      });
  }

  draw() {
    if (this.tasks === null) return;
    const chosen = this.chosen();
    const pages = Math.max(1, Math.ceil(chosen.length / PAGE));
    this.page = Math.min(Math.max(this.page, 0), pages - 1);
    const shown = chosen.slice(this.page * PAGE, (this.page + 1) * PAGE);
    while (this.rows.length < shown.length) this.rows.push(this.row());
    this.rows.forEach((row, index) => this.fill(row, shown[index]));
    this.heads.forEach((head, index) =>
      head.setAttribute("aria-sort", index !== this.sorted ? "none" : this.direction > 0 ? "ascending" : "descending"),
    );
    this.describe(chosen.length, pages);
  }

  describe(found, pages) {
    const all = this.tasks.length;
    byId("found").textContent = found === all ? `${count(all)} in all` : `${count(found)} of ${count(all)}`;
    byId("turn").hidden = pages === 1;
    byId("place").textContent = `page ${this.page + 1} of ${pages}`;
    byId("back").disabled = this.page === 0;
    byId("onward").disabled = this.page === pages - 1;
    byId("no-tasks").hidden = found > 0;
    byId("no-tasks").textContent = all ? "No task matches." : "This engine has no tasks yet.";
    byId("task-table").parentElement.hidden = found === 0;
  }

  /** A row is made once and filled again, so that the keyboard's focus stays where it is. */
  row() {
    const pick = html("button", { type: "button", class: "pick" });
    pick.addEventListener("click", () => this.onPick(pick.textContent));
    const cells = COLUMNS.map(({ number, mono }) => html("td", { class: number ? "number" : mono ? "mono" : "" }));
    cells[0].append(pick);
    const row = html("tr", {}, ...cells);
    this.body.append(row);
    return row;
  }

  fill(row, task) {
    row.hidden = task === undefined;
    if (task === undefined) return;
    COLUMNS.forEach((column, index) => {
      const cell = row.cells[index];
      if (column.fill) column.fill(cell, task);
      else (cell.firstElementChild ?? cell).textContent = column.show ? column.show(task, this.now) : (column.value(task) ?? NOTHING);
      if (column.hint) cell.title = column.hint(task);
      if (column.failing) cell.classList.toggle("failing", column.failing(task));
    });
    row.cells[0].firstElementChild.title = `Try an image with ${task.name}`;
  }
}
