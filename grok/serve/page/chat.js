"use strict";
let messages = [];  // of the conversation so far, as they are sent

// Adds a message to what is shown, as text, whatever is in it.
function showMessage(role, text) {
  const shownMessage = document.createElement("div");
  shownMessage.className = `message ${role}`;
  shownMessage.textContent = text;
  const log = at("log");
  log.append(shownMessage);
  log.scrollTop = log.scrollHeight;
  return shownMessage;
}

async function chat() {
  const line = at("line").value;
  if (!line.trim()) return;
  if (!model) await findModel();
  at("reset").disabled = false;
  if (!messages.length && at("system").value) {
    messages.push({ role: "system", content: at("system").value });
    showMessage("system", at("system").value);
  }
  const before = messages;
  const asked = showMessage("user", line), answered = showMessage("assistant waiting", "");
  at("line").value = "";
  const conversation = [...messages, { role: "user", content: line }];
  say("chat", "waiting for the first token");
  try {
    await answer(conversation, answered);
  } catch (error) {
    if (messages !== before) return;  // a new conversation has begun
    say("chat", error.name === "AbortError" ? "stopped" : "");
    if (!answered.textContent) {  // nothing to go on from: the line can be sent again
      asked.remove();
      answered.remove();
      at("line").value ||= line;
    }
    if (error.name !== "AbortError") throw error;
  } finally {
    answered.classList.remove("waiting");
    if (messages === before && asked.isConnected)
      messages = [...conversation, { role: "assistant", content: answered.textContent }];
    at("line").focus();
  }
}

async function answer(conversation, answered) {
  const began = performance.now(), log = at("log");
  const response = await post("v1/chat/completions", { ...sampling(), messages: conversation, logprobs: true });
  if (!response.ok) throw new Error((await problem(response)).message);
  await follow("chat", response, began, ({ delta, logprobs }) => {
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    answered.textContent += delta.content;
    if (atEnd) log.scrollTop = log.scrollHeight;
    return logprobs ? logprobs.content.length : 0;
  });
}

function reset() {
  if (leaving) leaving.abort();
  messages = [];
  at("log").replaceChildren();
  at("reset").disabled = true;
  say("chat", "");
  at("line").focus();
}

whenSent(at("chat_form"), chat, (error) => {
  showMessage("error", error.message);
  if (!at("key_label").hidden && !at("key").value) at("more").open = true;
});
at("reset").addEventListener("click", reset);
at("line").addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    at("chat_form").requestSubmit();
  }
  const lines = messages.filter(({ role }) => role === "user");
  if (event.key === "ArrowUp" && !at("line").value && lines.length) {
    event.preventDefault();
    at("line").value = lines.at(-1).content;
  }
});
