// The editor: a picture to paint a hole on, and the results that take its place. Gradio calls this
// with element, props, trigger, upload and watch. Python gets props.value: {path}, {example} or
// {result} to choose a picture, {strokes} to run; it answers {picture}, {error} or {before, results}.
const words = props.words[navigator.language.toLowerCase().startsWith("zh") ? 1 : 0];
const all = (selector) => [...element.querySelectorAll(selector)];
const [view, sheet, canvas, ring, drop, message] =
  [".view", ".sheet", "canvas", ".ring", ".drop", ".message"].map((name) => all(name)[0]);
const [before, after] = all(".sheet img");
const [sizeSlider, compareSlider] = all("input[type=range]");
const pen = canvas.getContext("2d");
const fingers = new Map(); // pointers that are down, by id
let mode = "empty"; // then paint, results
let picture = null; // URL of what is painted on
let strokes = [], undone = [], eraser = false, space = false;
let left = 0, top = 0, zoom = 1; // of the sheet in the view

for (const button of all("[data-do]")) button.textContent = words[button.dataset.do];
all(".drop span")[0].textContent = words.drop;
[words.size, words.compare].forEach((word, i) => (all(".size span")[i].textContent = word));

// ---- Sheet and view ----
function place() {
  sheet.style.transform = `translate(${left}px, ${top}px) scale(${zoom})`;
}
function fit() {
  const wide = view.clientWidth, shape = canvas.height / canvas.width;
  view.style.height = mode === "empty" ? "" : `${Math.min(wide * shape, 0.6 * window.innerHeight)}px`;
  zoom = Math.min(wide / canvas.width, view.clientHeight / canvas.height);
  left = (wide - canvas.width * zoom) / 2;
  top = (view.clientHeight - canvas.height * zoom) / 2;
  place();
}
function zoomAt(x, y, factor) {
  const fitting = Math.min(view.clientWidth / canvas.width, view.clientHeight / canvas.height);
  if (zoom * factor <= fitting) return fit();
  factor = Math.min(factor, (40 * fitting) / zoom);
  [left, top, zoom] = [x - (x - left) * factor, y - (y - top) * factor, zoom * factor];
  place();
}
function spot(event) { // in pixels of the view
  const box = view.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}
function brush() { // width in pixels of the canvas: 1/200 to 1/4 of the shorter side
  return 0.005 * 50 ** (sizeSlider.value / 100) * Math.min(canvas.width, canvas.height);
}
function showRing(x, y) {
  const isShown = mode === "paint" && fingers.size < 2;
  Object.assign(ring.style, { left: `${x}px`, top: `${y}px`, width: `${brush() * zoom}px`,
    height: `${brush() * zoom}px`, visibility: isShown ? "visible" : "hidden" });
}

// ---- Painting ----
function draw(stroke, from = 0) {
  pen.globalCompositeOperation = stroke.eraser ? "destination-out" : "source-over";
  Object.assign(pen, { lineWidth: stroke.width, lineCap: "round", lineJoin: "round",
    strokeStyle: "#ff2d55" });
  pen.beginPath();
  stroke.points.slice(from).forEach(([x, y]) => pen.lineTo(x, y));
  pen.lineTo(...stroke.points.at(-1)); // a dot, where there is one point
  pen.stroke();
}
function redraw() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  strokes.forEach((stroke) => draw(stroke));
}
function hand() { // to Python, what is painted now
  props.value = { strokes: strokes.length ? canvas.toDataURL() : null };
}
function change() {
  redraw();
  hand();
}
const actions = {
  brush: () => (eraser = false),
  eraser: () => (eraser = true),
  undo: () => { if (strokes.length) undone.push(strokes.pop()); change(); },
  redo: () => { if (undone.length) strokes.push(undone.pop()); change(); },
  clear: () => { strokes = []; change(); },
  other: () => all(".drop input")[0].click(),
  back: () => show("paint"),
  go_on: () => choose({ result: all(".results img").findIndex((img) => img.matches(".on")) }),
  hold: () => {},
};
function mark() {
  all("[data-do=brush]")[0].classList.toggle("on", !eraser);
  all("[data-do=eraser]")[0].classList.toggle("on", eraser);
}
for (const button of all("[data-do]"))
  button.onclick = () => { actions[button.dataset.do](); mark(); };

