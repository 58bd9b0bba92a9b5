"use strict";
// Values under the pointer, tables that can be sorted, and the responses. Text of a run is only ever set as text.

const data = (id) => {
  const element = document.getElementById(id);
  return element ? JSON.parse(element.textContent) : null;
};
const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
const format = (value) => {
  if (value === null || value === undefined) return "not finite";
  const size = Math.abs(value);
  const text = Number.isInteger(value) ? String(value) : size >= 0.1 ? value.toFixed(size >= 10 ? 2 : 3) : value.toPrecision(3);
  return text.replace(/^-/, "\u2212");
};

// Values under the pointer

function nearestInX(line, x) {
  let low = 0, high = line.x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (line.x[middle] < x) low = middle; else high = middle;
  }
  return Math.abs(line.x[low] - x) <= Math.abs(line.x[high] - x) ? low : high;
}

function addHover(figure, plot) {
  const svg = figure.querySelector("svg");
  const [left, top, right, bottom] = plot.box;
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const tip = make("div", "tip");
  tip.hidden = true;
  figure.append(tip);
  const guide = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [key, value] of [["y1", top], ["y2", bottom], ["stroke", "var(--muted)"], ["stroke-width", 1], ["visibility", "hidden"]]) {
    guide.setAttribute(key, value);
  }
  svg.append(guide);
  const toX = (x) => left + ((x - plot.x[0]) / (plot.x[1] - plot.x[0])) * (right - left);
  const toY = (y) => bottom - ((y - plot.y[0]) / (plot.y[1] - plot.y[0])) * (bottom - top);
  const hide = () => { tip.hidden = true; guide.setAttribute("visibility", "hidden"); };
  const entry = (line, text) => {
    const row = make("div");
    row.append(make("span", `swatch c${line.color}`), document.createTextNode(text));
    return row;
  };
  const byStep = (x) => {
    const lines = plot.lines.filter((line) => line.x.length);
    if (!lines.length) return null;
    const steps = lines.map((line) => line.x[nearestInX(line, x)]);
    const step = steps.reduce((best, other) => (Math.abs(other - x) < Math.abs(best - x) ? other : best));
    const rows = [make("div", "", `${plot.x_name} ${format(step)}`)];
    for (const line of lines) {
      const number = nearestInX(line, step);
      if (line.x[number] !== step) continue;
      rows.push(entry(line, lines.length > 1 ? `${line.label}  ${format(line.y[number])}` : format(line.y[number])));
    }
    return [step, rows];
  };
  const nearest = (px, py) => {
    let best = null;
    for (const line of plot.lines) {
      line.x.forEach((x, number) => {
        if (line.y[number] === null) return;
        const distance = Math.hypot(toX(x) - px, toY(line.y[number]) - py);
        if (!best || distance < best.distance) best = { distance, line, x, y: line.y[number] };
      });
    }
    if (!best || best.distance > 40) return null;
    return [best.x, [entry(best.line, best.line.label), make("div", "", `${plot.x_name} ${format(best.x)}`), make("div", "", `value ${format(best.y)}`)]];
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * width;
    const py = ((event.clientY - box.top) / box.height) * height;
    if (px < left - 6 || px > right + 6) return hide();
    const x = plot.x[0] + ((px - left) / (right - left)) * (plot.x[1] - plot.x[0]);
    const found = plot.nearest ? nearest(px, py) : byStep(x);
    if (!found) return hide();
    tip.replaceChildren(...found[1]);
    tip.hidden = false;
    guide.setAttribute("x1", toX(found[0]));
    guide.setAttribute("x2", toX(found[0]));
    guide.setAttribute("visibility", "visible");
    const at = (toX(found[0]) / width) * box.width;
    const besideLeft = at + tip.offsetWidth + 14 > box.width;
    tip.style.left = `${Math.max(0, besideLeft ? at - tip.offsetWidth - 10 : at + 10)}px`;
    tip.style.top = `${svg.offsetTop + (top / height) * box.height}px`;
  });
  svg.addEventListener("pointerleave", hide);
}

const plots = data("plots") || {};
for (const figure of document.querySelectorAll("figure.plot")) {
  if (plots[figure.id]) addHover(figure, plots[figure.id]);
}

// Tables

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value;
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [one, other] = [key(a), key(b)];
        const order = one !== undefined && other !== undefined
          ? Number(one) - Number(other)
          : one !== undefined ? 1 : other !== undefined ? -1
          : a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", { numeric: true });
        return descending ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// Responses

const PER_PAGE = 10;
const SAME = 0, ADDED = 1;

