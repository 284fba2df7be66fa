// The editor: a picture to paint a hole on, and the results that take its place. Gradio calls this
// with element, props, trigger, upload and watch. Python gets props.value: {path}, {example} or
// {result} to choose a picture, {strokes} to run; it answers {picture}, {error} or {before, results}.
const language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const words = Object.fromEntries(
  Object.entries(props.words).map(([key, both]) => [key, both[language]]));
const all = (selector) => [...element.querySelectorAll(selector)];
const [view, sheet, canvas, ring, drop, message, samples, examples] = [".view", ".sheet", "canvas",
  ".ring", ".drop", ".message", ".samples", ".examples"].map((name) => all(name)[0]);
const [before, after] = all(".sheet img");
const [size, compare] = all("[type=range]");
const [brush, eraser] = all("[data-do]");
const file = all("[type=file]")[0];
const pen = canvas.getContext("2d");
const fingers = new Map(); // places of the pointers that are down, by id
let mode = "empty"; // then paint, results
let picture = null; // URL of what is painted on
let choices = 0; // the last one counts, and not an upload that ends after it
let strokes = [], undone = [], stroke = null;
let [wide, high, left, top, zoom, fitting] = [1, 1, 0, 0, 1, 1]; // the sheet and its place

all("[data-do]").forEach((button) => (button.textContent = words[button.dataset.do]));
all("label span").forEach((span, i) => (span.textContent = [words.drop, words.size, words.compare][i]));

// ---- Sheet and view ----
function zoomAt(x, y, factor) { // and never smaller than the view
  factor = Math.min(Math.max(factor, fitting / zoom), (40 * fitting) / zoom);
  [left, top, zoom] = [x - (x - left) * factor, y - (y - top) * factor, zoom * factor];
  if (zoom <= fitting) {
    left = (view.clientWidth - wide * zoom) / 2;
    top = (view.clientHeight - high * zoom) / 2;
  }
  sheet.style.transform = `translate(${left}px, ${top}px) scale(${zoom})`;
}
function fit() {
  if (mode === "empty") return;
  const height = Math.min((view.clientWidth * high) / wide, 0.6 * window.innerHeight);
  view.style.height = `${height}px`;
  fitting = Math.min(view.clientWidth / wide, view.clientHeight / high);
  zoomAt(0, 0, 0);
}
function placeOf(event) { // in pixels of the view
  const box = view.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}
function brushWidth() { // in pixels of the canvas: 1/200 to 1/4 of the shorter side
  return 0.005 * 50 ** (size.value / 100) * Math.min(wide, high);
}

// ---- Painting ----
function redraw() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  Object.assign(pen, { lineCap: "round", lineJoin: "round", strokeStyle: "#ff2d55" });
  for (const { clears, erases, width, points } of strokes) {
    if (clears) {
      pen.clearRect(0, 0, canvas.width, canvas.height);
      continue;
    }
    pen.globalCompositeOperation = erases ? "destination-out" : "source-over";
    pen.lineWidth = width;
    pen.beginPath();
    const [x0, y0] = points[0];
    for (const [x, y] of [[x0 + 0.01, y0], ...points]) pen.lineTo(x, y); // one point is a dot
    pen.stroke();
  }
}
function hand() { // to Python, what is painted now
  redraw();
  props.value = { strokes: strokes.length ? canvas.toDataURL() : null };
}
function take(tool) {
  [brush, eraser].forEach((button) => button.classList.toggle("on", button === tool));
}
const actions = {
  brush: () => take(brush),
  eraser: () => take(eraser),
  undo: () => { undone.push(...strokes.splice(-1)); hand(); },
  redo: () => { strokes.push(...undone.splice(-1)); hand(); },
  clear: () => { strokes.push({ clears: true }); undone = []; hand(); },
  other: () => file.click(),
  back: () => show("paint", picture),
  go_on: () => choose({ result: all(".samples img").findIndex((image) => image.matches(".on")) }),
};
element.onclick = ({ target }) => actions[target.dataset.do]?.();
view.onpointerdown = (event) => {
  if (mode === "empty") return;
  view.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, placeOf(event));
  if (stroke) strokes.pop(); // two fingers zoom: the first one did not mean to paint
  stroke = null;
  if (mode === "paint" && fingers.size === 1 && event.button === 0) {
    stroke = { erases: eraser.matches(".on"), width: brushWidth(), points: [] };
    strokes.push(stroke);
    view.onpointermove(event);
  }
};
view.onpointermove = (event) => {
  const [x, y] = placeOf(event);
  const width = `${brushWidth() * zoom}px`;
  const visibility = mode === "paint" && fingers.size < 2 ? "visible" : "hidden";
  Object.assign(ring.style, { left: `${x}px`, top: `${y}px`, width, height: width, visibility });
  const earlier = fingers.get(event.pointerId);
  if (!earlier) return;
  fingers.set(event.pointerId, [x, y]);
  if (stroke) {
    for (const each of event.getCoalescedEvents().concat(event)) {
      const [x, y] = placeOf(each);
      stroke.points.push([(x - left) / zoom, (y - top) / zoom]);
    }
    redraw();
    return;
  }
  const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1] ?? [x, y];
  const isPair = fingers.size > 1; // each finger moves the middle by half
  left += (x - earlier[0]) * (isPair ? 0.5 : 1);
  top += (y - earlier[1]) * (isPair ? 0.5 : 1);
  const reach = ([a, b]) => Math.hypot(a - other[0], b - other[1]);
  zoomAt((x + other[0]) / 2, (y + other[1]) / 2, isPair ? reach([x, y]) / reach(earlier) : 1);
};
view.onpointerup = view.onpointercancel = (event) => {
  fingers.delete(event.pointerId);
  if (!stroke) return;
  [stroke, undone] = [null, []];
  hand();
  trigger("painted");
};
view.onpointerleave = () => (ring.style.visibility = "hidden");
view.addEventListener("wheel", (event) => {
  if (mode === "empty") return;
  event.preventDefault();
  zoomAt(...placeOf(event), 1.0015 ** -event.deltaY);
}, { passive: false });
new ResizeObserver(fit).observe(element);
const isTyping = () => document.activeElement.matches("input:not([type=range]), textarea");
document.addEventListener("keydown", (event) => {
  if (mode !== "paint" || isTyping() || !(event.ctrlKey || event.metaKey)) return;
  const key = event.key.toLowerCase();
  if (key !== "z" && key !== "y") return;
  event.preventDefault();
  actions[event.shiftKey || key === "y" ? "redo" : "undo"]();
});

