// Draw faces, each from its number alone:
//   npm install && node make.mjs --out train
//   node make.mjs --out val --start 1000000 --count 300
// They are in DiceBear's style "toon-head" by Johan Melin, CC BY 4.0
// (https://creativecommons.org/licenses/by/4.0/), here with other colours and nearer.

import { mkdirSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { createAvatar } from "@dicebear/core";
import * as toonHead from "@dicebear/toon-head";
import { Resvg } from "@resvg/resvg-js";

// Few colours, and far apart: a hole that is filled with the wrong one is seen at once.
const style = {
  backgroundColor: [
    ...["b6e3f4", "c0aede", "d1d4f9", "ffd5dc", "ffdfbf", "c8e6c9", "fff3b0", "f8c8dc"],
    ...["cdeac0", "bde0fe", "e2c6ff", "ffc8a2", "b5ead7", "e8e4d9", "ffb7b2", "d6dce4"],
  ],
  skinColor: ["f1c3a5", "d9a07c", "a36b4f", "7a4a35"],
  hairColor: ["2c1b18", "5a3020", "c1571f", "e0b75e", "d9d4ce"],
  clothesColor: ["545454", "b11f1f", "0b3286", "147f3c", "eab308", "731ac3", "f97316", "e8e9e6"],
  // Larger than drawn, so that eyes and mouth have some pixels each.
  scale: 115,
  beardProbability: 30,
  rearHairProbability: 40,
};

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
  const svg = createAvatar(toonHead, { ...style, seed: String(seed) }).toString();
  const png = new Resvg(svg, { fitTo: { mode: "width", value: size } }).render().asPng();
  // Under its own name a picture is whole, even if this is stopped halfway.
  writeFileSync(`${path}.part`, png);
  renameSync(`${path}.part`, path);
}
