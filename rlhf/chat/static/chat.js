"use strict";

// The state of the page is that of the server. All text is inserted as textContent.

const byId = (id) => document.getElementById(id);
let state = null;
let busy = false;

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function showMessage(text) {
  byId("message").textContent = text;
}

async function request(path, content) {
  const options = content === undefined ? {} : {
    method: "POST",
    headers: {"Content-Type": "application/json"},
    body: JSON.stringify(content),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server cannot be reached. Has it been stopped?");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new Error(body.error || `The server has refused the request (${response.status}).`);
  }
  return response;
}

function setBusy(value) {
  busy = value;
  byId("send").hidden = value;
  byId("stop").hidden = !value;
  byId("reset").disabled = value;
  for (const input of document.querySelectorAll("#models input, #settings input")) input.disabled = value;
}

// Settings

function showSettings() {
  const models = byId("models");
  for (const label of models.querySelectorAll("label")) label.remove();
  for (const model of state.models) {
    const label = element("label");
    const box = element("input");
    box.type = "checkbox";
    box.name = model.name;
    box.checked = model.active;
    box.addEventListener("change", changeModels);
    label.append(box, model.name);
    models.append(label);
  }
  for (const input of byId("settings").elements) {
    if (input.name) input.value = input.name === "seed" ? state.seed : state.settings[input.name];
  }
  const files = byId("files");
  files.replaceChildren();
  const describe = (title, text) => {
    const row = element("div");
    row.append(element("dt", "", title), element("dd", "", text));
    files.append(row);
  };
  for (const model of state.models) {
    const kind = model.multi_turn ? "conversation" : "single prompts";
    const size = `${(model.parameters / 1e6).toFixed(1)}M parameters`;
    const note = state.reward_model && !model.scored ? ", no score: the vocabulary differs from that of the reward model" : "";
    describe(model.name, `${model.path}: ${size}, ${kind}${note}`);
  }
  if (state.reward_model) describe("reward model", state.reward_model);
}

async function change(settings) {
  try {
    state = await (await request("/api/settings", settings)).json();
    showMessage("");
  } catch (error) {
    showMessage(error.message);
  }
  showSettings();
}

function changeModels() {
  const boxes = [...document.querySelectorAll("#models input")];
  change({active: boxes.filter((box) => box.checked).map((box) => box.name)});
}

byId("settings").addEventListener("change", (event) => {
  const input = event.target;
  if (input.reportValidity()) change({[input.name]: input.valueAsNumber});
});
byId("settings").addEventListener("submit", (event) => event.preventDefault());

// Turns

function fillResponse(card, response) {
  card.classList.toggle("best", response.best);
  const text = card.querySelector(".text");
  text.textContent = response.error || response.text;
  text.classList.toggle("error", Boolean(response.error));
  const status = card.querySelector(".status");
  const parts = [];
  if (response.reward !== null) parts.push(element("span", "score", `score ${response.reward.toFixed(2)}`));
  parts.push(element("span", "", `${response.tokens} token${response.tokens === 1 ? "" : "s"}`));
  if (response.state === "truncated") parts.push(element("span", "note", "cut at max. new tokens"));
  if (response.state === "stopped" || response.state === "failed") parts.push(element("span", "note", response.state));
  if (response.prompt_tokens !== null) {
    parts.push(element("span", "note", `prompt cut to its last ${response.prompt_tokens} tokens`));
  }
  status.replaceChildren(...parts.flatMap((part, index) => (index ? [", ", part] : [part])));
}

function makeTurn(turn) {
  const section = element("section", "turn");
  const prompt = element("p", "prompt", turn.prompt);
  prompt.dir = "auto";
  prompt.title = `seed ${turn.seed}`;
  const responses = element("div", "responses");
  for (const response of turn.responses) {
    const card = element("article", "response");
    const text = element("p", "text");
    text.dir = "auto";
    card.append(element("h2", "", response.model), text, element("p", "status"));
    responses.append(card);
  }
  section.append(prompt, responses);
  fillTurn(section, turn);
  return section;
}

function fillTurn(section, turn) {
  const cards = section.querySelectorAll(".response");
  turn.responses.forEach((response, index) => fillResponse(cards[index], response));
}

function appendTurn(turn) {
  const turns = byId("turns");
  if (turns.dataset.conversation && Number(turns.dataset.conversation) !== turn.conversation) {
    turns.append(element("p", "divider", "New conversation"));
  }
  turns.querySelector(".empty")?.remove();
  turns.dataset.conversation = turn.conversation;
  const section = makeTurn(turn);
  turns.append(section);
  return section;
}

function showTurns() {
  const turns = byId("turns");
  turns.replaceChildren();
  delete turns.dataset.conversation;
  if (!state.turns.length) {
    const kind = state.models.some((model) => model.multi_turn)
      ? "Models marked as conversation get the earlier messages with each prompt."
      : "Each prompt is a separate one: these models were trained on single prompts.";
    turns.append(element("p", "empty", `All models respond to the same prompt. ${kind}`));
  }
  state.turns.forEach(appendTurn);
  turns.scrollTop = turns.scrollHeight;
}

async function* linesOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, {stream: true})).split("\n");
    rest = lines.pop();
    yield* lines;
  }
}

// Show the responses that another page has asked for, and offer to stop them.
async function follow() {
  state = await (await request("/api/state")).json();
  setBusy(state.running);
  showTurns();
  while (state.running) {
    await new Promise((resolve) => setTimeout(resolve, 500));
    state = await (await request("/api/state")).json();
    showTurns();
  }
  showSettings();
}

async function ask(prompt) {
  const turns = byId("turns");
  setBusy(true);
  showMessage("");
  try {
    const response = await request("/api/ask", {prompt});
    byId("prompt").value = "";
    let section = null;
    for await (const line of linesOf(response)) {
      const turn = JSON.parse(line);
      const atEnd = !section || turns.scrollHeight - turns.scrollTop - turns.clientHeight < 80;
      if (section) fillTurn(section, turn);
      else section = appendTurn(turn);
      if (atEnd) turns.scrollTop = turns.scrollHeight;
    }
    state = await (await request("/api/state")).json();
    showSettings();
  } catch (error) {
    showMessage(error.message);
    await follow().catch(() => {});
  }
  setBusy(false);
  byId("prompt").focus();
}

function stop() {
  if (busy) request("/api/stop", {}).catch((error) => showMessage(error.message));
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = byId("prompt").value;
  if (!busy && prompt.trim()) ask(prompt);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
byId("stop").addEventListener("click", stop);
byId("reset").addEventListener("click", async () => {
  try {
    state = await (await request("/api/reset", {})).json();
    const turns = byId("turns");
    if (turns.dataset.conversation) turns.append(element("p", "divider", "New conversation"));
    turns.dataset.conversation = state.conversation;
    turns.scrollTop = turns.scrollHeight;
  } catch (error) {
    showMessage(error.message);
  }
});

follow().catch((error) => showMessage(error.message)).then(() => setBusy(false));
