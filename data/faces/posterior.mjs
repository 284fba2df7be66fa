// Draw what may be behind a hole: one of the faces that have the same known pixels, each as often
// as make.mjs draws it. No inpainting can know more, so this says how good one can get.
//
// A line of JSON on standard input is a face and a hole: {"seed": 1000000, "size": 64, "picture":
// its pixels, "hole": a byte a pixel, 0 where it is known}, both in base64. The answer is a line of
// JSON: {"picture": the pixels} or {"error": why not}.
//
// It is Gibbs sampling over the features of a face. It starts from the face itself, which is a fair
// draw, so every later face is one. Features that the known pixels settle stay as they are.

import { createInterface } from "node:readline";
import { avatar, render, shapes, style } from "./style.mjs";

const SWEEPS = 4;
const colors = ["backgroundColor", "skinColor", "hairColor", "clothesColor"];
const always = ["clothes", "eyebrows", "eyes", "hair", "mouth"];
const sometimes = ["beard", "rearHair"]; // null is a face without

// Feature -> [value, how often make.mjs draws it], of all its values.
const features = new Map();
for (const name of colors) features.set(name, evenly(style[name], 1));
for (const name of always) features.set(name, evenly(shapes(name), 1));
for (const name of sometimes) {
  const share = style[`${name}Probability`] / 100;
  features.set(name, [...evenly(shapes(name), share), [null, 1 - share]]);
}

function evenly(values, share) {
  return values.map((value) => [value, share / values.length]);
}

// The features of a face that make.mjs draws.
function featuresOf(seed) {
  const { primaryBackgroundColor, ...extra } = avatar({ ...style, seed }).toJson().extra;
  const all = { ...extra, backgroundColor: primaryBackgroundColor };
  return Object.fromEntries([...features.keys()].map((name) => [name, plain(all[name])]));
}

function plain(value) {
  return value === undefined ? null : value.replace("#", "");
}

// The pixels of a face with these features: 3 bytes each.
function pixelsOf(face, size) {
  const options = { scale: style.scale };
  for (const [name, value] of Object.entries(face)) {
    if (value !== null) options[name] = [value];
    if (sometimes.includes(name)) options[`${name}Probability`] = value === null ? 0 : 100;
  }
  const { pixels } = render(avatar(options), size);
  return Buffer.from(pixels.filter((_, i) => i % 4 < 3));
}

// A number in [0, 1) from a state that it moves on: mulberry32, in the public domain.
function random(state) {
  state[0] += 0x6d2b79f5;
  let t = Math.imul(state[0] ^ (state[0] >>> 15), state[0] | 1);
  t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
}

function choose(chances, state) {
  let left = random(state) * chances.reduce((sum, [, chance]) => sum + chance, 0);
  return chances.find(([, chance]) => (left -= chance) < 0)?.[0] ?? chances.at(-1)[0];
}

function draw({ seed, size, picture, hole }) {
  const [wanted, hidden] = [picture, hole].map((text) => Buffer.from(text, "base64"));
  const seen = new Map();
  const fits = (face) => {
    const key = JSON.stringify(face);
    if (!seen.has(key)) {
      const found = pixelsOf(face, size);
      seen.set(key, found.every((value, i) => hidden[Math.floor(i / 3)] || value === wanted[i]));
    }
    return seen.get(key);
  };
  let face = featuresOf(String(seed));
  if (!fits(face)) return { error: `is not the face that make.mjs draws from ${seed}` };
  const fitting = (name) => features.get(name).filter(([value]) => fits({ ...face, [name]: value }));
  const open = [...features.keys()].filter((name) => fitting(name).length > 1);
  const state = new Int32Array([seed]);
  for (let sweep = 0; sweep < SWEEPS; sweep++) {
    for (const name of open) face = { ...face, [name]: choose(fitting(name), state) };
  }
  return { picture: pixelsOf(face, size).toString("base64") };
}

for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(draw(JSON.parse(line))));
}
