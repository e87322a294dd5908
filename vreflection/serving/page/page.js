"use strict";
// Everything stays between this page and the server it came from.
const $ = (id) => document.getElementById(id);
// Perceived lightness rises evenly; the package's figures use the same ramp.
const RAMP = [
  [90, 32, 171], [119, 30, 170], [147, 28, 163], [175, 25, 150], [200, 22, 132], [223, 25, 109], [240, 45, 88], [249, 70, 78],
  [255, 92, 67], [255, 112, 60], [255, 132, 55], [255, 152, 53], [255, 172, 56], [255, 192, 70], [255, 211, 90], [255, 230, 114],
  [255, 247, 139],
];
const state = { image: null, url: null, box: null, kept: null, running: new Set(), cards: new Set(), model: null, maps: false };

function colour(strength) {
  const at = Math.min(Math.max(strength, 0), 1) * (RAMP.length - 1);
  const low = Math.floor(at);
  const high = Math.min(low + 1, RAMP.length - 1);
  return RAMP[low].map((value, i) => Math.round(value + (RAMP[high][i] - value) * (at - low)));
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function percent(share) {
  return (100 * share).toFixed(1) + " %";
}

// The image and its box

function size(canvas, image) {
  const longest = Math.max(image.naturalWidth, image.naturalHeight);
  const scale = Math.min(1, 1024 / longest) || 1;
  canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
}

function outline(context, box, width, height) {
  if (!box) return;
  const [x0, y0, x1, y1] = box;
  for (const [style, line] of [["#000", 5], ["#fff", 2.5]]) {
    context.strokeStyle = style;
    context.lineWidth = line * Math.max(1, width / 400);
    context.strokeRect(x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height);
  }
}

function drawPicture() {
  const canvas = $("picture");
  const there = state.image !== null;
  for (const [id, shown] of [["picture", there], ["remove", there], ["boxfield", there], ["hint", !there]]) $(id).hidden = !shown;
  if (!there) return;
  size(canvas, state.image);
  const context = canvas.getContext("2d");
  context.drawImage(state.image, 0, 0, canvas.width, canvas.height);
  outline(context, state.box, canvas.width, canvas.height);
}

function setBox(box) {
  state.box = box;
  ["x0", "y0", "x1", "y1"].forEach((id, i) => {
    if (document.activeElement !== $(id)) $(id).value = box ? Math.round(1000 * box[i]) / 10 : "";
  });
  drawPicture();
  state.cards.forEach((card) => card.draw());
}

function typedBox() {
  const values = ["x0", "y0", "x1", "y1"].map((id) => ($(id).value === "" ? NaN : Number($(id).value) / 100));
  const wrong = values.some((value) => !(value >= 0 && value <= 1)) || values[0] >= values[2] || values[1] >= values[3];
  for (const id of ["x0", "y0", "x1", "y1"]) $(id).setAttribute("aria-invalid", wrong);
  if (!wrong) setBox(values);
}

function openImage(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("This file is not an image the browser can show; choose a PNG, JPEG or WebP."));
    image.src = url;
  });
}

async function setImage(url, box = null) {
  state.wanted = url;
  try {
    const image = await openImage(url);
    if (state.wanted !== url) return;  // another one was chosen meanwhile
    state.image = image;
    state.url = url;
    fail("");
    setBox(box);
  } catch (error) {
    fail(error.message);
  }
}

function readFile(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => setImage(reader.result);
  reader.onerror = () => fail("The file could not be read.");
  reader.readAsDataURL(file);
}

