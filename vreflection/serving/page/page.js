"use strict";
// Everything stays between this page and the server it came from.
const $ = (id) => document.getElementById(id);
// Perceived lightness rises evenly; the package's figures use the same ramp.
const RAMP = [
  [90, 32, 171], [119, 30, 170], [147, 28, 163], [175, 25, 150], [200, 22, 132], [223, 25, 109], [240, 45, 88], [249, 70, 78],
  [255, 92, 67], [255, 112, 60], [255, 132, 55], [255, 152, 53], [255, 172, 56], [255, 192, 70], [255, 211, 90], [255, 230, 114],
  [255, 247, 139],
];
const PACE = 500;  // milliseconds a look stays while they play
const EDGES = ["x0", "y0", "x1", "y1"];
// `boxes` in the order of the looks, `hop` the one that mouse and fields change. A box alone belongs to every hop.
const state = {
  image: null, url: null, boxes: [], hop: 0, kept: null, running: new Set(), cards: new Set(), model: null, maps: false, spans: 8,
};

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

// The image and its boxes

function size(canvas, image) {
  const longest = Math.max(image.naturalWidth, image.naturalHeight);
  // Small images get more pixels than they have, so that edges of tokens stay sharp.
  const scale = longest > 1024 ? 1024 / longest : Math.ceil(Math.min(640, 8 * longest) / longest) || 1;
  canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
  canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
  canvas.style.setProperty("--aspect", canvas.width / canvas.height);
}

