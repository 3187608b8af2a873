// The page of `foveate serve`. It sends each question twice: with a method, and with all tokens.
// Whatever comes from the user or the server is inserted as text.

const $ = (id) => document.getElementById(id);
const COSTS = [
  ["visual tokens", (facts) => facts.visual_tokens?.after, (n) => n.toLocaleString("en")],
  ["FLOPs of the LLM’s prefill", (facts) => facts.flops?.prefill, (n) => scaled(n, 1000, ["", " k", " M", " G", " T", " P"])],
  ["KV cache", (facts) => facts.kv_bytes?.now, (n) => scaled(n, 1024, [" B", " KiB", " MiB", " GiB", " TiB"])],
  ["time to first token", (facts) => facts.seconds?.first_token, (n) => scaled(1000 * n, 1000, [" ms", " s"])],
];

let images = []; // {name, url} of each; the url holds the bytes
let methods = [];
let running = null; // what stops the question that is being answered
let asked = []; // what the answers that are shown were asked for
let costs = {}; // what the server says of "plain" and "pruned" when their answers end
let examples = Math.floor(Math.random() * 12);
let waiting = 0; // timer of a change

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const say = (text) => ($("status").textContent = text);
const precise = (n) => Number(n.toPrecision(3)).toLocaleString("en");
const percent = (share) => `${precise(100 * share)}\u00a0%`;
const scaled = (n, step, [unit, ...larger]) =>
  n < step || !larger.length ? precise(n) + unit : scaled(n / step, step, larger);

/** The response to a request. Raises an Error with the server's own words. */
async function send(path, options = {}) {
  const key = $("key").value.trim();
  sessionStorage.setItem("foveate-key", key);
  const headers = new Headers({ "Content-Type": "application/json" });
  if (key) headers.set("Authorization", `Bearer ${key}`);
  const unreachable = () => Promise.reject(new Error("The server cannot be reached."));
  const response = await fetch(path, { ...options, headers }).catch(unreachable);
  if (response.ok) return response;
  if (response.status === 401) $("key-field").hidden = false;
  const wait = response.headers.get("Retry-After");
  const message = wordsOf(await response.text()) || `The server answered ${response.status}.`;
  throw new Error(wait ? `${message} (Try again in ${wait} s.)` : message);
}

/** The message in the body of an error: OpenAI's form, FastAPI's, or plain text. */
function wordsOf(text) {
  try {
    const { error, detail } = JSON.parse(text);
    const message = error?.message ?? error ?? detail;
    return typeof message === "string" ? message : JSON.stringify(message);
  } catch {
    return text.slice(0, 500);
  }
}

/** The data of server-sent events, as text. Raises an Error where the stream has no proper end. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part = {}; !part.done; ) {
    part = await reader.read();
    const lines = (rest + (part.value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield data;
    }
  }
  throw new Error("The server closed the stream before the answer ended.");
}

const question = () => [images, $("question").value.trim(), $("longest").value];
const chosen = () => methods.find(({ slug }) => slug === document.querySelector("#methods :checked")?.value);

/** Ask with the method and, unless `again`, with all tokens. */
async function ask(again) {
  clearTimeout(waiting);
  if (!chosen() || !$("model").textContent) await load();
  if (!$("ask").reportValidity()) return;
  running?.abort();
  const mine = (running = new AbortController());
  const { slug, default_keep } = chosen();
  const fields = JSON.parse($("fields").value || "{}");
  const keep = $("own").checked ? (default_keep ?? undefined) : Number($("keep").value) / 100;
  asked = question();
  $("go").textContent = "Stop";
  $("method-column").textContent = slug;
  begin("pruned", $("own").checked ? `${slug}, as published` : `${slug}, keep ${percent(keep)}`);
  if (!again) {
    begin("plain", "All tokens");
    drawStages([]);
    $("answers").scrollIntoView({ block: "nearest" });
  }
  await answer("pruned", { method: slug, keep, fields, show_kept: true }, mine);
  if (!again && !mine.signal.aborted) await answer("plain", { keep: 1 }, mine);
  if (running !== mine) return;
  running = null;
  $("go").textContent = "Ask";
  const [plain, pruned] = ["plain", "pruned"].map((side) => $(side).querySelector("p").textContent);
  const compared = plain === pruned ? "Both answers are the same." : "The answers differ.";
  say(mine.signal.aborted ? "Stopped." : costs.plain && costs.pruned ? compared : "");
}