function listenToImage() {
  const drop = $("drop");
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => { event.preventDefault(); readFile(event.dataTransfer.files[0]); });
  // Beside the zone the browser would leave this page for the file.
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) { event.preventDefault(); readFile(file); }
  });
  $("file").addEventListener("change", () => { readFile($("file").files[0]); $("file").value = ""; });
  $("remove").addEventListener("click", () => { state.image = state.url = null; setBox(null); $("file").focus(); });
  $("nobox").addEventListener("click", () => setBox(null));
  for (const id of ["x0", "y0", "x1", "y1"]) $(id).addEventListener("input", typedBox);
  const canvas = $("picture");
  let from = null;
  const place = (event) => {
    const area = canvas.getBoundingClientRect();
    const clamp = (value) => Math.min(Math.max(value, 0), 1);
    return [clamp((event.clientX - area.left) / area.width), clamp((event.clientY - area.top) / area.height)];
  };
  canvas.addEventListener("pointerdown", (event) => { from = place(event); canvas.setPointerCapture(event.pointerId); });
  let drawn = null;  // what the next frame will show: a mouse moves more often than a large picture can be drawn
  const show = () => { if (drawn) setBox(drawn); drawn = null; };
  canvas.addEventListener("pointermove", (event) => {
    if (!from) return;
    const to = place(event);
    const box = [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
    if (box[2] - box[0] <= 0.01 || box[3] - box[1] <= 0.01) return;
    if (!drawn) requestAnimationFrame(show);
    drawn = box;
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => { show(); from = null; });
}

// One answer

class Card {
  constructor(title, question, image, url) {
    this.whole = false;
    this.element = $("card").content.firstElementChild.cloneNode(true);
    this.image = image;
    this.url = url;
    this.question = question;
    this.maps = null;
    this.hidden = null;
    this.timer = null;
    this.text = "";
    this.part = (name) => this.element.querySelector(name);
    this.part("h2").textContent = title;
    this.part(".asked").textContent = question;
    this.slider = this.part("input");
    this.slider.addEventListener("input", () => { clearInterval(this.timer); this.draw(); });
    this.part(".keep").addEventListener("click", () => keep(this));
    $("answers").prepend(this.element);
    state.cards.add(this);
  }

  progress(words) { this.part(".progress").textContent = words; }

  add(piece) {
    const shown = this.text ? piece : piece.trimStart();
    this.text += shown;
    // New text nodes only: a screen reader says what is new, not the whole answer again.
    if (shown) this.part(".answer").append(shown);
  }

  looks(latent) {
    if (latent.hidden) {
      this.hidden = latent.hidden;
      this.part(".keep").hidden = false;
    }
    const maps = latent.maps && latent.maps.images && latent.maps.images[0];
    if (!maps || !maps.steps.length || !this.image) {
      if (latent.maps) this.part(".nolooks").textContent = "This answer opened no latent span: there is no look to show.";
      return;
    }
    this.maps = maps;
    this.most = Math.max(...maps.steps.map((step) => Math.max(...step)));
    this.mean = maps.steps[0].map((_, i) => maps.steps.reduce((sum, step) => sum + step[i], 0) / maps.steps.length);
    this.part(".source").textContent = latent.maps.source === "student"
      ? "Attention of the student's probes." : "Attention of the language model, mean over layers and heads.";
    this.part(".most").textContent = percent(this.most) + " per token";
    this.slider.max = maps.steps.length;
    this.part("figure").hidden = false;
    const ramp = this.part(".ramp").getContext("2d");
    for (let x = 0; x < 160; x++) {
      ramp.fillStyle = `rgb(${colour(x / 159).join(",")})`;
      ramp.fillRect(x, 0, 1, 10);
    }
    this.play();
  }

  play() {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.slider.value = still ? 0 : 1;
    this.draw();
    if (still) return;
    this.timer = setInterval(() => {
      const next = Number(this.slider.value) + 1;
      if (next > this.maps.steps.length) { clearInterval(this.timer); return; }
      this.slider.value = next;
      this.draw();
    }, 350);
  }

  share(map) {
    const [h, w] = this.maps.grid;
    const [x0, y0, x1, y1] = state.box;
    let sum = 0;  // tokens that the box touches
    for (let row = Math.floor(y0 * h); row < Math.ceil(y1 * h); row++) {
      for (let column = Math.floor(x0 * w); column < Math.ceil(x1 * w); column++) sum += map[row * w + column];
    }
    return sum;
  }

  draw() {
    if (!this.maps) return;
    const step = Number(this.slider.value);
    const map = step ? this.maps.steps[step - 1] : this.mean;
    const name = step ? `latent step ${step} of ${this.maps.steps.length}` : "mean of all latent steps";
    this.part(".which").textContent = name;
    this.slider.setAttribute("aria-valuetext", name);
    const canvas = this.part(".look");
    size(canvas, this.image);
    const context = canvas.getContext("2d");
    const [h, w] = this.maps.grid;
    context.filter = "grayscale(0.7)";
    context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    context.filter = "none";
    context.fillStyle = "rgba(0, 0, 0, 0.4)";
    context.fillRect(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < map.length; i++) {
      const strength = map[i] / this.most;
      if (strength < 0.02) continue;
      context.fillStyle = `rgba(${colour(strength).join(",")}, ${(0.25 + 0.67 * strength).toFixed(3)})`;
      const x = Math.round((i % w) * canvas.width / w);
      const y = Math.round(Math.floor(i / w) * canvas.height / h);
      const right = Math.round((i % w + 1) * canvas.width / w);
      const bottom = Math.round((Math.floor(i / w) + 1) * canvas.height / h);
      context.fillRect(x, y, right - x, bottom - y);
    }
    const own = this.url === state.url && state.box;
    outline(context, own ? state.box : null, canvas.width, canvas.height);
    const inside = own ? `${percent(this.share(map))} of this attention is in the box (mean of all steps ${percent(this.share(this.mean))}).` : "";
    this.part(".inside").textContent = inside;
    canvas.setAttribute("aria-label", `Attention at ${name}. ${inside}`);
  }
}

// Asking

async function ask(title, question, latent) {
  const card = new Card(title, question, state.image, state.url);
  const aborter = new AbortController();
  state.running.add(aborter);
  busy();
  card.progress("waiting …");
  const content = [{ type: "text", text: question }];
  if (state.url) content.unshift({ type: "image_url", image_url: { url: state.url } });
  const body = {
    model: state.model.id, messages: [{ role: "user", content }], stream: true, stream_options: { include_usage: true },
    max_tokens: Number($("tokens").value) || 128, latent,
  };
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  try {
    const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal: aborter.signal });
    if (!response.ok) throw new Error(await refusal(response));
    await follow(response, card);
  } catch (error) {
    card.progress(error.name === "AbortError" ? "stopped" : "failed");
    if (error.name !== "AbortError") {
      fail(error instanceof TypeError ? await silence() : error.message);
      if (!card.text) { card.element.remove(); state.cards.delete(card); }
    }
  } finally {
    state.running.delete(aborter);
    busy();
  }
}

