// What a report does beyond showing itself: dividers, sorting, filtering, numbers of curves, objects.

const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// -- curves: numbers at the pointer, or at the place that the arrow keys choose

for (const figure of all("figure.curves")) {
  const svg = figure.querySelector("svg");
  if (!svg) continue;
  const output = figure.querySelector("output");
  const cursor = svg.querySelector(".cursor");
  const points = all(".point", svg);
  const places = [...new Set(points.map((point) => Number(point.dataset.at)))].sort((a, b) => a - b);
  let place = -1;
  const choose = (index) => {
    place = Math.max(0, Math.min(places.length - 1, index));
    const at = places[place];
    const chosen = points.filter((point) => Number(point.dataset.at) === at);
    cursor.setAttribute("transform", `translate(${at} 0)`);
    cursor.setAttribute("visibility", "visible");
    output.textContent = chosen.map((point) => point.querySelector("title").textContent).join("; ");
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    choose(places.reduce((best, at, i) => (Math.abs(at - x) < Math.abs(places[best] - x) ? i : best), 0));
  });
  figure.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.target !== figure) return;
    event.preventDefault();
    choose(place + step);
  });
}

// -- gallery

const gallery = document.querySelector("#cards");
if (gallery) {
  const cards = all(".card", gallery);
  const divide = (box, percent) => box.style.setProperty("--at", `${percent}%`);
  for (const card of cards) {
    const slider = card.querySelector("input[type=range]");
    slider?.addEventListener("input", () => divide(card, slider.value));
  }
  document.querySelector("#divide-all").addEventListener("input", (event) => {
    for (const card of cards) {
      divide(card, event.target.value);
      const slider = card.querySelector("input[type=range]");
      if (slider) slider.value = event.target.value;
    }
  });
  const orders = {
    index: (a, b) => a.dataset.index - b.dataset.index,
    worst: (a, b) => a.dataset.gain - b.dataset.gain,
    best: (a, b) => b.dataset.gain - a.dataset.gain,
    after: (a, b) => a.dataset.after - b.dataset.after,
  };
  const order = document.querySelector("#order");
  order.addEventListener("change", () => gallery.append(...cards.sort(orders[order.value])));
  const filter = document.querySelector("#filter");
  const count = document.querySelector("#count");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const card of cards) card.hidden = !words.every((word) => card.dataset.caption.toLowerCase().includes(word));
    count.textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length} captions`;
  });
}

// -- samples over time: pictures that the gallery has already are not in the file twice

for (const picture of all("img[data-same]")) picture.src = document.getElementById(picture.dataset.same).src;

for (const button of all("button[data-reveals]")) {
  button.addEventListener("click", () => {
    for (const row of all(button.dataset.reveals)) row.hidden = false;
    button.remove();
  });
}

// -- configuration

document.querySelector("#all-keys")?.addEventListener("change", (event) => {
  for (const row of all("#configuration tr.same")) row.hidden = !event.target.checked;
});

// -- objects

const dialog = document.querySelector("dialog");
if (dialog) {
  const cameras = JSON.parse(document.querySelector("#cameras").textContent);
  let close = () => {};
  dialog.addEventListener("close", () => close());
  for (const button of all("button[data-scenes]")) {
    button.addEventListener("click", async () => {
      const card = button.closest(".card");
      dialog.querySelector("h2").textContent = card.querySelector("h3").textContent;
      dialog.showModal();
      const scenes = JSON.parse(button.dataset.scenes);
      const remove = await show(dialog, scenes, cameras);
      // what was painted, over what the object looks like from there, beneath it
      const pictures = all(".compare img", card);
      all(".pane", dialog).forEach((pane, i) => pictures[i] && pane.append(pictures[i].cloneNode()));
      close = remove;
      if (!dialog.open) remove();
    });
  }
}