function begin(side, name) {
  $(side).querySelector("h2").textContent = name;
  for (const line of $(side).querySelectorAll("p")) line.textContent = "";
  $(side).removeAttribute("aria-busy");
  delete costs[side];
  drawCosts();
}

/** Stream one answer into its card, unless another question takes its place. */
async function answer(side, given, mine) {
  const [text, error, note] = $(side).querySelectorAll("p");
  $(side).setAttribute("aria-busy", "true");
  say(`Asking: ${$(side).querySelector("h2").textContent} …`);
  const [sent, words, longest] = asked;
  const content = sent.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  const messages = [{ role: "user", content: [...content, { type: "text", text: words }] }];
  const limits = { stream: true, temperature: 0, max_tokens: Number(longest) || undefined };
  const body = JSON.stringify({ model: $("model").textContent, messages, ...limits, ...given });
  try {
    const response = await send("v1/chat/completions", { method: "POST", body, signal: mine.signal });
    for await (const data of events(response)) {
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(wordsOf(data));
      const choice = chunk.choices?.[0];
      text.textContent += choice?.delta?.content ?? "";
      if (choice?.finish_reason === "length") note.textContent = `Cut after ${longest} tokens. `;
      costs[side] = chunk.foveate ?? costs[side];
    }
  } catch (problem) {
    if (running === mine && !mine.signal.aborted) error.textContent = problem.message;
  }
  if (running !== mine) return;
  $(side).removeAttribute("aria-busy");
  if (costs[side]) note.textContent += `${precise(costs[side].seconds.total)} s in all.`;
  drawCosts();
  drawStages(costs.pruned?.images ?? []);
}

function drawCosts() {
  const rows = COSTS.map(([title, read, format]) => {
    const [all, now] = [costs.plain, costs.pruned].map((facts) => facts && read(facts));
    const cell = (n) => make("td", {}, n == null ? "–" : format(n));
    const share = make("td", { className: "share" });
    if (all && now != null) {
      const bar = make("i", { className: now > all ? "bar more" : "bar" });
      bar.style.width = `${Math.min(100, (100 * now) / all)}%`;
      share.append(make("span", { className: "track" }, bar), percent(now / all));
    }
    return make("tr", {}, make("th", { scope: "row" }, title), cell(all), cell(now), share);
  });
  $("costs").querySelector("tbody").replaceChildren(...rows);
  $("costs").hidden = !costs.plain && !costs.pruned;
}

function drawStages(shown) {
  const strips = shown.map(({ before, stages }, number) => {
    const { name, url } = asked[0][number] ?? { name: `image ${number + 1}` };
    const panels = stages.map(({ name: where, kept, picture, note = "" }) =>
      figure(picture, where, `${kept} of ${before} tokens, ${percent(kept / before)} ${note}`, `${name}: `));
    return make("div", { className: "strip" }, figure(url, name, `${before} tokens`), ...panels);
  });
  $("stages").replaceChildren(...strips);
}

function figure(url, title, count, of = "") {
  const image = url?.startsWith("data:image/") ? [make("img", { src: url, alt: `${of}${title}, ${count}` })] : [];
  return make("figure", {}, ...image, make("figcaption", {}, make("b", {}, title), count));
}

