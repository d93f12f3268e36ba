"use strict";
const at = (id) => document.getElementById(id);
let model = "", leaving = null;

const headers = () => {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
};

function say(panel, text, isError = false) {
  const status = at(panel).querySelector(".status");
  status.textContent = text;
  status.classList.toggle("error", isError);
}

async function problem(response) {
  try { return (await response.json()).error; } catch { return { message: `The server answers ${response.status}.` }; }
}

// The panel of this name; the settings go along.
function show(panel) {
  for (const tab of at("tabs").children) {
    const selected = tab.dataset.panel === panel;
    tab.setAttribute("aria-selected", selected);
    at(tab.dataset.panel).hidden = !selected;
    if (selected) at(panel).querySelector(".settings").append(at("settings"));
  }
  at(panel).querySelector("textarea").focus();
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    at("key_label").hidden = false;
    throw new Error("This server asks for an API key.");
  }
  if (!response.ok) throw new Error((await problem(response)).message);
  const [card] = (await response.json()).data;
  model = card.id;
  at("model").textContent = model;
  if (card.capabilities.completion_chat && at("tabs").hidden) {
    at("tabs").hidden = false;
    show(at("prompt").value ? "completion" : "chat");
  }
}

function sampling() {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  for (const name of ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"])
    if (at(name).value !== "") body[name] = Number(at(name).value);
  if (at("stop").value) body.stop = at("stop").value;
  return body;
}

// The response of a stream that can be halted.
async function post(path, body) {
  leaving = new AbortController();
  return fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: leaving.signal });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (pending + value).split("\n\n");
    pending = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice(6));
  }
}

// Takes each choice of a stream, and tells tokens, speed and end. `take` returns a choice's number of tokens.
async function follow(panel, response, began, take) {
  let count = 0, first = 0, ended = "";
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) count = event.usage.completion_tokens;
    for (const choice of event.choices) {
      first ||= performance.now();
      ended = choice.finish_reason || ended;
      count += take(choice);
    }
    const seconds = (performance.now() - (first || began)) / 1000;
    const pace = count > 1 ? `${((count - 1) / seconds).toFixed(1)} a second, ` : "";
    say(panel, `${count} tokens, ${pace}the first after ` +
      `${((first - began) / 1000).toFixed(2)} s${ended && (ended === "stop" ? "; ended by itself" : "; as long as was asked")}`);
  }
}

// Runs `work` when the form is sent; meanwhile only Stop can be pressed. `failed` gets what goes wrong.
function whenSent(form, work, failed) {
  const [go, halt] = [form.querySelector(".go"), form.querySelector(".halt")];
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (go.disabled) return;
    [go.disabled, halt.disabled] = [true, false];
    try { await work(); } catch (error) { failed(error); }
    [go.disabled, halt.disabled] = [false, true];
  });
  halt.addEventListener("click", () => leaving && leaving.abort());
}

at("tabs").addEventListener("click", (event) => event.target.dataset.panel && show(event.target.dataset.panel));
at("key").addEventListener("change", () => findModel().then(() => say("completion", ""), (error) => say("completion", error.message, true)));
