// Draw faces, each from its number alone:
//   npm install && node make.mjs --out train
//   node make.mjs --out val --start 1000000 --count 300

import { mkdirSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { avatar, render, style } from "./style.mjs";

const { values } = parseArgs({
  options: {
    out: { type: "string", default: "train" },
    start: { type: "string", default: "0" },
    count: { type: "string", default: "20000" },
    size: { type: "string", default: "64" },
  },
});
const [start, count, size] = [["start", 0], ["count", 1], ["size", 1]].map(([key, lowest]) => {
  const number = /^\d+$/.test(values[key]) ? Number(values[key]) : NaN;
  if (Number.isSafeInteger(number) && number >= lowest) return number;
  const found = JSON.stringify(values[key]);
  console.error(`error: --${key}: expected a whole number, at least ${lowest}, found ${found}`);
  process.exit(2);
});

mkdirSync(values.out, { recursive: true });
for (let seed = start; seed < start + count; seed++) {
  const path = join(values.out, `${String(seed).padStart(7, "0")}.png`);
  const png = render(avatar({ ...style, seed: String(seed) }), size).asPng();
  // Under its own name a picture is whole, even if this is stopped halfway.
  writeFileSync(`${path}.part`, png);
  renameSync(`${path}.part`, path);
}