view.onpointerdown = (event) => {
  if (mode === "empty") return;
  event.preventDefault();
  view.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, spot(event));
  const [x, y] = spot(event);
  if (mode === "results") hold(fingers.size === 1);
  else if (fingers.size > 1 && view.stroke) {
    view.stroke = null; // two fingers zoom: the first one did not mean to paint
    strokes.pop();
    redraw();
  } else if (fingers.size === 1 && event.button === 0 && !space) {
    undone = [];
    view.stroke = { eraser, width: brush(), points: [[(x - left) / zoom, (y - top) / zoom]] };
    strokes.push(view.stroke);
    draw(view.stroke);
  }
};
view.onpointermove = (event) => {
  const [x, y] = spot(event);
  showRing(x, y);
  const earlier = fingers.get(event.pointerId);
  if (!earlier) return;
  if (view.stroke) {
    for (const each of event.getCoalescedEvents?.() ?? [event]) {
      const [x, y] = spot(each);
      view.stroke.points.push([(x - left) / zoom, (y - top) / zoom]);
    }
    redraw();
  } else if (mode !== "results" || fingers.size > 1) {
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    const share = other ? 0.5 : 1; // with two fingers, each moves the middle by half
    left += (x - earlier[0]) * share;
    top += (y - earlier[1]) * share;
    const reach = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]);
    if (other) zoomAt((x + other[0]) / 2, (y + other[1]) / 2, reach([x, y]) / reach(earlier));
    else place();
  }
  fingers.set(event.pointerId, [x, y]);
};
view.onpointerup = view.onpointercancel = (event) => {
  fingers.delete(event.pointerId);
  if (view.stroke) hand();
  view.stroke = null;
  hold(false);
};
view.onpointerleave = () => (ring.style.visibility = "hidden");
view.addEventListener("wheel", (event) => {
  if (mode === "empty") return;
  event.preventDefault();
  zoomAt(...spot(event), 1.0015 ** -event.deltaY);
}, { passive: false });
new ResizeObserver(() => view.clientWidth && fit()).observe(element);
const isTyping = () => document.activeElement?.matches("input:not([type=range]), textarea");
document.addEventListener("keydown", (event) => {
  if (mode !== "paint" || isTyping()) return;
  if (event.code === "Space") space = true;
  else if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z")
    actions[event.shiftKey ? "redo" : "undo"]();
  else return;
  event.preventDefault();
});
document.addEventListener("keyup", (event) => { if (event.code === "Space") space = false; });

// ---- Results ----
function hold(isHeld) {
  after.style.visibility = mode === "results" && !isHeld ? "visible" : "hidden";
}
compareSlider.oninput = () => (after.style.clipPath = `inset(0 0 0 ${compareSlider.value}%)`);
const holder = all("[data-do=hold]")[0];
holder.onpointerdown = () => hold(true);
holder.onpointerup = holder.onpointerleave = holder.onpointercancel = () => hold(false);
function pick(image) {
  all(".results img").forEach((each) => each.classList.toggle("on", each === image));
  after.src = image.src;
}

// ---- Pictures ----
async function show(newMode, url = picture) {
  before.src = url;
  await before.decode();
  mode = newMode;
  const side = Math.max(before.naturalWidth, before.naturalHeight);
  const scale = Math.max(1, Math.ceil(512 / side)); // strokes on a small picture are fine ones
  const size = [before.naturalWidth * scale, before.naturalHeight * scale];
  if (mode === "paint" && url !== picture) strokes = [];
  if (mode === "paint") picture = url;
  if (String(size) !== String([canvas.width, canvas.height])) [canvas.width, canvas.height] = size;
  Object.assign(sheet.style, { width: `${size[0]}px`, height: `${size[1]}px`, visibility: "visible" });
  sheet.classList.toggle("small", scale > 1);
  canvas.style.visibility = mode === "paint" ? "visible" : "hidden";
  drop.style.display = "none";
  all(".examples")[0].style.display = "none";
  all(".paint")[0].style.display = mode === "paint" ? "flex" : "none";
  all(".shown")[0].style.display = mode === "results" ? "flex" : "none";
  hold(false);
  fit();
  if (mode === "paint") change();
  say(mode === "paint" ? words.rule : "");
}
function say(text, isError = false) {
  message.textContent = text;
  message.classList.toggle("error", isError);
}
function fill(text, file) {
  const size = (file.size / 1e6).toFixed(1);
  return text.replace("{name}", file.name).replace("{size}", size).replace("{most}", props.most_mb);
}
function choose(value) {
  say(words.reading);
  props.value = value;
  trigger("chosen");
}
async function send(file) {
  if (!file) return;
  if (file.size > props.most_mb * 2 ** 20) return say(fill(words.too_large, file), true);
  say(fill(words.uploading, file));
  try {
    choose({ path: (await upload(file)).path });
  } catch {
    say(fill(words.failed, file), true);
  }
}
all(".drop input")[0].onchange = (event) => {
  send(event.target.files[0]);
  event.target.value = ""; // the same file may be chosen again
};
element.ondragover = (event) => event.preventDefault();
element.ondrop = (event) => { event.preventDefault(); send(event.dataTransfer.files[0]); };
document.addEventListener("paste", (event) => { if (!isTyping()) send(event.clipboardData.files[0]); });
props.examples.forEach((url, number) => {
  const image = Object.assign(new Image(), { src: url, alt: `${number + 1}` });
  image.onclick = () => choose({ example: number });
  if (!number) all(".examples")[0].append(words.examples);
  all(".examples")[0].append(image);
});

watch("value", () => {
  const value = props.value ?? {};
  if (value.error) {
    say(value.error, true);
    hand();
  } else if (value.picture) {
    sizeSlider.value = 48.5; // a thirtieth of the shorter side
    eraser = false;
    mark();
    show("paint", value.picture);
  } else if (value.results) {
    const images = value.results.map((src) => Object.assign(new Image(), { src }));
    images.forEach((image) => (image.onclick = () => pick(image)));
    all(".results")[0].replaceChildren(...(images.length > 1 ? images : []));
    compareSlider.value = 0;
    compareSlider.oninput();
    pick(images[0]);
    show("results", value.before);
    hand();
  }
});