const read = (file) =>
  new Promise((done, fail) => {
    if (!file.type.startsWith("image/")) throw new Error(`${file.name} is not an image.`);
    const reader = new FileReader();
    reader.onload = () => done({ name: file.name, url: reader.result });
    reader.onerror = () => fail(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });

async function add(files) {
  const tried = await Promise.allSettled([...files].map(read));
  images = [...images, ...tried.flatMap(({ value }) => value ?? [])];
  drawImages();
  say(tried.find(({ reason }) => reason)?.reason.message ?? "");
}

function drawImages() {
  const items = images.map((image) => {
    const remove = make("button", { type: "button", ariaLabel: `Remove ${image.name}` }, "×");
    remove.onclick = () => {
      images = images.filter((other) => other !== image);
      drawImages();
      $("files").focus();
    };
    return make("li", {}, make("img", { src: image.url, alt: "" }), make("span", {}, image.name), remove);
  });
  $("images").replaceChildren(...items);
  $("files").required = !images.length;
}

async function example() {
  const { name, image, question } = await (await send(`example/${examples++}`)).json();
  images = [{ name, url: image }];
  $("question").value = question;
  drawImages();
}

async function load() {
  say("");
  methods = await (await send("v1/methods")).json();
  methods.sort((a, b) => b.works - a.works);
  const rows = methods.map(({ slug, stage, summary, works, why_not }) => {
    const radio = make("input", { type: "radio", name: "method", required: true, value: slug, disabled: !works });
    const where = make("span", { className: `stage ${stage}` }, stage);
    const about = make("span", { className: "note" }, works ? summary : why_not);
    Object.assign(radio, { ariaLabel: slug, ariaDescription: `${stage}: ${about.textContent}` });
    const title = make("span", { className: "line" }, make("b", {}, slug), where);
    return make("label", { className: works ? "" : "off" }, radio, title, about);
  });
  $("methods").replaceChildren(...rows);
  const usual = methods.find(({ slug, works }) => works && slug === "pyramiddrop") ?? methods[0];
  const first = methods.find(({ default: own }) => own) ?? usual;
  const { control, offsetTop } = rows[methods.indexOf(first)];
  control.checked = first.works;
  $("methods").scrollTop = offsetTop;
  const { keep, fields } = first.default ?? {};
  if (keep < 1) $("keep").value = 100 * keep;
  $("own").checked = keep != null && String(keep) === String(first.default_keep);
  $("fields").value = JSON.stringify(fields ?? {}).replace(/^{}$/, "");
  drawChoice();
  $("model").textContent = (await (await send("v1/models")).json()).data[0].id;
  if (!first.works) throw new Error("No method works on this model.");
}

/** What depends on the method and on `keep`. */
function drawChoice() {
  const { slug = "", paper = "", default_keep } = chosen() ?? {};
  const own = [default_keep ?? []].flat().map((n) => (n > 1 ? `${n} tokens` : percent(n)));
  $("chosen").textContent = slug;
  $("own-keep").textContent = own.length ? `as published: ${own.join(", ")}` : "the method decides";
  $("keep").ariaValueText = `${$("keep").value} % of the visual tokens`;
  $("kept").textContent = $("own").checked ? "" : $("keep").ariaValueText;
  const number = /arXiv:(\d{4}\.\d{4,5}(v\d+)?)/.exec(paper)?.[1];
  const href = `https://arxiv.org/abs/${number}`;
  $("paper").replaceChildren(number ? make("a", { href, target: "_blank", rel: "noreferrer" }, paper) : paper);
}

/** Ask again after a change; the answer with all tokens stays if it is to this very question. */
function changed() {
  drawChoice();
  clearTimeout(waiting);
  const same = question().every((part, number) => part === asked[number]);
  if (same) waiting = setTimeout(told(() => ask(Boolean(costs.plain))), 400);
}

const told = (task) => () => task().catch((problem) => say(problem.message));
$("ask").onsubmit = (event) => {
  event.preventDefault();
  running ? running.abort() : told(ask)();
};
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  told(ask)();
};
$("fields").oninput = () => {
  $("fields").setCustomValidity("");
  try {
    JSON.parse($("fields").value || "{}");
  } catch {
    $("fields").setCustomValidity('This is not JSON, such as {"layer": 2}.');
  }
};
$("more").addEventListener("invalid", () => ($("more").open = true), true);
$("filter").oninput = () => {
  const words = $("filter").value.toLowerCase();
  for (const row of $("methods").children) row.hidden = !row.textContent.toLowerCase().includes(words);
};
$("keep").oninput = () => drawChoice(($("own").checked = false));
for (const id of ["methods", "keep", "own", "fields"]) $(id).onchange = changed;
$("methods").oninput = () => $("fields").oninput(($("fields").value = ""));
$("files").onchange = () => add($("files").files).then(() => ($("files").value = ""));
$("example").onclick = told(example);
$("key").onchange = told(load);
document.onpaste = (event) => add(event.clipboardData.files);
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragover");
    if (type === "drop") add(event.dataTransfer.files);
  });
}

$("key").value = sessionStorage.getItem("foveate-key") ?? "";
told(load)();
