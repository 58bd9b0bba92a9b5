"use strict";

// Text of the data is only ever assigned to textContent.
const element = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", t: "tie", b: "both_bad", s: "skip" };
let annotator = "";
let pair = null;
let busy = false;

async function request(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error || `The server responded with ${response.status}.`);
  return content;
}

function show(view) {
  pair = view.pair;
  const { total, labeled, skipped, own } = view.progress;
  element("bar").max = total;
  element("bar").value = labeled + skipped;
  element("count").textContent = `${labeled} of ${total} labeled, ${skipped} skipped, ${own} by you`;
  element("pair").hidden = pair === null;
  element("done").hidden = pair !== null;
  if (pair !== null) {
    for (const name of ["prompt", "left", "right"]) {
      element(name).textContent = pair[name];
      element(name).scrollTop = 0;
    }
    element("pair").dataset.id = pair.id;
    element("reason").value = "";
  }
  if (element("details").open) showStatistics();
}

// One request at a time: a key that is pressed while a choice is being stored has no effect.
async function perform(action, done) {
  if (busy) return;
  busy = true;
  try {
    show(await action());
    say(done);
    return true;
  } catch (error) {
    say(`${error.message} Nothing was lost. Try again.`, true);
  } finally {
    busy = false;
  }
}

function say(text, isError = false) {
  element("message").textContent = text;
  element("message").classList.toggle("error", isError);
}

function choose(choice) {
  if (pair === null) return;
  const names = { left: "left is better", right: "right is better", tie: "equally good", both_bad: "both are bad", skip: "skipped" };
  const body = { annotator, pair: pair.id, choice, reason: element("reason").value };
  perform(() => request("/api/choice", body), `Stored: ${names[choice]}.`);
}

function undo() {
  perform(() => request("/api/undo", { annotator }), "The last choice was taken back.");
}

async function showStatistics() {
  const status = await request("/api/status");
  const percent = (entry) => `${(100 * entry.value).toFixed(1)} % (${(100 * entry.low).toFixed(1)} to ${(100 * entry.high).toFixed(1)}), ${entry.choices} choices`;
  const rows = [];
  for (const [name, count] of Object.entries(status.annotators)) rows.push([name, `${count} choices`]);
  for (const entry of status.win_rates) rows.push([`${entry.model} wins over ${entry.versus}`, percent(entry)]);
  if (status.reward_model) rows.push(["Agreement with the reward model", percent(status.reward_model)]);
  for (const entry of status.kappa) {
    const value = entry.kappa === null ? "undefined" : entry.kappa.toFixed(2);
    rows.push([`Cohen's kappa, ${entry.annotators.join(" and ")}`, `${value}, ${entry.pairs} pairs`]);
  }
  element("statistics").replaceChildren(...rows.flatMap(([term, text]) => {
    const dt = document.createElement("dt");
    const dd = document.createElement("dd");
    dt.textContent = term;
    dd.textContent = text;
    return [dt, dd];
  }));
}

async function start(name) {
  annotator = name.trim();
  if (!annotator) return;
  element("who").hidden = true;
  if (await perform(() => request(`/api/pair?annotator=${encodeURIComponent(annotator)}`), "")) {
    localStorage.setItem("annotator", annotator);
    element("annotator").textContent = `Annotator: ${annotator}`;
  } else {
    localStorage.removeItem("annotator");
    element("who").hidden = false;
  }
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.matches("input")) {
    if (event.target.id === "reason" && (event.key === "Enter" || event.key === "Escape")) event.target.blur();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "u") undo();
  else if (key === "r" && pair !== null) element("reason").focus();
  else if (key in KEYS) choose(KEYS[key]);
  else return;
  event.preventDefault();
});

document.addEventListener("DOMContentLoaded", () => {
  for (const button of document.querySelectorAll("button[data-choice]")) {
    button.addEventListener("click", () => choose(button.dataset.choice));
  }
  element("undo").addEventListener("click", undo);
  element("undo-last").addEventListener("click", undo);
  element("details").addEventListener("toggle", () => element("details").open && showStatistics());
  element("who").addEventListener("submit", (event) => {
    event.preventDefault();
    start(element("name").value);
  });
  const given = new URLSearchParams(location.search).get("annotator") || localStorage.getItem("annotator");
  if (given) start(given);
  else element("who").hidden = false;
});
