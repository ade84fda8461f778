// Calls of the server, with the token where it asks for one.

import { byId } from "./dom.js";

const TOKEN = "prompttune-token";

/** What the server said against a call, in its own words. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let asking = null;

/** The answer's JSON and the server's clock in Unix seconds. Throws `Refused`, or TypeError when nobody answers. */
export async function call(path, options = {}) {
  for (;;) {
    const token = sessionStorage.getItem(TOKEN);
    const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
    const response = await fetch(path, { ...options, headers, cache: "no-store" });
    if (response.status === 401) {
      if (token === sessionStorage.getItem(TOKEN)) await askForToken(await message(response), token !== null);
      continue;
    }
    if (!response.ok) throw new Refused(response.status, await message(response));
    const clock = Date.parse(response.headers.get("Date") ?? "");
    return { body: await response.json(), now: (Number.isNaN(clock) ? Date.now() : clock) / 1000 };
  }
}

async function message(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error || text;
  } catch {
    return text || `the server answered ${response.status} ${response.statusText}`;
  }
}

/** One dialog, however many calls wait for it. */
function askForToken(reason, wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("token-dialog");
    byId("token-reason").textContent = wrong ? `The token was refused: ${reason}` : "";
    dialog.returnValue = "";
    dialog.onclose = () => {
      if (dialog.returnValue !== "given") {
        dialog.showModal(); // without a token there is nothing to show
        return;
      }
      sessionStorage.setItem(TOKEN, byId("token").value);
      byId("token").value = "";
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}
