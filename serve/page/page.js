// The page: asks the server for its figures now and then, and shows them.

import { byId, bytes, chip, count, duration, html, meter, milliseconds, percent, rate } from "./dom.js";
import { Plot } from "./plot.js";
import { call } from "./server.js";
import { TaskTable } from "./tasks.js";
import { Trial } from "./trial.js";

const STATUS_EVERY_MS = 2000;
const TASKS_EVERY_MS = 5000;

const trial = new Trial();
const tasks = new TaskTable((name) => trial.pick(name));
const latency = new Plot(byId("latency"), {
  title: "Time to answer",
  unit: "ms",
  series: [
    { key: "p50_ms", name: "p50" },
    { key: "p95_ms", name: "p95" },
    { key: "p99_ms", name: "p99" },
  ],
  write: milliseconds,
  empty: "No request in the last five minutes. Latencies appear here with the first.",
});
const throughput = new Plot(byId("throughput"), {
  title: "Answers",
  unit: "per s",
  series: [
    { key: "rows", name: "answers" },
    { key: "requests", name: "requests" },
    { key: "errors", name: "errors" },
  ],
  write: (value) => `${count(value)}/s`,
  empty: "No answer in the last five minutes.",
});

function showServer(server) {
  const state = byId("ready");
  state.textContent = server.ready ? "ready" : "not ready";
  state.className = `state ${server.ready ? "good" : "warn"}`;
  const facts = {
    Engine: server.engine,
    Backbone: server.backbone,
    Method: server.method,
    Precision: server.precision,
    Input: `${server.image_size} × ${server.image_size}`,
    Version: server.version,
    Up: duration(server.uptime_s),
  };
  byId("facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))),
  );
  document.title = `${server.engine} · prompttune`;
}

function tile(name, value, of, share = null) {
  const full = share === null || Number.isNaN(share) ? [] : [meter(share)];
  return html(
    "li",
    {},
    html("div", { class: "name" }, name),
    html("div", { class: "value" }, value),
    html("div", { class: "of" }, of),
    ...full,
  );
}

function showLoad(load, workers, points) {
  const sum = (key) => workers.reduce((total, worker) => total + worker[key], 0);
  const hits = sum("hits") / (sum("hits") + sum("misses"));
  const [resident, capacity] = [sum("resident"), sum("capacity")];
  const up = workers.filter((worker) => worker.state === "ready").length;
  const batch = points.at(-1)?.batch_rows ?? null;
  byId("load").replaceChildren(
    tile("Queue", count(load.queued_rows), `of ${count(load.max_queue)} answers`, load.queued_rows / load.max_queue),
    tile("In flight", count(load.running_rows), "answers on a device"),
    tile("Throughput", rate(load.rows_per_s), "answers a second"),
    tile("Batch", rate(batch), "images on average"),
    tile("Resident tasks", count(resident), `of ${count(capacity)} rows`, resident / capacity),
    tile("Found resident", percent(Number.isNaN(hits) ? null : hits), "of look-ups", hits),
    tile("Workers", count(up), `of ${count(workers.length)} ready`),
  );
}

function showWorkers(workers) {
  const rows = workers.map((worker) => {
    const figures = [
      `${count(worker.resident)} of ${count(worker.capacity)}`,
      count(worker.hits),
      count(worker.misses),
      count(worker.evictions),
      bytes(worker.row_bytes),
      `${bytes(worker.host_bytes)} of ${bytes(worker.host_limit)}`,
      bytes(worker.resident_bytes),
      count(worker.restarts),
    ];
    return html(
      "tr",
      {},
      html("td", {}, worker.device),
      html("td", {}, chip(worker.state, worker.state === "ready" ? "good" : "warn")),
      html("td", { class: "wide" }, worker.runtime),
      ...figures.map((text) => html("td", { class: "number" }, text)),
    );
  });
  byId("workers").replaceChildren(...rows);
}

async function readStatus() {
  const { body, now } = await call("status");
  showServer(body.server);
  showLoad(body.load, body.workers, body.latency);
  showWorkers(body.workers);
  latency.update(body.latency, now);
  throughput.update(body.latency, now);
}

async function readTasks() {
  const { body, now } = await call("status/tasks");
  tasks.update(body, now);
  trial.offer(body.filter((task) => task.state === "READY").map((task) => task.name));
}

/** What is wrong now, by the call that said so. */
const problems = new Map();

function showProblems() {
  byId("problem").hidden = problems.size === 0;
  byId("problem").textContent = [...new Set(problems.values())].join(" ");
  if (!problems.size) return;
  byId("ready").textContent = "unknown";
  byId("ready").className = "state bad";
}

/** Reads again and again; a hidden page waits until it is looked at. */
async function repeat(read, every) {
  for (;;) {
    try {
      await read();
      problems.delete(read);
    } catch (problem) {
      const text = problem instanceof TypeError ? "The server does not answer." : `The server says: ${problem.message}.`;
      problems.set(read, `${text} Trying again.`);
    }
    showProblems();
    await new Promise((resolve) => setTimeout(resolve, every));
    while (document.hidden) {
      await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
    }
  }
}

repeat(readStatus, STATUS_EVERY_MS);
repeat(readTasks, TASKS_EVERY_MS);