async function refusal(response) {
  let told;
  try { told = (await response.json()).error.message; } catch { told = ""; }
  if (response.status === 401) {
    $("keyline").hidden = false;
    $("key").focus();
    return $("key").value ? "The server does not take this API key." : "This server asks for an API key.";
  }
  if (response.status === 429) return `The server is busy: ${told}`;
  return told || `The server answered with status ${response.status}.`;
}

// A refused upload and a server that is gone look the same to fetch.
async function silence() {
  try {
    await fetch("/health");
    return "The server closed the connection; the image may be larger than it takes.";
  } catch {
    return "The server does not answer. Is it still running?";
  }
}

async function follow(response, card) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) {
      if (!card.whole) throw new Error("The answer broke off; ask again.");
      return;
    }
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") card.whole = true;
      if (!line.startsWith("data: ") || card.whole) continue;
      take(JSON.parse(line.slice(6)), card);
    }
  }
}

function take(chunk, card) {
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) {
    const { completion_tokens: tokens, latent_steps: steps, prompt_tokens: prompt } = chunk.usage;
    card.part(".counts").textContent = `${prompt} prompt tokens, ${tokens} answer tokens, ${steps} latent steps`;
  }
  for (const choice of chunk.choices) {
    if (choice.delta.content) { card.progress("answering …"); card.add(choice.delta.content); }
    if (choice.latent && choice.latent.step) card.progress(`looking again: latent step ${choice.latent.step} …`);
    if (choice.latent && choice.latent.steps !== undefined) card.looks(choice.latent);
    if (choice.finish_reason) card.progress(choice.finish_reason === "length" ? "cut at the token limit" : "");
  }
}

