"use strict";
const percent = (logprob) => (100 * Math.exp(logprob)).toFixed(1) + " %";
const shown = (text) => JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "\u2423");
let spans = [], routed = 0, numExperts = 1;

// A token that is part of a character comes as its bytes, bytes:\xe2\x82.
function bytesOf(token) {
  if (!token.startsWith("bytes:")) return new TextEncoder().encode(token);
  return Uint8Array.from(token.slice(6).split("\\x").slice(1), (two) => parseInt(two, 16));
}

function addTokens({ logprobs, experts = [] }, decoder) {
  logprobs.tokens.forEach((token, place) => {
    const logprob = logprobs.token_logprobs[place];
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = decoder.decode(bytesOf(token), { stream: true });
    span.style.backgroundColor = `hsl(var(--shade) / ${0.45 * (1 - Math.exp(logprob))})`;
    span.chosen = [token, logprob];
    span.others = Object.entries(logprobs.top_logprobs[place]);
    at("answer").append(span);
    spans.push(span);
  });
  // A token goes through the model one step after it is chosen; the last one may not at all.
  for (const layers of experts) {
    spans[routed++].experts = layers;
    numExperts = Math.max(numExperts, 1 + Math.max(...layers.flat()));
  }
}

// A column for each layer, a row for each expert.
function drawExperts(layers) {
  const canvas = at("tip").querySelector("canvas"), pen = canvas.getContext("2d");
  const wide = Math.max(3, Math.min(14, Math.floor(360 / layers.length))), high = 7;
  canvas.width = wide * layers.length;
  canvas.height = high * numExperts;
  const color = getComputedStyle(canvas).color;
  layers.forEach((chosen, layer) => {
    for (let expert = 0; expert < numExperts; expert++) {
      const place = chosen.indexOf(expert);
      pen.globalAlpha = place < 0 ? 0.12 : 1 - (0.5 * place) / chosen.length;
      pen.fillStyle = color;
      pen.fillRect(layer * wide, expert * high, wide - 1, high - 1);
    }
  });
}

function showTip(event) {
  const span = event.target.closest(".token");
  at("tip").style.display = span ? "block" : "none";
  if (!span) return;
  const rows = span.others.some(([token]) => token === span.chosen[0]) ? span.others : [span.chosen, ...span.others];
  at("routes").hidden = !span.experts;
  if (span.experts) drawExperts(span.experts);
  at("tip").firstElementChild.replaceChildren(...rows.map(([token, logprob]) => {
    const row = document.createElement("tr");
    if (token === span.chosen[0]) row.className = "chosen";
    row.append(...[shown(token), percent(logprob)].map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return row;
  }));
  const { width, height } = at("tip").getBoundingClientRect();
  const below = event.clientY + 18 + height < innerHeight;
  at("tip").style.left = Math.max(4, Math.min(event.clientX + 8, innerWidth - width - 8)) + "px";
  at("tip").style.top = (below ? event.clientY + 18 : event.clientY - height - 12) + "px";
}

async function go() {
  if (!model) await findModel();
  const body = { ...sampling(), prompt: at("prompt").value, logprobs: 5, experts: true };
  const prompt = document.createElement("span");
  prompt.className = "prompt";
  prompt.textContent = body.prompt;
  at("answer").replaceChildren(prompt);
  [spans, routed, numExperts] = [[], 0, 1];
  say("completion", "waiting for the first token");
  const began = performance.now(), decoder = new TextDecoder();
  let response = await post("v1/completions", body);
  if (!response.ok) {
    const error = await problem(response);
    if (error.param !== "experts") throw new Error(error.message);
    body.experts = false;  // this server has none to show
    response = await post("v1/completions", body);
    if (!response.ok) throw new Error((await problem(response)).message);
  }
  await follow("completion", response, began, (choice) => {
    if (!choice.logprobs) return 0;
    addTokens(choice, decoder);
    return choice.logprobs.tokens.length;
  });
}

whenSent(at("form"), go, (error) => {
  if (error.name === "AbortError") say("completion", "stopped"); else say("completion", error.message, true);
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
at("answer").addEventListener("mousemove", showTip);
at("answer").addEventListener("mouseleave", () => { at("tip").style.display = "none"; });
findModel().catch((error) => say("completion", error.message, true));
