// A heatmap over a picture: the grid of patches is enlarged smoothly, strong patches glow, weak ones are dimmed.

// From weak to strong: red, green, blue, opacity.
const STOPS = [
  [10, 10, 30, 0.55],
  [90, 20, 110, 0.5],
  [205, 55, 75, 0.5],
  [250, 140, 10, 0.5],
  [255, 235, 130, 0.55],
];

function colour(value) {
  const position = Math.min(value, 1) * (STOPS.length - 1);
  const index = Math.min(Math.floor(position), STOPS.length - 2);
  const part = position - index;
  return STOPS[index].map((low, channel) => low + (STOPS[index + 1][channel] - low) * part);
}

// What is left of the colour for a word without heat; as in the pictures of `tercet explain`.
const THINNEST = 0.35;

// `strength`: the heat of this map beside that of the strongest, 0 to 1; weak ones are drawn thinly.
export function draw(canvas, grid, strength) {
  const rows = grid.length;
  const columns = grid[0].length;
  const strongest = Math.max(...grid.flat(), 1e-12);
  const thickness = THINNEST + (1 - THINNEST) * Math.sqrt(strength);
  const small = new OffscreenCanvas(columns, rows);
  const pen = small.getContext("2d");
  const pixels = pen.createImageData(columns, rows);
  grid.flat().forEach((value, index) => {
    const [red, green, blue, opacity] = colour(Math.max(value, 0) / strongest);
    pixels.data.set([red, green, blue, 255 * opacity * thickness], 4 * index);
  });
  pen.putImageData(pixels, 0, 0);
  const box = canvas.getBoundingClientRect();
  canvas.width = Math.round(box.width * devicePixelRatio);
  canvas.height = Math.round(box.height * devicePixelRatio);
  const brush = canvas.getContext("2d");
  brush.imageSmoothingQuality = "high";
  brush.drawImage(small, 0, 0, canvas.width, canvas.height);
}
