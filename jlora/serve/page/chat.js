"use strict";
// Each side has its own conversation with its own model: what the other one said is not in it.
const setup = JSON.parse(document.getElementById("setup").textContent);
const at = (id) => document.getElementById(id);
const sides = ["left", "right"];
const histories = { left: [], right: [] };
let running = null; // an AbortController while answers come

const adapters = setup.voices.filter((voice) => !voice.base);
at("right").value = adapters.length ? adapters[0].name : "";

function made(template, parent) {
  parent.append(at(template).content.cloneNode(true));
  return parent.lastElementChild;
}

function options(voice, history) {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const common = {
    model: voice.name, stream: true, stream_options: { include_usage: true }, temperature: number("temperature"),
    top_p: number("top_p"), seed: number("seed"),
  };
  const limit = number("max_tokens");
  if (!voice.chats) return ["/v1/completions", { ...common, prompt: history[history.length - 1].content, max_tokens: limit ?? 64 }];
  const system = at("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...history] : history;
  return ["/v1/chat/completions", { ...common, messages, max_completion_tokens: limit }];
}

// The events of a stream of server-sent ones, each the JSON of a line "data: ...".
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    for (let end; (end = held.indexOf("\n\n")) >= 0; held = held.slice(end + 2)) {
      const data = held.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(path, fields, signal) {
  const headers = { "Content-Type": "application/json" };
  if (setup.needs_key) headers.Authorization = `Bearer ${at("key").value}`;
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(fields), signal });
  if (response.ok) return events(response.body);
  let said = `The server answered with status ${response.status}.`;
  try { said = (await response.json()).error.message; } catch { /* no words of its own */ }
  throw new Error(said);
}

function figures(place, began, first, tokens) {
  if (!tokens || !first) return;
  const seconds = (performance.now() - first) / 1000;
  const speed = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} a second` : "";
  place.textContent = `${tokens} tokens${speed}; the first after ${((first - began) / 1000).toFixed(2)} s`;
}

async function answer(side, voice, place, signal) {
  const history = histories[side], text = place.querySelector(".text"), began = performance.now();
  let said = "", first = 0, tokens = 0, finish = "";
  try {
    for await (const event of await ask(...options(voice, history), signal)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      const piece = choice ? (choice.delta ? choice.delta.content : choice.text) : "";
      if (piece) {
        first = first || performance.now();
        said += piece;
        text.append(piece);
        follow();
      }
      if (choice && choice.finish_reason) finish = choice.finish_reason;
      if (event.usage) tokens = event.usage.completion_tokens;
    }
  } catch (error) {
    const stopped = error.name === "AbortError";
    const notice = document.createElement("p");
    notice.className = stopped ? "muted" : "notice";
    notice.textContent = stopped ? "(stopped)" : error instanceof TypeError ? "The server cannot be reached." : error.message;
    place.querySelector(".text").after(notice);
    if (!stopped) notice.setAttribute("role", "alert");
  }
  place.setAttribute("aria-busy", "false");
  figures(place.querySelector(".figures"), began, first, tokens);
  if (finish === "length") place.querySelector(".figures").append(" (cut here: no more tokens)");
  // A turn without an answer is taken back, so that roles go on alternating.
  if (said) history.push({ role: "assistant", content: said });
  else history.pop();
}

// Keeps the newest words in sight of whoever is at the end of the page.
let below = true;
addEventListener("scroll", () => { below = innerHeight + scrollY >= document.body.scrollHeight - 80; }, { passive: true });
function follow() { if (below) scrollTo(0, document.body.scrollHeight); }

function busy(now) {
  at("send").disabled = at("anew").disabled = now;
  at("stop").disabled = !now;
  at("state").textContent = now ? "Answers are coming." : "The answers are there.";
}

async function send() {
  const question = at("question").value.trim();
  if (running || !question || !at("composer").reportValidity()) return;
  at("question").value = "";
  const turn = made("turn", at("talk"));
  turn.querySelector(".question").textContent = question;
  running = new AbortController();
  busy(true);
  below = true;
  const waiting = sides.filter((side) => at(side).value).map((side) => {
    const voice = setup.voices.find((one) => one.name === at(side).value);
    const place = made("answer", turn.querySelector(".answers"));
    place.querySelector("h3").textContent = voice.name + (voice.base ? " (base)" : "");
    histories[side].push({ role: "user", content: question });
    return answer(side, voice, place, running.signal);
  });
  follow();
  await Promise.all(waiting);
  running = null;
  busy(false);
  follow();
  at("question").focus();
}

at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
at("stop").addEventListener("click", () => running && running.abort());
at("anew").addEventListener("click", () => {
  at("talk").replaceChildren();
  for (const side of sides) histories[side] = [];
  at("question").focus();
});
at("question").focus();
