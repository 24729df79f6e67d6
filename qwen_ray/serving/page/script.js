"use strict";
// Texts of models and knowledge bases are put in as text, never as HTML. The key stays in its field.

const find = (id) => document.getElementById(id);
const PRESELECTED = 4;
let running = null; // AbortController of the question being answered

function headers() {
  const key = find("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function notice(text) {
  find("notice").textContent = text;
  find("notice").hidden = !text;
}

async function failure(reply) {
  if (reply.status === 401) {
    find("key-row").hidden = false;
    return "This server asks for an API key.";
  }
  const message = await reply.json().then((body) => body.error.message, () => reply.statusText);
  const wait = reply.headers.get("Retry-After");
  return wait ? `${message} Try again in ${wait} s.` : message;
}

// ---------------------------------------------------------------- what is served

async function listModels() {
  const box = find("models");
  const legend = box.querySelector("legend");
  let reply;
  try {
    reply = await fetch("v1/models", { headers: headers() });
  } catch {
    notice("The server does not answer.");
    return;
  }
  if (!reply.ok) {
    notice(await failure(reply));
    box.replaceChildren(legend);
    return;
  }
  notice("");
  const chosen = new Set([...box.querySelectorAll("input:checked")].map((input) => input.value));
  const all = (await reply.json()).data.filter((model) => !model.embeddings).map((model) => model.id);
  const ids = all.filter((id) => !id.includes("@")).concat(all.filter((id) => id.includes("@")));
  const kinds = new Set();
  box.replaceChildren(legend, ...ids.map((id) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "checkbox", value: id });
    // At first one of each kind: base, adapter, retrieval, router.
    const kind = `${id.includes(":auto") ? "auto" : id.includes(":") ? "adapter" : "base"}${id.endsWith("+rag")}`;
    const one = !id.includes("@") && !kinds.has(kind) && kinds.size < PRESELECTED;
    if (one) kinds.add(kind);
    input.checked = chosen.size ? chosen.has(id) : one;
    label.append(input, id);
    return label;
  }));
}

// ---------------------------------------------------------------- one column

function makeCard(model, body) {
  const card = find("card").content.firstElementChild.cloneNode(true);
  const part = (name) => card.querySelector(name);
  card.setAttribute("aria-label", model);
  card.setAttribute("aria-busy", "true");
  part("h2").textContent = model;
  const data = JSON.stringify({ ...body, stream: undefined, stream_options: undefined });
  const command = [
    `curl ${new URL("v1/chat/completions", location.href)}`,
    "-H 'Content-Type: application/json'",
    ...(find("key").value ? ["-H \"Authorization: Bearer $QWEN_RAY_API_KEY\""] : []),
    `-d '${data.replaceAll("'", "'\\''")}'`,
  ].join(" \\\n  ");
  part(".request pre").textContent = command;
  part(".request button").addEventListener("click", async (event) => {
    try {
      await navigator.clipboard.writeText(command);
      event.target.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(part(".request pre")); // no clipboard without https: to copy by hand
    }
  });
  return { card, part };
}

function showOrigin(part, about) {
  const { adapter, route, citations } = about;
  const said = [adapter ? `adapter ${adapter}` : "base model"];
  if (route) said.push(route.domain ? `routed as ${route.domain} (${route.score})` : "the router abstained");
  part(".by").textContent = said.join(" · ");
  if (!citations) return;
  const count = citations.length;
  part(".sources summary").textContent = count ? `Read ${count} passage${count > 1 ? "s" : ""}` : "Read no passage";
  part(".sources").hidden = false;
  part(".sources ol").replaceChildren(...citations.map((citation) => {
    const item = document.createElement("li");
    const origin = document.createElement("small");
    const { title, source, license, knowledge_base: base, version } = citation;
    origin.textContent = [title, source, license, `${base}@${version}`].filter(Boolean).join(" · ");
    item.append(citation.text, origin);
    return item;
  }));
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function answer({ card, part }, body, signal) {
  const began = performance.now();
  const seconds = () => ((performance.now() - began) / 1000).toFixed(2);
  const figures = [];
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal,
    });
    if (!reply.ok) throw new Error(await failure(reply));
    let usage = null;
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.qwen_ray) showOrigin(part, event.qwen_ray.prompts[0]);
      const text = event.choices[0]?.delta.content;
      if (text) {
        if (!figures.length) figures.push(`first token ${seconds()} s`);
        part(".text").append(text);
      }
      usage = event.usage ?? usage;
    }
    figures.push(`all ${seconds()} s`);
    if (usage) figures.push(`${usage.prompt_tokens} tokens read, ${usage.completion_tokens} written`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    const lost = error instanceof TypeError; // what fetch throws where there is no connection
    part(".error").textContent = stopped ? "Stopped." : lost ? "The connection was lost." : error.message;
    part(".error").hidden = false;
  }
  part(".figures").textContent = figures.join(" · ");
  card.setAttribute("aria-busy", "false");
}

// ---------------------------------------------------------------- asking

async function ask(event) {
  event.preventDefault();
  const chosen = [...find("models").querySelectorAll("input:checked")].map((input) => input.value);
  if (!chosen.length) {
    notice("Choose at least one model.");
    return;
  }
  notice("");
  running?.abort();
  const mine = running = new AbortController();
  find("stop").disabled = false;
  find("status").textContent = "Answering";
  const columns = chosen.map((model) => {
    const body = {
      model,
      messages: [{ role: "user", content: find("question").value.trim() }],
      temperature: Number(find("temperature").value),
      max_tokens: Number(find("tokens").value),
      stream: true,
      stream_options: { include_usage: true },
    };
    return { body, ...makeCard(model, body) };
  });
  find("answers").replaceChildren(...columns.map((column) => column.card));
  await Promise.all(columns.map((column) => answer(column, column.body, mine.signal)));
  if (running !== mine) return;
  running = null;
  find("stop").disabled = true;
  find("status").textContent = "All answers are here";
}

find("ask").addEventListener("submit", ask);
find("stop").addEventListener("click", () => running?.abort());
find("key").addEventListener("change", listModels);
find("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("ask").requestSubmit();
});
listModels();