function busy() {
  $("stop").disabled = state.running.size === 0;
}

function keep(card) {
  state.kept = { hidden: card.hidden, question: card.question };
  $("keptof").textContent = `“${card.question}”`;
  const context = $("keptpicture").getContext("2d");
  context.clearRect(0, 0, 56, 56);
  if (card.image) context.drawImage(card.image, 0, 0, 56, 56);
  $("kept").hidden = false;
  $("usekept").checked = true;
  $("usekept").focus();
}

function submit(event) {
  event.preventDefault();
  fail("");
  const question = $("question").value.trim();
  if (!question) { fail("Type a question first."); return; }
  if (!state.model) { fail("The server has not answered yet; try again in a moment."); return; }
  const latents = state.model.latent_steps > 0;
  const mode = document.querySelector("input[name=mode]:checked").value;
  const force = $("force").checked ? { force: true } : {};
  const include = state.maps && state.url ? ["maps", "hidden"] : ["hidden"];
  const runs = [];
  if (!latents) runs.push(["Answer", {}]);
  if (latents && mode !== "on") runs.push(["Without latent steps", { off: true, ...force }]);
  if (latents && mode !== "off") {
    if (state.kept && $("usekept").checked) {
      runs.push(["With the kept latents", { use: state.kept.hidden, include, ...force }]);
      if (mode === "both") runs.push(["With its own latents", { include, ...force }]);
    } else runs.push(["With latent steps", { include, ...force }]);
  }
  runs.forEach(([title, latent]) => ask(title, question, latent));
}

// Start

async function start() {
  listenToImage();
  $("form").addEventListener("submit", submit);
  $("stop").addEventListener("click", () => state.running.forEach((aborter) => aborter.abort()));
  $("forget").addEventListener("click", () => { state.kept = null; $("kept").hidden = true; $("usekept").checked = false; });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
  $("key").addEventListener("change", about);
  await about();
}

async function about() {
  try {
    const headers = $("key").value ? { Authorization: "Bearer " + $("key").value } : {};
    const response = await fetch("/examples", { headers });
    if (!response.ok) throw new Error(await refusal(response));
    show(await response.json());
    fail("");
  } catch (error) {
    fail(error instanceof TypeError ? await silence() : error.message);
  }
}

function show({ model, maps, examples }) {
  state.model = model;
  state.maps = maps;
  const latents = model.latent_steps > 0;
  $("model").textContent = `${model.id}, stage ${model.stage}, ` + (latents ? `${model.latent_steps} latent steps` : "no latent steps");
  document.querySelectorAll("input[name=mode], #force").forEach((input) => { input.disabled = !latents; });
  $("nolatents").hidden = latents && maps;
  $("nolatents").textContent = latents ? "This server shows no looks."
    : "This checkpoint was trained without latent steps: there is nothing to switch.";
  $("examples").replaceChildren(...examples.map((example) => {
    const button = document.createElement("button");
    button.type = "button";
    const image = document.createElement("img");
    image.src = example.image;
    image.alt = "";
    button.append(image, example.title);
    button.addEventListener("click", async () => {
      await setImage(example.image, example.box);
      $("question").value = example.question;
      $("question").focus();
    });
    return button;
  }));
}

start();