function setUpResponses(root, samples) {
  const control = (name) => root.querySelector(`[data-control="${name}"]`);
  const list = root.querySelector(".samples");
  const text = (response) => response.segments.filter(([kind]) => kind <= ADDED).map(([, part]) => part).join("");
  const texts = samples.rows.map((row) =>
    [row.prompt, row.target || "", ...Object.values(row.responses).map(text)].join("\n").toLowerCase());
  const differs = samples.rows.map((row) =>
    Object.values(row.responses).some((response) => response.segments.some(([kind]) => kind !== SAME)));
  let page = 0;

  const score = (row, model, metric) => {
    const value = (name) => (row.responses[name] ? row.responses[name].metrics[metric] : undefined);
    if (model !== "difference") return value(model);
    const values = samples.models.map(value).filter((found) => found !== undefined);
    return values.length > 1 ? Math.max(...values) - Math.min(...values) : undefined;
  };

  const body = (className, content) => {
    const element = make("div", className);
    element.dir = "auto";
    if (typeof content === "string") element.textContent = content;
    else for (const part of content) element.append(part);
    return element;
  };

  const segments = (response) => response.segments
    .filter(([kind]) => kind <= ADDED || control("removed").checked)
    .map(([kind, part]) => (kind === SAME || !control("differences").checked ? document.createTextNode(part) : make(kind === ADDED ? "ins" : "del", "", part)));

  const card = (name, color, content, metrics) => {
    const element = make("div", "response");
    const who = make("div", "who");
    if (color !== null) who.append(make("span", `swatch c${color % 8}`));
    who.append(document.createTextNode(name));
    element.append(who, body("body", content));
    if (metrics) {
      const scores = make("div", "scores");
      for (const [key, value] of Object.entries(metrics)) {
        scores.append(make("span", key === control("metric").value ? "chosen" : "", `${key} ${format(value)}`), " ");
      }
      element.append(scores);
    }
    return element;
  };

  const show = () => {
    const words = control("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const model = control("model").value, metric = control("metric").value, order = control("order").value;
    let found = samples.rows.map((row, number) => number)
      .filter((number) => words.every((word) => texts[number].includes(word)))
      .filter((number) => !control("only").checked || differs[number]);
    if (order !== "data") {
      const keys = new Map(found.map((number) => [number, score(samples.rows[number], model, metric)]));
      const sign = order === "descending" ? -1 : 1;
      const missing = found.filter((number) => keys.get(number) === undefined);
      found = found.filter((number) => keys.get(number) !== undefined).sort((a, b) => sign * (keys.get(a) - keys.get(b)));
      found.push(...missing);
    }
    const last = Math.max(0, Math.ceil(found.length / PER_PAGE) - 1);
    page = Math.min(page, last);
    const shown = found.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
    list.replaceChildren(...shown.map((number) => {
      const row = samples.rows[number];
      const sample = make("article", "sample");
      const prompt = make("div", "prompt");
      prompt.append(make("div", "small", `Prompt ${number + 1}`), body("body", row.prompt));
      const responses = make("div", "responses");
      samples.models.forEach((name, index) => {
        const response = row.responses[name];
        if (response) responses.append(card(name === samples.baseline ? `${name} (baseline)` : name, samples.colors[index], segments(response), response.metrics));
      });
      if (row.target !== null) responses.append(card("target", null, row.target, null));
      sample.append(prompt, responses);
      return sample;
    }));
    for (const status of root.querySelectorAll(".pages span")) {
      status.textContent = found.length
        ? `${page * PER_PAGE + 1}\u2013${page * PER_PAGE + shown.length} of ${found.length} prompts`
        : "No prompt matches.";
    }
    for (const button of root.querySelectorAll(".pages button")) {
      button.disabled = button.dataset.move === "-1" ? page === 0 : page >= last;
    }
  };

  for (const name of ["search", "model", "metric", "order", "only", "differences", "removed"]) {
    control(name).addEventListener("input", () => { page = 0; show(); });
  }
  for (const button of root.querySelectorAll(".pages button")) {
    button.addEventListener("click", () => { page += Number(button.dataset.move); show(); list.scrollIntoView({ block: "nearest" }); });
  }
  show();
}

const samples = data("samples");
if (samples && samples.rows.length) setUpResponses(document.getElementById("responses"), samples);

// The section in view, in the table of contents

const links = new Map([...document.querySelectorAll("nav.contents a")].map((link) => [link.hash.slice(1), link]));
const inView = new Set();
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) inView.add(entry.target.id); else inView.delete(entry.target.id);
  const current = [...links.keys()].find((id) => inView.has(id));
  links.forEach((link, id) => link.classList.toggle("current", id === current));
}, { rootMargin: "-10% 0px -60% 0px" });
for (const id of links.keys()) observer.observe(document.getElementById(id));