// ---- Results ----
function pick(image) {
  [...samples.children].forEach((each) => each.classList.toggle("on", each === image));
  after.src = image.src;
}
compare.oninput = () => (after.style.clipPath = `inset(0 0 0 ${compare.value}%)`);
element.addEventListener("pointerdown", ({ target }) => {
  if (target.dataset.do === "hold") after.style.visibility = "hidden";
});
document.addEventListener("pointerup", () => (after.style.visibility = ""));

// ---- Pictures ----
async function show(newMode, url) {
  before.src = url;
  await before.decode();
  mode = newMode;
  const { naturalWidth, naturalHeight } = before;
  const scale = Math.ceil(512 / Math.max(naturalWidth, naturalHeight)); // for fine strokes
  [wide, high] = [naturalWidth * scale, naturalHeight * scale];
  Object.assign(sheet.style, { width: `${wide}px`, height: `${high}px`, visibility: "inherit" });
  sheet.classList.toggle("small", scale > 1);
  drop.style.display = examples.style.display = "none";
  for (const name of ["paint", "results"])
    all(`.${name}`)[0].style.display = mode === name ? "flex" : "none";
  after.style.display = mode === "results" ? "" : "none";
  canvas.style.display = mode === "paint" ? "" : "none";
  fit();
  if (mode === "paint" && url !== picture) {
    [canvas.width, canvas.height] = [wide, high];
    [strokes, undone, picture] = [[], [], url];
  }
  hand();
  say(mode === "paint" ? words.rule : "");
}
function say(text, isError = false) {
  message.textContent = text;
  message.classList.toggle("error", isError);
}
function choose(value) {
  choices += 1;
  say(words.reading);
  props.value = value;
  trigger("chosen");
}
async function send(file) {
  if (!file) return;
  const told = { name: file.name, size: (file.size / 1e6).toFixed(1), most: props.most_mb };
  const fill = (text) => text.replace(/{(\w+)}/g, (_, key) => told[key]);
  if (file.size > props.most_mb * 1e6) return say(fill(words.too_large), true);
  say(fill(words.uploading));
  const own = (choices += 1);
  try {
    const { path } = await upload(file);
    if (own === choices) choose({ path });
  } catch {
    if (own === choices) say(fill(words.failed), true);
  }
}
file.onchange = () => send(file.files[0]).then(() => (file.value = "")); // the same may come again
element.ondragover = (event) => event.preventDefault();
element.ondrop = (event) => { event.preventDefault(); send(event.dataTransfer.files[0]); };
document.addEventListener("paste", (event) => isTyping() || send(event.clipboardData.files[0]));
props.examples.forEach((src, number) => {
  if (!number) examples.append(words.examples);
  const onclick = () => choose({ example: number });
  examples.append(Object.assign(new Image(), { src, onclick, alt: number }));
});

watch("value", () => {
  const value = props.value ?? {};
  if (value.error) {
    say(value.error, true);
    hand();
  } else if (value.picture) {
    size.value = 48.5; // a thirtieth of the shorter side
    take(brush);
    show("paint", value.picture);
  } else if (value.results) {
    const images = value.results.map((src) => Object.assign(new Image(), { src }));
    images.forEach((image) => (image.onclick = () => pick(image)));
    samples.replaceChildren(...images);
    compare.value = 0;
    compare.oninput();
    pick(images[0]);
    show("results", value.before);
  }
});
