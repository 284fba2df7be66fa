// What the faces look like: DiceBear's style "toon-head" by Johan Melin, CC BY 4.0
// (https://creativecommons.org/licenses/by/4.0/), here with other colours and nearer.

import { createAvatar } from "@dicebear/core";
import * as toonHead from "@dicebear/toon-head";
import { Resvg } from "@resvg/resvg-js";

// Few colours, and far apart: a hole that is filled with the wrong one is seen at once.
export const style = {
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

// The shapes that the style chooses from, by feature.
export const shapes = (feature) => toonHead.schema.properties[feature].items.enum;

// The face that these options of DiceBear make.
export const avatar = (options) => createAvatar(toonHead, options);

// A face as a picture of size x size pixels.
export const render = (face, size) =>
  new Resvg(face.toString(), { fitTo: { mode: "width", value: size } }).render();
