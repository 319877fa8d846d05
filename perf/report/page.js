// Draws each chart when it comes near the window. Colours are CSS variables, so that the page
// turns from light to dark without drawing anything anew.
const charts = JSON.parse(document.getElementById("charts").textContent);

function draw(place) {
  observer.unobserve(place);
  vegaEmbed(place, charts[place.dataset.chart], { actions: false, renderer: "svg", ast: true })
    .then(() => { place.style.minHeight = ""; })
    .catch((error) => { place.textContent = `This chart could not be drawn: ${error.message}`; });
}

const observer = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
  { rootMargin: "800px" },
);
const places = document.querySelectorAll("[data-chart]");
places.forEach((place) => observer.observe(place));
window.addEventListener("beforeprint", () => places.forEach((place) => place.firstChild || draw(place)));
