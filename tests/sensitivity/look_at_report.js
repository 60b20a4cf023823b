// Notes in `outcome` how a report stands, and writes it where it can be read back.

const edge = document.documentElement.getBoundingClientRect().right + 1;
const counts = one => !one.closest(".scroll") && (!one.closest("svg") || one.matches(".main-svg"));
const cut = text => {
  const inner = text.getBoundingClientRect(), outer = text.closest(".main-svg").getBoundingClientRect();
  const across = inner.left < outer.left - 1 || inner.right > outer.right + 1;
  return inner.width && (across || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1);
};
outcome.images = document.images.length;
outcome.title = document.title;
outcome.sticksOut = [...document.body.querySelectorAll("*")]
  .filter(one => counts(one) && one.getBoundingClientRect().right > edge)
  .map(one => `${one.tagName} ${one.id} ${one.className}`);
outcome.cutLabels = [...document.querySelectorAll(".main-svg text")].filter(cut).map(text => text.textContent);
// Plotly finishes some of its work later: what it complains of then is counted too.
setTimeout(() => at("outcome").textContent = JSON.stringify({ ...outcome, problems }), 1000);