// `thick`: for canvases that are shown small.
function outline(canvas, box, number = null, thick = 1) {
  const context = canvas.getContext("2d");
  const [x0, y0, x1, y1] = box.map((edge, i) => edge * (i % 2 ? canvas.height : canvas.width));
  const unit = thick * Math.max(1, canvas.width / 400);
  for (const [style, line] of [["#000", 5], ["#fff", 2.5]]) {
    context.strokeStyle = style;
    context.lineWidth = line * unit;
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
  }
  if (number === null) return;
  // The number stands outside the box where there is room, so that it covers nothing of it.
  const side = 22 * unit;
  const left = Math.min(Math.max(x0 - 2 * unit, 0), canvas.width - side);
  const top = y0 >= side ? y0 - side : Math.min(y1, canvas.height - side);
  context.fillStyle = "#fff";
  context.fillRect(left, top, side, side);
  context.fillStyle = "#000";
  context.font = `600 ${15 * unit}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(number, left + side / 2, top + side / 2);
}

function drawPicture() {
  const canvas = $("picture");
  const there = state.image !== null;
  for (const [id, shown] of [["picture", there], ["remove", there], ["boxfield", there], ["hint", !there]]) $(id).hidden = !shown;
  if (!there) return;
  size(canvas, state.image);
  canvas.getContext("2d").drawImage(state.image, 0, 0, canvas.width, canvas.height);
  state.boxes.forEach((box, hop) => outline(canvas, box, state.boxes.length > 1 ? hop + 1 : null));
}

function setBoxes(boxes, hop = 0) {
  state.boxes = boxes;
  state.hop = hop;
  showBoxes();
}

// The box of the chosen hop; null takes all boxes away.
function setBox(box) {
  if (!box) { setBoxes([]); return; }
  state.boxes[state.hop] = box;
  showBoxes();
}

function showBoxes() {
  const box = state.boxes[state.hop];
  EDGES.forEach((id, i) => {
    if (document.activeElement !== $(id)) $(id).value = box ? Math.round(1000 * box[i]) / 10 : "";
  });
  showHops();
  drawPicture();
  state.cards.forEach((card) => card.draw());
}

function showHops() {
  const count = state.boxes.length;
  const buttons = count > 1 || state.hop ? Array.from({ length: Math.max(count, state.hop + 1) }, (_, hop) => {
    const button = plainButton(`look ${hop + 1}`, () => setBoxes(state.boxes, hop));
    button.setAttribute("aria-pressed", hop === state.hop);
    return button;
  }) : [];
  if (count && state.hop < count && count < state.spans) {
    buttons.push(plainButton("Add the next look’s box", () => { setBoxes(state.boxes, count); $("x0").focus(); }));
  }
  // A button that is drawn anew keeps the keyboard's place.
  const focused = [...$("hops").children].indexOf(document.activeElement);
  $("hops").replaceChildren(...buttons);
  if (focused >= 0 && buttons.length) buttons[Math.min(focused, buttons.length - 1)].focus();
  $("nobox").textContent = count > 1 ? "No boxes" : "No box";
}

function plainButton(text, action) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "plain";
  button.textContent = text;
  button.addEventListener("click", action);
  return button;
}

function typedBox() {
  const values = EDGES.map((id) => ($(id).value === "" ? NaN : Number($(id).value) / 100));
  const wrong = values.some((value) => !(value >= 0 && value <= 1)) || values[0] >= values[2] || values[1] >= values[3];
  for (const id of EDGES) $(id).setAttribute("aria-invalid", wrong);
  if (!wrong) setBox(values);
}

// What the server made of a file, so that what is drawn is what the model sees: a browser turns and colours some formats
// otherwise, and shows some that the server refuses.
async function serverPicture(url) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = "Bearer " + $("key").value;
  const response = await fetch("/image", { method: "POST", headers, body: JSON.stringify({ image: url }) });
  if (!response.ok) throw new Error(await refusal(response));
  return dataAddress(await response.blob());
}

function dataAddress(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file could not be read."));
    reader.readAsDataURL(file);
  });
}

function openImage(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("The picture that the server sent could not be shown."));
    image.src = url;
  });
}

// `source`: a file or a data address.
function setImage(source, boxes = []) {
  state.loading = loadImage(source, boxes);
  return state.loading;
}

// Whether the image is shown now; it is not if the server refuses it, or another one was chosen meanwhile.
async function loadImage(source, boxes) {
  state.wanted = source;
  $("drop").setAttribute("aria-busy", true);
  try {
    const url = typeof source === "string" ? source : await dataAddress(source);
    const image = await openImage(await serverPicture(url));
    if (state.wanted !== source) return false;
    state.image = image;
    state.url = url;
    fail("");
    setBoxes(boxes);
    return true;
  } catch (error) {
    if (state.wanted === source) fail(error instanceof TypeError ? await silence() : error.message);
    return false;
  } finally {
    if (state.wanted === source || !state.wanted) {
      state.loading = null;
      $("drop").removeAttribute("aria-busy");
    }
  }
}

function readFile(file) {
  if (file) setImage(file);
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
  $("remove").addEventListener("click", () => { state.image = state.url = state.wanted = null; setBoxes([]); $("file").focus(); });
  $("nobox").addEventListener("click", () => setBox(null));
  for (const id of EDGES) $(id).addEventListener("input", typedBox);
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

// As a person reads it: what the last <answer> holds, if there is one. `open`: more may come.
function readable(text, open) {
  const tagged = [...text.matchAll(/<answer>([\s\S]*?)(?:<\/answer>|$)/g)];
  let shown = tagged.length ? tagged[tagged.length - 1][1] : text;
  if (open) shown = shown.replace(/<\/?[a-z]*$/, "");  // a tag of which the end has not come
  return shown.trim();
}

// `(spans, steps, width)` numbers as one base64 text per span.
function bySpan({ data, shape }) {
  const bytes = atob(data);
  const length = bytes.length / shape[0];
  return Array.from({ length: shape[0] }, (_, span) => (
    { data: btoa(bytes.slice(span * length, (span + 1) * length)), shape: shape.slice(1) }
  ));
}

function meanOf(maps) {
  return maps[0].map((_, i) => maps.reduce((sum, map) => sum + map[i], 0) / maps.length);
}

class Card {
  constructor(title, question, image, url) {
    this.whole = false;
    this.ended = false;
    this.element = $("card").content.firstElementChild.cloneNode(true);
    this.image = image;
    this.url = url;
    this.question = question;
    this.grid = null;
    this.steps = [];  // maps of all steps
    this.spans = [];  // the span of each step
    this.hidden = [];  // latents by span
    this.view = { hop: null, step: null };  // the mean of all where both are null
    this.timer = null;
    this.text = "";
    this.part = (name) => this.element.querySelector(name);
    this.part("h2").textContent = title;
    this.part(".asked").textContent = question;
    this.slider = this.part("input");
    this.slider.addEventListener("input", () => { this.pause(); this.goTo(Number(this.slider.value)); });
    this.part(".play").addEventListener("click", () => { if (this.timer) this.pause(); else this.play(); });
    this.part(".keep").addEventListener("click", () => keep(this));
    $("answers").prepend(this.element);
    state.cards.add(this);
  }

  progress(words) { this.part(".progress").textContent = words; }

  add(piece) {
    this.text += piece;
    this.say();
  }

  say() {
    const element = this.part(".answer");
    const before = element.textContent;
    const shown = readable(this.text, !this.ended);
    // New text nodes only, where text was added: a screen reader says what is new, not the whole answer again.
    if (shown !== before && shown.startsWith(before)) element.append(shown.slice(before.length));
    else if (shown !== before) element.textContent = shown;
    this.part(".raw").hidden = !this.ended || this.text.trim() === shown;
    this.part(".raw pre").textContent = this.text.trim();
  }

  end(reason) {
    this.ended = true;
    this.progress(reason === "length" ? "cut at the token limit" : "");
    this.say();
    if (this.grid) this.draw();
  }

  get hops() { return this.spans.length ? this.spans[this.spans.length - 1] + 1 : 0; }

  stepsOf(hop) { return this.spans.flatMap((span, step) => (span === hop ? [step] : [])); }

  // Looks and latents of the spans that have ended since the last ones.
  looks(latent) {
    if (latent.hidden) {
      this.hidden.push(...bySpan(latent.hidden));
      this.part(".keep").hidden = false;
    }
    const maps = latent.maps && latent.maps.images && latent.maps.images[0];
    if (!maps || !maps.steps.length || !this.image) {
      if (latent.maps && !this.grid) this.part(".nolooks").textContent = "This answer opened no latent span: there is no look to show.";
      return;
    }
    const first = !this.grid;
    this.grid = maps.grid;
    this.steps.push(...maps.steps);
    this.spans.push(...latent.maps.span);
    this.most = Math.max(...this.steps.map((step) => Math.max(...step)));
    this.part(".source").textContent = latent.maps.source === "student"
      ? "Attention of the student’s probes." : "Attention of the language model, mean over layers and heads.";
    this.part(".most").textContent = percent(this.most) + " per token";
    this.slider.max = this.steps.length;
    this.part("figure").hidden = false;
    this.element.classList.add("looked");
    while (this.part(".film").children.length < this.hops) this.addFrame(this.part(".film").children.length);
    this.part(".film").hidden = this.hops < 2;
    if (first) this.begin();
    this.draw();
  }

  addFrame(hop) {
    const frame = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.append(document.createElement("canvas"), document.createElement("span"));
    button.addEventListener("click", () => { this.pause(); this.choose(hop); });
    frame.append(button);
    this.part(".film").append(frame);
  }

  begin() {
    const ramp = this.part(".ramp").getContext("2d");
    for (let x = 0; x < 160; x++) {
      ramp.fillStyle = `rgb(${colour(x / 159).join(",")})`;
      ramp.fillRect(x, 0, 1, 10);
    }
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) this.play();
  }

  // From the step shown on, or from the first again; at the end it waits for looks of an answer that goes on.
  play() {
    const shown = Number(this.slider.value);
    this.goTo(shown >= this.steps.length ? 1 : Math.max(shown, 1));
    this.timer = setInterval(() => {
      const next = Number(this.slider.value) + 1;
      if (next <= this.steps.length) this.goTo(next);
      else if (this.ended) this.pause();
    }, PACE);
    this.showPlaying();
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.showPlaying();
  }

  showPlaying() { this.part(".play").textContent = this.timer ? "Pause" : "Play"; }

  // A step from 1, or 0 for the mean of all.
  goTo(place) {
    this.slider.value = place;
    this.view = place ? { hop: this.spans[place - 1], step: place - 1 } : { hop: null, step: null };
    this.draw();
  }

  choose(hop) {
    this.slider.value = this.stepsOf(hop)[0] + 1;
    this.view = { hop, step: null };
    this.draw();
  }

  share(map, box) {
    const [h, w] = this.grid;
    const [x0, y0, x1, y1] = box;
    let sum = 0;  // tokens that the box touches
    for (let row = Math.floor(y0 * h); row < Math.ceil(y1 * h); row++) {
      for (let column = Math.floor(x0 * w); column < Math.ceil(x1 * w); column++) sum += map[row * w + column];
    }
    return sum;
  }

  // The box that belongs to a hop; a box alone belongs to every hop.
  boxOf(hop) {
    if (this.url !== state.url) return null;
    return (state.boxes.length === 1 ? state.boxes[0] : state.boxes[hop]) || null;
  }

  meanOfHop(hop) { return meanOf(this.stepsOf(hop).map((step) => this.steps[step])); }

  // Name, map, and boxes with their numbers of what is shown large.
  shown() {
    const { hop, step } = this.view;
    const count = this.steps.length;
    const many = this.hops > 1;
    const numbered = state.boxes.length > 1;
    const boxes = (hop === null ? [...Array(Math.max(this.hops, 1)).keys()] : [hop])
      .filter((place) => this.boxOf(place))
      .map((place) => [this.boxOf(place), numbered ? place + 1 : null]);
    if (hop === null) return { name: "mean of all latent steps", map: meanOf(this.steps), boxes: numbered ? boxes : boxes.slice(0, 1) };
    const own = this.stepsOf(hop);
    const place = many ? `look ${hop + 1} of ${this.hops}` : "";
    if (step === null) {
      return { name: many ? `${place}, mean of its steps` : "mean of all latent steps", map: this.meanOfHop(hop), boxes };
    }
    const name = many ? `${place}, step ${own.indexOf(step) + 1} of ${own.length}` : `latent step ${step + 1} of ${count}`;
    return { name, map: this.steps[step], boxes };
  }

  inside({ map, boxes }) {
    if (!boxes.length) return "";
    if (state.boxes.length === 1) {
      const mean = this.view.hop === null ? "" : ` (mean of all steps ${percent(this.share(meanOf(this.steps), boxes[0][0]))})`;
      return `${percent(this.share(map, boxes[0][0]))} of this attention is in the box${mean}.`;
    }
    const { hop } = this.view;
    const ofHop = (number) => percent(this.share(this.meanOfHop(number), this.boxOf(number)));
    if (hop === null) return `In its own box: ${boxes.map(([, number]) => `look ${number} ${ofHop(number - 1)}`).join(", ")}.`;
    const mean = this.view.step === null ? "" : ` (mean of the look ${ofHop(hop)})`;
    return `${percent(this.share(map, boxes[0][0]))} of this attention is in box ${hop + 1}${mean}.`;
  }

  draw() {
    if (!this.grid) return;
    const shown = this.shown();
    const canvas = this.part(".look");
    this.paint(canvas, shown);
    const inside = this.inside(shown);
    this.part(".which").textContent = shown.name;
    this.part(".inside").textContent = inside;
    this.slider.setAttribute("aria-valuetext", shown.name);
    canvas.setAttribute("aria-label", `Attention at ${shown.name}. ${inside}`);
    if (this.hops > 1) [...this.part(".film").children].forEach((frame, hop) => this.drawFrame(frame.firstChild, hop));
  }

  drawFrame(button, hop) {
    const [canvas, caption] = button.children;
    const box = this.boxOf(hop);
    const map = this.meanOfHop(hop);
    const boxes = box ? [[box, state.boxes.length > 1 ? hop + 1 : null]] : [];
    const key = JSON.stringify([boxes, this.most, map.length]);
    if (button.dataset.drawn !== key) this.paint(canvas, { map, boxes }, 2.2);
    button.dataset.drawn = key;
    canvas.setAttribute("aria-hidden", "true");
    caption.textContent = `look ${hop + 1}` + (box ? `\n${percent(this.share(map, box))} in its box` : "");
    button.setAttribute("aria-pressed", this.view.hop === hop);
  }

  paint(canvas, { map, boxes }, thick = 1) {
    size(canvas, this.image);
    const context = canvas.getContext("2d");
    const [h, w] = this.grid;
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
    boxes.forEach(([box, number]) => outline(canvas, box, number, thick));
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
    card.end("");
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
    const latent = choice.latent;
    if (choice.delta.content) { card.progress("answering …"); card.add(choice.delta.content); }
    if (latent && latent.step) card.progress(`looking again: look ${latent.span + 1}, step ${latent.span_step} …`);
    if (latent && latent.steps !== undefined) card.looks(latent);
    if (choice.finish_reason) card.end(choice.finish_reason);
  }
}

function busy() {
  $("stop").disabled = state.running.size === 0;
}

function keep(card) {
  state.kept = { spans: card.hidden, question: card.question };
  const hops = card.hidden.map((_, hop) => new Option(`look ${hop + 1}`, hop));
  $("kepthop").replaceChildren(new Option("all looks", "all", true, true), ...hops);
  $("keptline").hidden = hops.length < 2;
  $("keptof").textContent = `“${card.question}”`;
  const context = $("keptpicture").getContext("2d");
  context.clearRect(0, 0, 56, 56);
  if (card.image) context.drawImage(card.image, 0, 0, 56, 56);
  $("kept").hidden = false;
  $("usekept").checked = true;
  $("usekept").focus();
}

// All hops' latents, or those of one hop alone: the model makes the others itself.
function keptLatents() {
  const hop = $("kepthop").value;
  if (hop === "all") return state.kept.spans;
  return Array.from({ length: state.spans }, (_, place) => (place === Number(hop) ? state.kept.spans[place] : null));
}

async function submit(event) {
  event.preventDefault();
  fail("");
  // A question asked while its image is on the way belongs to that image, and waits; if it is refused, nothing is asked.
  let ready = true;
  while (state.loading) ready = await state.loading;
  if (!ready && state.wanted) return;
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
      runs.push(["With the kept latents", { use: keptLatents(), include, ...force }]);
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

function show({ model, maps, spans, examples }) {
  Object.assign(state, { model, maps, spans });
  const latents = model.latent_steps > 0;
  $("tokens").max = model.max_tokens;
  $("tokens").value = Math.min($("tokens").value, model.max_tokens);
  $("model").textContent = `${model.id}, stage ${model.stage}, ` + (latents ? `${model.latent_steps} latent steps per span` : "no latent steps");
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
      await setImage(example.image, [...example.boxes]);
      $("question").value = example.question;
      $("question").focus();
    });
    return button;
  }));
}

start();
