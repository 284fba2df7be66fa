// Draw faces, each from its number alone:
//   npm install && node make.mjs --out train
//   node make.mjs --out val --start 1000000 --count 300

import { mkdirSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { avatar, render, style } from "./style.mjs";

const defaults = { out: "train", start: "0", count: "20000", size: "64" };
const options = Object.fromEntries(
  Object.entries(defaults).map(([key, value]) => [key, { type: "string", default: value }]),
);
const { values } = parsed(options);
const [start, count, size] = [["start", 0], ["count", 1], ["size", 1]].map(([key, lowest]) => {
  const number = /^\d+$/.test(values[key]) ? Number(values[key]) : NaN;
  if (Number.isSafeInteger(number) && number >= lowest) return number;
  const found = JSON.stringify(values[key]);
  return refuse(`--${key}: expected a whole number, at least ${lowest}, found ${found}`);
});

function parsed(options) {
  try {
    return parseArgs({ options });
  } catch (error) {
    return refuse(error.message);
  }
}

function refuse(problem) {
  console.error(`error: ${problem}`);
  process.exit(2);
}

mkdirSync(values.out, { recursive: true });
for (let seed = start; seed < start + count; seed++) {
  const path = join(values.out, `${String(seed).padStart(7, "0")}.png`);
  const png = render(avatar({ ...style, seed: String(seed) }), size).asPng();
  // Under its own name a picture is whole, even if this is stopped halfway.
  writeFileSync(`${path}.part`, png);
  renameSync(`${path}.part`, path);
}
